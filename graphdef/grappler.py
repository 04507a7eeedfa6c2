"""What TensorFlow's own optimisers will do to a function: told in advance, done in advance, or kept from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.core.protobuf import device_properties_pb2
from tensorflow.python.eager import context as context_lib
from tensorflow.python.framework import meta_graph
from tensorflow.python.grappler import cluster as cluster_lib
from tensorflow.python.grappler import tf_optimizer

from graphswap import ir
from graphswap.graphdef.traced import (
    LOOPS,
    REPLACED,
    FuncGraph,
    data_inputs,
    edges_of,
    live_nodes,
    shape_of,
    topological,
)

Folding: TypeAlias = Mapping[str, Any]
"""Definitions of a function's nodes after TensorFlow's constant folding, by name."""


@contextlib.contextmanager
def without_memory_optimizer() -> Iterator[None]:
    """Keeps TensorFlow's memory optimiser away from the functions that are called inside: memory is planned already.

    Where it takes memory to be short (a CPU, it thinks, has 256 MiB) it turns an AddN of three and more into
    additions in the order of arrival, which moves memory about and rounds by chance.
    """
    context = context_lib.context()
    before = context.function_call_options
    config = tf.compat.v1.ConfigProto.FromString(planned_config())
    context.function_call_options = context_lib.FunctionCallOptions(before.executor_type, config)
    try:
        yield
    finally:
        context.function_call_options = before


def planned_config() -> bytes:
    """TensorFlow's options as they are, less its memory optimiser, as a serialized ConfigProto."""
    config = tf.compat.v1.ConfigProto.FromString(context_lib.context().function_call_options.config_proto_serialized)
    rewrites = config.graph_options.rewrite_options
    rewrites.memory_optimization = rewrites.NO_MEM_OPT
    return config.SerializeToString()


def constant_folding(func_graph: FuncGraph) -> Folding | None:
    """What TensorFlow's constant folding makes of the function; None if it is switched off or fails."""
    return _optimized(func_graph, func_graph.as_graph_def(), "constfold") if folds_constants() else None


def _optimized(func_graph: FuncGraph, definition: Any, optimizer: str, cluster: Any = None) -> Folding | None:
    """What one of Grappler's optimizers makes of the function's definition, by name; None if it fails."""
    with tf.Graph().as_default():
        item = meta_graph.create_meta_graph_def(graph_def=definition)
    kept = [tensor.op.name for tensor in (*func_graph.outputs, *func_graph.inputs)]
    kept += [operation.name for operation in func_graph.control_outputs]
    item.collection_def["train_op"].node_list.value.extend(dict.fromkeys(kept))
    config = tf.compat.v1.ConfigProto()
    rewrites = config.graph_options.rewrite_options
    rewrites.optimizers.append(optimizer)
    rewrites.min_graph_nodes = -1
    rewrites.meta_optimizer_iterations = rewrites.ONE
    try:
        with tf.init_scope():
            return {node.name: node for node in tf_optimizer.OptimizeGraph(config, item, cluster=cluster).node}
    except tf.errors.OpError:
        return None


def run_trips_in_turn(func_graph: FuncGraph) -> None:
    """Lets no trip of the function's loops begin before the last one has ended, in place.

    TensorFlow lets 10 trips and more run ahead, and what waits to be added up piles up by chance: in the gradient of an
    LSTM whose state takes 32 KiB, 63 MiB of gradients of its weights. Loops inside of others stay as they are.
    """
    for operation in func_graph.get_operations():
        if operation.type in LOOPS:
            operation._set_attr("parallel_iterations", attr_value_pb2.AttrValue(i=1))


def transpose_layout(func_graph: FuncGraph, architecture: str) -> None:
    """Gives convolutions and what goes with them the layout that TensorFlow would give them on a GPU, in place.

    It turns NHWC into NCHW and inserts Transposes. What they hold belongs to the plan; and which ops it turns depends
    on what stands nearby, so that it would turn others, and round otherwise, once the step is rewritten. Done here
    first, there is nothing left to turn. Where an op with side effects would have to be made anew, or a result would
    change its layout, the step stays as it is.

    Args:
        func_graph: The traced step.
        architecture: The GPU's compute capability: "9.0". It decides on the layout of half-precision values.
    """
    if not _optimizes("layout_optimizer"):
        return
    gpu = device_properties_pb2.DeviceProperties(type="GPU", environment={"architecture": architecture})
    where = "/job:localhost/replica:0/task:0/device:GPU:0"
    live = {node.name for node in live_nodes(list(map(edges_of, func_graph.get_operations())), func_graph, {})}
    definition = func_graph.as_graph_def()
    nodes = [node for node in definition.node if node.name in live]
    del definition.node[:]
    definition.node.extend(nodes)
    for node in definition.node:
        node.device = node.device or where
    devices = [device_properties_pb2.NamedDevice(name=where, properties=gpu)]
    after = _optimized(func_graph, definition, "layout", cluster_lib.Cluster(devices=devices))
    if after is None or len(after) == len(definition.node):
        return
    order = topological(list(map(_defined_edges, after.values())))
    known = {operation.name: operation for operation in func_graph.get_operations()}
    results = {tensor.op.name for tensor in func_graph.outputs}
    made: dict[str, Any] = {}  # name in `after` -> operation that takes its place
    rewired: dict[str, list[tf.Tensor]] = {}  # operation that stays -> the inputs that it will have
    for name in (node.name for node in order):
        node = after[name]
        inputs = [_result_of(func_graph, made, reference) for reference in node.input if reference[0] != "^"]
        operation = known.get(name)
        if operation is not None and _fits(operation, node, inputs):
            rewired[name] = inputs
        elif operation is not None and (operation.op_def.is_stateful or name in results):
            return
        else:
            made[name] = _made(func_graph, node, inputs, operation)
    for name, inputs in rewired.items():
        operation = func_graph.get_operation_by_name(name)
        for index, tensor in enumerate(inputs):
            if tensor is not operation.inputs[index]:
                operation._update_input(index, tensor)
    replaced = {operation.name: name for name, operation in made.items() if name in known}
    setattr(func_graph, REPLACED, {**getattr(func_graph, REPLACED, {}), **replaced})
    for operation in func_graph.get_operations():
        controls = [made.get(control.name, control) for control in operation.control_inputs]
        if controls != operation.control_inputs:
            operation._remove_all_control_inputs()
            operation._add_control_inputs(controls)


def _defined_edges(node: Any) -> ir.Node:
    """The same of a definition."""
    controls = tuple(name[1:] for name in node.input if name[0] == "^")
    return ir.Node(node.name, node.op, tuple(name for name in node.input if name[0] != "^"), controls)


def _result_of(func_graph: FuncGraph, made: Mapping[str, Any], reference: str) -> tf.Tensor:
    """The tensor that a definition calls "node" or "node:1"."""
    name, _, index = reference.partition(":")
    return (made.get(name) or func_graph.get_operation_by_name(name)).outputs[int(index or 0)]


def _fits(operation: Any, node: Any, inputs: Sequence[tf.Tensor]) -> bool:
    """Whether the operation computes what the definition says once it reads these inputs."""
    same_attrs = all(
        value == operation.node_def.attr[name] for name, value in node.attr.items() if not name.startswith("_")
    )
    return (
        operation.type == node.op
        and same_attrs
        and all(
            shape_of(new) == shape_of(old) for new, old in zip(inputs, operation.inputs, strict=True) if new is not old
        )
    )


def _made(func_graph: FuncGraph, node: Any, inputs: Sequence[tf.Tensor], original: Any) -> Any:
    """Adds what a definition of Grappler's says.

    Args:
        func_graph: Gets the operation.
        node: The definition.
        inputs: What it reads.
        original: The operation in whose place it is, if it is in the place of one.
    """
    controls = [] if original is None else original.control_inputs
    with func_graph.as_default(), tf.control_dependencies(None), tf.control_dependencies(controls):
        operation = func_graph.create_op(
            node.op,
            inputs,
            None,
            name=f"{node.name.removesuffix('-LayoutOptimizer')}{'' if original is None else '/transposed'}",
            attrs={name: value for name, value in node.attr.items() if not name.startswith("_")},
            compute_device=False,
        )
    if original is not None and original.device:
        operation._set_device(original.device)
    return operation


def regroup(func_graph: FuncGraph, folding: Folding) -> None:
    """Regroups sums and products with constants as TensorFlow's constant folding would, in place.

    It turns c * (x * y) into x * (c * y) where nobody else reads x * y. That moves work and memory from one end of
    the step to the other, and rounds differently; and it would no longer do so where a node is repeated. Done
    here first, it holds for the plan and for every copy. Where it changes a shape or an op, it is left to TensorFlow.
    """
    changes: dict[str, tuple[str, ...]] = {}  # node -> the inputs that it will have
    old_inputs: dict[str, tuple[str, ...]] = {}
    for node in func_graph.as_graph_def().node:
        after = folding.get(node.name)
        if node.op in _REGROUPED and after is not None:
            inputs, wanted = data_inputs(node), data_inputs(after)
            if inputs != wanted:
                old_inputs[node.name] = inputs
                changes[node.name] = wanted if after.op == node.op else ()
    for group in _connected(old_inputs, changes):
        outer = [sorted(r for name in group for r in table[name] if r not in group) for table in (old_inputs, changes)]
        if outer[0] == outer[1] and all(changes[name] for name in group):
            _replace_group(func_graph, {name: changes[name] for name in group})


def folds_constants() -> bool:
    """Whether TensorFlow's constant folding is on."""
    return _optimizes("constant_folding")


def _optimizes(option: str) -> bool:
    """Whether an optimiser of TensorFlow's is on."""
    options = tf.config.optimizer.get_experimental_options()
    return options.get(option, True) and not options.get("disable_meta_optimizer", False)


REGROUPED_SUFFIX = "/regrouped"

_REGROUPED = frozenset({"Mul", "Add", "AddV2", "Sub", "RealDiv", "Div"})


def _connected(*edges: Mapping[str, Sequence[str]]) -> list[set[str]]:
    """The groups of nodes that read each other, by any of the tables from node to inputs."""
    groups: dict[str, set[str]] = {name: {name} for name in edges[0]}
    for table in edges:
        for name, inputs in table.items():
            for other in inputs:
                if other in groups and groups[other] is not groups[name]:
                    merged = groups[name] | groups[other]
                    groups.update(dict.fromkeys(merged, merged))
    return list({id(group): group for group in groups.values()}.values())


def _replace_group(func_graph: FuncGraph, inputs: Mapping[str, Sequence[str]]) -> None:
    """Adds the nodes anew with other inputs, and lets their readers read the new ones."""
    results = {tensor.op.name for tensor in func_graph.outputs}
    nodes = topological([ir.Node(name, "", tuple(references)) for name, references in inputs.items()])
    made: dict[str, tf.Tensor] = {}
    for node in nodes:
        operation = func_graph.get_operation_by_name(node.name)
        left, right = (made.get(r, func_graph.get_tensor_by_name(r if ":" in r else f"{r}:0")) for r in node.inputs)
        is_known = left.shape.is_fully_defined() and right.shape.is_fully_defined()
        same_shape = is_known and tf.broadcast_static_shape(left.shape, right.shape) == operation.outputs[0].shape
        if not same_shape or node.name in results or operation.control_inputs:
            return
        with func_graph.as_default(), tf.control_dependencies(None):
            new = func_graph.create_op(
                operation.type,
                [left, right],
                [operation.outputs[0].dtype],
                name=f"{node.name}{REGROUPED_SUFFIX}",
                attrs=dict(operation.node_def.attr),
                op_def=operation.op_def,
                compute_device=False,
            )
        if operation.device:
            new._set_device(operation.device)
        made[node.name] = new.outputs[0]
    for name, tensor in made.items():
        operation = func_graph.get_operation_by_name(name)
        for waiting in operation._control_outputs:
            controls = [made[c.name].op if c.name in made else c for c in waiting.control_inputs]
            waiting._remove_all_control_inputs()
            if waiting.type != "Const":  # which has nothing to wait for, and which the new nodes may read
                waiting._add_control_inputs(controls)
        old = operation.outputs[0]
        for reader in old.consumers():
            for index, read in enumerate(reader.inputs):
                if read is old and reader.name not in made:
                    reader._update_input(index, tensor)
