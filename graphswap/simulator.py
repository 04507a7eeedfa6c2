"""simulate(graph, plan, cost_model) -> Timeline: runs a step on paper. The only judge of a plan.

The model is in-order execution, which `rewrites.ordering` enforces: one compute lane and one lane per
direction of every link. Buffers are counted as TensorFlow's executor counts them: one reference per
input that still waits to read; an elementwise op writes over an input that nobody else waits for; a
buffer is free after its last reader. A SwapOut's source is counted until the node that waits for it
starts, a SwapIn's target from the node that starts it, so the peak holds however fast the link is.

Known weaknesses: ops outside the chain (none after `ordering`) and TensorFlow's own graph optimiser can
change which elementwise op writes over which input.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from graphswap import allocator as allocator_lib
from graphswap import ir, liveness
from graphswap.cost_model import CostModel
from graphswap.plan import Plan, Swap


class Step(NamedTuple):
    """One entry of a timeline.

    Attributes:
        name: Node name; a repeated node carries the name of the first one, a copy that of its value.
        kind: "run", "recompute", "swap_out" or "swap_in".
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
    """

    steps: tuple[Step, ...]
    peak_bytes: int
    allocated_peak_bytes: int
    seconds: float
    swapped_bytes: int
    recomputed_seconds: float

    @property
    def peak_step(self) -> Step:
        """The first step that reaches the peak."""
        return max(self.steps, key=lambda step: step.live_bytes)


class NoRoom(Exception):
    """The modelled allocator ran out during a step.

    Attributes:
        position: How many of the user's nodes had run.
        nbytes: The request that failed.
        layout: All chunks as (address, bytes, owner), by address; the owner is the value that lives there,
            "" for other uses, None for a free chunk.
    """

    def __init__(self, position: int, nbytes: int, layout: Sequence[tuple[int, int, str | None]]):
        super().__init__(f"no room for {nbytes} bytes after {position} nodes")
        self.position = position
        self.nbytes = nbytes
        self.layout = layout


def simulate(
    graph: ir.Graph,
    plan: Plan,
    cost_model: CostModel,
    *,
    allocator: allocator_lib.Allocator | None = None,
    repetitions: int = 1,
) -> Timeline:
    """Runs the step under the plan.

    Args:
        graph: The user's graph, or a rewritten one with an empty plan.
        plan: What to do; checked by the caller.
        cost_model: Seconds and bytes.
        allocator: A fresh model of the device's allocator. Every buffer is then placed in it.
        repetitions: How many steps to run one after the other on the same allocator, at most: variables
            move when they are assigned, so later steps meet another layout, until one comes again.

    Raises:
        NoRoom: If the modelled allocator runs out.
    """
    plain = _plain(graph, cost_model)
    actions, versions = _expand(graph, plan, plain)
    results = [plain.version[reference] for reference in graph.outputs]
    run = _Run(actions, versions, results, cost_model, allocator)
    layouts = [run.layout()]
    timeline = run.step()
    while len(layouts) < repetitions and run.layout() not in layouts:
        layouts.append(run.layout())
        timeline = max(timeline, run.step(), key=lambda t: t.allocated_peak_bytes)
    return timeline


# --- what to run ----------------------------------------------------------------------------------------------


class _Output(NamedTuple):
    """Where an output lives: the first of `held`, `alias` and `overwrites` that applies, else in a new buffer.

    Attributes:
        reference: The value; of a repeated node, the first one's.
        nbytes: Device bytes.
        held: The value before the step whose buffer it is; "" for a handle: who holds a handle does not
            keep the variable from being updated in place.
        alias: The input whose buffer it is.
        overwrites: Inputs that it may be written over if nobody else needs them.
    """

    reference: str
    nbytes: int
    held: str | None
    alias: int | None
    overwrites: Sequence[int]


class _Facts(NamedTuple):
    """What the simulation needs of a node, looked up once."""

    name: str
    seconds: float
    workspace: int
    outputs: Sequence[_Output]
    is_resident: bool  # whether the outputs are there before the step
    assigns: str  # the variable that gets another value, or ""
    in_place: bool  # whether it keeps its buffer if nobody reads it


class _Action(NamedTuple):
    """A node to run on versions of values. A version is a number: one copy of a value."""

    kind: str
    inputs: Sequence[int]
    outputs: Sequence[int]
    facts: _Facts
    waits: Sequence[int] = ()  # copies in the far tier that must be complete; their sources may then go


class _Copy(NamedTuple):
    """A copy from one tier to the other: makes a version of a version."""

    kind: str
    inputs: Sequence[int]
    outputs: Sequence[int]
    value: str
    nbytes: int
    tier: str
    piece_bytes: int  # what is on the device twice while the value comes back in pieces


def _piece_bytes(value: ir.Value) -> int:
    pieces = ir.swap_pieces(value)
    return value.nbytes // pieces if pieces > 1 else 0


class _Plain(NamedTuple):
    """The step without a plan."""

    actions: Mapping[str, _Action | _Copy]  # by node
    version: Mapping[str, int]  # of each value the first one


@functools.lru_cache(maxsize=8)
def _plain(graph: ir.Graph, cost_model: CostModel) -> _Plain:
    root_of, origin = liveness.roots(graph), ir.origin(graph)
    version = {reference: number for number, reference in enumerate(origin)}
    actions: dict[str, _Action | _Copy] = {}
    for node in graph.nodes:
        inputs = tuple(version[reference] for reference in node.inputs)
        outputs = tuple(version[reference] for reference in node.refs())
        if node.op in (ir.SWAP_OUT, ir.SWAP_IN):
            kind = "swap_out" if node.op == ir.SWAP_OUT else "swap_in"
            attrs: Any = dict(node.attrs)
            value, nbytes, tier = origin[node.name], attrs["nbytes"], attrs["tier"]
            actions[node.name] = _Copy(kind, inputs, outputs, value, nbytes, tier, _piece_bytes(graph.value(value)))
        else:
            kind = "recompute" if node.like else "run"
            waits = [version[name] for name in node.control_inputs if graph.by_name[name].op == ir.SWAP_OUT]
            actions[node.name] = _Action(kind, inputs, outputs, _facts(graph, node, cost_model, root_of), waits)
    return _Plain(actions, version)


def _facts(graph: ir.Graph, node: ir.Node, cost_model: CostModel, root_of: Mapping[str, str]) -> _Facts:
    is_resident = node.op in ir.RESIDENT_OPS
    outputs = []
    for index, (value, nbytes) in enumerate(zip(node.outputs, liveness.output_bytes(node), strict=True)):
        reference = ir.ref(node.like or node.name, index)
        held = None
        if is_resident:
            held = "" if value.dtype == "resource" else reference
        elif node.op == "ReadVariableOp":
            held = root_of[node.inputs[0]]
        overwrites = [
            slot
            for slot in liveness.IN_PLACE.get(node.op, ())[: 0 if index else len(node.inputs)]
            if _is_as_large(graph.value(node.inputs[slot]), value)
        ]
        outputs.append(_Output(reference, nbytes, held, liveness.alias_of(node, index), overwrites))
    in_place = node.op in liveness.UPDATES
    return _Facts(
        name=node.like or node.name,
        seconds=cost_model.seconds(graph, node),
        workspace=allocator_lib.rounded(cost_model.workspace_bytes(graph, node)),
        outputs=outputs,
        is_resident=is_resident,
        assigns=root_of[node.inputs[0]] if in_place or node.op in liveness.ASSIGNS else "",
        in_place=in_place,
    )


def _is_as_large(value: ir.Value, other: ir.Value) -> bool:
    return (value.dtype, value.nbytes) == (other.dtype, other.nbytes)


@dataclasses.dataclass(slots=True)
class _Transfer:
    """A Swap that is being carried out."""

    swap: Swap
    value: int  # first version
    out: int | None = None  # version in the far tier; None if it was there before
    back: int = -1  # version that came back


def _expand(graph: ir.Graph, plan: Plan, plain: _Plain) -> tuple[list[_Action | _Copy], int]:
    """The actions in execution order, every input bound to the version it reads; and the number of versions."""
    outs, fences, ins, switches = (collections.defaultdict[str, list[_Transfer]](list) for _ in range(4))
    repeats = collections.defaultdict[str, list[str]](list)
    for swap in plan.swaps:
        transfer = _Transfer(swap, plain.version[swap.value])
        outs[swap.out_after].append(transfer)
        fences[swap.freed_before].append(transfer)
        ins[swap.in_after].append(transfer)
        switches[swap.in_before].append(transfer)
    for recompute in plan.recomputes:
        repeats[recompute.before].extend(recompute.nodes)

    actions: list[_Action | _Copy] = []
    current: dict[int, int] = {}  # first version -> the one that is read now, where that is another one
    handles: dict[int, int] = {}  # first version -> the one in the far tier
    versions = len(plain.version)

    def bound(name: str) -> Any:
        action = plain.actions[name]
        if current.keys().isdisjoint(action.inputs):
            return action
        kind, inputs, *others = action
        return action._make((kind, [current.get(version, version) for version in inputs], *others))

    def copy(kind: str, source: int, swap: Swap) -> int:
        nonlocal versions
        value = graph.value(swap.value)
        piece_bytes = _piece_bytes(value)
        actions.append(_Copy(kind, (source,), (versions,), swap.value, value.nbytes, swap.tier, piece_bytes))
        versions += 1
        return versions - 1

    for name in plan.order or graph.position:
        for transfer in switches.get(name, ()):
            current[transfer.value] = transfer.back
        for repeated in repeats.get(name, ()):
            action = bound(repeated)
            outputs = range(versions, versions + len(action.outputs))
            versions += len(outputs)
            current.update(zip(action.outputs, outputs, strict=True))
            actions.append(action._replace(kind="recompute", outputs=outputs))
        action = bound(name)
        waits = [transfer.out for transfer in fences.get(name, ()) if transfer.out is not None]
        actions.append(action._replace(waits=waits) if waits else action)
        for transfer in outs.get(name, ()):
            value = transfer.value
            if value not in handles:
                transfer.out = handles[value] = copy("swap_out", current.get(value, value), transfer.swap)
        for transfer in ins.get(name, ()):
            transfer.back = copy("swap_in", handles[transfer.value], transfer.swap)
    return actions, versions


# --- running it -----------------------------------------------------------------------------------------------


class _Buffer:
    __slots__ = ("address", "nbytes", "readers", "holders", "is_free")

    def __init__(self, nbytes: int, address: int):
        self.nbytes = nbytes
        self.address = address
        self.readers = 0
        self.holders = 0
        self.is_free = False


class _Run:
    """The device. Between steps variables, arguments and constants stay, everything else is freed."""

    def __init__(
        self,
        actions: Sequence[_Action | _Copy],
        versions: int,
        results: Sequence[int],
        cost_model: CostModel,
        allocator: allocator_lib.Allocator | None,
    ):
        self.actions = actions
        self.results = results
        self.cost = cost_model
        self.allocator = allocator
        self.owners: dict[int, str] = {}  # address -> the value that lives there
        self.live = self.position = 0
        self.held: dict[str, _Buffer] = {}  # value before the step -> buffer: variables, arguments, constants
        self.readers = [0] * versions
        if cost_model.resident_bytes:
            self._allocate(cost_model.resident_bytes, "")
        for version in results:
            self.readers[version] += 1
        for action in actions:
            for version in action.inputs:
                self.readers[version] += 1
            if isinstance(action, _Action) and action.facts.is_resident:
                for output in action.facts.outputs:
                    if output.nbytes:
                        buffer = self.held[output.reference] = self._allocate(output.nbytes, output.reference)
                        buffer.holders = 1

    def step(self) -> Timeline:
        peak = self.live
        self.position = 0  # how many of the user's nodes have run
        self.now = 0.0
        self.buffers: list[_Buffer | None] = [None] * len(self.readers)
        self.ready: dict[int, float] = {}  # version on its way -> when its copy is complete
        self.sources: dict[int, _Buffer] = {}  # version in the far tier -> what it is copied from
        self.lanes: dict[tuple[str, str], float] = {}
        steps = []
        swapped = recomputed = 0
        for action in self.actions:
            if isinstance(action, _Action):
                step = self._compute(action)
                recomputed += action.facts.seconds if step.kind == "recompute" else 0
            else:
                step = self._copy(action)
                swapped += action.nbytes if step.kind == "swap_out" else 0
            peak = max(peak, step.live_bytes)
            steps.append(step)
        for buffer in (*self.sources.values(), *(self.buffers[version] for version in self.results)):
            self._release(buffer)
        allocated = self.allocator.peak_bytes if self.allocator else peak
        end = max((self.now, *self.lanes.values()))
        return Timeline(tuple(steps), peak, allocated, end, swapped, recomputed)

    def layout(self) -> list[tuple[int, int, str | None]]:
        """All chunks as (address, bytes, owner), by address; nothing without an allocator."""
        chunks = self.allocator.layout() if self.allocator else []
        return [(address, nbytes, self.owners.get(address, "") if used else None) for address, nbytes, used in chunks]

    def _copy(self, action: _Copy) -> Step:
        (source,), (target,) = action.inputs, action.outputs
        link, lane = self.cost.link(action.tier), (action.tier, action.kind)
        start = max(self.now, self.lanes.get(lane, 0.0), self.ready.get(source, 0.0))
        if action.kind == "swap_out":
            end = start + link.out_seconds(action.nbytes)
            if (buffer := self.buffers[source]) is not None:
                self.sources[target] = buffer
            live = self.live
        else:
            end = start + link.in_seconds(action.nbytes)
            buffer = self.buffers[target] = self._allocate(allocator_lib.rounded(action.nbytes), action.value)
            buffer.readers = self.readers[target]
            piece = self._allocate(allocator_lib.rounded(action.piece_bytes), "") if action.piece_bytes else None
            live = self.live
            self._drop(piece)
            self._drop(buffer)
        self.lanes[lane] = self.ready[target] = end
        if not link.overlaps:
            self.now = end
        return Step(action.value, action.kind, start, end, live)

    def _compute(self, action: _Action) -> Step:
        kind, facts, buffers = action.kind, action.facts, self.buffers
        start = self.now
        if self.ready:
            for version in (*action.waits, *action.inputs):
                start = max(start, self.ready.pop(version, start))
        for version in action.waits:
            self._release(self.sources.pop(version, None))
        inputs = [buffers[version] for version in action.inputs]
        given_up = self._assign(facts, inputs) if facts.assigns else None
        for index, version in enumerate(action.outputs):
            buffer = buffers[version] = self._place(facts.outputs[index], inputs)
            if buffer is not None:
                buffer.readers += self.readers[version]
        scratch = self._allocate(facts.workspace, "") if facts.workspace else None
        live = self.live
        for buffer in inputs:
            self._release(buffer)
        for version in action.outputs:
            self._drop(buffers[version])
        self._drop(scratch)
        self._drop(given_up)
        self.now = start + facts.seconds
        if kind == "run":
            self.position += 1
        return Step(facts.name, kind, start, self.now, live)

    def _place(self, output: _Output, inputs: Sequence[_Buffer | None]) -> _Buffer | None:
        _, nbytes, held, alias, overwrites = output
        if held is not None:
            return self.held.get(held)
        if alias is not None:
            return inputs[alias]
        if not nbytes:
            return None
        for slot in overwrites:
            buffer = inputs[slot]
            if buffer is not None and buffer.readers == 1 and not buffer.holders:
                return buffer
        return self._allocate(nbytes, output.reference)

    def _assign(self, facts: _Facts, inputs: Sequence[_Buffer | None]) -> _Buffer | None:
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
        self.owners[new.address] = facts.assigns
        return old

    def _allocate(self, nbytes: int, owner: str) -> _Buffer:
        self.live += nbytes
        if self.allocator is None:
            return _Buffer(nbytes, 0)
        try:
            address = self.allocator.allocate(nbytes)
        except allocator_lib.OutOfMemory:
            raise NoRoom(self.position, nbytes, self.layout()) from None
        self.owners[address] = owner
        return _Buffer(nbytes, address)

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
            self.allocator.free(buffer.address)
            del self.owners[buffer.address]
