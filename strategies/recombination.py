"""Many changes of a plan at once: which of those that were judged one by one go together, by an integer program.

A single change says little where memory is full: what it frees is of use only if others fill it, and what it needs
others have to free. So each change is judged alone, for what it does to memory at every position and to the step's
seconds; as changes of different parts of the step add up, nearly, a small program chooses among them, at most one for
each part. This is large neighbourhood search (Shaw, CP 1998) with an integer program for the neighbourhood, as in
relaxation-induced search (Danna, Rothberg and Le Pape, Math. Programming 2005).

Known weaknesses: chains of repeats that run through several parts do not add up; what is chosen has to be judged again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from graphswap import bound
from graphswap.strategies import fitting, gaps, solver

_STRETCHES = 150
"""Of the step: memory is looked at where it is fullest in each, and where a solution overflows in each."""
_LOOKS = 6
"""Times to solve a program, as it overflows where nobody looked."""
_GAP = 0.02
"""How far from its optimum a program is solved."""
_UNIT = 1e-9
"""Memory is counted in GB, so that all coefficients are of similar size."""


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """A change of a state, judged.

    Attributes:
        state: The whole state, changed.
        parts: Of the step: those whose gaps are treated another way.
        live: Bytes more at each position, shape (nodes,).
        seconds: That the step takes longer.
    """

    state: fitting.Evictions
    parts: Collection[int]
    live: np.ndarray
    seconds: float


def parts(problem: gaps.Gaps, among: Sequence[int], count: int, shift: float) -> Mapping[int, int]:
    """Gap to the part of the step in which it ends; all parts have about as many bytes.

    Args:
        problem: The gaps.
        among: Those to look at.
        count: How many parts.
        shift: Moves their borders, by a share of a part.
    """
    late = sorted(among, key=lambda gap: problem.gaps[gap].end)
    *before, total = itertools.accumulate((problem.gaps[gap].nbytes for gap in late), initial=0)
    return {gap: int(nbytes / total * count + shift) for gap, nbytes in zip(late, before, strict=True)}


def changed(base: fitting.Evictions, other: fitting.Evictions) -> set[int]:
    """The gaps that two states treat differently."""
    every = {*base.evicted, *other.evicted, *base.since, *other.since}
    return {gap for gap in every if _way(base, gap) != _way(other, gap)}


def with_part_of(
    problem: gaps.Gaps, base: fitting.Evictions, other: fitting.Evictions, among: Collection[int]
) -> fitting.Evictions:
    """A state that treats some gaps as another one does.

    Raises:
        gaps.CantRecompute: If a value can't be recomputed.
    """
    return fitting.evictions(problem, *_patched(base, [(other, among)], base.anchors))


def merged(problem: gaps.Gaps, base: fitting.Evictions, others: Sequence[fitting.Evictions]) -> fitting.Evictions:
    """A state with all that the others change, each of them other gaps.

    Raises:
        gaps.CantRecompute: If a value can't be recomputed.
    """
    anchors = set(base.anchors)
    for other in others:
        anchors = (anchors | set(other.anchors)) - (set(base.anchors) - set(other.anchors))
    patches = [(other, changed(base, other)) for other in others]
    return fitting.evictions(problem, *_patched(base, patches, frozenset(anchors)))


def chosen(changes: Sequence[Change], live: np.ndarray, target: float, price: float, seconds: float) -> Sequence[int]:
    """Which changes to make together, so that the step gets fastest: at most one for each part.

    Args:
        changes: To choose from.
        live: Bytes at each position before, shape (nodes,).
        target: What they should not exceed.
        price: Seconds that each byte above it counts for, at the worst position.
        seconds: Time limit for each program that is solved.
    """
    if not changes:
        return []
    borders = np.linspace(0, len(live), min(len(live), _STRETCHES) + 1).astype(int)
    slices = [slice(start, end) for start, end in itertools.pairwise(borders)]

    def fullest(memory: np.ndarray) -> set[int]:
        return {int(part.start + memory[part].argmax()) for part in slices}

    deltas = np.array([change.live for change in changes])
    looks, found = fullest(live), []
    for _ in range(_LOOKS):
        solution = _solved(changes, deltas, live, target, price, sorted(looks), seconds)
        if solution is None:
            break
        found, over = solution
        memory = live + deltas[found].sum(0)
        missed = {at for at in fullest(memory) if memory[at] > target + over + 1.0} - looks
        if not missed:
            break
        looks |= missed
    return found


def _solved(
    changes: Sequence[Change],
    deltas: np.ndarray,
    live: np.ndarray,
    target: float,
    price: float,
    looks: Sequence[int],
    seconds: float,
) -> tuple[list[int], float] | None:
    """The changes that the program chooses, and by how much they overflow at `looks`; None if it has no answer."""
    builder = bound.Builder()
    for change in changes:
        builder.column(cost=change.seconds)
    most = float(np.abs(deltas).sum() + live.max()) * _UNIT
    over = builder.column(most, cost=price / _UNIT)
    for at in looks:
        terms = [(int(number), -float(deltas[number, at]) * _UNIT) for number in np.flatnonzero(deltas[:, at])]
        builder.row([*terms, (over, 1.0)], lower=(live[at] - target) * _UNIT)
    touching: dict[int, list[int]] = {}
    for number, change in enumerate(changes):
        for part in change.parts:
            touching.setdefault(part, []).append(number)
    for numbers in touching.values():
        builder.row([(number, 1.0) for number in numbers], upper=1.0)
    whole = solver.IntegerSolver(builder.program(0.0), np.arange(len(changes)), _GAP)
    try:
        columns = whole.solve_integers(0.0, seconds).columns
    except solver.SolverError:
        return None
    return [int(number) for number in np.flatnonzero(columns[:over] > 0.5)], float(columns[over]) / _UNIT


def _way(state: fitting.Evictions, gap: int) -> tuple[str, int | None]:
    return state.evicted.get(gap, ""), state.since.get(gap)


def _patched(
    base: fitting.Evictions, patches: Sequence[tuple[fitting.Evictions, Collection[int]]], anchors: Collection[int]
) -> tuple[dict[int, str], Collection[int], dict[int, int]]:
    """The arguments of `fitting.evictions` for a state with some gaps as others have them."""
    evicted, since = dict(base.evicted), dict(base.since)
    for other, among in patches:
        for gap in among:
            evicted.pop(gap, None)
            since.pop(gap, None)
            if gap in other.evicted:
                evicted[gap] = other.evicted[gap]
            if gap in other.since:
                since[gap] = other.since[gap]
    return evicted, anchors, since
