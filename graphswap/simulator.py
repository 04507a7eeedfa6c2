"""simulate(graph, plan, cost_model) -> Timeline: runs a step on paper. The only judge of a plan.

The model is in-order execution, which `rewrites.ordering` enforces: one compute lane and one lane per
direction of every link. Buffers are counted as TensorFlow's executor counts them: one reference per
input that still waits to read; an elementwise op writes over an input that nobody else waits for; a
buffer is free after its last reader, with two nodes side by side after both. A SwapOut's source is counted
until the node that waits for it starts, a SwapIn's target from the node that starts it, so the peak holds
however fast the link is.

Known weaknesses: ops outside the chain (none after `ordering`) and TensorFlow's own graph optimiser can
change which elementwise op writes over which input. Two nodes side by side are given the sum of their seconds.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from graphswap import allocator as allocator_lib
from graphswap import ir, liveness
from graphswap.cost_model import CostModel, Workspace
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
    plain = _plain(graph, cost_model)
    actions, versions = _expand(graph, plan, plain)
    if second_first:
        _turn_pairs(actions, second_first)
    results = [plain.version[reference] for reference in graph.outputs]
    return _Run(actions, versions, results, cost_model, allocator).timeline()


# --- what to run ----------------------------------------------------------------------------------------------


_VARIABLE, _ARGUMENT, _CONSTANT = range(3)  # in the order in which they come to the device


class _Output(NamedTuple):
    """Where an output lives: the first of `held`, `alias` and `overwrites` that applies, else in a new buffer.

    Attributes:
        reference: The value; of a repeated node, the first one's.
        nbytes: Device bytes.
        pieces: In how many equal buffers.
        held: The value before the step whose buffer it is; "" for a handle: who holds a handle does not
            keep the variable from being updated in place.
        alias: The input whose buffer it is.
        overwrites: Inputs that it may be written over if nobody else needs them.
    """

    reference: str
    nbytes: int
    pieces: int
    held: str | None
    alias: int | None
    overwrites: Sequence[int]


class _Facts(NamedTuple):
    """What the simulation needs of a node, looked up once."""

    name: str
    seconds: float
    workspace: Workspace  # rounded as the allocator does
    outputs: Sequence[_Output]
    resides: int | None  # _VARIABLE, _ARGUMENT or _CONSTANT if the outputs are there before the step
    assigns: str  # the variable that gets another value, or ""
    in_place: bool  # whether it keeps its buffer if nobody reads it


class _Action(NamedTuple):
    """A node to run on versions of values. A version is a number: one copy of a value."""

    kind: str
    inputs: Sequence[int]
    outputs: Sequence[int]
    facts: _Facts
    waits: Sequence[int] = ()  # copies in the far tier that must be complete; their sources may then go
    beside: str = ""  # the node that it runs side by side with, if that is the action before


class _Copy(NamedTuple):
    """A copy from one tier to the other: makes a version of a version."""

    kind: str
    inputs: Sequence[int]
    outputs: Sequence[int]
    value: str
    nbytes: int
    tier: str
    piece_bytes: int  # what is on the device twice while the value comes back in pieces
    is_synchronous: bool  # whether nothing else runs meanwhile


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
    departing = {
        node.name for node in graph.nodes if node.op == ir.SWAP_OUT and not dict(node.attrs).get("is_synchronous")
    }
    actions: dict[str, _Action | _Copy] = {}
    for node in graph.nodes:
        inputs = tuple(version[reference] for reference in node.inputs)
        outputs = tuple(version[reference] for reference in node.refs())
        if node.op in (ir.SWAP_OUT, ir.SWAP_IN):
            kind = "swap_out" if node.op == ir.SWAP_OUT else "swap_in"
            attrs: Any = dict(node.attrs)
            moved = graph.value(node.inputs[0]) if kind == "swap_out" else node.outputs[0]
            value, nbytes, tier = origin[node.name], attrs["nbytes"], attrs["tier"]
            synchronous = attrs.get("is_synchronous", False)
            actions[node.name] = _Copy(kind, inputs, outputs, value, nbytes, tier, _piece_bytes(moved), synchronous)
        else:
            kind = "recompute" if node.like else "run"
            waits = [version[name] for name in node.control_inputs if name in departing]
            beside: Any = dict(node.attrs).get("beside", "")
            actions[node.name] = _Action(kind, inputs, outputs, _facts(graph, node, cost_model, root_of), waits, beside)
    return _Plain(actions, version)


def _facts(graph: ir.Graph, node: ir.Node, cost_model: CostModel, root_of: Mapping[str, str]) -> _Facts:
    resides = None
    if node.op in ir.RESIDENT_OPS:
        resides = _VARIABLE if node.outputs[0].dtype == "resource" else _CONSTANT if node.op == "Const" else _ARGUMENT
    outputs = []
    sizes, pieces = liveness.output_bytes(node), liveness.output_pieces(node)
    for index, (value, nbytes, count) in enumerate(zip(node.outputs, sizes, pieces, strict=True)):
        reference = ir.ref(node.like or node.name, index)
        held = None
        if resides is not None:
            held = "" if value.dtype == "resource" else reference
        elif node.op == "ReadVariableOp":
            held = root_of[node.inputs[0]]
        overwrites = liveness.overwritten_by(graph, node, index)
        outputs.append(_Output(reference, nbytes, count, held, liveness.alias_of(node, index), overwrites))
    in_place = node.op in liveness.UPDATES
    early, late = cost_model.workspace(graph, node)
    return _Facts(
        name=node.like or node.name,
        seconds=cost_model.seconds(graph, node),
        workspace=Workspace(tuple(map(allocator_lib.rounded, early)), tuple(map(allocator_lib.rounded, late))),
        outputs=outputs,
        resides=resides,
        assigns=root_of[node.inputs[0]] if in_place or node.op in liveness.ASSIGNS else "",
        in_place=in_place,
    )


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

    first_of = {pair.second: pair.first for pair in plan.pairs}
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
        moved = (swap.value, value.nbytes, swap.tier, piece_bytes, swap.is_synchronous)
        actions.append(_Copy(kind, (source,), (versions,), *moved))
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
        fenced = [transfer for transfer in fences.get(name, ()) if not transfer.swap.is_synchronous]
        waits = [transfer.out for transfer in fenced if transfer.out is not None]
        if waits or name in first_of:
            action = action._replace(waits=waits or action.waits, beside=first_of.get(name, action.beside))
        actions.append(action)
        for transfer in outs.get(name, ()):
            value = transfer.value
            if value not in handles:
                transfer.out = handles[value] = copy("swap_out", current.get(value, value), transfer.swap)
        for transfer in ins.get(name, ()):
            transfer.back = copy("swap_in", handles[transfer.value], transfer.swap)
    return _without_unread(graph, plan, plain, actions), versions


def _without_unread(
    graph: ir.Graph, plan: Plan, plain: _Plain, actions: list[_Action | _Copy]
) -> list[_Action | _Copy]:
    """The actions less the nodes that `rewrites.prune` takes out."""
    repeated = {name for decision in plan.recomputes for name in decision.nodes} - liveness.waited_for(graph)
    if not repeated:
        return actions
    readers = collections.Counter(version for action in actions for version in action.inputs)
    readers.update(plain.version[reference] for reference in graph.outputs)
    kept: list[_Action | _Copy] = []
    for action in reversed(actions):
        if isinstance(action, _Action) and action.facts.name in repeated and not any(map(readers.get, action.outputs)):
            readers.subtract(action.inputs)
            _hand_on_waits(action, kept)
        else:
            kept.append(action)
    return kept[::-1]


def _hand_on_waits(action: _Action, later: list[_Action | _Copy]) -> None:
    """What the action would have waited for, the next one (at the end of `later`) waits for."""
    for place in reversed(range(len(later))):
        heir = later[place]
        if isinstance(heir, _Action):
            later[place] = heir._replace(waits=[*action.waits, *heir.waits])
            return


def _are_beside(first: _Action | _Copy, second: _Action | _Copy | None) -> bool:
    return (
        isinstance(first, _Action)
        and isinstance(second, _Action)
        and (first.kind, first.facts.name) == ("run", second.beside)
    )


def _turn_pairs(actions: list[_Action | _Copy], second_first: Container[str]) -> None:
    for place in range(len(actions) - 1):
        first, second = actions[place : place + 2]
        if not (isinstance(first, _Action) and isinstance(second, _Action) and _are_beside(first, second)):
            continue
        if second.facts.name in second_first:
            actions[place : place + 2] = second._replace(beside=""), first._replace(beside=second.facts.name)


# --- running it -----------------------------------------------------------------------------------------------


class _Buffer:
    __slots__ = ("addresses", "nbytes", "readers", "holders", "is_free")

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self.addresses: list[int] = []  # of its pieces
        self.readers = 0
        self.holders = 0
        self.is_free = False


class _Run:
    """One step on a device."""

    def __init__(
        self,
        actions: Sequence[_Action | _Copy],
        versions: int,
        results: Sequence[int],
        cost_model: CostModel,
        allocator: allocator_lib.Allocator | None,
    ):
        self.actions = actions
        self.cost = cost_model
        self.allocator = allocator
        self.owners: dict[int, str] = {}  # address -> the value that lives there
        self.live = 0
        self.after = ""  # the last of the user's nodes that has run
        self.held: dict[str, _Buffer] = {}  # value before the step -> buffer: variables, arguments, constants
        self.readers = [0] * versions
        if cost_model.resident_bytes:
            self._allocate(cost_model.resident_bytes, "")
        for version in results:
            self.readers[version] += 1
        residents = []
        for action in actions:
            for version in action.inputs:
                self.readers[version] += 1
            if isinstance(action, _Action) and action.facts.resides is not None:
                residents += [(action.facts.resides, -output.nbytes, output) for output in action.facts.outputs]
        residents.sort(key=lambda resident: resident[:2])
        self._reside(output for when, _, output in residents if when != _CONSTANT)
        holes = []
        for _ in range(cost_model.device.holes if allocator else 0):
            holes.append(self._allocate(allocator_lib.HOLE_BYTES, ""))
            self._allocate(allocator_lib.ALIGNMENT_BYTES, "")  # the fence behind it
        for hole in holes:
            self._drop(hole)
        self._reside(output for when, _, output in residents if when == _CONSTANT)

    def _reside(self, outputs: Iterable[_Output]) -> None:
        for output in outputs:
            if output.nbytes:
                buffer = self.held[output.reference] = self._allocate(output.nbytes, output.reference)
                buffer.holders = 1

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
        for action, later in zip(self.actions, [*self.actions[1:], None], strict=True):
            if isinstance(action, _Action):
                step = self._compute(action, is_first=_are_beside(action, later))
                recomputed += action.facts.seconds if step.kind == "recompute" else 0
            else:
                step = self._copy(action)
                swapped += action.nbytes if step.kind == "swap_out" else 0
            peak = max(peak, step.live_bytes)
            allocated = self.allocator.peak_bytes if self.allocator else peak
            if allocated > highest:
                highest, peak_step = allocated, step
            steps.append(step)
        allocated = self.allocator.peak_bytes if self.allocator else peak
        end = max((self.now, *self.lanes.values()))
        return Timeline(tuple(steps), peak, allocated, end, swapped, recomputed, peak_step)

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
            live = self.live
            if action.is_synchronous:
                self._release(self.buffers[source])
            elif (buffer := self.buffers[source]) is not None:
                self.sources[target] = buffer
        else:
            end = start + link.in_seconds(action.nbytes)
            buffer = self.buffers[target] = self._allocate(allocator_lib.rounded(action.nbytes), action.value)
            buffer.readers = self.readers[target]
            piece = self._allocate(allocator_lib.rounded(action.piece_bytes), "") if action.piece_bytes else None
            live = self.live
            self._drop(piece)
            self._drop(buffer)
        self.lanes[lane] = self.ready[target] = end
        if action.is_synchronous or not link.overlaps:
            self.now = end
        return Step(action.value, action.kind, start, end, live)

    def _compute(self, action: _Action, is_first: bool) -> Step:
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
        scratch = [self._allocate(nbytes, "") for nbytes in facts.workspace.early]
        for index, version in enumerate(action.outputs):
            buffer = buffers[version] = self._place(facts.outputs[index], inputs)
            if buffer is not None:
                buffer.readers += self.readers[version]
        scratch += [self._allocate(nbytes, "") for nbytes in facts.workspace.late]
        live = self.live
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
        return Step(facts.name, kind, start, self.now, live)

    def _place(self, output: _Output, inputs: Sequence[_Buffer | None]) -> _Buffer | None:
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
                return buffer
        return self._allocate(nbytes, output.reference, pieces)

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
        self.owners.update(dict.fromkeys(new.addresses, facts.assigns))
        return old

    def _allocate(self, nbytes: int, owner: str, pieces: int = 1) -> _Buffer:
        self.live += nbytes
        buffer = _Buffer(nbytes)
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
