"""Runs nodes and copies as `simulator` does, but follows only some buffers, and notes what time hangs on.

`Recorder` runs the whole plain step and notes how its buffers live; `Walk` runs what a plan touches beside them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

from graphswap import actions, allocator
from graphswap.cost_model import CostModel


class _Buffer:
    __slots__ = ("nbytes", "readers", "holders", "is_free", "number")

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self.readers = 0
        self.holders = 0
        self.is_free = False
        self.number = -1  # of a buffer of the plain step


class Choice(NamedTuple):
    """How the plain step placed an output that may be written over an input.

    Attributes:
        place: In the output's `overwrites`; their number if it got a new buffer.
        was_free: Of each of `overwrites`, whether it could be written over.
    """

    place: int
    was_free: Sequence[bool]


@dataclasses.dataclass(slots=True)
class Step:
    """The plain step, as `Recorder` saw it.

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
    choices: dict[int, Choice]
    nbytes: list[int]
    first: list[int]
    last: list[int]
    touching: list[set[int]]
    held: dict[int, str]
    variables: set[str]
    untouched: set[int]
    follows: dict[int, set[int]]


class Event(NamedTuple):
    """What takes time.

    Attributes:
        place: Position of the user's node that it is, or that comes after it.
        is_node: Whether it is that node, which then waits, or exchanges something with other replicas.
        action: What is inserted, or such a node; None for another one.
        waits: Versions that must be there.
    """

    place: int
    is_node: bool
    action: actions.Action | actions.Copy | None
    waits: Sequence[int] = ()


class Walk:
    """Runs entries as `simulator` does, but follows only some buffers; the others are None.

    Attributes:
        live: Bytes of what is followed.
        events: What takes time.
        differences: (buffer that is followed, buffer that is not): as the first lives differently than in the plain
            step, so does the second.
        altered: Versions of the plain step that could be written over other inputs there than here. If that is so in
            two parts, neither knows which it is.
    """

    def __init__(self, plain: actions.Plain, step: Step, followed: Collection[int], cost_model: CostModel):
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
        self.events: list[Event] = []
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
                self.events.append(Event(place, True, None, tuple(waits)))
        else:
            waits = ()
        if action.kind != "run":
            self.events.append(Event(place, False, action, tuple(waits)))
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
        self.events.append(Event(place, False, action))
        self._copied.add(target)
        buffer = self._buffers.get(source)
        live = self.live
        if action.leaves:
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


class Recorder(Walk):
    """Runs the plain step and notes how every buffer lives."""

    def __init__(self, plain: actions.Plain, entries: Sequence[actions.Entry], cost_model: CostModel):
        self._position = -1
        super().__init__(plain, Step([], {}, [], [], [], [], {}, set(), {-1}, {}), (), cost_model)
        self._entries = entries
        self.read(entries)

    def record(self) -> Step:
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
            self._step.choices[version] = Choice(place, was_free)
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


def _is_free_after(buffer: _Buffer) -> bool:
    """Whether nobody needs it but the node that runs."""
    return buffer.readers == 1 and not buffer.holders
