"""What `simulate` says of a plan, worked out from the plain step and from what the plan changes of it. For search.

Most buffers live under a plan as they do without. Only those that hold what a plan moves or repeats, or what a
repeat reads, are followed anew, at the nodes that touch them; all others keep the places they have in the plain step.
A buffer that turns out to be written over at another moment than in the plain step is followed from then on, too.

Known weaknesses: no allocator, no pairs, no order but the graph's own; `simulator.simulate` has the last word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from graphswap import actions, allocator, ir
from graphswap.cost_model import CostModel
from graphswap.plan import Decision, Plan


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
        held: Value before the step to its buffer.
        follows: Buffer to others that must be followed when it is.
    """

    buffer_of: list[int]
    choices: dict[int, _Choice]
    nbytes: list[int]
    first: list[int]
    last: list[int]
    touching: list[set[int]]
    held: dict[str, int]
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
        self._at += cost_model.resident_bytes + np.array([fact.workspace.nbytes for fact in facts])
        self._before += cost_model.resident_bytes

    def outline(self, decisions: Sequence[Decision]) -> Outline:
        """What the step does under these decisions.

        Args:
            decisions: Swaps and recomputes that `Plan.check` accepts.
        """
        plan = Plan(decisions=tuple(decisions))
        position, last = self._graph.position, len(self._names) - 1
        repeated = {name for decision in plan.recomputes for name in decision.nodes}
        start: set[int] = set()
        places = {position[decision.before] for decision in plan.recomputes}
        for swap in plan.swaps:
            start.add(self._step.buffer_of[self._plain.version[swap.value]])
            names = (swap.out_after, swap.freed_before, swap.in_after, swap.in_before)
            places.update(position[name] for name in names)
        for name in repeated:
            places.update((position[name], min(position[name] + 1, last)))
            action = self._plain.actions[name]
            start.update(self._step.buffer_of[version] for version in (*action.inputs, *action.outputs))
        while True:
            followed = self._closure(start)
            names = [self._names[p] for p in sorted(places.union(*(self._step.touching[b] for b in followed)))]
            outline, differences = self._outline(plan, repeated, followed, names)
            if not differences:
                return outline
            for cause, buffer in differences:
                self._step.follows.setdefault(cause, set()).add(buffer)

    def _closure(self, start: Iterable[int]) -> set[int]:
        found = set(start)
        pending = list(found)
        while pending:
            new = self._step.follows.get(pending.pop(), set()) - found
            found |= new
            pending += new
        found.discard(-1)
        return found

    def _lives(self, buffers: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that buffers of the plain step take while each node runs, and before each node and after the last."""
        count = len(self._names)
        numbers = np.fromiter(buffers, int)
        nbytes, first, last = (of[numbers] for of in self._intervals)
        made = np.cumsum(np.bincount(first + 1, nbytes, count + 2))
        gone = np.cumsum(np.bincount(last + 1, nbytes, count + 2))
        return made[1:-1] - gone[:-2], made[:-1] - gone[:-1]

    def _outline(
        self, plan: Plan, repeated: set[str], followed: set[int], names: Sequence[str]
    ) -> tuple[Outline, set[tuple[int, int]]]:
        """The outline, which is right if there are no differences: see `_Walk`."""
        position = self._graph.position
        entries, versions = actions.expand(self._graph, plan, self._plain, names)
        pruned = [position[name] for name in repeated.difference(_runs(entries))] if repeated else []
        busy = self._seconds.copy()
        busy[pruned] = 0.0
        clock = [0.0, *np.cumsum(busy).tolist()]
        at, before = self._lives(followed)
        at, before = self._at - at, (self._before - before).tolist()  # what is not followed

        walk = _Walk(self._plain, self._step, followed, entries, versions, self._cost_model)
        now, done = 0.0, 0  # done: how many of the user's nodes
        own: list[tuple[int, float]] = []  # position of a node, bytes while it runs
        inserted: list[tuple[int, float, float]] = []  # position of the node after it, bytes while it runs, seconds
        since, standing = [0], [walk.live]  # bytes between what is followed, and from which position on
        for name, action in entries:
            place = position[name]
            start = place + isinstance(action, actions.Copy)
            if done < start:
                now += clock[start] - clock[done]
                done = start
            if isinstance(action, actions.Copy):
                now, live = walk.copy(action, now)
                inserted.append((done, before[done] + live, 0.0))
            else:
                now, live = walk.compute(action, now)
                if action.kind == "run":
                    own.append((place, at[place] + live))
                    done = place + 1
                else:
                    live += action.facts.workspace.nbytes
                    inserted.append((place, before[place] + live, action.facts.seconds))
            since.append(done)
            standing.append(walk.live)
        now += clock[-1] - clock[done]

        live = at + np.repeat(standing, np.diff([*since, len(self._names)]))
        live[[place for place, _ in own]] = [nbytes for _, nbytes in own]
        live[pruned] = 0.0
        peak = max(live.max(), before[0] + standing[0], *(nbytes for _, nbytes, _ in inserted), 0.0)
        gone = set(pruned)
        for place, nbytes, seconds in inserted:
            while place in gone:
                place += 1
            if place < len(live):
                live[place] = max(live[place], nbytes)
                busy[place] += seconds
        recomputed = sum(seconds for _, _, seconds in inserted)
        end = float(max(now, *walk.lanes.values(), 0.0))
        return Outline(live, busy, int(peak), end, walk.swapped_bytes, recomputed), walk.differences


class _Walk:
    """Runs entries as `simulator` does, but follows only some buffers; the others are None.

    Attributes:
        live: Bytes of what is followed.
        lanes: When each lane is free.
        swapped_bytes: Copied off the device so far.
        differences: (buffer that is followed, buffer that is not): as the first lives differently than in the plain
            step, so does the second.
    """

    def __init__(
        self,
        plain: actions.Plain,
        step: _Step,
        followed: Container[int],
        entries: Sequence[actions.Entry],
        versions: int,
        cost_model: CostModel,
    ):
        self._plain = plain
        self._step = step
        self._followed = followed
        self._cost_model = cost_model
        self._readers = [0] * versions
        for version in plain.results:
            self._readers[version] += 1
        for _, action in entries:
            for version in action.inputs:
                self._readers[version] += 1
        self._buffers: list[_Buffer | None] = [None] * versions
        self._held: dict[str, _Buffer] = {}
        self._ready: dict[int, float] = {}
        self._sources: dict[int, _Buffer] = {}
        self.live = 0.0
        self.lanes: dict[tuple[str, str], float] = {}
        self.swapped_bytes = 0
        self.differences: set[tuple[int, int]] = set()
        for value, number in step.held.items():
            if number in followed:
                self._held[value] = self._new(step.nbytes[number])
                self._held[value].holders = 1

    def compute(self, action: actions.Action, now: float) -> tuple[float, float]:
        """Runs a node; returns when it is done, and the bytes of what is followed while it runs."""
        buffers = self._buffers
        if self._ready:
            for version in (*action.waits, *action.inputs):
                now = max(now, self._ready.pop(version, now))
        for version in action.waits:
            self._release(self._sources.pop(version, None))
        facts = action.facts
        inputs = [buffers[version] for version in action.inputs]
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
        return now + facts.seconds, live

    def copy(self, action: actions.Copy, now: float) -> tuple[float, float]:
        """Starts a copy; returns when the next node may run, and the bytes of what is followed meanwhile."""
        (source,), (target,) = action.inputs, action.outputs
        link, lane = self._cost_model.link(action.tier), (action.tier, action.kind)
        start = max(now, self.lanes.get(lane, 0.0), self._ready.get(source, 0.0))
        buffer = self._buffers[source]
        if action.kind == "swap_out":
            end = start + link.out_seconds(action.nbytes)
            live = self.live
            self.swapped_bytes += action.nbytes
            if action.is_synchronous:
                self._release(buffer)
            elif buffer is not None:
                self._sources[target] = buffer
        else:
            end = start + link.in_seconds(action.nbytes)
            buffer = self._buffers[target] = self._new(allocator.rounded(action.nbytes))
            buffer.readers = self._readers[target]
            live = self.live + (allocator.rounded(action.piece_bytes) if action.piece_bytes else 0)
            self._drop(buffer)
        self.lanes[lane] = self._ready[target] = end
        return (end if action.is_synchronous or not link.overlaps else now), live

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
        if variable not in self._step.held or not has_bytes:
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
        step = _Step([], {}, [], [], [], [], {}, {})
        super().__init__(plain, step, (), entries, len(plain.version), cost_model)
        self._entries = entries

    def record(self) -> _Step:
        """Runs the step."""
        step = self._step
        for _, action in self._entries:
            assert isinstance(action, actions.Action)
            for output in action.facts.outputs if action.facts.resides is not None else ():
                if output.nbytes:
                    buffer = self._held[output.reference] = self._new(output.nbytes)
                    buffer.holders = 1
                    step.held[output.reference] = buffer.number
        for position, (_, action) in enumerate(self._entries):
            assert isinstance(action, actions.Action)
            self._position = position
            self.compute(action, 0.0)
            for version in (*action.inputs, *action.outputs):
                self._touch(self._buffers[version])
        step.buffer_of = [-1 if buffer is None else buffer.number for buffer in self._buffers]
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


def _runs(entries: Sequence[actions.Entry]) -> list[str]:
    """The user's nodes that run."""
    return [action.facts.name for _, action in entries if isinstance(action, actions.Action) and action.kind == "run"]


def _is_free_after(buffer: _Buffer) -> bool:
    """Whether nobody needs it but the node that runs."""
    return buffer.readers == 1 and not buffer.holders
