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

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from graphswap import allocator as allocator_lib
from graphswap import ir, liveness
from graphswap.cost_model import CostModel
from graphswap.plan import Plan


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One entry of a timeline.

    Attributes:
        name: Node name; a repeated node carries the name of the first one.
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Facts:
    """What the simulation needs of a node, looked up once."""

    seconds: float
    workspace: int
    sizes: Sequence[int]
    aliases: Sequence[int | None]
    overwrites: Sequence[int]  # inputs that the first output may be written over, if nobody else needs them


@functools.lru_cache(maxsize=8)
def _facts(graph: ir.Graph, cost_model: CostModel) -> Mapping[str, _Facts]:
    found = {}
    for node in graph.nodes:
        sizes = liveness.output_bytes(node)
        overwrites = []
        for slot in liveness.IN_PLACE.get(node.op, ())[: len(node.inputs)]:
            value = graph.value(node.inputs[slot])
            if (value.dtype, value.nbytes) == (node.outputs[0].dtype, node.outputs[0].nbytes):
                overwrites.append(slot)
        found[node.name] = _Facts(
            cost_model.seconds(graph, node),
            allocator_lib.rounded(cost_model.workspace_bytes(graph, node)),
            sizes,
            [liveness.alias_of(node, index) for index in range(len(node.outputs))],
            overwrites,
        )
    return found


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
        repetitions: How many steps to run one after the other on the same allocator: variables move
            when they are assigned, so later steps meet another layout.

    Raises:
        NoRoom: If the modelled allocator runs out.
    """
    run = _Run(graph, _expand(graph, plan), cost_model, allocator)
    timeline = run.step()
    for _ in range(repetitions - 1):
        timeline = max(timeline, run.step(), key=lambda t: t.allocated_peak_bytes)
    return timeline


@dataclasses.dataclass(slots=True)
class _Action:
    """A node to run on versions of values. A version is a number: one copy of a value."""

    node: ir.Node
    kind: str
    inputs: Sequence[int]
    outputs: Sequence[int]
    waits: Sequence[int]  # versions whose copy must be complete before this starts
    tier: str = ""
    nbytes: int = 0


def _expand(graph: ir.Graph, plan: Plan) -> list[_Action]:
    """The plan's actions in execution order, every input bound to the copy it reads."""
    outs: dict[str, list] = {}
    fences: dict[str, list] = {}
    ins: dict[str, list] = {}
    switches: dict[str, list] = {}
    for swap in plan.swaps:
        outs.setdefault(swap.out_after, []).append(swap)
        fences.setdefault(swap.freed_before, []).append(swap)
        ins.setdefault(swap.in_after, []).append(swap)
        switches.setdefault(swap.in_before, []).append(swap)
    repeats: dict[str, list] = {}
    for recompute in plan.recomputes:
        repeats.setdefault(recompute.before, []).append(recompute)

    current: dict[str, int] = {}
    handle: dict[str, int] = {}  # value -> version number of its copy in the far tier
    fence_of: dict[int, int] = {}  # id of a swap -> version its fence waits for
    arrived: dict[int, int] = {}  # id of a swap -> version of the copy that came back
    actions: list[_Action] = []
    fresh = 0

    def emit(node: ir.Node, kind: str, waits: Sequence[int] = ()) -> None:
        nonlocal fresh
        inputs = [current[reference] for reference in node.inputs]
        outputs = list(range(fresh, fresh + len(node.outputs)))
        fresh += len(outputs)
        for reference, version in zip(node.refs(), outputs, strict=True):
            current[reference] = version
        actions.append(_Action(node, kind, inputs, outputs, waits))

    in_flight: dict[str, int] = {}  # SwapOut node of a rewritten graph -> version
    by_name = graph.by_name
    for name in plan.order or graph.position:
        node = by_name[name]
        for swap in switches.get(name, ()):
            current[swap.value] = arrived[id(swap)]
        for recompute in repeats.get(name, ()):
            for repeated in recompute.nodes:
                emit(by_name[repeated], "recompute")
        waits = [fence_of[id(swap)] for swap in fences.get(name, ()) if id(swap) in fence_of]
        waits += [in_flight[c] for c in node.control_inputs if c in in_flight]
        if node.op in (ir.SWAP_OUT, ir.SWAP_IN):
            kind = "swap_out" if node.op == ir.SWAP_OUT else "swap_in"
            emit(node, kind, waits)
            attrs = dict(node.attrs)
            actions[-1].tier, actions[-1].nbytes = str(attrs["tier"]), int(attrs["nbytes"])  # pyright: ignore[reportArgumentType]
            if kind == "swap_out":
                in_flight[name] = current[name]
        else:
            emit(node, "recompute" if node.like else "run", waits)
        for swap in outs.get(name, ()):
            if swap.value not in handle:
                value = graph.value(swap.value)
                out_node = ir.Node(swap.value, ir.SWAP_OUT, outputs=(ir.Value("variant"),))
                action = _Action(out_node, "swap_out", [current[swap.value]], [fresh], (), swap.tier, value.nbytes)
                actions.append(action)
                handle[swap.value] = fence_of[id(swap)] = fresh
                fresh += 1
        for swap in ins.get(name, ()):
            value = graph.value(swap.value)
            in_node = ir.Node(swap.value, ir.SWAP_IN, outputs=(value,))
            action = _Action(in_node, "swap_in", [handle[swap.value]], [fresh], (), swap.tier, value.nbytes)
            actions.append(action)
            arrived[id(swap)] = fresh
            fresh += 1
    results = [current[reference] for reference in graph.outputs]
    actions.append(_Action(ir.Node("", "_Results"), "results", results, (), ()))
    return actions


class _Buffer:
    __slots__ = ("address", "nbytes", "readers", "holders", "is_free")

    def __init__(self, nbytes: int, address: int):
        self.nbytes = nbytes
        self.address = address
        self.readers = 0
        self.holders = 0
        self.is_free = False


class _Run:
    """State of the device between steps: variables and constants stay, everything else is freed."""

    def __init__(
        self,
        graph: ir.Graph,
        actions: list[_Action],
        cost_model: CostModel,
        allocator: allocator_lib.Allocator | None,
    ):
        self.graph = graph
        self.actions = actions
        self.cost = cost_model
        self.allocator = allocator
        self.facts = _facts(graph, cost_model)
        self.owners: dict[int, str] = {}
        self.position = 0
        self.readers: dict[int, int] = {}
        for action in actions:
            for version in action.inputs:
                self.readers[version] = self.readers.get(version, 0) + 1
        self.live = 0
        self.held: dict[str, _Buffer] = {}  # value before the step -> buffer: variables, arguments, constants
        if cost_model.resident_bytes:
            self._allocate(cost_model.resident_bytes, "")
        for action in actions:
            node = action.node
            if node.op in liveness.HELD_OPS:
                for reference, nbytes in zip(node.refs(), liveness.output_bytes(node), strict=True):
                    if nbytes:
                        self.held[reference] = self._allocate(nbytes, reference)
                        self.held[reference].holders = 1

    def _allocate(self, nbytes: int, owner: str) -> _Buffer:
        self.live += nbytes
        if self.allocator is None:
            return _Buffer(nbytes, 0)
        try:
            address = self.allocator.allocate(nbytes)
        except allocator_lib.OutOfMemory:
            layout = [(at, size, self.owners[at] if used else None) for at, size, used in self.allocator.layout()]
            raise NoRoom(self.position, nbytes, layout) from None
        self.owners[address] = owner
        return _Buffer(nbytes, address)

    def _drop(self, buffer: _Buffer) -> None:
        if not (buffer.readers or buffer.holders or buffer.is_free):
            buffer.is_free = True
            self.live -= buffer.nbytes
            if self.allocator:
                self.allocator.free(buffer.address)
                del self.owners[buffer.address]

    def step(self) -> Timeline:
        cost, readers = self.cost, self.readers
        root_of = liveness.roots(self.graph)
        self.position = 0
        buffers: dict[int, _Buffer | None] = {}
        ready: dict[int, float] = {}  # version in flight -> when its copy is complete
        releases: dict[int, _Buffer] = {}  # SwapOut's version -> source to release at the fence
        lanes: dict[tuple[str, str], float] = {}
        steps: list[Step] = []
        now = recomputed = 0.0
        swapped = 0
        peak = self.live
        kept: list[_Buffer] = []

        def release(buffer: _Buffer) -> None:
            buffer.readers -= 1
            self._drop(buffer)

        def add_output(version: int, buffer: _Buffer | None) -> None:
            buffers[version] = buffer
            if buffer is not None:
                buffer.readers += readers.get(version, 0)

        for action in self.actions:
            node, kind = action.node, action.kind
            if kind == "swap_out":
                link = cost.link(action.tier)
                start = max(now, lanes.get((action.tier, "out"), 0.0))
                end = start + link.out_seconds(action.nbytes)
                lanes[action.tier, "out"] = end
                if not link.overlaps:
                    now = end
                ready[action.outputs[0]] = end
                source = buffers[action.inputs[0]]
                if source is not None:
                    releases[action.outputs[0]] = source
                buffers[action.outputs[0]] = None
                swapped += action.nbytes
                steps.append(Step(node.name, kind, start, end, self.live))
                continue
            if kind == "swap_in":
                link = cost.link(action.tier)
                start = max(now, lanes.get((action.tier, "in"), 0.0), ready[action.inputs[0]])
                end = start + link.in_seconds(action.nbytes)
                lanes[action.tier, "in"] = end
                if not link.overlaps:
                    now = end
                ready[action.outputs[0]] = end
                buffer = self._allocate(allocator_lib.rounded(action.nbytes), node.name)
                peak = max(peak, self.live)
                add_output(action.outputs[0], buffer)
                self._drop(buffer)
                steps.append(Step(node.name, kind, start, end, self.live))
                continue
            if kind == "results":
                kept = [b for b in (buffers[version] for version in action.inputs) if b is not None]
                continue

            start = now
            for version in (*action.waits, *action.inputs):
                if version in ready:
                    start = max(start, ready[version])
            for version in action.waits:
                source = releases.pop(version, None)
                if source is not None:
                    release(source)
            inputs = [buffers[version] for version in action.inputs]
            updated = self._run_node(action, inputs, root_of, add_output)
            facts = self.facts[node.name]
            scratch = self._allocate(facts.workspace, "") if facts.workspace else None
            peak = max(peak, self.live)
            live = self.live
            if scratch is not None:
                self._drop(scratch)
            for buffer in inputs:
                if buffer is not None:
                    release(buffer)
            for version in action.outputs:
                buffer = buffers[version]
                if buffer is not None and buffer not in inputs:
                    self._drop(buffer)
            if updated is not None:
                self._drop(updated)
            now = start + facts.seconds
            if kind == "recompute":
                recomputed += facts.seconds
            else:
                self.position += 1
            steps.append(Step(node.name, kind, start, now, live))
        for source in releases.values():
            release(source)
        for buffer in kept:
            release(buffer)
        end = max([now, *lanes.values()])
        allocated = self.allocator.peak_bytes if self.allocator else peak
        return Timeline(tuple(steps), peak, allocated, end, swapped, recomputed)

    def _run_node(self, action, inputs, root_of, add_output) -> _Buffer | None:
        """Binds the node's outputs to buffers. Returns a buffer that a variable gave up, if any."""
        node = action.node
        if node.op in liveness.HELD_OPS:
            for reference, value, version in zip(node.refs(), node.outputs, action.outputs, strict=True):
                # A handle is not the variable's buffer: who holds it does not keep an update from working in place.
                add_output(version, None if value.dtype == "resource" else self.held.get(reference))
            return None
        if node.op == "ReadVariableOp":
            add_output(action.outputs[0], self.held.get(root_of[node.inputs[0]]))
            return None
        gave_up = None
        if node.op in liveness.ASSIGNS or node.op in liveness.UPDATES:
            gave_up = self._assign(node, inputs, root_of[node.inputs[0]])
        facts = self.facts[node.name]
        for index, version in enumerate(action.outputs):
            source = facts.aliases[index]
            if source is not None:
                add_output(version, inputs[source])
            elif not facts.sizes[index]:
                add_output(version, None)
            else:
                buffer = _overwritten(inputs, facts) if index == 0 else None
                if buffer is None:
                    buffer = self._allocate(facts.sizes[index], ir.ref(node.like or node.name, index))
                add_output(version, buffer)
        return gave_up

    def _assign(self, node: ir.Node, inputs: Sequence[_Buffer | None], variable: str) -> _Buffer | None:
        old, new = self.held.get(variable), inputs[1]
        if old is None or new is None:
            return None
        if node.op in liveness.UPDATES:
            if not old.readers:
                return None
            new = self._allocate(old.nbytes, variable)
        elif new is old:
            return None
        new.holders += 1
        old.holders -= 1
        self.held[variable] = new
        return old


def _overwritten(inputs: Sequence[_Buffer | None], facts: _Facts) -> _Buffer | None:
    for slot in facts.overwrites:
        buffer = inputs[slot]
        if buffer is not None and buffer.readers == 1 and not buffer.holders:
            return buffer
    return None
