"""What things cost: seconds and bytes of nodes and copies, measured where possible. Never decides."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from graphswap import ir

MEMORY_VARIABLE = "GRAPHSWAP_EMULATED_MEMORY"
"""The environment variable that holds the bytes of an emulated device (`emulate`)."""

NETWORK_LANE = ("network", "exchange")
"""Where replicas exchange gradients, beside the lanes of far tiers, each a tier and a direction."""

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """The way between the device and a far tier.

    Attributes:
        out_bytes_per_second: Speed of copies off the device; may be infinite, or 0: then nothing is swapped.
        in_bytes_per_second: Speed of copies back, likewise.
        latency_seconds: Added to every copy.
        overlaps: Whether copies run beside compute. On a CPU they take the same cores.

    Raises:
        ValueError: If a speed is negative or no number, or the latency is not finite and >= 0.
    """

    out_bytes_per_second: float = 1e9
    in_bytes_per_second: float = 1.5e9
    latency_seconds: float = 20e-6
    overlaps: bool = False

    def __post_init__(self) -> None:
        for name in ("out_bytes_per_second", "in_bytes_per_second"):
            _expect("Link", name, getattr(self, name), "a speed >= 0; 0 if nothing gets through")
        _expect("Link", "latency_seconds", self.latency_seconds, "finite seconds >= 0", is_finite=True)

    @property
    def is_closed(self) -> bool:
        """Whether what is copied out never arrives, or never comes back."""
        return not (self.out_bytes_per_second and self.in_bytes_per_second)

    def out_seconds(self, nbytes: float) -> float:
        """Seconds of a copy off the device; infinite if nothing gets through."""
        return self.latency_seconds + _seconds(nbytes, self.out_bytes_per_second)

    def in_seconds(self, nbytes: float) -> float:
        """Seconds of a copy back, likewise."""
        return self.latency_seconds + _seconds(nbytes, self.in_bytes_per_second)


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device as the cost model sees it.

    Attributes:
        name: For reports and cache keys.
        memory_bytes: Size of its memory; None if nothing limits it: then its allocator loses none, either.
        reserves_memory: Whether its allocator takes all memory as one region at the start.
        holes: How many holes `placement` leaves for small buffers.
        runs_pairs: Whether two nodes side by side are done sooner than one after the other.
        computes_there: Whether its cores are the host's, and compute the same in far memory: then it is best to compute
            there what can be.
        has_cpu_kernels: Whether its kernels are TensorFlow's for CPUs, whose workspace is known. For others none is
            assumed until it is measured.
        flops_per_second: For the analytic estimate of matrix products and convolutions.
        memory_bytes_per_second: For the analytic estimate of everything else.
        launch_seconds: Added to every node.
        links: Tier name to `Link`.
        network: The way to the next worker of a ring; copies out are those to it.

    Raises:
        ValueError: If a number is out of range or no number.
    """

    name: str = "cpu"
    memory_bytes: int | None = None
    reserves_memory: bool = True
    holes: int = 0
    runs_pairs: bool = False
    computes_there: bool = False
    has_cpu_kernels: bool = True
    flops_per_second: float = 5e10
    memory_bytes_per_second: float = 8e9
    launch_seconds: float = 10e-6
    links: Mapping[str, Link] = dataclasses.field(
        default_factory=lambda: {"host": Link(), "disk": Link(0.7e9, 0.9e9, 100e-6)}
    )
    network: Link = dataclasses.field(default_factory=lambda: Link(1.25e9, 1.25e9, 50e-6, overlaps=True))  # 10 Gb/s

    def __post_init__(self) -> None:
        for name in ("flops_per_second", "memory_bytes_per_second"):
            _expect("DeviceSpec", name, getattr(self, name), "a rate > 0", is_positive=True)
        _expect("DeviceSpec", "launch_seconds", self.launch_seconds, "finite seconds >= 0", is_finite=True)
        if self.memory_bytes is not None:
            _expect("DeviceSpec", "memory_bytes", self.memory_bytes, "bytes > 0, or None", is_positive=True)


def _expect(
    owner: str, name: str, value: float, expected: str, *, is_finite: bool = False, is_positive: bool = False
) -> None:
    """Raises ValueError unless the value is in range: not negative, and what else is asked for."""
    if not (value > 0 or (value == 0 and not is_positive)) or (is_finite and math.isinf(value)):
        raise ValueError(f"{owner}.{name}: expected {expected}, received {value!r}. Correct it, or measure again.")


def _seconds(nbytes: float, bytes_per_second: float) -> float:
    if not bytes_per_second:
        return math.inf if nbytes else 0.0
    return nbytes / bytes_per_second


class Workspace(NamedTuple):
    """Buffers that a node holds only while it runs, in the order in which it asks for them.

    Attributes:
        early: Bytes of those it asks for before its outputs.
        late: Of those after.
    """

    early: tuple[int, ...] = ()
    late: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(self.early) + sum(self.late)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Measured costs of one graph on one device.

    Attributes:
        fingerprint: `Graph.fingerprint` of the measured graph.
        seconds: Node name to seconds; nodes that did not run are missing.
        workspace: Node name to what it allocates while it runs, beyond its outputs.
        links: Tier name to `Link` as measured then, so that later runs that find the profile make the same plan.
            Of the disk only as one plan's steps saw it: its speed depends on the directory.
        time_scale: What a whole step took over what its parts cost. It leaves plans as they are: predictions are
            multiplied by it when they are reported.
        reserved_bytes: To leave free of the budget, as steps have been seen to need them beyond their prediction.
    """

    fingerprint: str
    seconds: Mapping[str, float]
    workspace: Mapping[str, Workspace]
    links: Mapping[str, Link] = dataclasses.field(default_factory=dict)
    time_scale: float = 1.0
    reserved_bytes: int = 0

    def __post_init__(self) -> None:
        workspace_bytes = {name: workspace.nbytes for name, workspace in self.workspace.items()}
        for name, value in (*self.seconds.items(), *workspace_bytes.items()):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"expected a finite cost >= 0 for node '{name}', received {value!r}. Measure again.")
        if not (math.isfinite(self.time_scale) and self.time_scale > 0):
            raise ValueError(f"expected a finite time_scale > 0, received {self.time_scale!r}. Measure again.")
        if self.reserved_bytes < 0:
            raise ValueError(f"expected reserved_bytes >= 0, received {self.reserved_bytes!r}. Measure again.")

    def to_json(self) -> str:
        fields = {**vars(self), "links": {k: dataclasses.asdict(v) for k, v in self.links.items()}}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        fields = json.loads(text)
        workspace = {k: Workspace(tuple(early), tuple(late)) for k, (early, late) in fields["workspace"].items()}
        links = {k: Link(**v) for k, v in fields["links"].items()}
        return cls(**{**fields, "workspace": workspace, "links": links})


@dataclasses.dataclass(frozen=True, eq=False)
class CostModel:
    """Answers for one graph on one device.

    Attributes:
        device: The device.
        profile: Measured costs, or None for analytic ones.
        resident_bytes: Device bytes in use before the step that the graph does not show.
        far_tier: The tier that swaps go to.
    """

    device: DeviceSpec = DeviceSpec()
    profile: Profile | None = None
    resident_bytes: int = 0
    far_tier: str = "host"

    def seconds(self, graph: ir.Graph, node: ir.Node) -> float:
        """Seconds that the node computes. A repeated node costs what the first one costs.

        What may run beside compute takes its link's time: how long others wait for it hangs on when it starts.
        """
        measured = None
        if self.profile is not None and not self.overlaps(node):
            measured = self.profile.seconds.get(node.like or node.name)
        if measured is not None:
            return measured
        if node.op == ir.FETCH:
            return self.link(_tier(node)).in_seconds(node.outputs[0].nbytes)
        if node.op == ir.STORE:
            return self.link(_tier(node)).out_seconds(graph.value(node.inputs[0]).nbytes)
        if node.op == ir.UPDATE:
            return self._update_seconds(graph, node)
        if self.profile is not None or node.op == ir.EXCHANGE:
            return self.device.launch_seconds
        if not any(value.nbytes for value in node.outputs) or node.op in NO_COMPUTE:
            return self.device.launch_seconds
        moved = sum(graph.value(r).nbytes for r in node.inputs) + sum(v.nbytes for v in node.outputs)
        return (
            self.device.launch_seconds
            + flops(graph, node) / self.device.flops_per_second
            + moved / self.device.memory_bytes_per_second
        )

    def overlaps(self, node: ir.Node) -> bool:
        """Whether the node may run beside compute: it copies a variable over a link that does so."""
        return node.op in (ir.FETCH, ir.STORE) and self.link(_tier(node)).overlaps

    def _update_seconds(self, graph: ir.Graph, node: ir.Node) -> float:
        """As much as it takes to pass all values through memory once, and those on the disk over their link."""
        attrs: Any = dict(node.attrs)
        nbytes = ir.Value(attrs["dtype"], attrs["shape"]).nbytes
        seconds = self.device.launch_seconds
        moved = sum(graph.value(r).nbytes for r in node.inputs) + sum(value.nbytes for value in node.outputs)
        for number, handle in enumerate(ir.far_handles(node)):
            tier, is_stored = _tier(graph.by_name[handle]), number in attrs["stored"]
            moved += nbytes * (1 + is_stored)
            if tier == "disk":
                seconds += self.link(tier).in_seconds(nbytes) + is_stored * self.link(tier).out_seconds(nbytes)
        return seconds + moved / self.device.memory_bytes_per_second

    def workspace(self, graph: ir.Graph, node: ir.Node) -> Workspace:
        """Device buffers that the node holds only while it runs, beyond its outputs."""
        if self.profile is not None:
            measured = self.profile.workspace.get(node.like or node.name)
            if measured is not None:
                return measured
        if node.op == ir.ALL_REDUCE:
            return Workspace(late=(node.outputs[0].nbytes,))  # what arrives of the other replicas
        if node.op == ir.SHARD:
            return Workspace(early=(node.outputs[0].nbytes,))  # a slice of what begins anywhere is a copy, too
        if node.op == ir.ALL_GATHER:
            return Workspace(late=(node.outputs[0].nbytes - node.outputs[0].nbytes // _workers(node),))  # likewise
        nbytes: Any = dict(node.attrs).get("workspace_bytes", 0)
        if not nbytes and self.device.has_cpu_kernels:
            if node.op == "MaxPoolGrad":
                pooled = graph.value(node.inputs[1]).nbytes
                return Workspace(early=(pooled, 2 * pooled))  # maximums, and where they were as 64-bit integers
            nbytes = _convolution_workspace(graph, node)
        return Workspace(late=(nbytes,)) if nbytes else Workspace()

    def network_seconds(self, graph: ir.Graph, node: ir.Node) -> float:
        """Seconds that a sum over all replicas is on the network, by itself, or what gathers parts; 0 for other nodes.

        All pass parts around a ring, n - 1 times to sum them and n - 1 times to spread them, each time an n-th of
        the bytes (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", Journal
        of Parallel and Distributed Computing 2009; TensorFlow's ring_alg.cc and NCCL do so).
        """
        workers = _workers(node)
        times = _rounds(node)
        return times * self.device.network.out_seconds(node.outputs[0].nbytes / workers) if times else 0.0

    def network_latency_seconds(self, node: ir.Node) -> float:
        """What `network_seconds` is for no bytes."""
        return _rounds(node) * self.device.network.latency_seconds

    def link(self, tier: str) -> Link:
        """The way to a far tier, as the profile has it, else the device spec."""
        if self.profile is not None and tier in self.profile.links:
            return self.profile.links[tier]
        return self.device.links[tier]


_COLLECTIVES = {ir.ALL_REDUCE: 2, ir.EXCHANGE: 2, ir.ALL_GATHER: 1}
"""How often parts go once around the ring."""


def _workers(node: ir.Node) -> int:
    """How many replicas' values the node sums or joins."""
    workers: Any = dict(node.attrs).get("workers", 1) if node.op in _COLLECTIVES else 1
    return workers


def _rounds(node: ir.Node) -> int:
    """How often a replica passes a part on."""
    return _COLLECTIVES.get(node.op, 0) * (_workers(node) - 1)


def _tier(node: ir.Node) -> str:
    return str(dict(node.attrs)["tier"])


NO_COMPUTE = frozenset(
    {"Const", "Placeholder", "Identity", "IdentityN", "NoOp", "Reshape", "Squeeze", "ExpandDims"}
) | {
    "ReadVariableOp",
    "StopGradient",
    "PreventGradient",
    "Shape",
    "ShapeN",
    "Size",
    "Rank",
    ir.VIEW,
}
"""Ops that move no data."""

_CONVOLUTIONS = {"Conv2D": (1, -1), "Conv2DBackpropInput": (1, 2), "Conv2DBackpropFilter": (-1, 2)}
"""Where the filter and the array on the output's side are: an input's index, or -1 for the output."""


def flops(graph: ir.Graph, node: ir.Node) -> float:
    """Floating point operations of matrix products and convolutions, from shapes alone; 0 for others.

    For C = A B with sizes mk, kn, mn the product of the three sizes is (mkn)^2, whichever operand is
    transposed; with a batch of b it is b^3 (mkn)^2. An Einsum is taken for a matrix product, which
    overestimates batched ones.
    """
    shapes = [graph.value(r).shape or () for r in node.inputs]
    sizes = [math.prod(d or 1 for d in shape) for shape in shapes]
    if not node.outputs:
        return 0.0
    out_shape = node.outputs[0].shape or ()
    out = math.prod(d or 1 for d in out_shape)
    if node.op in ("MatMul", "BatchMatMulV2", "BatchMatMul", "Einsum", "_FusedMatMul") and len(sizes) >= 2:
        batch = math.prod(d or 1 for d in out_shape[:-2]) if node.op.startswith("Batch") else 1
        return 2.0 * math.sqrt(sizes[0] * sizes[1] * out / batch)
    if node.op in _CONVOLUTIONS:
        filter_at, image_at = _CONVOLUTIONS[node.op]
        filter_shape = out_shape if filter_at < 0 else shapes[filter_at]
        image = out if image_at < 0 else sizes[image_at]
        return 2.0 * image * math.prod(d or 1 for d in filter_shape[:-1])
    if node.op.startswith("DepthwiseConv2d"):
        return 2.0 * max(out, *sizes) * 9
    return 0.0


def _convolution_workspace(graph: ir.Graph, node: ir.Node) -> int:
    """The im2col buffer of TensorFlow's CPU kernels for convolution gradients.

    It holds one image for the gradient of the image (conv_grad_input_ops.h, where all threads work on one), and as
    many as fill 30 MiB for that of the filter (conv_grad_filter_ops.cc).
    """
    if node.op not in ("Conv2DBackpropInput", "Conv2DBackpropFilter"):
        return 0
    filter_at, image_at = _CONVOLUTIONS[node.op]
    filter_shape = node.outputs[0].shape if filter_at < 0 else graph.value(node.inputs[filter_at]).shape
    image = graph.value(node.inputs[image_at])
    if not filter_shape or not image.shape or None in filter_shape or None in image.shape:
        return 0
    pixels = math.prod(d or 1 for d in image.shape[1:3])
    taps = math.prod(d or 1 for d in filter_shape[:3])
    depth = filter_shape[3] or 1
    unit = pixels * depth + taps * depth + pixels * taps
    item = ir.ITEM_BYTES.get(image.dtype, 4)
    shard = 1 if node.op == "Conv2DBackpropInput" else -(-(30 * _MIB // item) // unit)
    return shard * pixels * taps * item


NO_LINK = Link(0.0, 0.0, 0.0)
"""A link that nothing gets through."""
