"""Measures: the device, the links to the far tiers, and every node of a step.

Private TensorFlow used here (2.21): the profiler's XSpace protobuf, `ConcreteFunction._call_flat`, the list of local
devices and the eager context's initialisation.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.client import device_lib
from tensorflow.python.eager import context
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from graphswap import allocator, devices, exactness, graphdef, ir, liveness, tiers
from graphswap.cost_model import NO_LINK, CostModel, DeviceSpec, Link, Profile, Workspace
from graphswap.plan import Plan, PlanError

_PROFILE_VERSION = 5
"""Of what is measured and how: profiles of another version are not read."""
_LINK_BYTES = 8 << 20
_LEAST_LINK_BYTES = 64 << 10
_LINK_COPIES = 7
_PINNED_BYTES = 64 << 20
_LAUNCH_PICOSECONDS = 20_000_000
"""How long a GPU may wait for the next kernel because the host is late, rather than because of a copy."""
_MOST_HOLES = 128
_HOLES_FROM_BYTES = 32 << 20


class CantMeasure(Exception):
    """The step can't be run without side effects, or the profiler is busy; the text says why."""


# --- the device -------------------------------------------------------------------------------------------------


def device_name() -> str:
    """The device that the step's memory is planned for."""
    return "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"


def is_synchronous() -> bool:
    """Whether a step has taken its time when its call returns: a GPU's kernels run later, by themselves."""
    return device_name() == "CPU:0"


def on_context_initialized(callback: Callable[[], None]) -> None:
    """Calls `callback` once, as soon as TensorFlow has initialised its devices; now if it has done so."""
    current = context.context()
    if current._initialized:
        callback()
        return
    initialize = current.ensure_initialized

    def ensure_initialized() -> None:
        initialize()
        if "ensure_initialized" in vars(current):
            del current.ensure_initialized  # back to the class's method
            callback()

    current.ensure_initialized = ensure_initialized


def memory_in_use(kind: str = "current") -> int | None:
    """Bytes in use ("current") or the most so far ("peak"); None if the device's allocator does not count."""
    try:
        return int(tf.config.experimental.get_memory_info(device_name())[kind])
    except ValueError:
        return None


def is_emulated() -> bool:
    """Whether the device is a CPU that counts its bytes: numpy's memory lies outside of it."""
    return device_name() == "CPU:0" and memory_in_use() is not None


def device_spec(
    emulated_bytes: int | None,
    swap_directory: str | os.PathLike[str] | None = None,
    can_swap: bool = True,
    memory_budget: int | None = None,
) -> DeviceSpec:
    """Describes this machine's device: memory, and links as measured.

    Args:
        emulated_bytes: Memory of the emulated accelerator; None if there is none.
        swap_directory: Where the disk tier would go.
        can_swap: If not, no link is measured, and there is none.
        memory_budget: Bytes that measuring must not pass, if that is less than the device has.
    """
    if device_name() != "CPU:0":
        return _gpu_spec(swap_directory, can_swap)
    limit = os.environ.get("TF_CPU_BFC_MEM_LIMIT_IN_MB")
    counts = memory_in_use() is not None
    if emulated_bytes is not None:
        memory = emulated_bytes
    elif counts and limit:
        memory = int(limit) << 20
    else:
        memory = None
    if not can_swap:
        return DeviceSpec(f"{device_name()}/{os.cpu_count()}", memory, links={"host": NO_LINK, "disk": NO_LINK})
    room, in_use = _LINK_BYTES, memory_in_use() or 0
    if memory is not None:
        # Variables that will leave the device may still take more of it than the budget.
        limit = memory_budget if memory_budget is not None and in_use < memory_budget else memory
        room = max(0, min(limit, memory) - in_use) // 8
    nbytes = max(_LEAST_LINK_BYTES, min(_LINK_BYTES, 1 << (room.bit_length() - 1) if room else 0))
    links = {"host": measure_link("host", None, nbytes)}
    if swap_directory is not None:
        links["disk"] = measure_link("disk", os.fspath(swap_directory), nbytes)
    return DeviceSpec(
        name=f"{device_name()}/{os.cpu_count()}",
        memory_bytes=memory,
        reserves_memory=emulated_bytes is not None,
        holes=_holes(memory) if emulated_bytes is not None and memory else 0,
        runs_pairs=(os.cpu_count() or 1) > 1,
        computes_there=exactness.is_numpy_exact(),
        links={**DeviceSpec().links, **links},
    )


def gpu_architecture() -> str | None:
    """The GPU's compute capability, as "9.0"; None where the step runs on a CPU."""
    if device_name() == "CPU:0":
        return None
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    return ".".join(map(str, details.get("compute_capability", (8, 0))))


def _gpu_spec(swap_directory: str | os.PathLike[str] | None, can_swap: bool) -> DeviceSpec:
    """The GPU's memory as TensorFlow has been given it, links as measured, rates of its kind, else those of an A100."""
    physical = tf.config.list_physical_devices("GPU")[0]
    kind = tf.config.experimental.get_device_details(physical).get("device_name", "")
    known = max((name for name in devices.DEVICES if name in kind.lower()), key=len, default="a100")
    links = {"host": NO_LINK, "disk": NO_LINK}
    if can_swap:
        links = {"host": _measure_pinned_link() or devices.DEVICES[known].links["host"]}
        if swap_directory is not None:
            links["disk"] = measure_link("disk", os.fspath(swap_directory))
    return dataclasses.replace(
        devices.DEVICES[known],
        name=kind,
        memory_bytes=_gpu_memory(physical),
        reserves_memory=os.environ.get("TF_FORCE_GPU_ALLOW_GROWTH") != "true",
        links={**devices.DEVICES[known].links, **links},
    )


def _gpu_memory(physical: tf.config.PhysicalDevice) -> int:
    """Bytes that the program has set as the limit, else those that TensorFlow takes."""
    for logical in tf.config.get_logical_device_configuration(physical) or ():
        if logical.memory_limit is not None:
            return int(logical.memory_limit) << 20
    (gpu,) = (one for one in device_lib.list_local_devices() if one.name.endswith(device_name()))
    return gpu.memory_limit


@functools.cache
def _measure_pinned_link() -> Link | None:
    """Times copies to pinned memory and back, as swaps do them; both ways are taken to be equally fast.

    None if many copies take no longer than few: then something else was measured.

    Pinned memory can't leave a graph, so that a graph with many copies is compared with one that has few. No two copies
    are of the same value, and all come back: TensorFlow would merge or drop them.
    """
    far = tiers.Tiers()

    def seconds(count: int) -> float:
        @tf.function(autograph=False)
        def copies() -> tf.Tensor:
            values = [tf.fill((_PINNED_BYTES // 4,), tf.random.uniform(())) for _ in range(_LINK_COPIES)]
            ends = [value[0] for value in values]
            for value in values[:count]:
                with tf.control_dependencies([end.op for end in ends]):
                    copy = far.swap_out(value, "host")
                    ends.append(far.swap_in(copy, "float32", (_PINNED_BYTES // 4,))[0])
            return tf.add_n(ends)

        copies().numpy()  # pins memory
        return min(_seconds(lambda: copies().numpy()) for _ in range(5))

    with tf.init_scope():
        copied_seconds = (seconds(_LINK_COPIES) - seconds(1)) / (_LINK_COPIES - 1) / 2
    if copied_seconds <= 0.0:
        return None
    speed = _PINNED_BYTES / copied_seconds
    return Link(speed, speed, 20e-6, overlaps=True)


def _holes(memory_bytes: int) -> int:
    """How many holes to leave for small buffers: up to 1/64 of the memory, less where little would be left."""
    return min(_MOST_HOLES, max(0, memory_bytes - _HOLES_FROM_BYTES) // 64 // allocator.HOLE_BYTES)


@functools.cache
def measure_link(tier: str, directory: str | None, nbytes: int = _LINK_BYTES) -> Link:
    """Times the swap path of a tier with several values that are away at the same time, as in a step.

    A single value would find its strings' memory still mapped and look several times too fast.
    """
    far = tiers.Tiers(directory)
    shape = (nbytes // 4,)

    @tf.function(autograph=False)
    def out(value: tf.Tensor) -> list[tf.Tensor]:
        return far.swap_out(value, tier).pieces

    @tf.function(autograph=False)
    def back(pieces: list[tf.Tensor]) -> tf.Tensor:
        return far.swap_in(tiers.FarCopy(pieces, [], is_file=tier == "disk"), "float32", shape)

    with tf.init_scope():
        value = tf.random.stateless_uniform(shape, (0, 0))
        out_seconds, in_seconds = [], []
        for _ in range(2):  # in the first round memory is touched for the first time
            copies: list[list[tf.Tensor]] = []
            out_seconds = [_seconds(lambda copies=copies: copies.append(out(value))) for _ in range(_LINK_COPIES)]
            in_seconds = [_seconds(lambda copy=copy: back(copy)) for copy in copies]
            del copies
    return Link(
        nbytes / statistics.median(out_seconds),
        nbytes / statistics.median(in_seconds),
        20e-6,
        overlaps=device_name() != "CPU:0",
    )


def _seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# --- a step -----------------------------------------------------------------------------------------------------


def measure_step(
    func_graph: graphdef.FuncGraph,
    graph: ir.Graph,
    arguments: Sequence[Any],
    far_tiers: tiers.Tiers,
    known: CostModel,
    fingerprint: str,
) -> Profile:
    """Runs the step twice without its updates of variables, and measures every node in the second run.

    Args:
        func_graph: The traced step; it stays as it is.
        graph: What to run: the step's graph, usually rewritten under a frugal plan.
        arguments: Tensors or arrays to run it on, in the order of the function's inputs.
        far_tiers: Where its swaps go.
        known: Has the seconds of nodes if TensorFlow can't tell them: on a GPU without CUDA's profiling library.
        fingerprint: Of the graph that the profile is for.

    Raises:
        CantMeasure: If the step can't be run without side effects.
        tf.errors.ResourceExhaustedError: If it does not fit.
    """
    harmless = without_side_effects(graph)
    if any(not hasattr(tensor, "numpy") for tensor, _ in func_graph.captures):
        raise CantMeasure("the step captures tensors of an outer function")
    function = graphdef.build_function(func_graph, harmless, far_tiers)
    with tf.init_scope():
        tensors = [
            tf.convert_to_tensor(argument, dtype=tensor.dtype)
            for tensor, argument in zip(func_graph.inputs, arguments, strict=False)
        ]
        graphdef.run_built(function, func_graph, tensors)  # makes kernels, and touches memory for the first time
        with recording() as events:
            graphdef.run_built(function, func_graph, tensors)
    if device_name() == "CPU:0":
        seconds = _node_seconds(harmless, _spent(events, harmless))
    elif any(_KERNEL in stats for _, _, _, stats in events):
        seconds = _node_seconds(harmless, _spent_on_gpu(events, harmless))
    else:
        seconds = {node.name: known.seconds(graph, node) for node in graph.nodes if not node.like}
    host = [event for event in events if _KERNEL not in event[3]]
    return Profile(fingerprint, seconds, _node_workspace(host, harmless))


class Compiled(NamedTuple):
    """What a step needs of the device as XLA compiled it, beside variables and arguments.

    Attributes:
        temporary_bytes: Of the one buffer that everything between arguments and results shares.
        result_bytes: Of each result that lies in no argument's place.
        constant_bytes: Of the function's constants, which TensorFlow keeps on a CPU device for as long as it lives.
    """

    temporary_bytes: int
    result_bytes: tuple[int, ...] = ()
    constant_bytes: int = 0


def compiled(func_graph: graphdef.FuncGraph, graph: ir.Graph) -> Compiled:
    """Has XLA compile the step, and reads which buffers it assigned. Nothing runs.

    Args:
        func_graph: The traced step; it stays as it is.
        graph: What to compile: the step's graph, usually rewritten.

    Raises:
        UnsupportedGraphError: If XLA can't compile it.
    """
    gc.collect()  # the constants of the function before
    before = memory_in_use() or 0
    function = graphdef.build_function(func_graph, graph, tiers.Tiers())
    constants = (memory_in_use() or 0) - before
    program = graphdef.compiled_hlo(func_graph, function, graph, device_name())
    own = [
        buffer
        for buffer in program.buffer_assignment.buffer_allocations
        if not (buffer.is_entry_computation_parameter or buffer.is_constant or buffer.is_thread_local)
    ]
    return Compiled(
        sum(buffer.size for buffer in own if not buffer.maybe_live_out),
        tuple(buffer.size for buffer in own if buffer.maybe_live_out),
        constants,
    )


class Recorded(NamedTuple):
    """What the device's allocator counted during a step, the one with the highest peak of those that were recorded.

    Attributes:
        levels: Seconds from the start of the step, and bytes in use from then on.
        live: What the step had asked for and still held at the peak: the node, bytes, and whether it was workspace.
        peak_bytes: The most bytes in use, what was there before the step included.
    """

    levels: tuple[tuple[float, int], ...]
    live: tuple[tuple[str, int, bool], ...]
    peak_bytes: int


def record_memory(run: Callable[[], Any], steps: int) -> Recorded | None:
    """Runs a step once, then so often recorded, and tells what was on the device; None if it counts no bytes.

    Args:
        run: Runs the step.
        steps: How many to record. TensorFlow's order of a step that is not rewritten differs from run to run.

    Raises:
        CantMeasure: If TensorFlow's profiler is busy.
        tf.errors.ResourceExhaustedError: If it does not fit.
    """
    if memory_in_use() is None:
        return None
    run()
    recorded = []
    for _ in range(steps):
        with recording() as events:
            run()
        recorded.append(_recorded(events))
    return max(filter(None, recorded), key=lambda one: one.peak_bytes, default=None)


def _recorded(events: Sequence[Event]) -> Recorded | None:
    """What the allocator's events say; None if there are none."""
    changes = [event for event in events if event[2] in _MEMORY_EVENTS and _is_of_device(event[3])]
    if not changes:
        return None
    begun = changes[0][0]
    levels = tuple(((start - begun) / 1e12, int(stats["bytes_allocated"])) for start, _, _, stats in changes)
    fullest = max(range(len(levels)), key=lambda index: levels[index][1])
    held: dict[int, tuple[str, int, bool]] = {}
    for _, _, name, stats in changes[: fullest + 1]:
        address = int(stats["addr"])
        if name == _MEMORY_EVENTS[0]:
            is_workspace = stats.get("region_type") == "temp"
            held[address] = (str(stats.get("tf_op", "")), int(stats["allocation_bytes"]), is_workspace)
        else:
            held.pop(address, None)
    return Recorded(levels, tuple(held.values()), levels[fullest][1])


def measure_peak(run: Callable[[], Any], steps: int) -> int | None:
    """The most bytes that the device's allocator counts over some steps; None if it counts none.

    Args:
        run: Runs the step.
        steps: How many.

    Raises:
        tf.errors.ResourceExhaustedError: If it does not fit.
    """
    if memory_in_use() is None:
        return None
    tf.config.experimental.reset_memory_stats(device_name())
    for _ in range(steps):
        run()
    return memory_in_use("peak")


_MEMORY_EVENTS = ("MemoryAllocation", "MemoryDeallocation")


def step_costs(events: Sequence[Event], graph: ir.Graph, seconds: float, known: CostModel, fingerprint: str) -> Profile:
    """Costs of nodes and links as a step of the training itself showed them.

    Unlike those of `measure_step` they include the updates of variables and the gain of pairs. All are scaled so that
    they add up to the length that steps have when nobody records them.

    Args:
        events: Recorded while the step ran.
        graph: What ran: the step's graph as rewritten.
        seconds: Length of a step that is not recorded.
        known: What was known before: the workspace of nodes stays, and so do links that no copy used.
        fingerprint: Of the graph that the profile is for.

    Raises:
        CantMeasure: If none of the events is one of the graph.
    """
    spent = _spent(events, graph)
    scale = seconds / sum(spent.values())
    spent = {name: share * scale for name, share in spent.items()}
    links = {tier: _seen_link(known.link(tier), tier, graph, spent) for tier in known.device.links}
    workspace = known.profile.workspace if known.profile else _node_workspace(events, graph)
    return Profile(fingerprint, _node_seconds(graph, spent), workspace, links)


def _seen_link(link: Link, tier: str, graph: ir.Graph, spent: Mapping[str, float]) -> Link:
    """The link at the speed that copies within a step had."""
    speeds = {}
    for op, field in ((ir.SWAP_OUT, "out_bytes_per_second"), (ir.SWAP_IN, "in_bytes_per_second")):
        moved = [n for n in graph.nodes if n.op == op and dict(n.attrs)["tier"] == tier and spent.get(n.name)]
        nbytes = sum(int(dict(node.attrs)["nbytes"]) for node in moved)  # pyright: ignore[reportArgumentType]
        busy = sum(spent[node.name] for node in moved) - len(moved) * link.latency_seconds
        if nbytes and busy > 0:
            speeds[field] = nbytes / busy
    return dataclasses.replace(link, **speeds)


_FOLDERS = graphdef.OPAQUE | {ir.SWAP_OUT, ir.SWAP_IN, ir.FETCH, ir.VIEW, ir.STORE, ir.UPDATE, ir.SHARD}
"""Nodes that are made of several ops, called "<node>/..."."""


def _spent(events: Sequence[Event], graph: ir.Graph) -> Mapping[str, float]:
    """Seconds of a step by node.

    The whole step is dealt out: time in which several ops run in equal shares, time in which none runs to the op that
    runs next. So waits between ops are counted, and what runs side by side is counted once.

    Raises:
        CantMeasure: If none of the events is one of the graph.
    """
    inserted = {"is_inserted", ir.IS_ZEROS}
    folders = {node.name for node in graph.nodes if node.op in _FOLDERS or not inserted.isdisjoint(dict(node.attrs))}
    owner_of = _owners(graph, folders)
    intervals = [(start, start + duration, owner_of(name)) for start, duration, name, _ in events]
    spent = _shares([interval for interval in intervals if interval[2]])
    if not spent:
        raise CantMeasure("the profiler recorded none of the step's ops")
    return spent


def _spent_on_gpu(events: Sequence[Event], graph: ir.Graph) -> Mapping[str, float]:
    """Seconds of a GPU's step by node: those of its kernels, and of waits for the host that launches them."""
    owner_of = _owners(graph, {node.name for node in graph.nodes if node.op in graphdef.OPAQUE})
    spent: dict[str, float] = collections.defaultdict(float)
    end = 0
    for start, duration, name, stats in events:
        owner = owner_of(name) if _KERNEL in stats else ""
        if not owner:
            continue
        waited = max(0, start - end) if end else 0
        busy = max(0, start + duration - max(start, end))
        spent[owner] += (busy + min(waited, _LAUNCH_PICOSECONDS)) / 1e12
        end = max(end, start + duration)
    return spent


def _node_seconds(graph: ir.Graph, spent: Mapping[str, float]) -> Mapping[str, float]:
    """Seconds of all nodes of the user's: nothing for those that are too short to be recorded."""
    inserted = {node.name for node in graph.nodes if node.like or node.op in (ir.SWAP_OUT, ir.SWAP_IN)}
    seconds = {node.name: spent.get(node.name, 0.0) for node in graph.nodes if node.name not in inserted}
    for node in graph.nodes:
        if node.like and node.name in spent and node.like not in spent:  # the first run was not needed
            seconds[node.like] = spent[node.name]
    return seconds


def _shares(intervals: Sequence[tuple[int, int, str]]) -> dict[str, float]:
    """Seconds by name, out of intervals in picoseconds; see `_spent`."""
    changes = sorted(
        [(start, 1, name) for start, _, name in intervals] + [(end, -1, name) for _, end, name in intervals]
    )
    shares: dict[str, float] = collections.defaultdict(float)
    running: collections.Counter[str] = collections.Counter()
    since = changes[0][0] if changes else 0
    for moment, change, name in changes:
        for one in running or (name,):
            shares[one] += (moment - since) / max(1, len(running)) / 1e12
        since = moment
        running[name] += change
        if not running[name]:
            del running[name]
    return shares


def _owners(graph: ir.Graph, folders: Collection[str]) -> Callable[[str], str]:
    """Makes a function from an event's name to the node that it belongs to, "" if to none.

    Args:
        graph: The graph that ran.
        folders: Nodes that are made of several ops, called "<node>/...".
    """
    names = {node.name for node in graph.nodes}

    def owner(event: str) -> str:
        op = event.rpartition(":")[0]
        if op in names:
            return op
        return next((op[:end] for end in _slashes(op) if op[:end] in folders), "")

    return owner


def without_side_effects(graph: ir.Graph) -> ir.Graph:
    """The graph less the nodes that change state; what they would have read is still computed.

    A sum over all replicas is this one's own part: they do not measure in step.

    Raises:
        CantMeasure: If the value of such a node is needed.
    """
    kept: list[ir.Node] = []
    waited_for: dict[str, tuple[str, ...]] = {}  # dropped node -> kept nodes before it
    own_part: dict[str, str] = {}  # sum over all replicas -> this one's part

    def kept_before(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(found for name in names for found in waited_for.get(name, (name,))))

    for node in graph.nodes:
        inputs = tuple(own_part.get(reference, reference) for reference in node.inputs)
        read = [ir.producer(reference) for reference in inputs]
        if node.op in (ir.ALL_REDUCE, ir.EXCHANGE, ir.AWAIT):
            own_part[node.name] = inputs[0]
        if node.op == ir.UPDATE:
            node = dataclasses.replace(node, stateful=False)
        if node.stateful and not dict(node.attrs).get("only_reads"):
            waited_for[node.name] = kept_before([*read, *node.control_inputs])
            continue
        needed = [name for name in read if name in waited_for]
        if needed:
            raise CantMeasure(f"'{node.name}' needs the value of '{needed[0]}', which has side effects")
        kept.append(dataclasses.replace(node, inputs=inputs, control_inputs=kept_before(node.control_inputs)))
    ends = kept_before([*graph.control_outputs, *waited_for])
    outputs = tuple(own_part.get(reference, reference) for reference in graph.outputs)
    dropped = [ir.producer(reference) for reference in outputs if ir.producer(reference) in waited_for]
    if dropped:
        raise CantMeasure(f"a result of the step is the value of '{dropped[0]}', which has side effects")
    return graph.replace(nodes=tuple(kept), outputs=outputs, control_outputs=ends)


@contextlib.contextmanager
def recording() -> Iterator[list[Event]]:
    """Records what TensorFlow's ops and allocators do meanwhile, into a list that is filled at the end.

    Raises:
        CantMeasure: If TensorFlow's profiler is busy; nothing has run then.
    """
    events: list[Event] = []
    with tempfile.TemporaryDirectory(prefix="graphswap-profile-") as directory:
        try:
            tf.profiler.experimental.start(directory)  # TensorFlow 2.21 heeds none of its options
        except (tf.errors.AlreadyExistsError, tf.errors.UnavailableError) as error:
            raise CantMeasure(f"TensorFlow's profiler is busy: {error.message}") from error
        try:
            yield events
            if device_name() != "CPU:0":
                tf.test.experimental.sync_devices()
        finally:
            tf.profiler.experimental.stop()
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace()
        space.ParseFromString(path.read_bytes())
        events += _events(space)


Event = tuple[int, int, str, Mapping[str, Any]]
"""Start and duration in picoseconds, name, and further facts."""


def _node_workspace(events: Sequence[Event], graph: ir.Graph) -> Mapping[str, Workspace]:
    """Workspace by node, from the events of ops and of the allocator."""
    opaque = {node.name for node in graph.nodes if node.op in graphdef.OPAQUE}
    buffers = allocations(events)
    runs = _runs(events, _owners(graph, opaque)) if device_name() == "CPU:0" else _runs_on_gpu(buffers, graph)
    of_node: dict[str, list[Buffer]] = collections.defaultdict(list)
    for buffer in buffers:
        of_node[buffer.op].append(buffer)
    workspace = {name: _workspace(of_node[name], runs[name][1]) for name in runs if name not in opaque}
    before = 0  # when the nodes before had ended: a loop's counters may run ahead of them
    for node in graph.nodes:
        start, end = runs.get(node.name, (0, 0))
        if node.name in opaque and end:
            # Its inner nodes go by other names; it may free what it was given, trip by trip.
            growth = _most_bytes(buffers, max(start, before), end)
            workspace[node.name] = Workspace(late=(max(0, growth - sum(liveness.output_bytes(node))),))
        before = max(before, end)
        if node.like and node.name in runs and node.like not in runs:  # the first run was not needed
            workspace[node.like] = workspace[node.name]
    return workspace


def _runs(events: Sequence[Event], owner_of: Callable[[str], str]) -> dict[str, tuple[int, int]]:
    """Start and end of every node that ran, in picoseconds."""
    runs: dict[str, tuple[int, int]] = {}
    for start, duration_ps, name, _ in events:
        op = owner_of(name)
        if op:
            runs[op] = (min(start, runs.get(op, (start, 0))[0]), max(start + duration_ps, runs.get(op, (0, 0))[1]))
    return runs


def _runs_on_gpu(buffers: Sequence[Buffer], graph: ir.Graph) -> dict[str, tuple[int, int]]:
    """The same of a GPU's step, whose ops are no events: from a node's first buffer to the next one of another."""
    names = {node.name for node in graph.nodes}
    runs: dict[str, tuple[int, int]] = {}
    latest = ""
    for buffer in sorted(buffers, key=lambda buffer: buffer.start):
        if latest and buffer.op != latest:
            runs[latest] = (runs[latest][0], buffer.start)
        latest = buffer.op if buffer.op in names else ""
        if latest:
            runs[latest] = (runs.get(latest, (buffer.start, 0))[0], _NEVER)
    return runs


def _workspace(buffers: Sequence[Buffer], end: int) -> Workspace:
    """What a node held only while it ran, at the moment when that was most.

    Args:
        buffers: Those it asked for.
        end: When it ended. Some kernels make a temporary buffer their output: it outlives them.
    """
    outputs = [buffer for buffer in buffers if not buffer.is_temporary or buffer.end > end]
    temporary = sorted((buffer for buffer in buffers if buffer not in outputs), key=lambda buffer: buffer.start)
    fullest = max(temporary, key=lambda moment: _held_at(temporary, moment.start), default=None)
    if fullest is None:
        return Workspace()
    held = [buffer for buffer in temporary if buffer.start <= fullest.start < buffer.end]
    first_output = min((buffer.start for buffer in outputs), default=0)
    return Workspace(
        tuple(buffer.nbytes for buffer in held if buffer.start < first_output),
        tuple(buffer.nbytes for buffer in held if buffer.start >= first_output),
    )


def _held_at(buffers: Sequence[Buffer], moment: int) -> int:
    return sum(buffer.nbytes for buffer in buffers if buffer.start <= moment < buffer.end)


class Buffer(NamedTuple):
    """What the allocator handed out: times in picoseconds."""

    op: str
    nbytes: int
    is_temporary: bool
    start: int
    end: int


def allocations(events: Sequence[Event]) -> list[Buffer]:
    """The buffers that the device's allocator handed out while the events were recorded."""
    open_at: dict[int, Buffer] = {}  # by address
    closed = []
    for start, _, name, stats in events:
        if not _is_of_device(stats):
            continue
        if name == "MemoryAllocation":
            nbytes = allocator.rounded(int(stats["requested_bytes"]))
            is_temporary = stats.get("region_type") == "temp"
            buffer = Buffer(str(stats.get("tf_op", "")), nbytes, is_temporary, start, _NEVER)
            open_at[int(stats["addr"])] = buffer
        elif name == "MemoryDeallocation":
            buffer = open_at.pop(int(stats["addr"]), None)
            if buffer is not None:
                closed.append(buffer._replace(end=start))
    return [*closed, *open_at.values()]


_NEVER = 1 << 62


def _is_of_device(stats: Mapping[str, Any]) -> bool:
    """Whether an event of an allocator is one of the device's, not of the host's."""
    return device_name() == "CPU:0" or str(stats.get("allocator_name")).startswith("GPU")


def _most_bytes(buffers: Sequence[Buffer], start: int, end: int) -> int:
    """The most bytes that the buffers hold at a time between start and end, beyond what they hold at the start."""
    changes = [(buffer.start, buffer.nbytes) for buffer in buffers]
    changes += [(buffer.end, -buffer.nbytes) for buffer in buffers]
    inner = sorted(change for change in changes if start <= change[0] <= end)
    return max(itertools.accumulate(nbytes for _, nbytes in inner), default=0)


def _slashes(name: str) -> list[int]:
    return [end for end, letter in enumerate(name) if letter == "/"]


_KERNEL = "graphswap_kernel"
"""Marks the events that ran on the GPU."""


def _events(space: xplane_pb2.XSpace) -> list[Event]:
    """The host's events and the GPU's kernels by start."""
    events = []
    for plane in (plane for plane in space.planes if plane.name in ("/host:CPU", "/device:GPU:0")):
        stat_names = {key: entry.name for key, entry in plane.stat_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                stats = {}
                for stat in event.stats:
                    kind = stat.WhichOneof("value")
                    value = getattr(stat, kind)
                    stats[stat_names[stat.metadata_id]] = stat_names.get(value) if kind == "ref_value" else value
                name = plane.event_metadata[event.metadata_id].name
                if plane.name != "/host:CPU":
                    name, stats[_KERNEL] = str(stats.get("tf_op", "")), name
                events.append((line.timestamp_ns * 1000 + event.offset_ps, event.duration_ps, name, stats))
    return sorted(events, key=lambda event: event[0])


# --- the cache --------------------------------------------------------------------------------------------------


def cached_profile(fingerprint: str, device: str, question: str = "") -> Profile | None:
    """The profile of an earlier run, in this process or another; None if there is none that can be read.

    Args:
        fingerprint: Of the graph.
        device: `DeviceSpec.name`.
        question: What the profile was refined for; "" for the one that is measured first and serves all questions.
    """
    try:
        return Profile.from_json(_cache_file("profiles", fingerprint, device, question).read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store_profile(profile: Profile, device: str, question: str = "") -> None:
    """Keeps a profile for later runs. A directory that can't be written is no error: it is only a cache."""
    _store(_cache_file("profiles", profile.fingerprint, device, question), profile.to_json())


def cached_plan(fingerprint: str, device: str, question: str) -> Plan | None:
    """The plan that an earlier run ended with; None if there is none that can be read. As `cached_profile`."""
    try:
        return Plan.from_json(_cache_file("plans", fingerprint, device, question).read_text())
    except (OSError, PlanError):
        return None


def store_plan(plan: Plan, device: str, question: str) -> None:
    """Keeps a plan for later runs, as `store_profile`."""
    _store(_cache_file("plans", plan.fingerprint, device, question), plan.to_json())


def _store(path: pathlib.Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return


def _cache_file(what: str, fingerprint: str, device: str, question: str) -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    onednn = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1")
    kind = f"{device.translate(str.maketrans('/ ', '--', ':'))}-{tf.__version__}-{onednn}"
    refined = f"-{hashlib.sha256(question.encode()).hexdigest()[:16]}" if question else ""
    name = f"{fingerprint}-{kind}-v{_PROFILE_VERSION}{refined}.json"
    return pathlib.Path(root) / "graphswap" / what / name
