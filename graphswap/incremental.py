"""What `simulate` says of a plan, worked out from the plain step and from what the plan changes of it. For search.

Most buffers live under a plan as they do without. Only those that hold what a plan moves or repeats, or what a
repeat reads, are followed anew, at the nodes that touch them; all others keep the places they have in the plain step.
A buffer that turns out to be written over at another moment than in the plain step is followed from then on, too.

Decisions that touch no buffer and no place in common change memory independently: their *parts* are worked out one by
one and kept, as the next plan of a search has most of them, too. Only the times of copies hang on all parts.

Known weaknesses: no allocator, no pairs, no order but the graph's own; `simulator.simulate` has the last word.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from graphswap import actions, ir, walk
from graphswap.cost_model import NETWORK_LANE, CostModel
from graphswap.plan import Decision, Plan, Prefetch, Recompute, Swap, WriteBack

_MOST_KEPT = 5_000
"""Parts, and likewise decisions: a plan of a search needs those of the one before."""


class Outline(NamedTuple):
    """A step by positions of the user's nodes.

    Attributes:
        live: Bytes in use at each node, shape (nodes,); what is inserted counts for the user's node after it, and
            one that need not run any more has none.
        busy: Seconds that each computes, with what is repeated before it, shape (nodes,).
        peak_bytes: As in `simulator.Timeline`.
        seconds: Likewise.
        swapped_bytes: Likewise.
        recomputed_seconds: Likewise.
    """

    live: np.ndarray
    busy: np.ndarray
    peak_bytes: int
    seconds: float
    swapped_bytes: int
    recomputed_seconds: float


class Incremental:
    """One graph in its own order, ready for many plans."""

    def __init__(self, graph: ir.Graph, cost_model: CostModel):
        self._graph = graph
        self._cost_model = cost_model
        self._plain = actions.plain(graph, cost_model)
        self._names = tuple(graph.position)
        entries = list(self._plain.actions.items())
        facts = [action.facts for _, action in entries if isinstance(action, actions.Action)]
        self._seconds = np.array([fact.seconds for fact in facts])
        self._step = walk.Recorder(self._plain, entries, cost_model).record()
        self._exchanges = _exchanges([action for _, action in entries if isinstance(action, actions.Action)])
        self._intervals = tuple(np.array(of, int) for of in (self._step.nbytes, self._step.first, self._step.last))
        self._at, self._before = self._lives(range(len(self._step.nbytes)))
        self._reaches: dict[Decision, _Reach] = {}
        self._parts: dict[tuple[Decision, ...], _Part] = {}
        self._at += cost_model.resident_bytes + np.array([fact.workspace.nbytes for fact in facts])
        self._before += cost_model.resident_bytes

    def outline(self, decisions: Sequence[Decision]) -> Outline:
        """What the step does under these decisions.

        Args:
            decisions: Those that move values or repeat nodes, and that `Plan.check` accepts.
        """
        together: list[tuple[Decision, ...]] = []
        while True:
            parts = [self._part(group) for group in self._groups(decisions, together)]
            differences = set().union(*(part.differences for part in parts))
            for cause, buffer in differences:
                self._step.follows.setdefault(cause, set()).add(buffer)
            if differences:
                self._reaches.clear()
                self._parts.clear()
                continue
            owner: dict[int, _Part] = {}
            clashes = [
                (owner[version].decisions + part.decisions)
                for part in parts
                for version in part.altered
                if owner.setdefault(version, part) is not part
            ]
            if not clashes:
                return self._joined(parts)
            together += clashes

    def _groups(
        self, decisions: Sequence[Decision], together: Sequence[Sequence[Decision]]
    ) -> Iterable[tuple[Decision, ...]]:
        """The decisions by what they have in common, each group in their order.

        Args:
            decisions: All.
            together: Some that belong together for other reasons.
        """
        leader = list(range(len(decisions)))
        first: dict[int, int] = {}  # buffer, or place as a negative number, to the first decision that reaches it

        def find(number: int) -> int:
            while leader[number] != number:
                leader[number] = number = leader[leader[number]]
            return number

        reaches = [self._reach(decision) for decision in decisions]
        changed: dict[int, int] = {}  # version to the first decision that makes another one of it
        for number, reach in enumerate(reaches):
            for one in itertools.chain(reach.buffers, (~place for place in reach.places)):
                other = first.setdefault(one, number)
                if other != number:
                    leader[find(number)] = find(other)
            for version in reach.changed:
                leader[find(number)] = find(changed.setdefault(version, number))
        for number, reach in enumerate(reaches):
            for version in reach.read & changed.keys():
                leader[find(number)] = find(changed[version])
        if together:
            numbers = {decision: number for number, decision in enumerate(decisions)}
            for one, *others in together:
                for other in others:
                    leader[find(numbers[other])] = find(numbers[one])
        groups: dict[int, list[Decision]] = {}
        for number, decision in enumerate(decisions):
            groups.setdefault(find(number), []).append(decision)
        return map(tuple, groups.values())

    def _reach(self, decision: Decision) -> _Reach:
        """The buffers and places that a decision may change."""
        found = self._reaches.get(decision)
        if found is not None:
            return found
        position, last = self._graph.position, len(self._names) - 1
        buffer_of = self._step.buffer_of
        waiting = ""  # the node that waits for a copy: if it is repeated, and this run is left out, another one waits
        if isinstance(decision, Swap):
            changed, read = {self._plain.version[decision.value]}, set()
            after = (position[decision.out_after] + 1, position[decision.in_after] + 1)
            places = {position[decision.freed_before], position[decision.in_before], *after}
            beside = {position[decision.out_after], position[decision.in_after]}
            waiting = decision.freed_before
        elif isinstance(decision, Prefetch | WriteBack):
            node = position[decision.node]
            # What would have waited where it stood, the next one does, be it a repeat.
            places, beside = {node, min(node + 1, last)}, set()
            if isinstance(decision, Prefetch):
                changed, read = {self._plain.version[decision.node]}, set()
                places |= {position[decision.after] + 1, position[decision.before]}
                beside.add(position[decision.after])
            else:
                changed, read = set(), {self._plain.actions[decision.node].inputs[0]}
                places.add(position.get(decision.freed_before, node))
                places.update(position[name] for name in self._graph.waiting.get(decision.node, ()))
                waiting = decision.freed_before
        else:
            assert isinstance(decision, Recompute)
            changed, read, places, beside = set(), set(), {position[decision.before]}, set()
            for name in decision.nodes:
                beside.update((position[name], min(position[name] + 1, last)))
                action = self._plain.actions[name]
                changed.update(action.outputs)
                read.update(action.inputs)
        moved = {buffer_of[version] for version in changed} - {-1}
        buffers = self._closure(moved.union(buffer_of[version] for version in read)) - self._step.untouched | moved
        names = {place for place in places if place <= last}.union(beside, *(self._step.touching[b] for b in buffers))
        if waiting:
            read = read.union(self._plain.actions[waiting].outputs)
        _make_room(self._reaches)
        found = self._reaches[decision] = _Reach(
            frozenset(buffers), frozenset(places), frozenset(names), frozenset(changed), frozenset(read)
        )
        return found

    def _closure(self, start: Iterable[int]) -> set[int]:
        found = set(start)
        pending = list(found)
        while pending:
            new = self._step.follows.get(pending.pop(), set()) - found
            found |= new
            pending += new
        return found

    def _lives(self, buffers: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that buffers of the plain step take while each node runs, and before each node and after the last."""
        count = len(self._names)
        numbers = np.fromiter(buffers, int)
        nbytes, first, last = (of[numbers] for of in self._intervals)
        made = np.cumsum(np.bincount(first + 1, nbytes, count + 2))
        gone = np.cumsum(np.bincount(last + 1, nbytes, count + 2))
        return made[1:-1] - gone[:-2], made[:-1] - gone[:-1]

    def _part(self, decisions: tuple[Decision, ...]) -> _Part:
        """What a group of decisions changes."""
        found = self._parts.get(decisions)
        if found is None:
            _make_room(self._parts)
            found = self._parts[decisions] = self._walked(decisions)
        return found

    def _walked(self, decisions: tuple[Decision, ...]) -> _Part:
        """The part, from running what it touches; right if there are no differences: see `walk.Walk`."""
        position, count = self._graph.position, len(self._names)
        reaches = [self._reach(decision) for decision in decisions]
        followed = set().union(*(reach.buffers for reach in reaches))
        names = [self._names[place] for place in sorted(set().union(*(reach.names for reach in reaches)))]
        plan = Plan(decisions=decisions)
        repeated = {name for decision in plan.recomputes for name in decision.nodes}
        entries, _ = actions.expand(self._graph, plan, self._plain, names)
        moved = {decision.node for decision in plan.prefetches if decision.node == decision.before}
        moved.update(decision.node for decision in plan.write_backs)
        absent = (repeated | moved).difference(_runs(entries)) if repeated or moved else ()
        pruned = [position[name] for name in absent]

        run = walk.Walk(self._plain, self._step, followed, self._cost_model)
        run.read(entries)
        at_first = run.live
        done = 0  # how many of the user's nodes
        own: list[tuple[int, float]] = []  # position of a node, bytes while it runs
        inserted: list[tuple[int, float, float]] = []  # position of the node after it, bytes while it runs, seconds
        since, standing = [0], [run.live]  # bytes between what is followed, and from which position on
        for name, action in entries:
            place = position[name]
            if isinstance(action, actions.Copy):
                done = place + 1
                inserted.append((done, run.copy(action, done), 0.0))
            else:
                live = run.compute(action, place)
                if action.kind == "run":
                    own.append((place, live))
                    done = place + 1
                else:
                    done = place
                    inserted.append((place, live + action.facts.workspace.nbytes, action.facts.seconds))
            since.append(done)
            standing.append(run.live)
        before = np.repeat(standing, np.diff([*since, count + 1]))
        at = before[:-1].copy()
        at[[place for place, _ in own]] = [nbytes for _, nbytes in own]
        plain_at, plain_before = self._lives(followed)
        places = np.array([place for place, _, _ in inserted], int)
        return _Part(
            decisions=decisions,
            at=_Changes.of(at - plain_at),
            before=_Changes.of(before - plain_before),
            at_first=at_first - float(plain_before[0]),
            places=places,
            inserted=np.array([nbytes for _, nbytes, _ in inserted], float) - before[places],
            seconds=np.array([seconds for _, _, seconds in inserted], float),
            events=run.events,
            pruned=pruned,
            differences=run.differences,
            altered=run.altered,
        )

    def _joined(self, parts: Sequence[_Part]) -> Outline:
        """The outline of the step with all parts."""
        count = len(self._names)
        pruned = [place for part in parts for place in part.pruned]
        busy = self._seconds.copy()
        busy[pruned] = 0.0
        live = self._at + _Changes.summed([part.at for part in parts], count)
        live[pruned] = 0.0
        before = self._before + _Changes.summed([part.before for part in parts], count + 1)
        places = np.concatenate([np.empty(0, int), *(part.places for part in parts)])
        seconds = np.concatenate([np.empty(0), *(part.seconds for part in parts)])
        inserted = before[places] + np.concatenate([np.empty(0), *(part.inserted for part in parts)])
        at_first = self._before[0] + sum(part.at_first for part in parts)
        peak = max(live.max(initial=0.0), at_first, inserted.max(initial=0.0))
        end, swapped_bytes = self._timed(parts, np.concatenate([[0.0], np.cumsum(busy)]))
        if pruned:  # what is inserted before a node that does not run stands before the next one
            following = np.arange(count + 1)
            for place in sorted(pruned, reverse=True):
                following[place] = following[place + 1]
            places = following[places]
        there = places < count
        np.maximum.at(live, places[there], inserted[there])
        np.add.at(busy, places[there], seconds[there])
        return Outline(live, busy, int(peak), end, swapped_bytes, float(seconds.sum()))

    def _timed(self, parts: Sequence[_Part], clock: np.ndarray) -> tuple[float, int]:
        """When the step ends, and the bytes that are copied out.

        Args:
            parts: What is inserted and what waits.
            clock: When each node would start if nothing were inserted and nothing waited, and the end.
        """
        delay = 0.0  # by what is inserted and by waiting
        swapped_bytes = 0
        lanes: dict[tuple[str, str], float] = {}
        ready: dict[tuple[int, int], float] = {}  # of a part, a version: when it is there
        events = [(number, event) for number, part in enumerate(parts) for event in part.events]
        events += [(-1, event) for event in self._exchanges]
        for number, (place, is_node, action, waits) in sorted(events, key=lambda numbered: numbered[1][:2]):
            if isinstance(action, actions.Copy):
                now = float(clock[place]) + delay
                (source,), (target,) = action.inputs, action.outputs
                link, lane = self._cost_model.link(action.tier), action.lane
                end = max(now, lanes.get(lane, 0.0), ready.get((number, source), 0.0))
                end += action.duration(link)
                swapped_bytes += action.nbytes if action.kind == "swap_out" else 0
                lanes[lane] = ready[number, target] = end
                if action.is_synchronous or not link.overlaps:
                    delay = end - clock[place]
            else:
                for version in waits:
                    delay = max(delay, ready.get((number, version), 0.0) - clock[place])
                if action is None:
                    continue
                if not is_node:
                    delay += action.facts.seconds
                    continue
                begun = max(float(clock[place + 1]) + delay, lanes.get(NETWORK_LANE, 0.0))
                end = lanes[NETWORK_LANE] = begun + action.facts.network_seconds
                if action.facts.is_awaited:
                    ready[number, action.outputs[0]] = end
                else:
                    delay = end - clock[place + 1]
        return float(max(clock[-1] + delay, *lanes.values(), 0.0)), swapped_bytes


class _Reach(NamedTuple):
    """What a decision may change.

    Attributes:
        buffers: That are to be followed.
        places: Positions before which it inserts something or makes something wait.
        names: Positions of the nodes to run.
        changed: Versions that it moves or makes again.
        read: Versions that what it repeats reads, or that the node makes which waits for it.
    """

    buffers: frozenset[int]
    places: frozenset[int]
    names: frozenset[int]
    changed: frozenset[int]
    read: frozenset[int]


class _Changes(NamedTuple):
    """A function of position by its steps.

    Attributes:
        places: Where it changes.
        steps: By how much.
    """

    places: np.ndarray
    steps: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> _Changes:
        """The steps of an array of shape (positions,)."""
        steps = np.diff(values, prepend=0.0)
        places = np.flatnonzero(steps)
        return cls(places, steps[places])

    @classmethod
    def summed(cls, changes: Sequence[_Changes], count: int) -> np.ndarray:
        """The sum of all as an array of shape (count,)."""
        places = np.concatenate([np.empty(0, int), *(one.places for one in changes)])
        return np.cumsum(np.bincount(places, np.concatenate([np.empty(0), *(one.steps for one in changes)]), count))


class _Part(NamedTuple):
    """What decisions that have something in common change of the plain step.

    Attributes:
        decisions: These.
        at: Bytes in use while each of the user's nodes runs.
        before: Bytes in use before each, and after the last, when what is inserted there has run.
        at_first: Bytes in use before the step.
        places: Of what is inserted: the position of the node after it.
        inserted: Bytes while that runs, beyond `before`.
        seconds: Of that, if it computes.
        events: What takes time.
        pruned: Positions of nodes that need not run any more.
        differences: As in `walk.Walk`.
        altered: Likewise.
    """

    decisions: tuple[Decision, ...]
    at: _Changes
    before: _Changes
    at_first: float
    places: np.ndarray
    inserted: np.ndarray
    seconds: np.ndarray
    events: Sequence[walk.Event]
    pruned: Sequence[int]
    differences: set[tuple[int, int]]
    altered: set[int]


def _exchanges(nodes: Sequence[actions.Action]) -> list[walk.Event]:
    """What the plain step does on the network, and what waits for it."""
    events = []
    awaited: set[int] = set()
    for place, action in enumerate(nodes):
        if waits := tuple(awaited.intersection(action.inputs)):
            events.append(walk.Event(place, True, None, waits))
            awaited.difference_update(waits)
        if action.facts.network_seconds:
            events.append(walk.Event(place, True, action))
            awaited.update(action.outputs[:1] if action.facts.is_awaited else ())
    return events


def _make_room(kept: dict[Any, Any]) -> None:
    """Forgets all when it is much."""
    if len(kept) >= _MOST_KEPT:
        kept.clear()


def _runs(entries: Sequence[actions.Entry]) -> list[str]:
    """The user's nodes that run."""
    return [action.facts.name for _, action in entries if isinstance(action, actions.Action) and action.kind == "run"]
