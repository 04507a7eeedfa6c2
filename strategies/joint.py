"""Swap and recompute decided together: a linear program says what is worth what, the simulator judges.

The first plan is what `greedy` would choose, so that there is one early, however large the step is. Then the program
of `relaxation` is solved for the budget and for tighter ones. Each time its fractions are rounded to evictions; what
overflows then, as repeated chains may, is evicted as `greedy` would; and copies are given their times. The fastest is
improved by changing one gap at a time as long as there is time. What the allocator model accepts is kept. The
program's duals at the budget are the certified bound.

Known weaknesses: the order is that of the other strategies; where few large storages share a small budget, fractions
say little, and changing one gap at a time may end in a local optimum.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import time
from collections.abc import Sequence

import numpy as np

from graphswap import bound, ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.strategies import fitting, gaps, greedy, relaxation, solver, timing

_TIGHTENINGS = (1.0, 0.94, 0.88, 0.8)
_LEAST_SHARE = 0.002
"""Of the target: smaller storages are not tried one by one."""
_ROUNDS = 16
_HALF = 0.5
_WHERE_FULL = 0.7
_TWICE = 0.4
_HOTTEST = 0.003
"""Of the plain step's seconds."""
_PENALTY = 4.0
_TRIALS = 60
"""For each gap, at most."""
_ENOUGH = 0.0005
"""Above the bound: then nothing is left to gain."""


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
        shares = [functools.partial(search.attempt, share) for share in _TIGHTENINGS]
        attempts = [search.unsolved, *shares, search.improved]
        plan = fitting.fit(problem, attempts, memory_budget, "joint", planning_seconds=self.planning_seconds)
        return plan.replace(certificate=search.certificate)


def certificate(graph: ir.Graph, cost_model: CostModel, memory_budget: int, seconds: float = 60.0) -> bound.Certificate:
    """A lower bound on the seconds of every plan in the strategies' order, best at `memory_budget`.

    Raises:
        solver.SolverError: If the program has no solution: no plan of its class keeps the budget; or if time runs out.
    """
    relaxed = relaxation.Relaxation(gaps.problem(graph, cost_model))
    solution = solver.solve(relaxed.program, memory_budget, relaxed.prices, seconds)
    return bound.certificate(relaxed.program, solution.duals)


class _Moves:
    """Small changes of evictions.

    Attributes:
        count: How many gaps there are to change.
    """

    def __init__(self, problem: gaps.Gaps, target: float, rng: random.Random):
        self._problem = problem
        self._target = target
        self._rng = rng
        self._gaps = [gap for gap, item in enumerate(problem.gaps) if item.nbytes >= _LEAST_SHARE * target]
        self._starts = np.array([problem.gaps[gap].start for gap in self._gaps], int)
        self._ends = np.array([problem.gaps[gap].end for gap in self._gaps], int)
        self.count = len(self._gaps)

    def neighbour(self, state: fitting.Evictions) -> fitting.Evictions:
        """The evictions with one or two gaps changed, where memory overflows rather than elsewhere.

        Raises:
            gaps.CantRecompute: If a value can't be recomputed.
        """
        rng, live = self._rng, state.outline.live
        evicted, since = dict(state.evicted), dict(state.since)
        fullest = int(live.argmax())
        if live[fullest] > self._target and rng.random() < _WHERE_FULL:
            self._relieve(evicted, since, fullest)
        else:
            gap = self._change(evicted, since, self._gaps)
            if rng.random() < _TWICE:
                item = self._problem.gaps[gap]
                beside = np.flatnonzero((self._starts < item.end) & (self._ends > item.start))
                self._change(evicted, since, [self._gaps[number] for number in beside])
        return fitting.evictions(self._problem, evicted, state.anchors, since)

    def _change(self, evicted: dict[int, str], since: dict[int, int], among: Sequence[int]) -> int:
        """Gives one of the gaps another way; every second time one that is evicted."""
        rng = self._rng
        present = [gap for gap in among if gap in evicted]
        gap = rng.choice(present if present and rng.random() < _HALF else among)
        if gap in since and rng.random() < _HALF:
            del since[gap]
            return gap
        way = rng.choice([way for way in ("", "swap", "recompute", gaps.AGAIN) if way != evicted.get(gap, "")])
        evicted.pop(gap, None)
        if way:
            evicted[gap] = way
        return gap

    def _relieve(self, evicted: dict[int, str], since: dict[int, int], position: int) -> None:
        """Takes something off the device at a position, or has less repeated there."""
        rng = self._rng
        over = [self._gaps[number] for number in np.flatnonzero((self._starts < position) & (self._ends > position))]
        idle = [gap for gap in over if gap not in evicted or gap in since]
        repeated = [
            gap for gap, way in evicted.items() if way == "recompute" and self._problem.gaps[gap].end == position
        ]
        if idle and not (repeated and rng.random() < _HALF):
            gap = rng.choice(idle)
            since.pop(gap, None)
            evicted[gap] = rng.choice(["swap", "recompute"])
        elif repeated:
            evicted[rng.choice(repeated)] = "swap"


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
        self._deadline = time.monotonic() + seconds
        self._solved: dict[int, solver.Solution | None] = {}
        self._seen: list[fitting.Evictions] = []
        self.certificate: bound.Certificate | None = None

    def unsolved(self, target: float) -> fitting.Evictions:
        """Evicts as `greedy` would: there is a plan before the program is solved, however large that is."""
        state = self._repaired({}, {}, frozenset(), target)
        self._seen.append(state)
        return state

    def attempt(self, share: float, target: float) -> fitting.Evictions:
        """Evicts after the program's solution at a share of the target."""
        solution = self._solve(int(share * target))
        if solution is None:
            return self.unsolved(target)
        state = self._repaired(*self._rounded(solution), target)
        self._seen.append(state)
        return state

    def improved(self, target: float) -> fitting.Evictions:
        """The best of the attempts so far, annealed as long as there is time and something to gain."""
        everything = fitting.evictions(self._problem, dict.fromkeys(range(len(self._problem.gaps)), "swap"))
        states = [*self._seen, everything]
        start = min(states, key=lambda state: self._price(self._worth(state, target), target))
        found = self._annealed(start, target, random.Random(0))
        return min((*states, found), key=lambda state: self._worth(state, target))

    def _annealed(self, state: fitting.Evictions, target: float, rng: random.Random) -> fitting.Evictions:
        """Simulated annealing (Kirkpatrick et al., Science 1983) over what is evicted and how."""
        plain = float(self._problem.clock[-1])
        least = 0.0 if self.certificate is None else self.certificate.seconds(target)
        moves = _Moves(self._problem, target, rng)
        best, best_worth = state, self._worth(state, target)
        worth = best_worth
        begin = time.monotonic()
        for trial in itertools.count():
            now = time.monotonic()
            done = max((now - begin) / max(self._deadline - begin, 1e-9), trial / (_TRIALS * moves.count + 1))
            if done >= 1.0 or not moves.count or (best_worth[0] == 0.0 and best_worth[1] <= least * (1.0 + _ENOUGH)):
                break
            try:
                neighbour = moves.neighbour(state)
            except gaps.CantRecompute:
                continue
            found = self._worth(neighbour, target)
            temperature = _HOTTEST * (1.0 - done) ** 2 * plain
            rise = self._price(found, target) - self._price(worth, target)
            if rise <= 0.0 or rng.random() < math.exp(-rise / max(temperature, 1e-30)):
                state, worth = neighbour, found
            if found < best_worth:
                best, best_worth = neighbour, found
        return best

    def _price(self, worth: tuple[float, float], target: float) -> float:
        """Seconds, and what bytes above the target count for on the way to something better."""
        return worth[1] + worth[0] / target * _PENALTY * float(self._problem.clock[-1])

    def _worth(self, state: fitting.Evictions, target: float) -> tuple[float, float]:
        """Bytes above the target, and about the seconds when copies have their times: less is better."""
        seconds = state.outline.seconds
        if self._problem.cost_model.link(self._problem.cost_model.far_tier).overlaps:
            seconds = timing.estimated(self._problem, state.decisions, state.outline, target)
        return max(0.0, state.outline.peak_bytes - target), seconds

    def _solve(self, memory_budget: int) -> solver.Solution | None:
        if memory_budget not in self._solved:
            left = self._deadline - time.monotonic()
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
        self, evicted: dict[int, str], since: dict[int, int], anchors: frozenset[int], target: float
    ) -> fitting.Evictions:
        """Evicts what still overflows."""
        problem = self._problem
        try:
            state = fitting.evictions(problem, evicted, anchors, since)
        except gaps.CantRecompute:
            state = fitting.evictions(problem, dict.fromkeys(evicted, "swap"), anchors, since)
        self._seen.append(state)
        for _ in range(_ROUNDS):
            live = state.outline.live
            if live.max() <= target:
                break
            chosen = greedy.choose(problem, state.evicted, live, target, anchors)
            chosen = chosen or greedy.swap_instead(problem, state.evicted, live, target)
            late = set()
            over = np.flatnonzero(live > target)
            if not chosen:
                late = {gap for gap, start in state.since.items() if self._covers(gap, over, start)}
            if not (chosen or late):
                chosen = {
                    gap: "swap"
                    for gap, way in state.evicted.items()
                    if way == "recompute" and self._covers(gap, over, problem.gaps[gap].end)
                }
            if not (chosen or late):
                break
            kept = {gap: start for gap, start in state.since.items() if gap not in late}
            state = fitting.evictions(problem, {**state.evicted, **chosen}, anchors, kept)
        return state

    def _covers(self, gap: int, positions: np.ndarray, last: int) -> bool:
        """Whether one of the positions lies in the gap, up to `last`."""
        start = np.searchsorted(positions, self._problem.gaps[gap].start, side="right")
        return bool(start < len(positions) and positions[start] <= last)
