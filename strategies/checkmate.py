"""The best plan that recomputes and never swaps, as Checkmate (Jain et al., MLSys 2020) finds it: a baseline.

Checkmate decides for each pair of ops whether one is repeated right before the other: too many decisions for steps of
thousands of nodes. Here the program of `relaxation`, over a link that carries nothing, is solved in whole numbers: a
storage is dropped over a stretch of a gap or stays, a node is repeated in a bucket or not. Small storages stay out of
it, and as in Checkmate the order is fixed.

What is exact: the program's optimum, which the solver proves to `_GAP` of what is added to the step. As the program
bounds every plan, no plan in this order that only recomputes is faster. Where the simulator finds that the optimum,
carried out, keeps the budget in that time, it is the best plan.

What is not: what a chain of repeats holds between two checks is not in the program. Where a solution overflows by
that, smaller budgets are asked for until there is a plan, and then, as long as there is time, solutions are excluded
one by one, at most `_EXCLUSIONS`. On steps whose storages are large beside the budget neither may get far: the plan may
be much slower than the program's optimum, or none may be found though there is one.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Mapping

import numpy as np

from graphswap import bound, ir
from graphswap.cost_model import NO_LINK, CostModel
from graphswap.plan import Decision, Plan, Recompute
from graphswap.strategies import base, fitting, gaps, relaxation, solver

_GAP = 1e-4
_TIGHTENINGS = 8
_LEAST_TIGHTENING = 0.005
_EXCLUSIONS = 50
"""For all attempts together."""
_SEARCHING = 0.75
"""Of the planning time; what is left is for the smallest peak, where nothing fits."""


@dataclasses.dataclass(frozen=True)
class Checkmate:
    """See the module's text.

    Attributes:
        planning_seconds: When to stop.
    """

    planning_seconds: float = 60.0

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        """Implements `Strategy.plan`."""
        problem = gaps.problem(graph, _without_swaps(cost_model))
        search = _Search(problem, self.planning_seconds)
        try:
            return fitting.fit(problem, [search.attempt], memory_budget, "checkmate", actions=("recompute",))
        except base.InfeasibleBudgetError as error:
            raise base.InfeasibleBudgetError(
                memory_budget,
                error.smallest_bytes,
                error.node,
                error.bound_bytes,
                self.planning_seconds if search.is_cut_off else None,
            ) from None


@functools.lru_cache(maxsize=4)
def _without_swaps(cost_model: CostModel) -> CostModel:
    """The costs where swaps go nowhere. Variables in far tiers are still fetched from there."""
    device = dataclasses.replace(cost_model.device, links={**cost_model.device.links, "nowhere": NO_LINK})
    return dataclasses.replace(cost_model, device=device, far_tier="nowhere")


class _Search:
    """The state of one call of `plan`.

    Attributes:
        bound_seconds: No plan that recomputes only keeps the first target in less; None if nothing was solved.
        is_cut_off: Whether time ran out before the solver came to an end.
    """

    def __init__(self, problem: gaps.Gaps, seconds: float):
        self._problem = problem
        self._end = time.monotonic() + seconds
        self._deadline = self._end - (1.0 - _SEARCHING) * seconds
        self._exclusions = iter(range(_EXCLUSIONS))
        self._seen = [fitting.evictions(problem, {})]
        self.bound_seconds: float | None = None
        self.is_cut_off = False

    def attempt(self, target: float) -> fitting.Evictions:
        """The fastest evictions that keep a target, or those with the lowest peak."""
        if self._seen[0].outline.peak_bytes > target:
            self._tighten(target)
            self._exclude(target)
            if self._fastest(target) is None:
                self._lower()
        return self._fastest(target) or min(self._seen, key=lambda state: state.outline.peak_bytes)

    def _fastest(self, target: float) -> fitting.Evictions | None:
        """Of what was seen and keeps the target."""
        fits = (state for state in self._seen if state.outline.peak_bytes <= target)
        return min(fits, key=lambda state: state.outline.seconds, default=None)

    def _tighten(self, target: float) -> None:
        """Solves for the target, and for ever smaller budgets until what comes of it keeps the target."""
        budget = target
        for _ in range(_TIGHTENINGS):
            solution = self._solve(self._solver, budget, self._deadline)
            if solution is None:
                break
            if self.bound_seconds is None:
                self.bound_seconds = solution.bound * self._unit
            peak = min((state.outline.peak_bytes for state in self._carried_out(solution)), default=budget)
            if peak <= target:
                break
            budget -= max(peak - target, _LEAST_TIGHTENING * target)

    def _exclude(self, target: float) -> None:
        """Takes one solution after the other, the fastest first, until none is faster than what was seen."""
        for _ in self._exclusions:
            solution = self._solve(self._solver, target, self._deadline)
            if solution is None:
                break
            self._carried_out(solution)
            fastest = self._fastest(target)
            if fastest is not None and fastest.outline.seconds <= solution.bound * self._unit * (1.0 + _GAP):
                break
            self._solver.exclude(solution, self._choices)

    def _lower(self) -> None:
        """Adds what has the lowest peak, as far as the program knows."""
        program = self._program
        program = program.least_budget(float(program.cost @ program.upper), float(self._problem.live.max()))
        solution = self._solve(solver.IntegerSolver(program, self._integers, _GAP), 0.0, self._end)
        if solution is not None:
            self._carried_out(solution)

    def _solve(self, found: solver.IntegerSolver, budget: float, deadline: float) -> solver.IntegerSolution | None:
        """None if there is no solution, or none in time."""
        left = deadline - time.monotonic()
        try:
            if left <= 0.0:
                raise solver.OutOfTimeError
            solution = found.solve_integers(budget, left)
        except solver.SolverError as error:
            self.is_cut_off |= isinstance(error, solver.OutOfTimeError)
            return None
        self.is_cut_off |= not solution.is_proven
        return solution

    def _carried_out(self, solution: solver.IntegerSolution) -> list[fitting.Evictions]:
        """What the solution stands for, noted.

        Tried is every node where the solution repeats it; and evictions, which bring a storage back as late as it can
        be, both ways each: what comes back early is dropped again or not, what is dead is kept or not, and what was
        repeated is kept for the next repeat that reads it or not.
        """
        evicted, since, anchors = self._meaning(solution.columns)
        ways = [evicted, dict.fromkeys(evicted, "recompute")] if gaps.AGAIN in evicted.values() else [evicted]
        states = []
        for way, kept, reuse in itertools.product(ways, dict.fromkeys((anchors, frozenset())), (0, gaps.REUSE)):
            with contextlib.suppress(gaps.CantRecompute):
                states.append(fitting.evictions(self._problem, way, kept, since, reuse))
        decisions = self._repeats(solution.columns)
        outline = self._problem.outline(decisions)
        states.append(fitting.Evictions(evicted, anchors, since, gaps.REUSE, decisions, outline))
        self._seen += states
        return states

    def _repeats(self, value: np.ndarray) -> tuple[Decision, ...]:
        """The nodes of each bucket, with what gives their values other names, before the first gap that ends there."""
        problem, relaxed = self._problem, self._relaxed
        ends: dict[int, int] = {}  # bucket -> position
        for gap, stretches in relaxed.stretches.items():
            if (last := stretches[-1]).dropped is not None and value[last.dropped] > 0.5:
                ends[last.end] = min(problem.gaps[gap].end, ends.get(last.end, len(problem.order)))
        repeated: dict[int, set[str]] = {}
        for (node, bucket), run in relaxed.runs.items():
            if value[run] > 0.5:
                place = ends.get(bucket, int(relaxed.checks[min(bucket, len(relaxed.checks) - 1)]))
                repeated.setdefault(place, set()).update((node, *self._renamed[node]))
        position = problem.graph.position
        return tuple(
            Recompute(
                tuple(sorted((name for name in names if position[name] < place), key=position.__getitem__)),
                problem.order[place],
            )
            for place, names in sorted(repeated.items())
        )

    @functools.cached_property
    def _renamed(self) -> Mapping[str, set[str]]:
        """Node to those that only give its values other names."""
        problem = self._problem
        found: dict[str, set[str]] = collections.defaultdict(set)
        for storage in problem.storages:
            makers = {ir.producer(value) for value in storage.values[1:]}
            found[ir.producer(storage.root)] |= {
                name for name in makers if problem.can_repeat(problem.graph.by_name[name])
            }
        return found

    def _meaning(self, value: np.ndarray) -> tuple[dict[int, str], dict[int, int], frozenset[int]]:
        """Gaps to evict and how, since when where that is not from their start, and dead storages to keep."""
        relaxed = self._relaxed
        evicted: dict[int, str] = {}
        since: dict[int, int] = {}
        for gap, stretches in relaxed.stretches.items():
            item = self._problem.gaps[gap]
            dropped = [stretch for stretch in stretches if stretch.dropped is not None and value[stretch.dropped] > 0.5]
            if not dropped:
                continue
            node = ir.producer(self._problem.storages[item.storage].root)
            again = any(value[relaxed.runs.get((node, stretch.end), 0)] > 0.5 for stretch in dropped[:-1])
            evicted[gap] = gaps.AGAIN if again else "recompute"
            if dropped[0] is not stretches[0]:
                since[gap] = max(item.start, int(relaxed.checks[dropped[0].first]) - 1)
        anchors = (s for s, kept in relaxed.kept.items() if any(value[one.column] > 0.5 for one in kept))
        return evicted, since, frozenset(anchors)

    # --- the program ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def _relaxed(self) -> relaxation.Relaxation:
        return relaxation.Relaxation(self._problem)

    @functools.cached_property
    def _unit(self) -> float:
        """Seconds of the plain step."""
        return float(self._problem.clock[-1]) or 1.0

    @functools.cached_property
    def _program(self) -> bound.LinearProgram:
        return _in_units(self._relaxed.program, self._unit)

    @functools.cached_property
    def _choices(self) -> np.ndarray:
        """Columns that say what is dropped."""
        stretches = itertools.chain.from_iterable(self._relaxed.stretches.values())
        return np.array([stretch.dropped for stretch in stretches if stretch.dropped is not None], int)

    @functools.cached_property
    def _integers(self) -> np.ndarray:
        kept = itertools.chain.from_iterable(self._relaxed.kept.values())
        others = [*self._relaxed.runs.values(), *(one.column for one in kept)]
        return np.union1d(self._choices, np.array(others, int))

    @functools.cached_property
    def _solver(self) -> solver.IntegerSolver:
        return solver.IntegerSolver(self._program, self._integers, _GAP)


def _in_units(program: bound.LinearProgram, seconds: float) -> bound.LinearProgram:
    """The program with time in units of so many seconds: what a solver takes for nothing is an absolute number."""
    is_time = program.cost != 0.0
    in_time = np.zeros(len(program.row_lower), bool)
    in_time[program.rows[is_time[program.columns]]] = True
    row_factor, column_factor = np.where(in_time, 1.0 / seconds, 1.0), np.where(is_time, seconds, 1.0)
    return dataclasses.replace(
        program,
        constant=program.constant / seconds,
        lower=program.lower / column_factor,
        upper=program.upper / column_factor,
        values=program.values * row_factor[program.rows] * column_factor[program.columns],
        row_lower=program.row_lower * row_factor,
        row_upper=program.row_upper * row_factor,
        share=program.share * row_factor,
    )
