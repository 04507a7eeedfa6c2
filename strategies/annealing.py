"""Simulated annealing over what is evicted and how: makes good plans better (Kirkpatrick et al., Science 1983).

A move gives a gap another way to be evicted, or the gaps of one kind next to each other, as blocks of a network are
alike; where memory overflows, it takes something off the device there, or has what is read last there written over and
made again. What the program of `relaxation` does not care about is changed most. Plans that overflow are passed through
at a price. First of all many moves are made at once, as `recombination` chooses them, and parts of plans are exchanged,
until that does not help any more. Then it is as warm as the best plan so far lies above the bound, and cools down a few
times; at last the best plan is changed gap by gap.

What would be the fastest plan so far is shown to the device's allocator; each time that refuses, the sum of the buffers
has to get a little smaller.

Known weaknesses: what it finds depends on the time it has; it changes no order; the allocator refuses most plans, and
all that is known then is that it did.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from graphswap import ir
from graphswap.plan import Recompute
from graphswap.strategies import fitting, gaps, recombination, timing

_LEAST_SHARE = 0.001
"""Of the plain step's peak: smaller storages are left as they are."""
_WAYS = ("", "swap", gaps.SWAP_AGAIN, "recompute", gaps.AGAIN)
_REPEATING = ("recompute", gaps.AGAIN)
_AGAIN = {"swap": gaps.SWAP_AGAIN, "recompute": gaps.AGAIN}
_WHERE_FULL = 0.7
_OF_A_KIND = 0.25
_TWICE = 0.4
_ANCHORS = 0.1
_HALF = 0.5
_OFTEN_AGAIN = 0.3
_FIRST = 10.0
"""The change that the program cares about least but for r others is tried in proportion to 1 / (_FIRST + r)."""
_PENALTY = 2.0
"""Steps that exceeding the target by all of itself counts for."""
_WARMTH = 0.1
"""Of the distance to the bound."""
_WARMEST = 0.01
"""Of the plain step's seconds."""
_COOLINGS = 2
_WARM = 0.7
"""Of the time; in the rest the best plan is changed gap by gap."""
_RECOMBINING = 0.6
"""Of the time, at most, before annealing."""
_IDLE_ROUNDS = 2
"""Without anything better: then many changes at once are of no use any more."""
_PARTS = (6, 10, 16, 24, 40)
"""Into how many parts a round may cut the step."""
_OTHERS = 6
"""Plans that a round takes parts of."""
_SMALL_CHANGES = 250
"""Beside them, in each round."""
_CORRECTIONS = 6
"""Times to choose anew as what was chosen holds more than the sum of its changes."""
_CHOOSING = 2.0
"""Seconds for an integer program."""
_TRIALS = 60
"""For each gap and cooling, at most."""
_ENOUGH = 0.0005
"""Above the bound: then nothing is left to gain."""
_ASKING = 10
"""States to judge for each question to the allocator, which takes about as long as they do. No clock: a search that has
the time to end finds the same plan again."""
_TIGHTENING = 0.99
"""Of what the sum of the buffers may be, each time that the allocator refuses; and once it has taken something:"""
_SLIGHTLY = 0.997

Worth = tuple[float, float]
"""Bytes above the target, and about the seconds when copies have their times: less is better."""


def worth(problem: gaps.Gaps, state: fitting.Evictions, target: float) -> Worth:
    """What a state is worth."""
    seconds = state.outline.seconds
    if problem.copies_beside:
        seconds = timing.estimated(problem, state.decisions, state.outline, target)
    return max(0.0, state.outline.peak_bytes - target), seconds


def improved(
    problem: gaps.Gaps,
    states: Sequence[fitting.Evictions],
    memory_budget: int,
    seconds: float,
    least_seconds: float,
    placed: fitting.Evictions | None = None,
    indifference: Mapping[tuple[int, str], float] | None = None,
) -> fitting.Evictions | None:
    """The fastest state that is found and that the device's allocator takes; None if it takes none.

    Args:
        problem: The gaps.
        states: At least one, to start from.
        memory_budget: Bytes.
        seconds: Time to search.
        least_seconds: No plan takes less.
        placed: What the allocator has taken before.
        indifference: As `relaxation` has it; changes of little are tried most.
    """
    moves = _Moves(problem, random.Random(0), indifference or {})
    search = _Search(problem, states, moves, memory_budget, seconds, least_seconds, placed)
    search.recombine()
    for cooling in range(_COOLINGS):
        search.cool(cooling)
    search.descend()
    return search.finished()


class _Search:
    """The state of one call of `improved`.

    The allocator is asked about what would be the fastest so far, though not too often. Each time it refuses, the sum
    of the buffers has to get a little smaller.
    """

    def __init__(
        self,
        problem: gaps.Gaps,
        states: Sequence[fitting.Evictions],
        moves: _Moves,
        memory_budget: int,
        seconds: float,
        least_seconds: float,
        placed: fitting.Evictions | None,
    ):
        self._problem = problem
        self._memory_budget = memory_budget
        self._target = float(memory_budget)
        self._seconds = max(seconds, 1e-9)
        self._least_seconds = least_seconds
        self._plain = float(problem.clock[-1])
        self._rng = moves.rng
        self._moves = moves
        self._begin = time.monotonic()
        self._judged = self._asked = 0  # how many states, and how many of them by the allocator
        self._asks_always = False
        self._given = self._placed = placed
        judged = sorted(((state, self._judge(state)) for state in states), key=lambda pair: self._price(pair[1]))
        self._starts = [state for state, _ in judged]
        self._best = judged[0]
        for state, found in judged:
            self._offer(state, found)

    def recombine(self) -> None:
        """Makes the most promising state better by many changes at once."""
        state, others, idle = self._most_promising(), list(self._starts), 0
        while self._moves.count and idle < _IDLE_ROUNDS and self._passed() < _RECOMBINING:
            better = self._recombined(state, others)
            if better is state:
                idle += 1
            else:
                state, idle = better, 0
                others.append(state)
        self._starts = [state]

    def _most_promising(self) -> fitting.Evictions:
        return min([*self._starts, self._best[0]], key=lambda state: self._price(self._judge(state)))

    def _recombined(self, state: fitting.Evictions, others: Sequence[fitting.Evictions]) -> fitting.Evictions:
        """The best of what one change, or several that an integer program chooses, make of a state; or the state."""
        problem, rng = self._problem, self._rng
        now = self._judge(state)
        part_of = self._moves.parts()
        best, changes = (self._price(now), state), []

        def judge(other: fitting.Evictions) -> Worth:
            nonlocal best
            found = self._judge(other)
            self._note(other, found)
            if self._price(found) < best[0]:
                best = self._price(found), other
            return found

        some = rng.sample(others, min(len(others), _OTHERS))
        for change in self._moves.changes(state, part_of, some, self._target):
            if self._passed() >= _RECOMBINING:
                break
            try:
                other = change()
            except gaps.CantRecompute:
                continue
            touched = {part_of[gap] for gap in recombination.changed(state, other) if gap in part_of}
            live = other.outline.live - state.outline.live
            changes.append(recombination.Change(other, touched, live, judge(other)[1] - now[1]))
        missed = np.zeros(len(state.outline.live))  # by how much what was chosen holds more than the sum of its changes
        price = _PENALTY * self._plain / self._target
        for _ in range(_CORRECTIONS):
            picked = recombination.chosen(changes, state.outline.live + missed, self._target, price, _CHOOSING)
            if len(picked) < 2:
                break
            try:
                other = recombination.merged(problem, state, [changes[number].state for number in picked])
            except gaps.CantRecompute:
                break
            if not judge(other)[0]:
                break
            live = other.outline.live
            expected = state.outline.live + missed + sum(changes[number].live for number in picked)
            missed += np.where(live > self._target, np.maximum(live - expected, 0.0), 0.0)
        return best[1]

    def cool(self, cooling: int) -> None:
        """Anneals once, from the most promising state."""
        rng, count = self._rng, _TRIALS * self._moves.count
        start = self._most_promising()
        state, now, target = start, self._judge(start), self._target
        distance = max(self._price(now) - self._least_seconds, _ENOUGH * self._plain)
        warmth = min(_WARMTH * distance, _WARMEST * self._plain)
        for trial in range(count):
            done = max(self._passed() * _COOLINGS / _WARM - cooling, trial / count)
            if done >= 1.0:
                break
            try:
                neighbour = self._moves.neighbour(state, self._target)
            except gaps.CantRecompute:
                continue
            found = self._judge(neighbour)
            rise = self._price(found) - self._price(now)
            if rise <= 0.0 or rng.random() < math.exp(-rise / (warmth * (1.0 - done) ** 2 + 1e-30)):
                state, now = neighbour, found
            self._note(neighbour, found)
            if target != self._target:
                now, target = self._judge(state), self._target
        self._starts = []

    def descend(self) -> None:
        """Changes the best state that the allocator has taken, else the best, gap by gap, until nothing is better.

        What differs little from a state that it has taken has the best prospects.
        """
        if self._placed is not None:
            self._target, self._asks_always = float(self._memory_budget), True
            self._best = self._placed, (0.0, self._limit_seconds)
        is_better = True
        while is_better:
            is_better = False
            for change in self._moves.single():
                if self._passed() >= 1.0:
                    return
                base = self._placed or self._best[0]
                try:
                    neighbour = change(base)
                except gaps.CantRecompute:
                    continue
                if neighbour is not None:
                    is_better |= self._note(neighbour, self._judge(neighbour))

    def finished(self) -> fitting.Evictions | None:
        """What the allocator took; at last it is asked about the best, if it has not been."""
        self._asks_always = True
        self._offer(*self._best)
        return self._placed

    @property
    def _limit_seconds(self) -> float:
        """What takes as long is of no use any more."""
        return math.inf if self._placed is None else self._placed.outline.seconds

    def _judge(self, state: fitting.Evictions) -> Worth:
        self._judged += 1
        return worth(self._problem, state, self._target)

    def _price(self, found: Worth) -> float:
        return found[1] + found[0] / self._target * _PENALTY * self._plain

    def _passed(self) -> float:
        """The share of the time; 1 if there is nothing left to gain."""
        if self._limit_seconds <= self._least_seconds * (1.0 + _ENOUGH):
            return 1.0
        return min(1.0, (time.monotonic() - self._begin) / self._seconds)

    def _note(self, state: fitting.Evictions, found: Worth) -> bool:
        """Takes note of a state; whether it is the best so far, of those that the allocator takes if there are any."""
        limit = self._limit_seconds
        is_best = found < self._best[1]
        if is_best:
            self._best = state, found
        self._offer(state, found)
        return self._limit_seconds < limit if self._placed is not None else is_best

    def _offer(self, state: fitting.Evictions, found: Worth) -> None:
        """Asks the allocator about what would be the fastest."""
        if found[0] or found[1] >= self._limit_seconds:
            return
        if self._asked * _ASKING > self._judged and not self._asks_always:
            return
        self._asked += 1
        placed = fitting.placed(self._problem, state, self._memory_budget, self._target, self._limit_seconds)
        if placed is not None:
            self._placed = placed
        elif self._problem.cost_model.device.memory_bytes is not None and not self._asks_always:
            self._target *= _TIGHTENING if self._placed is self._given else _SLIGHTLY
            self._best = self._best[0], self._judge(self._best[0])


class _Moves:
    """Small changes of evictions.

    Attributes:
        count: How many gaps there are to change.
        rng: Chooses.
    """

    def __init__(self, problem: gaps.Gaps, rng: random.Random, indifference: Mapping[tuple[int, str], float]):
        self._problem = problem
        self.rng = rng
        least = _LEAST_SHARE * problem.live.max()
        self._gaps = [gap for gap, item in enumerate(problem.gaps) if item.nbytes >= least]
        self._starts = np.array([problem.gaps[gap].start for gap in self._gaps], int)
        self._ends = np.array([problem.gaps[gap].end for gap in self._gaps], int)
        self._kinds = collections.defaultdict[object, list[int]](list)
        self._kind_of = {gap: _kind(problem, gap) for gap in self._gaps}
        for gap in sorted(self._gaps, key=lambda gap: problem.gaps[gap].start):
            self._kinds[self._kind_of[gap]].append(gap)
        self.count = len(self._gaps)
        size = {gap: -problem.gaps[gap].nbytes * _length(problem.gaps[gap]) for gap in self._gaps}
        self._changes = sorted(
            itertools.product(self._gaps, ("swap", "recompute")),
            key=lambda change: (indifference.get(change, math.inf), size[change[0]]),
        )
        weights = [1.0 / (_FIRST + rank) for rank in range(len(self._changes))]
        self._cumulative = list(itertools.accumulate(weights))
        self._weight = dict.fromkeys(self._gaps, 0.0)
        for (gap, _), weight in zip(self._changes, weights, strict=True):
            self._weight[gap] = max(self._weight[gap], weight)

    def parts(self) -> Mapping[int, int]:
        """The gaps by parts of the step, a few or many."""
        return recombination.parts(self._problem, self._gaps, self.rng.choice(_PARTS), self.rng.random())

    def changes(
        self,
        state: fitting.Evictions,
        part_of: Mapping[int, int],
        others: Sequence[fitting.Evictions],
        target: float,
    ) -> Iterator[Callable[[], fitting.Evictions]]:
        """Small changes of a state, and large ones: all gaps of a part as one of the others treats them."""
        members = collections.defaultdict[int, set[int]](set)
        for gap, part in part_of.items():
            members[part].add(gap)
        for other in others:
            apart = recombination.changed(state, other)
            for among in members.values():
                if among & apart:
                    yield functools.partial(recombination.with_part_of, self._problem, state, other, among & apart)
        for _ in range(_SMALL_CHANGES):
            yield functools.partial(self.neighbour, state, target)

    def neighbour(self, state: fitting.Evictions, target: float) -> fitting.Evictions:
        """The evictions with a gap or a few changed, where memory overflows rather than elsewhere.

        Raises:
            gaps.CantRecompute: If a value can't be recomputed.
        """
        rng, live = self.rng, state.outline.live
        evicted, since, anchors = dict(state.evicted), dict(state.since), state.anchors
        fullest = int(live.argmax())
        if live[fullest] > target and rng.random() < _WHERE_FULL:
            anchors = self._relieve(evicted, since, anchors, fullest)
        else:
            gap = self._change(evicted, since)
            if evicted.get(gap) in _REPEATING and rng.random() < _HALF:
                anchors = frozenset(anchors) | self._dead_inputs(gap)
            if rng.random() < _OF_A_KIND:
                self._change_alike(evicted, since, gap)
            elif rng.random() < _TWICE:
                item = self._problem.gaps[gap]
                beside = np.flatnonzero((self._starts < item.end) & (self._ends > item.start))
                other = self._pick([self._gaps[number] for number in beside])
                _set(evicted, other, rng.choice([way for way in _WAYS if way != evicted.get(other, "")]))
        if rng.random() < _ANCHORS:
            anchors = self._other_anchors(state, anchors)
        return fitting.evictions(self._problem, evicted, anchors, since)

    def single(self) -> Iterator[Callable[[fitting.Evictions], fitting.Evictions | None]]:
        """All changes of one gap, the largest and longest first; None where it is so already."""
        problem = self._problem
        for gap in sorted(self._gaps, key=lambda gap: -problem.gaps[gap].nbytes * _length(problem.gaps[gap])):
            for way in _WAYS:
                yield functools.partial(self._with, gap, way, ())
            if inputs := self._dead_inputs(gap):
                for way in _REPEATING:
                    yield functools.partial(self._with, gap, way, inputs)

    def _with(self, gap: int, way: str, inputs: Collection[int], state: fitting.Evictions) -> fitting.Evictions | None:
        anchors = frozenset(state.anchors).union(inputs)
        if state.evicted.get(gap, "") == way and len(anchors) == len(state.anchors):
            return None
        evicted = dict(state.evicted)
        _set(evicted, gap, way)
        return fitting.evictions(self._problem, evicted, anchors, state.since)

    def _change(self, evicted: dict[int, str], since: dict[int, int]) -> int:
        """Gives a gap another way: often one that the program cares little about, else any, rather an evicted one."""
        rng = self.rng
        way = ""
        if rng.random() < _HALF:
            ((gap, way),) = rng.choices(self._changes, cum_weights=self._cumulative)
        else:
            present = [gap for gap in self._gaps if gap in evicted]
            gap = rng.choice(present if present and rng.random() < _HALF else self._gaps)
        now = evicted.get(gap, "")
        if gap in since and rng.random() < _HALF:
            del since[gap]
        elif way in ("", now):
            _set(evicted, gap, rng.choice([other for other in _WAYS if other != now]))
        else:
            _set(evicted, gap, _AGAIN[way] if rng.random() < _OFTEN_AGAIN else way)
        return gap

    def _other_anchors(self, state: fitting.Evictions, anchors: Collection[int]) -> frozenset[int]:
        """One anchor less, or something more that would make a chain of repeated nodes shorter."""
        rng, problem, anchors = self.rng, self._problem, frozenset(anchors)
        repeats = [decision for decision in state.decisions if isinstance(decision, Recompute)]
        if repeats and not (anchors and rng.random() < _HALF):
            repeat = rng.choice(repeats)
            place = problem.graph.position[repeat.before]
            made = (reference for name in repeat.nodes for reference in problem.graph.by_name[name].refs())
            roots = dict.fromkeys(problem.root_of[reference] for reference in made)
            found = [problem.storage_of[root] for root in roots if not problem.stays(root)]
            dead = [storage for storage in found if problem.storages[storage].uses[-1:] < (place,)]
            if dead:
                return anchors | {rng.choice(dead)}
        return anchors - {rng.choice(sorted(anchors))} if anchors else anchors

    def _dead_inputs(self, gap: int) -> set[int]:
        """What the gap's value is made of and nobody reads after the gap: kept, it is made again from that alone."""
        problem, item = self._problem, self._problem.gaps[gap]
        maker = problem.graph.by_name[ir.producer(problem.storages[item.storage].root)]
        roots = {problem.root_of[reference] for reference in maker.inputs}
        inputs = {problem.storage_of[root] for root in roots if not problem.stays(root)}
        return {storage for storage in inputs if problem.storages[storage].uses[-1] < item.end}

    def _pick(self, among: Sequence[int]) -> int:
        """One of the gaps, the more likely the less the program cares."""
        (gap,) = self.rng.choices(among, [self._weight[gap] for gap in among])
        return gap

    def _change_alike(self, evicted: dict[int, str], since: dict[int, int], gap: int) -> None:
        """Gives the next gaps of its kind, before or after it, the way of a gap."""
        rng, alike = self.rng, self._kinds[self._kind_of[gap]]
        place, count = alike.index(gap), rng.randint(1, len(alike))
        for other in alike[place : place + count] if rng.random() < _HALF else alike[max(0, place - count) : place]:
            since.pop(other, None)
            _set(evicted, other, evicted.get(gap, ""))

    def _relieve(
        self, evicted: dict[int, str], since: dict[int, int], anchors: Collection[int], position: int
    ) -> Collection[int]:
        """Takes something off the device at a position, or has less repeated there; returns the anchors.

        What goes right after the position can be written over there, if it is made again later.
        """
        rng = self.rng
        over = [self._gaps[number] for number in np.flatnonzero((self._starts < position) & (self._ends > position))]
        idle = [gap for gap in over if gap not in evicted or gap in since]
        early = [gap for gap in over if evicted.get(gap) in _AGAIN and gap not in since]  # may be back already
        repeated = [
            gap for gap, way in evicted.items() if way not in gaps.SWAPS and self._problem.gaps[gap].end == position
        ]
        read = [self._gaps[number] for number in np.flatnonzero(self._starts == position)]
        read = [gap for gap in read if gap not in evicted]
        options: list[tuple[int, str]] = []
        if idle:
            options.append((self._pick(idle), rng.choice(_WAYS[1:])))
        if early:
            gap = self._pick(early)
            options.append((gap, rng.choice((_AGAIN[evicted[gap]], "swap"))))
        if repeated:
            options.append((rng.choice(repeated), "swap"))
        if read:
            options.append((rng.choice(read), gaps.AGAIN))
        if options:
            gap, way = rng.choice(options)
            since.pop(gap, None)
            _set(evicted, gap, way)
            if gap in read:
                return frozenset(anchors) | self._dead_inputs(gap)
        return anchors


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
