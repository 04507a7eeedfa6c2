"""A traced function as a Graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import importer
from tensorflow.python.ops import handle_data_util

from graphswap import ir
from graphswap.graphdef.captures import capture_names
from graphswap.graphdef.grappler import Folding
from graphswap.graphdef.hidden_bytes import with_hidden_bytes
from graphswap.graphdef.traced import (
    COPIES,
    REPLACED,
    SHAPES,
    FuncGraph,
    Shape,
    UnsupportedGraphError,
    body_of,
    has_static_inputs,
    live_nodes,
    reference_to,
    server_devices,
    shape_of,
    source_of,
    topological,
)


def import_function(
    func_graph: FuncGraph, argument_shapes: Sequence[Shape] | None = None, folding: Folding | None = None
) -> ir.Graph:
    """Turns a traced function into a Graph.

    Nodes that nothing needs are left out. What depends on constants alone is a Const here: TensorFlow
    computes it once, when the function is made, and keeps it. Copies (Identity, IdentityN) are looked
    through: their readers read the source. Nested function calls are dissolved at trace time
    (`call_inline`); what is left of them is opaque, like While and If, and its memory is counted.

    Args:
        func_graph: The traced function.
        argument_shapes: Shapes of the arguments (not the captures) in the coming step; needed where the
            trace left dimensions open.
        folding: What TensorFlow's constant folding makes of the function; if None, all that it could is folded.

    Raises:
        UnsupportedGraphError: If the size of a value stays unknown.
    """
    operations = _in_trace_order(func_graph)
    shapes = _resolved_shapes(func_graph, operations, argument_shapes)
    names = capture_names(func_graph)
    homes = server_devices(func_graph)
    source = dict(names)  # reference to a copy -> reference to what it copies
    nodes = []
    for operation in operations:
        inputs = []
        for tensor in operation.inputs:
            reference = reference_to(tensor)
            inputs.append(source.get(reference, reference))
        # TensorFlow keeps them in sets: their order differs from process to process.
        controls = tuple(sorted(c.name for c in operation.control_inputs)) if operation.type != "Const" else ()
        if operation.type in COPIES and not controls:
            for tensor, original in zip(operation.outputs, inputs, strict=True):
                source[reference_to(tensor)] = original
        outputs = tuple(ir.Value(tensor.dtype.name, shapes(tensor)) for tensor in operation.outputs)
        nodes.append(
            ir.Node(
                name=names.get(operation.name) or operation.name,
                op=operation.type,
                inputs=tuple(inputs),
                control_inputs=controls,
                outputs=outputs,
                device=homes.get(operation.name) or _local_device(operation),
                stateful=bool(operation.op_def.is_stateful),
            )
        )
    graph = ir.Graph(
        name=func_graph.name,
        nodes=topological(live_nodes(_folded(nodes, func_graph), func_graph, names)),
        inputs=tuple(names.get(tensor.op.name) or tensor.op.name for tensor in func_graph.inputs),
        outputs=tuple(names.get(reference_to(tensor), reference_to(tensor)) for tensor in func_graph.outputs),
        control_outputs=tuple(sorted(operation.name for operation in func_graph.control_outputs)),
    )
    graph = with_hidden_bytes(graph, func_graph, folding)
    for node in graph.nodes:
        for value in node.outputs:
            if not value.is_resolved and node.op not in _SMALL:
                raise UnsupportedGraphError(
                    f"expected known shapes in '{graph.name}', received {value} from node '{node.name}' ({node.op}), "
                    "so its bytes can't be planned. Feed batches of one shape, or set "
                    "graphswap.Options(on_unsupported='run_unchanged')."
                )
    return ir.verify(graph)


_SMALL = frozenset(
    "Shape ShapeN Where Unique UniqueV2 BroadcastGradientArgs Range StridedSlice Squeeze Reshape Cast Prod".split()
)
"""Ops whose unknown outputs are taken for small: index arithmetic on shapes."""


def _local_device(operation: Any) -> str:
    """The operation's device, without the name of this process if it is one of a cluster's: all plan one graph.

    Raises:
        UnsupportedGraphError: If it is in another process.
    """
    device = tf.DeviceSpec.from_string(operation.device)
    if device.job in (None, "localhost"):
        return operation.device
    here = tf.DeviceSpec.from_string(tf.config.list_logical_devices("CPU")[0].name)
    if (device.job, device.task) != (here.job, here.task):
        raise UnsupportedGraphError(
            f"expected a step within '{here.make_merged_spec(tf.DeviceSpec()).to_string()}', received node "
            f"'{operation.name}' ({operation.type}) on '{operation.device}'. Run it in the process that it is for."
        )
    return tf.DeviceSpec(device_type=device.device_type, device_index=device.device_index).to_string()


def _in_trace_order(func_graph: FuncGraph) -> list[Any]:
    """The operations, those that were put in the place of others (`transpose_layout`) at their place."""
    replaced: Mapping[str, str] = getattr(func_graph, REPLACED, {})
    operations = func_graph.get_operations()
    position = {operation.name: index for index, operation in enumerate(operations)}
    return sorted(operations, key=lambda operation: position[replaced.get(operation.name, operation.name)])


def _folded(nodes: Sequence[ir.Node], func_graph: FuncGraph) -> list[ir.Node]:
    """The nodes, with those that TensorFlow computes ahead, Grappler or the executor, as Const nodes."""
    constant: set[str] = set()
    folded = []
    for node in nodes:
        is_known_shape = node.op in SHAPES and has_static_inputs(func_graph.get_operation_by_name(node.name))
        can_fold = node.op == "Const" or (
            node.inputs
            and not node.stateful
            and not node.control_inputs
            and (is_known_shape or constant.issuperset(map(ir.producer, node.inputs)))
            and all(value.dtype in ir.ITEM_BYTES and value.is_resolved for value in node.outputs)
            and sum(value.nbytes for value in node.outputs) <= _FOLDED_BYTES
        )
        if can_fold and node.op in _ZEROS and _are_many_zeros(func_graph.get_operation_by_name(node.name)):
            node = dataclasses.replace(node, attrs=tuple(sorted((*node.attrs, (ir.IS_ZEROS, True)))))
        elif can_fold:
            constant.add(node.name)
            node = dataclasses.replace(node, op="Const", inputs=())
        folded.append(node)
    return folded


_ZEROS = frozenset({"Fill", "ZerosLike"})
_MANY_BYTES = 64 << 10
"""Fewer zeros stay a constant: an op costs more than the memory is worth."""


def _are_many_zeros(operation: Any) -> bool:
    """Whether what a Fill or ZerosLike makes is zeros, and more than a few. -0 is another number."""
    (made,) = operation.outputs
    if not made.shape.is_fully_defined() or made.shape.num_elements() * made.dtype.size <= _MANY_BYTES:
        return False
    value = np.zeros(()) if operation.type == "ZerosLike" else tf.get_static_value(operation.inputs[1])
    return value is not None and value.tobytes() == bytes(value.nbytes)


_FOLDED_BYTES = 10 << 20
"""The largest constant that folding makes (ConstantFoldingOptions in TensorFlow 2.21)."""


def _resolved_shapes(
    func_graph: FuncGraph, operations: Sequence[Any], argument_shapes: Sequence[Shape] | None
) -> Callable[[tf.Tensor], Shape]:
    """A function from tensor to shape; runs TensorFlow's shape inference again where the trace left dimensions open."""
    opened = any(
        not tensor.shape.is_fully_defined() and tensor.dtype.name in ir.ITEM_BYTES
        for operation in operations
        for tensor in operation.outputs
    )
    if not opened or argument_shapes is None:
        return lambda tensor: shape_of(tensor)
    definition = func_graph.as_graph_def()
    known = {tensor.op.name: shape for tensor, shape in zip(func_graph.inputs, argument_shapes, strict=False)}
    passed: dict[str, str] = {}  # result of a conditional -> its input that either branch passes on
    for node in definition.node:
        node.attr.pop("_output_shapes", None)
        shape = known.get(node.name)
        if shape is not None:
            node.attr["shape"].shape.CopyFrom(tf.TensorShape(shape).as_proto())
        if node.op in _CONDITIONALS:
            operation = func_graph.get_operation_by_name(node.name)
            shapes = [tf.TensorShape(_gathered_shape(tensor)).as_proto() for tensor in operation.outputs]
            del node.attr["output_shapes"].list.shape[:]
            node.attr["output_shapes"].list.shape.extend(shapes)
            passed.update(_passed_on(operation))
    for node in definition.node:
        for index, reference in enumerate(node.input):
            node.input[index] = passed.get(reference, reference)
    scratch = FuncGraph("shapes")
    with scratch.as_default():
        placeholders = {}
        for tensor in func_graph.inputs:
            if tensor.dtype == tf.resource:
                placeholder = tf.compat.v1.placeholder(tf.resource, [])
                handle_data_util.copy_handle_data(tensor, placeholder)
                placeholders[tensor.name] = placeholder
        importer.import_graph_def(definition, input_map=placeholders, name="shapes")

    def resolve(tensor: tf.Tensor) -> Shape:
        if tensor.shape.is_fully_defined() or tensor.dtype.name not in ir.ITEM_BYTES:
            return shape_of(tensor)
        if tensor.op.type == _GATHER:
            return _gathered_shape(tensor)
        return shape_of(scratch.get_tensor_by_name(f"shapes/{tensor.name}"))

    return resolve


_GATHER = "CollectiveGatherV2"

_CONDITIONALS = frozenset({"If", "StatelessIf"})


def _passed_on(operation: Any) -> dict[str, str]:
    """Results of a conditional that either branch passes on unchanged, by their names in a definition."""
    bodies = [body_of(operation.graph, operation.get_attr(name).name) for name in ("then_branch", "else_branch")]
    branches = [body for body in bodies if body is not None]
    found = {}
    for index, tensor in enumerate(operation.outputs if len(branches) == len(bodies) else ()):
        for position, given in enumerate(operation.inputs[1:]):
            if all(source_of(body.outputs[index]) is body.inputs[position].op for body in branches):
                found[_defined_name(tensor)] = _defined_name(given)
    return found


def _defined_name(tensor: tf.Tensor) -> str:
    return tensor.name.removesuffix(":0")


def _gathered_shape(tensor: tf.Tensor) -> Shape:
    """The shape of what is gathered of all replicas, where each gives as much as this one.

    TensorFlow gathers sparse gradients in one of two branches; in the second one they are of different lengths.
    """
    maker = tensor
    if tensor.op.type in _CONDITIONALS:
        body = body_of(tensor.graph, tensor.op.get_attr("then_branch").name)
        maker = body.outputs[tensor.value_index] if body is not None else tensor
    source = source_of(maker)
    size = tf.get_static_value(source.inputs[1]) if source.type == _GATHER else None
    own = shape_of(source.inputs[0]) if size is not None else None
    if size is None or not own or own[0] is None:
        return shape_of(tensor)
    return (int(size) * own[0], *own[1:])
