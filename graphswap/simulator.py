"""simulate(graph, plan, cost_model) -> Timeline: runs a step on paper. The only judge of a plan.

The model is in-order execution, which `rewrites.ordering` enforces: one compute lane, one lane per direction of
every link, and one on which replicas exchange gradients, one collective at a time. Buffers are counted as TensorFlow's
executor counts them: one reference per input that still waits to read; an elementwise op writes over an input that
nobody else waits for; a buffer is free after its last reader, with two nodes side by side after both. What
leaves beside compute, a SwapOut's source or what a STORE writes back, is counted until the node that waits for it
starts, what arrives, a SwapIn's or FETCH's target, from the node that starts it, what is exchanged until its AWAIT has
run, so the peak holds however fast the links are.

Known weaknesses: ops outside the chain (none after `ordering`) and TensorFlow's own graph optimiser can
change which elementwise op writes over which input. Two nodes side by side are given the sum of their seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from graphswap import actions, ir
from graphswap import allocator as allocator_lib
from graphswap.cost_model import NETWORK_LANE, CostModel
from graphswap.plan import Plan


class Step(NamedTuple):
    """One entry of a timeline.

    Attributes:
        name: Node name; a repeated node carries the name of the first one, a copy that of its value.
        kind: "run", "exchange" for one that runs on the network beside others, "recompute", "swap_out", "swap_in", or
            "fetch" and "store" for those that run beside compute.
        start: Seconds from the start of the step.
        end: Likewise.
        live_bytes: Device bytes in use at this step's worst moment.
    """

    name: str
    kind: str
    start: float
    end: float
    live_bytes: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What one step does.

    Attributes:
        steps: In execution order.
        peak_bytes: The most device bytes in use, resident ones included, each buffer rounded to 256 bytes.
        allocated_peak_bytes: The same as the device's allocator counts it, with the slack of its chunks;
            equal to `peak_bytes` if no allocator was modelled.
        seconds: Length of the step.
        swapped_bytes: Bytes copied to the far tier.
        recomputed_seconds: Seconds of repeated nodes.
        peak_step: The first step that reaches the peak, as the allocator counts it if one was modelled.
    """

    steps: tuple[Step, ...]
    peak_bytes: int
    allocated_peak_bytes: int
    seconds: float
    swapped_bytes: int
    recomputed_seconds: float
    peak_step: Step


class NoRoom(Exception):
    """The modelled allocator ran out during a step.

    Attributes:
        after: The last of the user's nodes that had run; "" at the start of a step.
        nbytes: The request that failed.
        layout: All chunks as (address, bytes, owner), by address; the owner is the value that lives there,
            "" for other uses, None for a free chunk.
    """

    def __init__(self, after: str, nbytes: int, layout: Sequence[tuple[int, int, str | None]]):
        super().__init__(f"no room for {nbytes} bytes after node '{after}'")
        self.after = after
        self.nbytes = nbytes
        self.layout = layout


def simulate(
    graph: ir.Graph,
    plan: Plan,
    cost_model: CostModel,
    *,
    allocator: allocator_lib.Allocator | None = None,
    second_first: Container[str] = (),
) -> Timeline:
    """Runs the step under the plan.

    It begins as `placement` leaves the device: variables packed, the largest first, the batch, holes for small
    buffers, constants, then one free chunk.

    Args:
        graph: The user's graph, or a rewritten one with an empty plan.
        plan: What to do; checked by the caller.
        cost_model: Seconds and bytes.
        allocator: A fresh model of the device's allocator. Every buffer is then placed in it.
        second_first: Second nodes of pairs that ask for memory before the first one does; both happen.

    Raises:
        NoRoom: If the modelled allocator runs out.
    """
    plain = actions.plain(graph, cost_model)
    entries, versions = actions.expand(graph, plan, plain)
    if second_first:
        actions.turn_pairs(entries, second_first)
    return _Run([action for _, action in entries], versions, plain.results, cost_model, allocator).timeline()


def judge(graph: ir.Graph, plan: Plan, cost_model: CostModel) -> Timeline:
    """Runs the step with the allocator that the device has: of the two orders in which pairs may ask, the worse.

    Args:
        graph: As in `simulate`.
        plan: Likewise.
        cost_model: Likewise. If its device has no limit, no allocator is modelled.

    Raises:
        NoRoom: If the device has no room for it.
    """
    device = cost_model.device
    timelines = []
    for second_first in dict.fromkeys(((), tuple(pair.second for pair in plan.pairs))):
        memory = None
        if device.memory_bytes is not None:
            limit = max(plan.memory_budget or 0, device.memory_bytes)
            memory = allocator_lib.Allocator(limit, device.reserves_memory)
        timelines.append(simulate(graph, plan, cost_model, allocator=memory, second_first=second_first))
    return max(timelines, key=lambda timeline: timeline.allocated_peak_bytes)


class Live(NamedTuple):
    """A buffer at a moment of the step.

    Attributes:
        value: Reference to the value that it was made for; of workspace, the node; "" for what the graph does not show.
        kind: "variable", "argument", "constant", "activation", "workspace", "inner" (of a loop or branch) or
            "other".
        nbytes: Device bytes.
    """

    value: str
    kind: str
    nbytes: int


def at_peak(graph: ir.Graph, plan: Plan, cost_model: CostModel) -> tuple[Timeline, tuple[Live, ...]]:
    """Runs the step as `simulate` does without an allocator, and tells what is on the device when most of it is in use.

    Args:
        graph: As in `simulate`.
        plan: Likewise.
        cost_model: Likewise.

    Returns:
        The timeline, and the buffers at its first step with the peak; their bytes add up to it.
    """
    timeline = simulate(graph, plan, cost_model)
    plain = actions.plain(graph, cost_model)
    entries, versions = actions.expand(graph, plan, plain)
    watched = max(range(len(timeline.steps)), key=lambda index: timeline.steps[index].live_bytes)
    run = _Run([action for _, action in entries], versions, plain.results, cost_model, None, watched)
    run.timeline()
    return timeline, run.seen


class _Buffer:
    __slots__ = ("addresses", "owner", "kind", "nbytes", "readers", "holders", "is_free")

    def __init__(self, nbytes: int, owner: str, kind: str):
        self.nbytes = nbytes
        self.owner = owner
        self.kind = kind
        self.addresses: list[int] = []  # of its pieces
        self.readers = 0
        self.holders = 0
        self.is_free = False


_RESIDENT_KINDS = {actions.VARIABLE: "variable", actions.ARGUMENT: "argument", actions.CONSTANT: "constant"}


class _Run:
    """One step on a device."""

    def __init__(
        self,
        todo: Sequence[actions.Action | actions.Copy],
        versions: int,
        results: Sequence[int],
        cost_model: CostModel,
        allocator: allocator_lib.Allocator | None,
        watched: int | None = None,
    ):
        self.todo = todo
        self.watched = watched  # the number of the step at which `seen` is taken
        self.seen: tuple[Live, ...] = ()
        self.made: list[_Buffer] = []  # all buffers, if a step is watched
        self.taken = 0  # steps so far
        self.cost = cost_model
        self.allocator = allocator
        self.owners: dict[int, str] = {}  # address -> the value that lives there
        self.live = 0
        self.after = ""  # the last of the user's nodes that has run
        self.held: dict[str, _Buffer] = {}  # value before the step -> buffer: variables, arguments, constants
        self.readers = [0] * versions
        if cost_model.resident_bytes:
            self._allocate(cost_model.resident_bytes, "", kind="other")
        for version in results:
            self.readers[version] += 1
        residents = []
        for action in todo:
            for version in action.inputs:
                self.readers[version] += 1
            if isinstance(action, actions.Action) and action.facts.resides is not None:
                residents += [(action.facts.resides, -output.nbytes, output) for output in action.facts.outputs]
        residents.sort(key=lambda resident: resident[:2])
        self._reside((when, output) for when, _, output in residents if when != actions.CONSTANT)
        holes = []
        for _ in range(cost_model.device.holes if allocator else 0):
            holes.append(self._allocate(allocator_lib.HOLE_BYTES, ""))
            self._allocate(allocator_lib.ALIGNMENT_BYTES, "")  # the fence behind it
        for hole in holes:
            self._drop(hole)
        self._reside((when, output) for when, _, output in residents if when == actions.CONSTANT)

    def _reside(self, outputs: Iterable[tuple[int, actions.Output]]) -> None:
        for when, output in outputs:
            if output.nbytes:
                buffer = self._allocate(output.nbytes, output.reference, kind=_RESIDENT_KINDS[when])
                buffer.holders = 1
                self.held[output.reference] = buffer

    def timeline(self) -> Timeline:
        peak = self.live
        self.now = 0.0
        self.buffers: list[_Buffer | None] = [None] * len(self.readers)
        self.ready: dict[int, float] = {}  # version on its way -> when its copy is complete
        self.sources: dict[int, _Buffer] = {}  # version in the far tier -> what it is copied from
        self.lanes: dict[tuple[str, str], float] = {}
        self.done: list[tuple[list[_Buffer | None], list[_Buffer | None]]] = []  # what nodes read and what to drop
        steps = []
        swapped = recomputed = 0
        highest, peak_step = -1, Step("", "run", 0.0, 0.0, self.live)
        for action, later in zip(self.todo, [*self.todo[1:], None], strict=True):
            if isinstance(action, actions.Action):
                step = self._compute(action, is_first=actions.are_beside(action, later))
                recomputed += action.facts.seconds if step.kind == "recompute" else 0
            else:
                step = self._copy(action)
                swapped += action.nbytes if step.kind == "swap_out" else 0
            peak = max(peak, step.live_bytes)
            allocated = self.allocator.peak_bytes if self.allocator else peak
            if allocated > highest:
                highest, peak_step = allocated, step
            steps.append(step)
            self.taken += 1
        allocated = self.allocator.peak_bytes if self.allocator else peak
        end = max((self.now, *self.lanes.values()))
        return Timeline(tuple(steps), peak, allocated, end, swapped, recomputed, peak_step)

    def layout(self) -> list[tuple[int, int, str | None]]:
        """All chunks as (address, bytes, owner), by address; nothing without an allocator."""
        chunks = self.allocator.layout() if self.allocator else []
        return [(address, nbytes, self.owners.get(address, "") if used else None) for address, nbytes, used in chunks]

    def _copy(self, action: actions.Copy) -> Step:
        (source,), (target,) = action.inputs, action.outputs
        link, lane = self.cost.link(action.tier), action.lane
        start = max(self.now, self.lanes.get(lane, 0.0), self.ready.get(source, 0.0))
        end = start + action.duration(link)
        if action.leaves:
            live = self.live
            self._look()
            if action.is_synchronous:
                self._release(self.buffers[source])
            elif (buffer := self.buffers[source]) is not None:
                self.sources[target] = buffer
        else:
            buffer = self.buffers[target] = self._allocate(allocator_lib.rounded(action.nbytes), action.value)
            buffer.readers = self.readers[target]
            piece = self._allocate(allocator_lib.rounded(action.piece_bytes), "") if action.piece_bytes else None
            live = self.live
            self._look()
            self._drop(piece)
            self._drop(buffer)
        self.lanes[lane] = self.ready[target] = end
        if action.is_synchronous or not link.overlaps:
            self.now = end
        return Step(action.value, action.kind, start, end, live)

    def _compute(self, action: actions.Action, is_first: bool) -> Step:
        """Runs a node. The first of a pair lets go of its buffers only when the second one does."""
        kind, facts, buffers = action.kind, action.facts, self.buffers
        start = self.now
        if self.ready:
            for version in (*action.waits, *action.inputs):
                start = max(start, self.ready.pop(version, start))
        for version in action.waits:
            self._release(self.sources.pop(version, None))
        inputs = [buffers[version] for version in action.inputs]
        given_up = self._assign(facts, inputs) if facts.assigns else None
        scratch = [self._scratch(nbytes, facts.name) for nbytes in facts.workspace.early]
        for index, version in enumerate(action.outputs):
            buffer = buffers[version] = self._place(facts.outputs[index], inputs)
            if buffer is not None:
                buffer.readers += self.readers[version]
        scratch += [self._scratch(nbytes, facts.name) for nbytes in facts.workspace.late]
        live = self.live
        self._look()
        self.done += [(inputs, [*(buffers[version] for version in action.outputs), *scratch, given_up])]
        if not is_first:
            for read, made in self.done:
                for buffer in read:
                    self._release(buffer)
                for buffer in made:
                    self._drop(buffer)
            self.done = []
        self.now = start + facts.seconds
        if kind == "run":
            self.after = facts.name
        if facts.network_seconds:
            begun = max(self.now, self.lanes.get(NETWORK_LANE, 0.0))
            end = self.lanes[NETWORK_LANE] = begun + facts.network_seconds
            if facts.is_awaited:
                self.ready[action.outputs[0]] = end
                return Step(facts.name, "exchange", begun, end, live)
            self.now = end
        return Step(facts.name, kind, start, self.now, live)

    def _place(self, output: actions.Output, inputs: Sequence[_Buffer | None]) -> _Buffer | None:
        _, nbytes, pieces, held, alias, overwrites = output
        if held is not None:
            return self.held.get(held)
        if alias is not None:
            return inputs[alias]
        if not nbytes:
            return None
        for slot in overwrites:
            buffer = inputs[slot]
            if buffer is not None and buffer.readers == 1 and not buffer.holders:
                buffer.owner = output.reference
                return buffer
        return self._allocate(nbytes, output.reference, pieces)

    def _assign(self, facts: actions.Facts, inputs: Sequence[_Buffer | None]) -> _Buffer | None:
        """Gives a variable its new value. Returns the buffer that it gave up, if any."""
        old, new = self.held.get(facts.assigns), inputs[1]
        if old is None or new is None:
            return None
        if facts.in_place:
            if not old.readers and old.holders == 1:
                return None
            new = self._allocate(old.nbytes, facts.assigns)
        new.holders += 1
        old.holders -= 1
        self.held[facts.assigns] = new
        self.owners.update(dict.fromkeys(new.addresses, facts.assigns))
        return old

    def _look(self) -> None:
        """Takes down what is on the device if this is the step to watch."""
        if self.taken == self.watched:
            alive = (buffer for buffer in self.made if not buffer.is_free)
            self.seen = tuple(Live(buffer.owner, buffer.kind, buffer.nbytes) for buffer in alive)

    def _scratch(self, nbytes: int, node: str) -> _Buffer:
        buffer = self._allocate(nbytes, "", kind="workspace")
        buffer.owner = node
        return buffer

    def _allocate(self, nbytes: int, owner: str, pieces: int = 1, kind: str = "activation") -> _Buffer:
        self.live += nbytes
        buffer = _Buffer(nbytes, owner, kind)
        if self.watched is not None:
            self.made.append(buffer)
        if self.allocator is None:
            return buffer
        for _ in range(pieces):
            try:
                address = self.allocator.allocate(nbytes // pieces)
            except allocator_lib.OutOfMemory:
                raise NoRoom(self.after, nbytes // pieces, self.layout()) from None
            self.owners[address] = owner
            buffer.addresses.append(address)
        return buffer

    def _release(self, buffer: _Buffer | None) -> None:
        """One reader less."""
        if buffer is not None:
            buffer.readers -= 1
            if not buffer.readers:
                self._drop(buffer)

    def _drop(self, buffer: _Buffer | None) -> None:
        """Frees the buffer if nobody needs it."""
        if buffer is None or buffer.readers or buffer.holders or buffer.is_free:
            return
        buffer.is_free = True
        self.live -= buffer.nbytes
        if self.allocator:
            for address in buffer.addresses:
                self.allocator.free(address)
                del self.owners[address]
