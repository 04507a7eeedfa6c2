"""What `simulate` says of a plan, worked out from the plain step and from what the plan changes of it. For search.

Most buffers live under a plan as they do without. Only those that hold what a plan moves or repeats, or what a
repeat reads, are followed anew, at the nodes that touch them; all others keep the places they have in the plain step.
A buffer that turns out to be written over at another moment than in the plain step is followed from then on, too.

Decisions that touch no buffer and no place in common change memory independently: their *parts* are worked out one by
one and kept, as the next plan of a search has most of them, too. Only the times of copies hang on all parts.

Known weaknesses: no allocator, no pairs, no order but the graph's own; `simulator.simulate` has the last word.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from graphswap import actions, allocator, ir
from graphswap.cost_model import CostModel
from graphswap.plan import Decision, Plan, Recompute, Swap

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


class _Buffer:
    __slots__ = ("nbytes", "readers", "holders", "is_free", "number")

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self.readers = 0
        self.holders = 0
        self.is_free = False
        self.number = -1  # of a buffer of the plain step


class _Choice(NamedTuple):
    """How the plain step placed an output that may be written over an input.

    Attributes:
        place: In the output's `overwrites`; their number if it got a new buffer.
        was_free: Of each of `overwrites`, whether it could be written over.
    """

    place: int
    was_free: Sequence[bool]


@dataclasses.dataclass(slots=True)
class _Step:
    """The plain step, as `_Recorder` saw it.

    Attributes:
        buffer_of: Version to the number of its buffer, -1 for none.
        choices: Of versions that may be written over an input.
        nbytes: Of each buffer.
        first: Position at which each is made; -1 if it is there before the step.
        last: Position at whose end each is gone; the number of nodes if it stays.
        touching: Positions that read, make or give up what lives in each.
        held: Buffer that is there before the step to the value in it.
        variables: The values in `held`.
        untouched: Buffers that stay through the step whatever a plan does; and -1, for none.
        follows: Buffer to others that must be followed when it is.
    """

    buffer_of: list[int]
    choices: dict[int, _Choice]
    nbytes: list[int]
    first: list[int]
    last: list[int]
    touching: list[set[int]]
    held: dict[int, str]
    variables: set[str]
    untouched: set[int]
    follows: dict[int, set[int]]


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
        self._step = _Recorder(self._plain, entries, cost_model).record()
        self._intervals = tuple(np.array(of, int) for of in (self._step.nbytes, self._step.first, self._step.last))
        self._at, self._before = self._lives(range(len(self._step.nbytes)))
        self._reaches: dict[Decision, _Reach] = {}
        self._parts: dict[tuple[Decision, ...], _Part] = {}
        self._at += cost_model.resident_bytes + np.array([fact.workspace.nbytes for fact in facts])
        self._before += cost_model.resident_bytes

    def outline(self, decisions: Sequence[Decision]) -> Outline:
        """What the step does under these decisions.

        Args:
            decisions: Swaps and recomputes that `Plan.check` accepts.
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
        if isinstance(decision, Swap):
            changed, read = {self._plain.version[decision.value]}, set()
            after = (position[decision.out_after] + 1, position[decision.in_after] + 1)
            places = {position[decision.freed_before], position[decision.in_before], *after}
            beside = {position[decision.out_after], position[decision.in_after]}
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
        """The part, from running what it touches; right if there are no differences: see `_Walk`."""
        position, count = self._graph.position, len(self._names)
        reaches = [self._reach(decision) for decision in decisions]
        followed = set().union(*(reach.buffers for reach in reaches))
        names = [self._names[place] for place in sorted(set().union(*(reach.names for reach in reaches)))]
        plan = Plan(decisions=decisions)
        repeated = {name for decision in plan.recomputes for name in decision.nodes}
        entries, _ = actions.expand(self._graph, plan, self._plain, names)
        pruned = [position[name] for name in repeated.difference(_runs(entries))] if repeated else []

        walk = _Walk(self._plain, self._step, followed, self._cost_model)
        walk.read(entries)
        at_first = walk.live
        done = 0  # how many of the user's nodes
        own: list[tuple[int, float]] = []  # position of a node, bytes while it runs
        inserted: list[tuple[int, float, float]] = []  # position of the node after it, bytes while it runs, seconds
        since, standing = [0], [walk.live]  # bytes between what is followed, and from which position on
        for name, action in entries:
            place = position[name]
            if isinstance(action, actions.Copy):
                done = place + 1
                inserted.append((done, walk.copy(action, done), 0.0))
            else:
                live = walk.compute(action, place)
                if action.kind == "run":
                    own.append((place, live))
                    done = place + 1
                else:
                    done = place
                    inserted.append((place, live + action.facts.workspace.nbytes, action.facts.seconds))
            since.append(done)
            standing.append(walk.live)
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
            events=walk.events,
            pruned=pruned,
            differences=walk.differences,
            altered=walk.altered,
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
        events = [(*event[:2], number, *event[2:]) for number, part in enumerate(parts) for event in part.events]
        for place, _, number, action, waits in sorted(events, key=_when):
            if isinstance(action, actions.Copy):
                now = float(clock[place]) + delay
                (source,), (target,) = action.inputs, action.outputs
                link, lane = self._cost_model.link(action.tier), (action.tier, action.kind)
                is_out = action.kind == "swap_out"
                end = max(now, lanes.get(lane, 0.0), ready.get((number, source), 0.0))
                end += link.out_seconds(action.nbytes) if is_out else link.in_seconds(action.nbytes)
                swapped_bytes += action.nbytes if is_out else 0
                lanes[lane] = ready[number, target] = end
                if action.is_synchronous or not link.overlaps:
                    delay = end - clock[place]
            else:
                for version in waits:
                    delay = max(delay, ready.get((number, version), 0.0) - clock[place])
                if action is not None:
                    delay += action.facts.seconds
        return float(max(clock[-1] + delay, *lanes.values(), 0.0)), swapped_bytes


_Event = tuple[int, int, "actions.Action | actions.Copy | None", Sequence[int]]
"""Place, 0 if inserted before its node and 1 if the node itself, what is inserted, versions to wait for."""


def _when(event: tuple[Any, ...]) -> tuple[int, int]:
    return event[:2]


class _Walk:
    """Runs entries as `simulator` does, but follows only some buffers; the others are None.

    Attributes:
        live: Bytes of what is followed.
        events: What takes time.
        differences: (buffer that is followed, buffer that is not): as the first lives differently than in the plain
            step, so does the second.
        altered: Versions of the plain step that could be written over other inputs there than here. If that is so in
            two parts, neither knows which it is.
    """

    def __init__(self, plain: actions.Plain, step: _Step, followed: Collection[int], cost_model: CostModel):
        self._plain = plain
        self._step = step
        self._followed = followed
        self._cost_model = cost_model
        self._readers = collections.Counter[int](plain.results)
        self._buffers: dict[int, _Buffer | None] = {}
        self._held: dict[str, _Buffer] = {}
        self._copied: set[int] = set()  # versions that nobody has waited for yet
        self._sources: dict[int, _Buffer] = {}
        self.live = 0.0
        self.events: list[_Event] = []
        self.differences: set[tuple[int, int]] = set()
        self.altered: set[int] = set()

    def read(self, entries: Sequence[actions.Entry]) -> None:
        """Looks through what will run; to be called once."""
        for _, action in entries:
            self._readers.update(action.inputs)
        for number in self._step.held.keys() & self._followed:
            buffer = self._held[self._step.held[number]] = self._new(self._step.nbytes[number])
            buffer.holders = 1

    def compute(self, action: actions.Action, place: int) -> float:
        """Runs a node; returns the bytes of what is followed while it runs."""
        buffers = self._buffers
        if self._copied:
            waits = self._copied.intersection((*action.waits, *action.inputs))
            self._copied -= waits
            if waits and action.kind == "run":
                self.events.append((place, 1, None, tuple(waits)))
        else:
            waits = ()
        if action.kind != "run":
            self.events.append((place, 0, action, tuple(waits)))
        for version in action.waits:
            self._release(self._sources.pop(version, None))
        facts = action.facts
        inputs = [buffers.get(version) for version in action.inputs]
        given_up = self._assign(action, inputs) if facts.assigns else None
        made = []
        for version, output in zip(action.outputs, facts.outputs, strict=True):
            buffer = self._place(action, version, output, inputs)
            if buffer is not None:
                buffers[version] = buffer
                buffer.readers += self._readers[version]
                made.append(buffer)
        live = self.live
        for buffer in inputs:
            if buffer is not None:
                buffer.readers -= 1
                if not buffer.readers:
                    self._drop(buffer)
        for buffer in made:
            self._drop(buffer)
        self._drop(given_up)
        return live

    def copy(self, action: actions.Copy, place: int) -> float:
        """Makes a copy; returns the bytes of what is followed meanwhile."""
        (source,), (target,) = action.inputs, action.outputs
        self.events.append((place, 0, action, ()))
        self._copied.add(target)
        buffer = self._buffers.get(source)
        live = self.live
        if action.kind == "swap_out":
            if action.is_synchronous:
                self._release(buffer)
            elif buffer is not None:
                self._sources[target] = buffer
        else:
            buffer = self._buffers[target] = self._new(allocator.rounded(action.nbytes))
            buffer.readers = self._readers[target]
            live = self.live + (allocator.rounded(action.piece_bytes) if action.piece_bytes else 0)
            self._drop(buffer)
        return live

    def _place(
        self, action: actions.Action, version: int, output: actions.Output, inputs: Sequence[_Buffer | None]
    ) -> _Buffer | None:
        _, nbytes, _, held, alias, overwrites = output
        if held is not None:
            return self._held.get(held)
        if alias is not None:
            return inputs[alias]
        if not nbytes:
            return None
        buffer_of = self._step.buffer_of
        own = buffer_of[version] if version < len(buffer_of) else -1  # -1: made by a repeat
        is_followed = own < 0 or own in self._followed
        if not overwrites:
            return self._new(nbytes) if is_followed else None
        if own >= 0:
            was_free = self._step.choices[version].was_free
            for place, slot in enumerate(overwrites):
                buffer = inputs[slot]
                if buffer is not None and _is_free_after(buffer) != was_free[place]:
                    self.altered.add(version)
        for place, slot in enumerate(overwrites):
            buffer = inputs[slot]
            if buffer is not None and _is_free_after(buffer):
                if is_followed:
                    return buffer
                if place < self._step.choices[version].place:
                    first = self._plain.actions[action.facts.name].inputs[slot]
                    self.differences.add((buffer_of[first], own))
            elif buffer is None and is_followed and own >= 0 and self._step.choices[version].was_free[place]:
                self.differences.add((own, buffer_of[action.inputs[slot]]))
        return self._new(nbytes) if is_followed else None

    def _assign(self, action: actions.Action, inputs: Sequence[_Buffer | None]) -> _Buffer | None:
        """Gives a variable its new value. Returns the buffer that it gave up, if that is followed."""
        variable, version = action.facts.assigns, action.inputs[1]
        has_bytes = inputs[1] is not None or (
            version < len(self._step.buffer_of) and self._step.buffer_of[version] >= 0
        )
        if variable not in self._step.variables or not has_bytes:
            return None
        old, new = self._held.get(variable), inputs[1]
        if action.facts.in_place:
            if old is None or (not old.readers and old.holders == 1):
                return None
            new = self._new(old.nbytes)
        if old is not None:
            old.holders -= 1
            del self._held[variable]
        if new is not None:
            new.holders += 1
            self._held[variable] = new
        return old

    def _new(self, nbytes: int) -> _Buffer:
        self.live += nbytes
        return _Buffer(nbytes)

    def _release(self, buffer: _Buffer | None) -> None:
        """One reader less."""
        if buffer is not None:
            buffer.readers -= 1
            if not buffer.readers:
                self._drop(buffer)

    def _drop(self, buffer: _Buffer | None) -> None:
        """Frees the buffer if nobody needs it."""
        if buffer is not None and not (buffer.readers or buffer.holders or buffer.is_free):
            buffer.is_free = True
            self.live -= buffer.nbytes


class _Recorder(_Walk):
    """Runs the plain step and notes how every buffer lives."""

    def __init__(self, plain: actions.Plain, entries: Sequence[actions.Entry], cost_model: CostModel):
        self._position = -1
        super().__init__(plain, _Step([], {}, [], [], [], [], {}, set(), {-1}, {}), (), cost_model)
        self._entries = entries
        self.read(entries)

    def record(self) -> _Step:
        """Runs the step."""
        step = self._step
        for _, action in self._entries:
            assert isinstance(action, actions.Action)
            for output in action.facts.outputs if action.facts.resides is not None else ():
                if output.nbytes:
                    buffer = self._held[output.reference] = self._new(output.nbytes)
                    buffer.holders = 1
                    step.held[buffer.number] = output.reference
                    step.variables.add(output.reference)
        for position, (_, action) in enumerate(self._entries):
            assert isinstance(action, actions.Action)
            self._position = position
            self.compute(action, position)
            for version in (*action.inputs, *action.outputs):
                self._touch(self._buffers.get(version))
        buffers = (self._buffers.get(version) for version in range(len(self._plain.version)))
        step.buffer_of = [-1 if buffer is None else buffer.number for buffer in buffers]
        assigned = {action.facts.assigns for _, action in self._entries if isinstance(action, actions.Action)}
        step.untouched.update(number for number, value in step.held.items() if value not in assigned)
        return step

    def _touch(self, buffer: _Buffer | None) -> None:
        if buffer is not None:
            self._step.touching[buffer.number].add(self._position)

    def _place(
        self, action: actions.Action, version: int, output: actions.Output, inputs: Sequence[_Buffer | None]
    ) -> _Buffer | None:
        if output.held is not None:
            return self._held.get(output.held)
        if output.alias is not None:
            return inputs[output.alias]
        if not output.nbytes:
            return None
        buffers = [inputs[slot] for slot in output.overwrites]
        was_free = [buffer is not None and _is_free_after(buffer) for buffer in buffers]
        place = was_free.index(True) if True in was_free else len(was_free)
        if was_free:
            self._step.choices[version] = _Choice(place, was_free)
        return buffers[place] if place < len(was_free) else self._new(output.nbytes)

    def _assign(self, action: actions.Action, inputs: Sequence[_Buffer | None]) -> _Buffer | None:
        variable = action.facts.assigns
        old, new = self._held.get(variable), inputs[1]
        if old is None or new is None:
            return None
        self._touch(old)
        if action.facts.in_place:
            if not old.readers and old.holders == 1:
                return None
            new = self._new(old.nbytes)
            self._step.follows.setdefault(old.number, set()).add(new.number)
            self._step.follows.setdefault(new.number, set()).add(old.number)
        self._touch(new)
        new.holders += 1
        old.holders -= 1
        self._held[variable] = new
        return old

    def _new(self, nbytes: int) -> _Buffer:
        buffer = super()._new(nbytes)
        step = self._step
        buffer.number = len(step.nbytes)
        step.nbytes.append(nbytes)
        step.first.append(self._position)
        step.last.append(len(self._entries))
        step.touching.append(set())
        return buffer

    def _drop(self, buffer: _Buffer | None) -> None:
        was_free = buffer is None or buffer.is_free
        super()._drop(buffer)
        if buffer is not None and buffer.is_free and not was_free:
            self._step.last[buffer.number] = self._position


class _Reach(NamedTuple):
    """What a decision may change.

    Attributes:
        buffers: That are to be followed.
        places: Positions before which it inserts something or makes something wait.
        names: Positions of the nodes to run.
        changed: Versions that it moves or makes again.
        read: Versions that what it repeats reads.
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
        differences: As in `_Walk`.
        altered: Likewise.
    """

    decisions: tuple[Decision, ...]
    at: _Changes
    before: _Changes
    at_first: float
    places: np.ndarray
    inserted: np.ndarray
    seconds: np.ndarray
    events: Sequence[_Event]
    pruned: Sequence[int]
    differences: set[tuple[int, int]]
    altered: set[int]


def _make_room(kept: dict[Any, Any]) -> None:
    """Forgets all when it is much."""
    if len(kept) >= _MOST_KEPT:
        kept.clear()


def _runs(entries: Sequence[actions.Entry]) -> list[str]:
    """The user's nodes that run."""
    return [action.facts.name for _, action in entries if isinstance(action, actions.Action) and action.kind == "run"]


def _is_free_after(buffer: _Buffer) -> bool:
    """Whether nobody needs it but the node that runs."""
    return buffer.readers == 1 and not buffer.holders
