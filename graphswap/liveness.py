"""Which values share a buffer, and when each buffer is born, used and free.

A *storage* is one device buffer with all the values that alias it. Positions are indices into
`graph.nodes`, the execution order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from graphswap import allocator, ir

ALIASES: Mapping[str, int] = dict.fromkeys(
    (
        "Identity",
        "Reshape",
        "Squeeze",
        "ExpandDims",
        "StopGradient",
        "PreventGradient",
        "CheckNumerics",
        "Snapshot",
        "Bitcast",
        "EnsureShape",
        "ReadVariableOp",
        "PlaceholderWithDefault",
        ir.ANCHOR,  # XLA makes it a part of what reads it
        ir.AWAIT,
    ),
    0,
)
"""Ops whose first output is the buffer of the given input. IdentityN aliases each to each."""

IN_PLACE: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(
        "Abs Acos Asin Atan Ceil Cos Cosh Erf Erfc Exp Expm1 Floor Inv IsFinite Log Log1p LogicalNot Neg Reciprocal "
        "Relu Relu6 LeakyRelu Elu Selu Rint Round Rsqrt Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Square Tan Tanh "
        "Softmax LogSoftmax BiasAdd FusedBatchNormV3 FusedBatchNorm Cumsum".split(),
        (0,),
    ),
    **dict.fromkeys(
        "Add AddV2 Sub Mul MulNoNan Div DivNoNan RealDiv FloorDiv FloorMod Maximum Minimum Pow SquaredDifference Xdivy "
        "Xlogy LogicalAnd LogicalOr ReluGrad Relu6Grad LeakyReluGrad EluGrad SeluGrad SigmoidGrad TanhGrad RsqrtGrad "
        "SqrtGrad SoftplusGrad SoftsignGrad ReciprocalGrad InvGrad".split(),
        (0, 1),
    ),
    "AddN": tuple(range(64)),
    ir.ALL_REDUCE: (0,),
    ir.EXCHANGE: (0,),
    **dict.fromkeys("MaxPoolGrad SoftmaxCrossEntropyWithLogits SparseSoftmaxCrossEntropyWithLogits".split(), (0,)),
    **dict.fromkeys(("Select", "SelectV2"), (1, 2)),
}
"""Ops that write an output over an input nobody else needs: the inputs, in the order tried."""

OVERWRITES_ANY = "overwrites_any"
"""Attribute of a node whose output may be written over any input."""

WRITTEN_IN_PLACE: Mapping[str, int] = dict.fromkeys(
    ("SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits"), 1
)
"""Which output of such an op it is, where it is not the first."""

ASSIGNS = frozenset({"AssignVariableOp"})
"""Ops after which the variable owns the buffer of the assigned value."""
UPDATES = frozenset({"AssignAddVariableOp", "AssignSubVariableOp"})
"""Ops that change a variable in place, or a fresh copy of it while somebody still reads the old one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """One buffer.

    Attributes:
        root: Reference to the value that allocates it.
        values: All values that live in it, the root first.
        nbytes: Device bytes, rounded as the allocator does.
        born: Position of the root's node.
        uses: Positions of the nodes that read it or make an alias of it, rising.
        is_held: Whether it outlives the step or was there before: arguments, constants, results, variables and
            what becomes one.
    """

    root: str
    values: tuple[str, ...]
    nbytes: int
    born: int
    uses: tuple[int, ...]
    is_held: bool


def alias_of(node: ir.Node, index: int) -> int | None:
    """Number of the input whose buffer output `index` of the node is, or None if it has its own."""
    if node.op == "IdentityN":
        return index
    if index:
        return None
    copied: Any = dict(node.attrs).get("copy_of_input", ALIASES.get(node.op))
    return copied


def overwritten_by(graph: ir.Graph, node: ir.Node, index: int) -> list[int]:
    """Numbers of the inputs that output `index` of the node may be written over, in the order tried."""
    if index != WRITTEN_IN_PLACE.get(node.op, 0):
        return []
    slots = IN_PLACE.get(node.op, ())[: len(node.inputs)]
    if dict(node.attrs).get(OVERWRITES_ANY):
        slots = tuple(range(len(node.inputs)))
    return [slot for slot in slots if _is_as_large(graph.value(node.inputs[slot]), node.outputs[index])]


def _is_as_large(value: ir.Value, other: ir.Value) -> bool:
    return (value.dtype, value.nbytes) == (other.dtype, other.nbytes)


@functools.lru_cache(maxsize=8)
def roots(graph: ir.Graph) -> Mapping[str, str]:
    """For every value the value whose buffer it lives in. Resource handles are followed to their variable."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        for index, reference in enumerate(node.refs()):
            source = alias_of(node, index)
            found[reference] = reference if source is None else found[node.inputs[source]]
    return found


def storages(graph: ir.Graph) -> tuple[Storage, ...]:
    """All storages that hold device bytes, in the order of birth."""
    root_of = roots(graph)
    kept = {root_of[reference] for reference in graph.outputs}
    kept.update(root_of[node.inputs[1]] for node in graph.nodes if node.op in ASSIGNS)
    members: dict[str, list[str]] = {}
    uses: dict[str, list[int]] = {}
    for position, node in enumerate(graph.nodes):
        for reference in node.refs():
            members.setdefault(root_of[reference], []).append(reference)
        for root in {root_of[reference] for reference in node.inputs}:
            uses.setdefault(root, []).append(position)
    found = []
    for root, values in members.items():
        node = graph.by_name[ir.producer(root)]
        nbytes = output_bytes(node)[ir.split_ref(root)[1]]
        if not nbytes:
            continue
        held = root in kept or node.op in ir.RESIDENT_OPS or node.outputs[0].dtype == "resource"
        found.append(
            Storage(
                root=root,
                values=tuple(values),
                nbytes=nbytes,
                born=graph.position[node.name],
                uses=tuple(uses.get(root, ())),
                is_held=held,
            )
        )
    return tuple(sorted(found, key=lambda storage: storage.born))


def waited_for(graph: ir.Graph) -> set[str]:
    """Names of the nodes that must run even if nobody reads what they make."""
    names = {name for node in graph.nodes for name in node.control_inputs}
    return names.union(graph.control_outputs, graph.inputs)


def output_bytes(node: ir.Node) -> Sequence[int]:
    """Device bytes behind each output, rounded as the allocator does.

    A variant such as a TensorList and a resource hold bytes that their type does not show; the import
    writes them into the attribute `held_bytes`.
    """
    for name, value in node.attrs:
        if name == "held_bytes":
            return value  # pyright: ignore[reportReturnType]
    return [allocator.rounded(value.nbytes) for value in node.outputs]


def output_pieces(node: ir.Node) -> Sequence[int]:
    """In how many equal buffers the bytes of each output lie: a list's elements have one each.

    The import writes them into the attribute `held_pieces`.
    """
    pieces: Any = dict(node.attrs).get("held_pieces")
    return pieces or [1] * len(node.outputs)
