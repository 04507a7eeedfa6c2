"""Swap and recompute decided together: a linear program says what is worth what, the simulator judges.

The first plan is what `chen` or `greedy` would choose, so that there is one early, however large the step is. Then the
program of `relaxation` is solved for the budget and for tighter ones. Each time its fractions are rounded to evictions,
once so that all that came back early goes again. What overflows then, as repeated chains may, is dropped again where it
came back early, or evicted as `greedy` would; and copies are given their times. All of these, and what other strategies
would evict, are where `annealing` starts from, for most of the time; where nothing fits, it looks for plans for less,
too. The program's duals at the budget are the certified bound.

Known weaknesses: the order is that of the other strategies; where few large storages share a small budget, the program
does not see what chains of repeats hold, and annealing may end far from the optimum.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from graphswap import bound, ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.strategies import annealing, base, budgets, fitting, gaps, greedy, relaxation, solver

_TIGHTENINGS = (0.94, 0.88, 0.8, 0.7, 0.6, 0.5)
"""Of the budget. What is rounded overflows where much is repeated at once, and much less budget costs little time.
Where nothing fits, plans for less are annealed, too."""
_EACH_SEARCH = 0.5
"""Of the time left, where nothing fits."""
_ROUNDS = 16
_HALF = 0.5
_SEGMENTS = (6, 12, 24, 48)
_STARTING = 0.4
"""Of the planning time, for states to anneal from that take long."""
_SOLVING = 0.7
"""Of the planning time, for the first solution of the program, and for states to anneal from that take little."""


@dataclasses.dataclass(frozen=True)
class Joint:
    """See the module's text.

    Attributes:
        planning_seconds: When to stop looking for a faster plan.
    """

    planning_seconds: float = 30.0

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        """Implements `Strategy.plan`."""
        problem = gaps.problem(graph, cost_model)
        search = _Search(problem, relaxation.Relaxation(problem), memory_budget, self.planning_seconds)
        repeated = [functools.partial(search.repeated, count) for count in fitting.checkpoint_segments(problem)]
        attempts = [*repeated, search.unsolved, functools.partial(search.attempt, 1.0)]
        try:
            placed = fitting.fastest(problem, attempts, memory_budget, planning_seconds=self.planning_seconds)
        except base.InfeasibleBudgetError:
            found = search.improved(None)
            if found is None:
                raise
        else:
            found = search.improved(placed) or placed
        return problem.plan(found.decisions, "joint", memory_budget).replace(certificate=search.certificate)


def certificate(graph: ir.Graph, cost_model: CostModel, memory_budget: int, seconds: float = 60.0) -> bound.Certificate:
    """A lower bound on the seconds of every plan in the strategies' order, best at `memory_budget`.

    Raises:
        solver.SolverError: If the program has no solution: no plan of its class keeps the budget; or if time runs out.
    """
    relaxed = relaxation.Relaxation(gaps.problem(graph, cost_model))
    solution = solver.solve(relaxed.program, memory_budget, relaxed.prices, seconds)
    return bound.certificate(relaxed.program, solution.duals)


class _Search:
    """The state of one call of `plan`.

    Attributes:
        certificate: The bound; None until the program was solved.
    """

    def __init__(self, problem: gaps.Gaps, relaxed: relaxation.Relaxation, memory_budget: int, seconds: float):
        self._problem = problem
        self._relaxed = relaxed
        self._solver = solver.Solver(relaxed.program, relaxed.prices)
        self._memory_budget = memory_budget
        self._start = time.monotonic()
        self._deadline = self._start + seconds
        self._solved: dict[int, solver.Solution | None] = {}
        self._seen: list[fitting.Evictions] = []
        self.certificate: bound.Certificate | None = None

    def repeated(self, segments: int, target: float) -> fitting.Evictions:
        """Evicts as `chen` would, which takes next to no time: where it fits, little time finds no slower plan."""
        del target  # all or nothing
        state = fitting.checkpointed(self._problem, segments)
        self._seen.append(state)
        return state

    def unsolved(self, target: float) -> fitting.Evictions:
        """Evicts as `greedy` would: there is a plan before the program is solved, however large that is."""
        state = self._repaired({}, {}, frozenset(), target)
        self._seen.append(state)
        return state

    def attempt(self, share: float, target: float) -> fitting.Evictions:
        """Evicts after the program's solution at a share of the target."""
        solution = self._solve(int(share * target))
        if solution is None:
            return self._seen[0] if self._seen else self.unsolved(target)
        rounded = self._rounded(solution)
        self._seen.append(self._again(*rounded))
        state = self._repaired(*rounded, target, again=True)
        if state.outline.peak_bytes > target:
            self._seen.append(state)
            state = self._repaired(*rounded, target)
        self._seen.append(state)
        return state

    def _again(
        self, evicted: Mapping[int, str], since: Mapping[int, int], anchors: Collection[int]
    ) -> fitting.Evictions:
        """What came back early goes again."""
        ways = {gap: gaps.AGAIN if way == "recompute" else gaps.SWAP_AGAIN for gap, way in evicted.items()}
        return fitting.at_worst_swapped(self._problem, ways, anchors, since)

    def improved(self, placed: fitting.Evictions | None) -> fitting.Evictions | None:
        """What annealing makes of all attempts, of programs for less, and of other strategies' ways to evict.

        Args:
            placed: What the allocator has taken so far.
        """
        target = float(self._memory_budget)
        for share, start in self._starts(target):
            if time.monotonic() > self._start + share * (self._deadline - self._start):
                break
            self._seen.append(start())
        states = list({id(state): state for state in self._seen}.values())
        least = 0.0 if self.certificate is None else self.certificate.seconds(target)
        solution = self._solved.get(self._memory_budget)
        indifference = None if solution is None else self._relaxed.indifference(solution)

        def annealed(memory_budget: int, seconds: float) -> fitting.Evictions | None:
            return annealing.improved(self._problem, states, memory_budget, seconds, least, placed, indifference)

        left = self._deadline - time.monotonic()
        if placed is not None:
            return annealed(self._memory_budget, left)
        found = annealed(self._memory_budget, _EACH_SEARCH * left)
        least_bytes = budgets.least_peak(self._problem).nbytes
        for share in _TIGHTENINGS:  # a little too much memory may cost less than a plan that fits, which is then missed
            tighter, left = int(share * self._memory_budget), self._deadline - time.monotonic()
            if found is not None or tighter < least_bytes or left <= 0:
                break
            found = annealed(tighter, _EACH_SEARCH * left)
        return found

    def _starts(self, target: float) -> Iterator[tuple[float, Callable[[], fitting.Evictions]]]:
        """What makes states to anneal from, and until what share of the time each may begin.

        First checkpoints of which some are swapped, which take little time; then programs for less, all that can be
        swapped, and greedy evictions.
        """
        problem = self._problem
        for segments in _SEGMENTS:
            anchors = problem.anchors(segments)
            for way in ("recompute", gaps.AGAIN):
                yield _SOLVING, functools.partial(self._checkpointed, anchors, way)
        for share in _TIGHTENINGS:
            yield _STARTING, functools.partial(self.attempt, share, target)
        all_swapped = dict.fromkeys(range(len(problem.gaps)), "swap")
        yield _STARTING, functools.partial(fitting.evictions, problem, all_swapped)
        for segments in _SEGMENTS:
            yield _STARTING, functools.partial(greedy.evict, problem, problem.anchors(segments), target)

    def _checkpointed(self, anchors: Collection[int], way: str) -> fitting.Evictions:
        """Evicts all that waits for the backward pass: anchors are swapped, the others if they can't be repeated."""
        problem = self._problem
        evicted = {
            gap: way if storage not in anchors and problem.is_repeatable(gap) else "swap"
            for storage, gap in problem.saved.items()
        }
        return fitting.at_worst_swapped(problem, evicted, anchors)

    def _solve(self, memory_budget: int) -> solver.Solution | None:
        if memory_budget not in self._solved:
            left = self._start + _SOLVING * (self._deadline - self._start) - time.monotonic()
            try:
                found = self._solver.solve(memory_budget, left)
            except solver.SolverError:
                found = None
            self._solved[memory_budget] = found
            if found is not None:
                self._note(bound.certificate(self._relaxed.program, found.duals))
        return self._solved[memory_budget]

    def _note(self, found: bound.Certificate) -> None:
        """Keeps the certificate that says most at the budget."""
        budget = self._memory_budget
        if self.certificate is None or found.seconds(budget) > self.certificate.seconds(budget):
            self.certificate = found

    def _rounded(self, solution: solver.Solution) -> tuple[dict[int, str], dict[int, int], frozenset[int]]:
        """Gaps to evict and how, since when where that is not from their start, and dead storages to keep."""
        value, relaxed = solution.columns, self._relaxed
        read: dict[int, set[int]] = {}  # bucket -> storages that are read by what is run again there
        for (node, bucket), run in relaxed.runs.items():
            if value[run] > _HALF:
                read.setdefault(bucket, set()).update(relaxed.inputs(node))
        evicted: dict[int, str] = {}
        since: dict[int, int] = {}
        for gap, stretches in relaxed.stretches.items():
            item = self._problem.gaps[gap]
            way, first = "", 0
            for stretch in reversed(stretches):
                swapped = value[stretch.swapped]
                dropped = value[stretch.dropped] if stretch.dropped is not None else 0.0
                if swapped + dropped > _HALF:
                    way = way or ("swap" if swapped >= dropped else "recompute")
                    first = stretch.first
                elif way and item.storage in read.get(stretch.end, ()):
                    break  # it is there for that run, and goes after it
                elif way:
                    first = stretch.first
            if way:
                evicted[gap] = way
                if first > stretches[0].first:
                    since[gap] = max(item.start, int(relaxed.checks[first]) - 1)
        anchors = frozenset(s for s, kept in relaxed.kept.items() if any(value[k.column] > _HALF for k in kept))
        return evicted, since, anchors

    def _repaired(
        self,
        evicted: dict[int, str],
        since: dict[int, int],
        anchors: frozenset[int],
        target: float,
        again: bool = False,
    ) -> fitting.Evictions:
        """Evicts what still overflows.

        If `again`, what is recomputed over a place that overflows, and may be back there early, goes again before
        anything else is evicted.
        """
        problem = self._problem
        state = fitting.at_worst_swapped(problem, evicted, anchors, since)
        self._seen.append(state)
        for _ in range(_ROUNDS):
            live = state.outline.live
            if live.max() <= target:
                break
            over = np.flatnonzero(live > target)
            if again:
                early = [
                    gap
                    for gap, way in state.evicted.items()
                    if way == "recompute" and self._covers(gap, over, problem.gaps[gap].end - 1)
                ]
                if early:
                    ways = {**state.evicted, **dict.fromkeys(early, gaps.AGAIN)}
                    state = fitting.at_worst_swapped(problem, ways, anchors, state.since)
                    continue
            chosen = greedy.choose(problem, state.evicted, live, target, anchors)
            chosen = chosen or greedy.swap_instead(problem, state.evicted, live, target)
            late = set()
            if not chosen:
                late = {gap for gap, start in state.since.items() if self._covers(gap, over, start)}
            if not (chosen or late):
                chosen = {
                    gap: "swap"
                    for gap, way in state.evicted.items()
                    if way not in gaps.SWAPS and self._covers(gap, over, problem.gaps[gap].end)
                }
            if not (chosen or late):
                break
            kept = {gap: start for gap, start in state.since.items() if gap not in late}
            state = fitting.at_worst_swapped(problem, {**state.evicted, **chosen}, anchors, kept)
        return state

    def _covers(self, gap: int, positions: np.ndarray, last: int) -> bool:
        """Whether one of the positions lies in the gap, up to `last`."""
        start = np.searchsorted(positions, self._problem.gaps[gap].start, side="right")
        return bool(start < len(positions) and positions[start] <= last)
