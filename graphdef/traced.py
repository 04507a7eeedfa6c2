"""A traced function: what its operations read, run and hold, and what is taken out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import tensorflow as tf
from tensorflow.python.framework import func_graph as func_graph_lib

from graphswap import ir

FuncGraph: TypeAlias = func_graph_lib.FuncGraph
Shape = tuple[int | None, ...] | None

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
LOOPS = frozenset({"While", "StatelessWhile"})
BRANCHES = frozenset({"If", "StatelessIf", "Case", "StatelessCase"})
OPAQUE = CALLS | LOOPS | BRANCHES
"""Ops that run functions. Their bodies are not looked into, but their memory is counted."""
COPIES = frozenset({"Identity", "IdentityN"})
SHAPES = frozenset({"Shape", "ShapeN"})


class UnsupportedGraphError(ValueError):
    """The graph holds something that graphswap can't plan. The message names the node."""


def arguments(func_graph: FuncGraph) -> list[tf.Tensor]:
    """The function's inputs less what it captures, now or when it is called."""
    captured = {internal.op.name for _, internal in func_graph.captures}
    captured.update(internal.op.name for internal in func_graph.deferred_internal_captures)
    return [tensor for tensor in func_graph.inputs if tensor.op.name not in captured]


def group_size(func_graph: FuncGraph) -> int:
    """How many processes the function's collectives join, each with as many devices as this one; 1 if it has none."""
    found = [operation for operation in func_graph.get_operations() if operation.type.startswith("Collective")]
    sizes = [tf.get_static_value(operation.inputs[1]) for operation in found]
    replicas = max((int(size) for size in sizes if size is not None), default=1)
    return max(1, replicas // max(1, len({operation.device for operation in found})))


def server_devices(func_graph: FuncGraph) -> dict[str, str]:
    """Operation on a parameter server to its device: those placed there, and what takes a variable that lives there.

    Variables among them, also those that are arguments.
    """
    homes = {
        internal.op.name: external.device for external, internal in func_graph.captures if hasattr(external, "numpy")
    }
    homes = {name: device for name, device in homes.items() if _is_on_server(device)}
    for operation in func_graph.get_operations():
        if _is_on_server(operation.device):
            homes[operation.name] = operation.device
        elif not operation.device and operation.inputs and operation.inputs[0].dtype == tf.resource:
            home = homes.get(operation.inputs[0].op.name)
            homes.update({} if home is None else {operation.name: home})
    for argument in (tensor for tensor in func_graph.inputs if tensor.dtype == tf.resource):
        readers = {homes.get(reader.name) for reader in argument.consumers()}
        if len(readers) == 1 and None not in readers:
            homes.setdefault(argument.op.name, str(*readers))
    return homes


def _is_on_server(device: str | None) -> bool:
    return bool(device) and tf.DeviceSpec.from_string(device).job == "ps"


REPLACED = "_graphswap_replaced"
"""An attribute of a FuncGraph: name of an operation -> that of the traced one in whose place, or after which, it is."""


def live_nodes(nodes: Sequence[ir.Node], func_graph: FuncGraph, names: Mapping[str, str]) -> list[ir.Node]:
    """The nodes that run: what leads to a result or changes state, copies that were looked through left out."""
    by_name = {node.name: node for node in nodes}
    pending = [names.get(t.op.name, t.op.name) for t in (*func_graph.outputs, *func_graph.inputs)]
    pending += [operation.name for operation in func_graph.control_outputs]
    pending += [node.name for node in nodes if node.stateful and node.op not in ("ReadVariableOp", "VarHandleOp")]
    live: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in live:
            live.add(name)
            node = by_name[name]
            pending += [*map(ir.producer, node.inputs), *node.control_inputs]
    return [node for node in nodes if node.name in live]


def has_static_inputs(operation: Any) -> bool:
    """Whether the trace knows the shapes of all that the operation reads."""
    return all(tensor.shape.is_fully_defined() for tensor in operation.inputs)


def topological(nodes: Sequence[ir.Node]) -> tuple[ir.Node, ...]:
    """The nodes in trace order as far as inputs and control inputs allow. What is read from elsewhere is left out."""
    by_name = {node.name: node for node in nodes}
    done: set[str] = set()
    ordered = []
    for root in nodes:
        pending = [root]
        while pending:
            node = pending[-1]
            if node.name in done:
                pending.pop()
                continue
            before = [*map(ir.producer, node.inputs), *node.control_inputs]
            missing = [by_name[name] for name in before if name in by_name and name not in done]
            if missing:
                pending += reversed(missing)
            else:
                done.add(node.name)
                ordered.append(node)
    return tuple(ordered)


_HARMLESS = frozenset({"ReadVariableOp", "VarHandleOp", "Placeholder", "ResourceGather", "ResourceGatherNd"}) | {
    "RandomUniform",
    "RandomStandardNormal",
    "TruncatedNormal",
    "RandomUniformInt",
    "TensorListReserve",
    "TensorListPopBack",
    "Empty",
    "VarIsInitializedOp",
    "VariableShape",
}
"""Stateful ops that change nothing outside of the step."""


def only_reads(func_graph: FuncGraph, operation: Any) -> bool:
    """Whether a stateful operation, its bodies included, changes nothing outside of the step."""
    if operation.type in _HARMLESS:
        return True
    if operation.type not in OPAQUE:
        return False
    bodies = [body_of(func_graph, name) for name in body_names(operation)]
    return all(
        body is not None and all(only_reads(body, inner) for inner in body.get_operations() if inner.op_def.is_stateful)
        for body in bodies
    )


def body_names(operation: Any) -> list[str]:
    """Names of the functions that an opaque operation runs."""
    if operation.type in CALLS:
        return [operation.get_attr("f").name]
    if operation.type in LOOPS:
        return [operation.get_attr("body").name, operation.get_attr("cond").name]
    if operation.type in ("Case", "StatelessCase"):
        return [function.name for function in operation.get_attr("branches")]
    return [operation.get_attr("then_branch").name, operation.get_attr("else_branch").name]


def source_of(tensor: tf.Tensor) -> Any:
    """The operation that makes what a tensor is a copy of."""
    operation = tensor.op
    while operation.type in COPIES:
        operation = operation.inputs[0].op
    return operation


def copied_reference(tensor: tf.Tensor) -> str:
    """Reference to what a tensor is a copy of; as imported."""
    while tensor.op.type in COPIES and not tensor.op.control_inputs:
        tensor = tensor.op.inputs[tensor.value_index]
    return reference_to(tensor)


def body_of(func_graph: FuncGraph, name: str) -> FuncGraph | None:
    """The function of that name, as an operation of this one may run it; None if it was not traced in this process."""
    graph: Any = func_graph
    while graph is not None:
        function = graph._get_function(name)
        if function is not None:
            return getattr(function, "graph", None)
        graph = getattr(graph, "outer_graph", None)
    return None


def bytes_of(tensor: tf.Tensor) -> int:
    """Bytes of a tensor, not rounded; 0 where they are not known."""
    shape = shape_of(tensor)
    if shape is None or None in shape:
        return 0
    return ir.ITEM_BYTES.get(tensor.dtype.name, 0) * math.prod(d or 0 for d in shape)


def shape_of(tensor: tf.Tensor) -> Shape:
    """The shape as the trace knows it."""
    return None if tensor.shape.rank is None else tuple(tensor.shape.as_list())


def reference_to(tensor: tf.Tensor) -> str:
    """What a Graph calls the tensor: "node", or "node:1"."""
    return ir.ref(tensor.op.name, tensor.value_index)


def edges_of(operation: Any) -> ir.Node:
    """An operation without its outputs."""
    return ir.Node(
        operation.name,
        operation.type,
        tuple(map(reference_to, operation.inputs)),
        tuple(control.name for control in operation.control_inputs),
        stateful=bool(operation.op_def.is_stateful),
    )


def data_inputs(node: Any) -> tuple[str, ...]:
    """What a definition reads, by references as a Graph has them."""
    return tuple(name.removesuffix(":0") for name in node.input if not name.startswith("^"))


def remove_operations(func_graph: FuncGraph, removed: set[Any]) -> None:
    """Takes operations out that nobody reads.

    TensorFlow's graphs only grow; what becomes the function's definition is what `get_operations` lists.
    """
    kept = [operation for operation in func_graph.get_operations() if operation not in removed]
    for operation in kept:
        controls = [control for control in operation.control_inputs if control not in removed]
        if len(controls) < len(operation.control_inputs):
            operation._remove_all_control_inputs()
            operation._add_control_inputs(controls)
    func_graph.control_outputs = [operation for operation in func_graph.control_outputs if operation not in removed]
    gone: set[str] = getattr(func_graph, _REMOVED, set()) | {operation.name for operation in removed}
    setattr(func_graph, _REMOVED, gone)
    listed = type(func_graph).get_operations

    def get_operations() -> list[Any]:
        return [operation for operation in listed(func_graph) if operation.name not in gone]

    setattr(func_graph, "get_operations", get_operations)  # noqa: B010 (a method, to type checkers)


_REMOVED = "_graphswap_removed"
"""An attribute of a FuncGraph: names of the operations that were taken out."""
