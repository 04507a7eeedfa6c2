"""Simulated annealing over what is evicted and how: makes good plans better (Kirkpatrick et al., Science 1983).

A move gives a gap another way to be evicted, or the gaps of one kind next to each other, as blocks of a network are
alike; where memory overflows, it takes something off the device there. Plans that overflow are passed through at a
price. It is as warm as the best plan so far lies above the bound, and cools down a few times; at last the best plan is
changed gap by gap.

Known weaknesses: what it finds depends on the time it has; it changes no order.
"""

from __future__ import annotations

import collections
import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from graphswap import ir
from graphswap.strategies import fitting, gaps, timing

_LEAST_SHARE = 0.002
"""Of the target: smaller storages are left as they are."""
_WAYS = ("", "swap", "recompute", gaps.AGAIN)
_WHERE_FULL = 0.7
_OF_A_KIND = 0.25
_TWICE = 0.4
_ANCHORS = 0.1
_HALF = 0.5
_PENALTY = 2.0
"""Steps that exceeding the target by all of itself counts for."""
_WARMTH = 0.1
"""Of the distance to the bound."""
_WARMEST = 0.01
"""Of the plain step's seconds."""
_COOLINGS = 2
_WARM = 0.7
"""Of the time; in the rest the best plan is changed gap by gap."""
_TRIALS = 20
"""For each gap and cooling, at most."""
_ENOUGH = 0.0005
"""Above the bound: then nothing is left to gain."""

Worth = tuple[float, float]
"""Bytes above the target, and about the seconds when copies have their times: less is better."""


def worth(problem: gaps.Gaps, state: fitting.Evictions, target: float) -> Worth:
    """What a state is worth."""
    seconds = state.outline.seconds
    if problem.cost_model.link(problem.cost_model.far_tier).overlaps:
        seconds = timing.estimated(problem, state.decisions, state.outline, target)
    return max(0.0, state.outline.peak_bytes - target), seconds


def improved(
    problem: gaps.Gaps, states: Sequence[fitting.Evictions], target: float, seconds: float, least_seconds: float
) -> fitting.Evictions:
    """The best that is found, starting from the most promising of the states.

    Args:
        problem: The gaps.
        states: At least one.
        target: Bytes.
        seconds: Time to search.
        least_seconds: No plan takes less.
    """

    def judge(state: fitting.Evictions) -> Worth:
        return worth(problem, state, target)

    plain = float(problem.clock[-1])

    def price(found: Worth) -> float:
        return found[1] + found[0] / target * _PENALTY * plain

    judged = [(state, judge(state)) for state in states]
    best = min(judged, key=lambda pair: pair[1])
    rng = random.Random(0)
    moves = _Moves(problem, target, rng)
    enough = least_seconds * (1.0 + _ENOUGH)
    begin = time.monotonic()

    def passed() -> float:
        """The share of the time; 1 if there is nothing left to gain."""
        is_best = best[1][0] == 0.0 and best[1][1] <= enough
        return 1.0 if is_best else min(1.0, (time.monotonic() - begin) / max(seconds, 1e-9))

    for cooling in range(_COOLINGS):
        state, now = min([*judged, best], key=lambda pair: price(pair[1]))
        warmth = min(_WARMTH * max(price(now) - least_seconds, _ENOUGH * plain), _WARMEST * plain)
        for trial in range(_TRIALS * moves.count):
            done = max(passed() * _COOLINGS / _WARM - cooling, trial / (_TRIALS * moves.count))
            if done >= 1.0:
                break
            try:
                neighbour = moves.neighbour(state)
            except gaps.CantRecompute:
                continue
            found = judge(neighbour)
            rise = price(found) - price(now)
            if rise <= 0.0 or rng.random() < math.exp(-rise / (warmth * (1.0 - done) ** 2 + 1e-30)):
                state, now = neighbour, found
            if found < best[1]:
                best = neighbour, found
        judged = [best]
    is_better = True
    while is_better:
        is_better = False
        for change in moves.single():
            if passed() >= 1.0:
                return best[0]
            try:
                neighbour = change(best[0])
            except gaps.CantRecompute:
                continue
            if neighbour is not None and (found := judge(neighbour)) < best[1]:
                best, is_better = (neighbour, found), True
    return best[0]


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
        self._kinds = collections.defaultdict[object, list[int]](list)
        self._kind_of = {gap: _kind(problem, gap) for gap in self._gaps}
        for gap in sorted(self._gaps, key=lambda gap: problem.gaps[gap].start):
            self._kinds[self._kind_of[gap]].append(gap)
        self.count = len(self._gaps)

    def neighbour(self, state: fitting.Evictions) -> fitting.Evictions:
        """The evictions with a gap or a few changed, where memory overflows rather than elsewhere.

        Raises:
            gaps.CantRecompute: If a value can't be recomputed.
        """
        rng, live = self._rng, state.outline.live
        evicted, since, anchors = dict(state.evicted), dict(state.since), state.anchors
        fullest = int(live.argmax())
        if live[fullest] > self._target and rng.random() < _WHERE_FULL:
            self._relieve(evicted, since, fullest)
        else:
            gap = self._change(evicted, since, self._gaps)
            if rng.random() < _OF_A_KIND:
                self._change_alike(evicted, since, gap)
            elif rng.random() < _TWICE:
                item = self._problem.gaps[gap]
                beside = np.flatnonzero((self._starts < item.end) & (self._ends > item.start))
                self._change(evicted, since, [self._gaps[number] for number in beside])
        if anchors and rng.random() < _ANCHORS:
            anchors = frozenset(anchors) - {rng.choice(sorted(anchors))}
        return fitting.evictions(self._problem, evicted, anchors, since)

    def single(self) -> Iterator[Callable[[fitting.Evictions], fitting.Evictions | None]]:
        """All changes of one gap, the largest and longest first; None where it is so already."""
        problem = self._problem
        for gap in sorted(self._gaps, key=lambda gap: -problem.gaps[gap].nbytes * _length(problem.gaps[gap])):
            for way in _WAYS:
                yield functools.partial(self._with, gap, way)

    def _with(self, gap: int, way: str, state: fitting.Evictions) -> fitting.Evictions | None:
        if state.evicted.get(gap, "") == way:
            return None
        evicted = dict(state.evicted)
        _set(evicted, gap, way)
        return fitting.evictions(self._problem, evicted, state.anchors, state.since)

    def _change(self, evicted: dict[int, str], since: dict[int, int], among: Sequence[int]) -> int:
        """Gives one of the gaps another way; every second time one that is evicted."""
        rng = self._rng
        present = [gap for gap in among if gap in evicted]
        gap = rng.choice(present if present and rng.random() < _HALF else among)
        if gap in since and rng.random() < _HALF:
            del since[gap]
        else:
            _set(evicted, gap, rng.choice([way for way in _WAYS if way != evicted.get(gap, "")]))
        return gap

    def _change_alike(self, evicted: dict[int, str], since: dict[int, int], gap: int) -> None:
        """Gives the next gaps of its kind, before or after it, the way of a gap."""
        rng, alike = self._rng, self._kinds[self._kind_of[gap]]
        place, count = alike.index(gap), rng.randint(1, len(alike))
        for other in alike[place : place + count] if rng.random() < _HALF else alike[max(0, place - count) : place]:
            since.pop(other, None)
            _set(evicted, other, evicted.get(gap, ""))

    def _relieve(self, evicted: dict[int, str], since: dict[int, int], position: int) -> None:
        """Takes something off the device at a position, or has less repeated there."""
        rng = self._rng
        over = [self._gaps[number] for number in np.flatnonzero((self._starts < position) & (self._ends > position))]
        idle = [gap for gap in over if gap not in evicted or gap in since]
        early = [gap for gap in over if evicted.get(gap) == "recompute" and gap not in since]  # may be back already
        repeated = [gap for gap, way in evicted.items() if way != "swap" and self._problem.gaps[gap].end == position]
        options: list[tuple[int, str]] = []
        if idle:
            options.append((rng.choice(idle), rng.choice(_WAYS[1:])))
        if early:
            options.append((rng.choice(early), rng.choice((gaps.AGAIN, "swap"))))
        if repeated:
            options.append((rng.choice(repeated), "swap"))
        if options:
            gap, way = rng.choice(options)
            since.pop(gap, None)
            _set(evicted, gap, way)


def _length(gap: gaps.Gap) -> int:
    return gap.end - gap.start


def _set(evicted: dict[int, str], gap: int, way: str) -> None:
    evicted.pop(gap, None)
    if way:
        evicted[gap] = way


def _kind(problem: gaps.Gaps, gap: int) -> object:
    """What gaps of alike blocks have in common: size, who makes the value, and who reads it at the ends of the gap."""
    item = problem.gaps[gap]
    nodes = problem.graph.nodes
    maker = problem.graph.by_name[ir.producer(problem.storages[item.storage].root)]
    return item.nbytes, maker.op, nodes[item.start].op, nodes[item.end].op
