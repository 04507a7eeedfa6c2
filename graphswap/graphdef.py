"""The door to TensorFlow's graphs: FuncGraph to ir.Graph and back, and the hook at trace time.

Private TensorFlow used here (2.21): FuncGraph and its captures, `transform.FUNC_GRAPH_TRANSFORMS`,
`Operation._update_input` / `_add_control_inputs`, `Graph._get_function`, the graph importer, Grappler's Python
door, the options of function calls, the bridge to XLA and resource handle data. No other module but `profiler` uses
any.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import tensorflow as tf
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2
from tensorflow.core.framework import attr_value_pb2
from tensorflow.core.protobuf import device_properties_pb2
from tensorflow.python.eager import context as context_lib
from tensorflow.python.eager.polymorphic_function import concrete_function as concrete_function_lib
from tensorflow.python.eager.polymorphic_function import transform
from tensorflow.python.framework import func_graph as func_graph_lib
from tensorflow.python.framework import importer, meta_graph
from tensorflow.python.grappler import cluster as cluster_lib
from tensorflow.python.grappler import tf_optimizer
from tensorflow.python.ops import control_flow_v2_func_graphs, handle_data_util, resource_variable_ops
from tensorflow.python.saved_model import fingerprinting_utils, save_context

from graphswap import allocator, far_memory, ir, placement, tiers
from graphswap.elementwise import FUNCTIONS, Program

FuncGraph: TypeAlias = func_graph_lib.FuncGraph
Shape = tuple[int | None, ...] | None
Folding: TypeAlias = Mapping[str, Any]
"""Definitions of a function's nodes after TensorFlow's constant folding, by name."""

_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_LOOPS = frozenset({"While", "StatelessWhile"})
_BRANCHES = frozenset({"If", "StatelessIf", "Case", "StatelessCase"})
OPAQUE = _CALLS | _LOOPS | _BRANCHES
"""Ops that run functions. Their bodies are not looked into, but their memory is counted."""
_COPIES = frozenset({"Identity", "IdentityN"})


class UnsupportedGraphError(ValueError):
    """The graph holds something that graphswap can't plan. The message names the node."""


# --- import -----------------------------------------------------------------------------------------------------


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
    names = _capture_names(func_graph)
    homes = _homes(func_graph)
    source = dict(names)  # reference to a copy -> reference to what it copies
    nodes = []
    for operation in operations:
        inputs = []
        for tensor in operation.inputs:
            reference = _ref(tensor)
            inputs.append(source.get(reference, reference))
        # TensorFlow keeps them in sets: their order differs from process to process.
        controls = tuple(sorted(c.name for c in operation.control_inputs)) if operation.type != "Const" else ()
        if operation.type in _COPIES and not controls:
            for tensor, original in zip(operation.outputs, inputs, strict=True):
                source[_ref(tensor)] = original
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
        nodes=_topological(_live(_folded(nodes, func_graph), func_graph, names)),
        inputs=tuple(names.get(tensor.op.name) or tensor.op.name for tensor in func_graph.inputs),
        outputs=tuple(names.get(_ref(tensor), _ref(tensor)) for tensor in func_graph.outputs),
        control_outputs=tuple(sorted(operation.name for operation in func_graph.control_outputs)),
    )
    graph = _with_hidden_bytes(graph, func_graph, folding)
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


def _homes(func_graph: FuncGraph) -> dict[str, str]:
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


def _in_trace_order(func_graph: FuncGraph) -> list[Any]:
    """The operations, those that were put in the place of others (`transpose_layout`) at their place."""
    replaced: Mapping[str, str] = getattr(func_graph, _REPLACED, {})
    operations = func_graph.get_operations()
    position = {operation.name: index for index, operation in enumerate(operations)}
    return sorted(operations, key=lambda operation: position[replaced.get(operation.name, operation.name)])


_REPLACED = "_graphswap_replaced"
"""An attribute of a FuncGraph: name of an operation -> that of the traced one in whose place it is."""


def _capture_names(func_graph: FuncGraph) -> dict[str, str]:
    """Placeholder of a capture -> a name for it: that of its variable, or its number among the captures.

    TensorFlow calls it by a count of what the process has made so far.
    """
    alive = [variable for reference in func_graph._weak_variables if (variable := reference()) is not None]
    variables = {id(variable.handle): str(variable.name).partition(":")[0] for variable in alive}
    taken = {operation.name for operation in func_graph.get_operations()}
    names: dict[str, str] = {}
    for index, (external, internal) in enumerate(func_graph.captures):
        name = wanted = variables.get(id(external), f"capture_{index}")
        suffix = 0
        while name in taken:
            suffix += 1
            name = f"{wanted}_{suffix}"
        taken.add(name)
        names[internal.op.name] = name
    return names


def _live(nodes: Sequence[ir.Node], func_graph: FuncGraph, names: Mapping[str, str]) -> list[ir.Node]:
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


def _folded(nodes: Sequence[ir.Node], func_graph: FuncGraph) -> list[ir.Node]:
    """The nodes, with those that TensorFlow computes ahead, Grappler or the executor, as Const nodes."""
    constant: set[str] = set()
    folded = []
    for node in nodes:
        is_known_shape = node.op in _SHAPES and _has_static_inputs(func_graph.get_operation_by_name(node.name))
        if node.op == "Const" or (
            node.inputs
            and not node.stateful
            and not node.control_inputs
            and (is_known_shape or constant.issuperset(map(ir.producer, node.inputs)))
            and all(value.dtype in ir.ITEM_BYTES and value.is_resolved for value in node.outputs)
            and sum(value.nbytes for value in node.outputs) <= _FOLDED_BYTES
        ):
            constant.add(node.name)
            node = dataclasses.replace(node, op="Const", inputs=())
        folded.append(node)
    return folded


_SHAPES = frozenset({"Shape", "ShapeN"})


def _has_static_inputs(operation: Any) -> bool:
    return all(tensor.shape.is_fully_defined() for tensor in operation.inputs)


_FOLDED_BYTES = 10 << 20
"""The largest constant that folding makes (ConstantFoldingOptions in TensorFlow 2.21)."""


def _topological(nodes: Sequence[ir.Node]) -> tuple[ir.Node, ...]:
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
        return lambda tensor: _shape(tensor)
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
            return _shape(tensor)
        if tensor.op.type == _GATHER:
            return _gathered_shape(tensor)
        return _shape(scratch.get_tensor_by_name(f"shapes/{tensor.name}"))

    return resolve


_GATHER = "CollectiveGatherV2"
_CONDITIONALS = frozenset({"If", "StatelessIf"})


def _passed_on(operation: Any) -> dict[str, str]:
    """Results of a conditional that either branch passes on unchanged, by their names in a definition."""
    bodies = [_body(operation.graph, operation.get_attr(name).name) for name in ("then_branch", "else_branch")]
    branches = [body for body in bodies if body is not None]
    found = {}
    for index, tensor in enumerate(operation.outputs if len(branches) == len(bodies) else ()):
        for position, given in enumerate(operation.inputs[1:]):
            if all(_source(body.outputs[index]) is body.inputs[position].op for body in branches):
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
        body = _body(tensor.graph, tensor.op.get_attr("then_branch").name)
        maker = body.outputs[tensor.value_index] if body is not None else tensor
    source = _source(maker)
    size = tf.get_static_value(source.inputs[1]) if source.type == _GATHER else None
    own = _shape(source.inputs[0]) if size is not None else None
    if size is None or not own or own[0] is None:
        return _shape(tensor)
    return (int(size) * own[0], *own[1:])


def _with_hidden_bytes(graph: ir.Graph, func_graph: FuncGraph, folding: Folding | None) -> ir.Graph:
    """Writes down the bytes that types don't show: of variables, and of the lists that loops pile up."""
    inputs = dict(zip(graph.inputs, func_graph.inputs, strict=True))
    handles = {name: _variable_bytes(internal) for name, internal in inputs.items() if internal.dtype == tf.resource}
    late = {id(tensor) for tensor in func_graph.deferred_internal_captures}
    names = {internal.op.name: name for name, internal in inputs.items()}
    nodes = []
    constants: set[str] = set()
    for node in graph.nodes:
        facts: list[tuple[str, ir.Attr]] = []
        if node.outputs and node.outputs[0].dtype == "resource":
            nbytes = handles.get(node.name, 0)
            if node.op == "VarHandleOp":
                nbytes = _variable_bytes(func_graph.get_operation_by_name(node.name).outputs[0])
            if nbytes:
                facts = [("held_bytes", (allocator.rounded(nbytes),))]
        elif node.name in inputs:
            facts = [(ir.IS_DEFERRED, True)] if id(inputs[node.name]) in late else []
        elif node.op in _LOOPS:
            facts = _loop_bytes(node, func_graph)
        elif node.op == ir.ALL_REDUCE:
            workers = tf.get_static_value(func_graph.get_operation_by_name(node.name).inputs[1])
            facts = [] if workers is None else [("workers", int(workers))]
        elif node.op == "Const" and node.outputs[0].nbytes > _MERGED_BYTES:
            digest = _digest(func_graph.get_operation_by_name(node.name))
            facts = [("held_bytes", (0,))] if digest in constants else []
            constants.add(digest)
        elif node.op in _REDUCTIONS and node.outputs[0] == graph.value(node.inputs[0]) and _folds_constants():
            facts = [("copy_of_input", 0)]
        elif (copied := _copied_input(node, folding, names)) is not None:
            facts = [("copy_of_input", copied)]
        elif node.op == "TensorListFromTensor" or (node.op == "ZerosLike" and node.outputs[0].dtype == "variant"):
            length, nbytes = _list_elements(func_graph.get_operation_by_name(node.name).outputs[0], func_graph)
            facts = [("held_bytes", (length * nbytes,)), ("held_pieces", (max(length, 1),))]
        elif node.op in _BRANCHES or node.op in _CALLS:
            facts = _branch_bytes(node, func_graph)
        if node.op in FUNCTIONS and _is_folded(func_graph.get_operation_by_name(node.name), folding):
            facts.append((ir.IS_FOLDED, True))
        if node.stateful and _only_reads(func_graph, func_graph.get_operation_by_name(node.name)):
            facts.append(("only_reads", True))
        nodes.append(dataclasses.replace(node, attrs=tuple(sorted(facts))) if facts else node)
    return graph.replace(nodes=tuple(nodes))


def _copied_input(node: ir.Node, folding: Folding | None, names: Mapping[str, str]) -> int | None:
    """Which input the node will be a copy of after constant folding, such as of a product with 1; None if of none."""
    after = None if folding is None else folding.get(node.name)
    if after is None or after.op == node.op or after.op not in ("Identity", "Snapshot"):
        return None
    (source,) = (names.get(name, name) for name in _data_inputs(after))
    return node.inputs.index(source) if source in node.inputs else None


def _is_folded(operation: Any, folding: Folding | None) -> bool:
    """Whether constant folding makes another op of it or lets it read something else, `regroup` left aside."""
    if folding is None or operation.name.endswith(_REGROUPED_SUFFIX):
        return False
    after = folding.get(operation.name)
    inputs = tuple(_ref(tensor).replace(_REGROUPED_SUFFIX, "") for tensor in operation.inputs)
    return after is None or after.op != operation.type or _data_inputs(after) != inputs


_MERGED_BYTES = 16 << 10
"""Of equal constants above this size one is counted: TensorFlow merges them."""


def _digest(operation: Any) -> str:
    """Equal for operations that compute the same of the same constants."""
    definition = type(operation.node_def)()
    definition.CopyFrom(operation.node_def)
    definition.name = ""
    del definition.input[:]
    if operation.type in _SHAPES:
        definition.input.extend(str(tensor.shape) for tensor in operation.inputs)
    else:
        definition.input.extend(f"{_digest(tensor.op)}:{tensor.value_index}" for tensor in operation.inputs)
    return hashlib.sha256(definition.SerializeToString(deterministic=True)).hexdigest()


_REDUCTIONS = frozenset({"Sum", "Mean", "Max", "Min", "Prod"})
"""Ops that TensorFlow replaces by a copy where they reduce nothing, as in the gradient of a sum of equal shapes."""


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


def _only_reads(func_graph: FuncGraph, operation: Any) -> bool:
    """Whether a stateful operation, its bodies included, changes nothing outside of the step."""
    if operation.type in _HARMLESS:
        return True
    if operation.type not in OPAQUE:
        return False
    bodies = [_body(func_graph, name) for name in _body_names(operation)]
    return all(
        body is not None
        and all(_only_reads(body, inner) for inner in body.get_operations() if inner.op_def.is_stateful)
        for body in bodies
    )


def _body_names(operation: Any) -> list[str]:
    """Names of the functions that an opaque operation runs."""
    if operation.type in _CALLS:
        return [operation.get_attr("f").name]
    if operation.type in _LOOPS:
        return [operation.get_attr("body").name, operation.get_attr("cond").name]
    if operation.type in ("Case", "StatelessCase"):
        return [function.name for function in operation.get_attr("branches")]
    return [operation.get_attr("then_branch").name, operation.get_attr("else_branch").name]


def _variable_bytes(handle: Any) -> int:
    entry = _variable_type(handle)
    shape = None if entry is None else tf.TensorShape(entry.shape)
    if entry is None or shape is None or not shape.is_fully_defined():
        return 0
    return (shape.num_elements() or 0) * ir.ITEM_BYTES.get(tf.dtypes.as_dtype(entry.dtype).name, 0)


def _loop_bytes(node: ir.Node, func_graph: FuncGraph) -> list[tuple[str, ir.Attr]]:
    """Bytes of a While: what each of its results holds, and what its body needs beside them.

    A list that the body pushes to grows by one element per trip. A result that the body passes on
    unchanged is the argument's buffer.
    """
    operation = func_graph.get_operation_by_name(node.name)
    body = _body(func_graph, operation.get_attr("body").name)
    if body is None:
        return []
    trips = _trips(func_graph, operation)
    states = {inner.op.name: _source(result) for inner, result in zip(body.inputs, body.outputs, strict=True)}
    counted: set[str] = set()
    held, pieces = [0] * len(node.outputs), [1] * len(node.outputs)
    results = list(enumerate(zip(node.outputs, body.inputs, body.outputs, strict=True)))
    # An element may be in two lists: those that are pushed to wait for the backward loop.
    for index, (value, argument, result) in sorted(results, key=lambda r: _source(r[1][2]).type != _PUSH):
        source = _source(result)
        if source is argument.op:
            continue
        if value.dtype != "variant":
            held[index] = allocator.rounded(value.nbytes)
        elif source.type in _ELEMENT:
            element = source.inputs[_ELEMENT[source.type]]
            # A state that is pushed is what the trip before has made, perhaps in another list already.
            maker = states.get(_source(element).name, _source(element))
            # An element of a list keeps the list's buffer: once the loop is over, nothing else does.
            owner = _source(maker.inputs[0]) if maker.type == "TensorListGetItem" else maker
            if maker.type not in _MAKE_NOTHING and owner.name not in counted:
                counted.add(owner.name)
                held[index] = trips * allocator.rounded(_nbytes(element))
                pieces[index] = trips
    return [("held_bytes", tuple(held)), ("held_pieces", tuple(pieces)), ("workspace_bytes", _body_peak(body))]


def _list_elements(tensor: tf.Tensor, func_graph: FuncGraph) -> tuple[int, int]:
    """How many elements a list has, and the bytes of each, which has a buffer of its own."""
    operation = _source(tensor)
    if operation.type == "ZerosLike":
        return _list_elements(operation.inputs[0], func_graph)
    if operation.type == "TensorListFromTensor":
        rows = operation.inputs[0]
        length = rows.shape[0] if rows.shape.rank else None
        return (length, allocator.rounded(_nbytes(rows) // length)) if length else (0, 0)
    body = _body(func_graph, operation.get_attr("body").name) if operation.type in _LOOPS else None
    if body is not None and _source(body.outputs[tensor.value_index]) is body.inputs[tensor.value_index].op:
        return _list_elements(operation.inputs[tensor.value_index], func_graph)
    return 0, 0


_PUSH = "TensorListPushBack"
_ELEMENT = {_PUSH: 1, "TensorListSetItem": 2}
"""Ops that put an element into a list, and which input it is."""


_MAKE_NOTHING = frozenset({"Placeholder", "Const", "ReadVariableOp"})
"""Ops of a body whose results are buffers that exist outside of the loop."""


def _source(tensor: tf.Tensor) -> Any:
    operation = tensor.op
    while operation.type in _COPIES:
        operation = operation.inputs[0].op
    return operation


def _copied(tensor: tf.Tensor) -> str:
    """Reference to what a tensor is a copy of; as imported."""
    while tensor.op.type in _COPIES and not tensor.op.control_inputs:
        tensor = tensor.op.inputs[tensor.value_index]
    return _ref(tensor)


def _trips(func_graph: FuncGraph, operation: Any) -> int:
    """How often a While runs: a static bound, that of the loop whose counter bounds it, or the length of its lists."""
    bound = operation.inputs[1]
    source = _source(bound)
    if source.type in _LOOPS and source is not operation:
        return _trips(func_graph, source)
    static = tf.get_static_value(bound)
    if static is not None and static > 0:
        return int(static)
    lengths: list[Any] = []
    for producer in (tensor.op for tensor in operation.inputs):
        if producer.type == "TensorListReserve":
            lengths.append(tf.get_static_value(producer.inputs[1]))
        elif producer.type == "TensorListFromTensor" and producer.inputs[0].shape.rank:
            lengths.append(producer.inputs[0].shape[0])
    return max((int(length) for length in lengths if length is not None and length > 0), default=1)


def _body_peak(body: FuncGraph) -> int:
    """The most bytes that a body's intermediate values hold at a time, run in the order of its trace."""
    operations = body.get_operations()
    last_use = {_ref(tensor): index for index, operation in enumerate(operations) for tensor in operation.inputs}
    expiring: dict[int, int] = {}
    live = peak = 0
    for index, operation in enumerate(operations):
        if operation.type not in _VIEWS:
            for tensor in operation.outputs:
                nbytes = allocator.rounded(_nbytes(tensor))
                live += nbytes
                end = last_use.get(_ref(tensor), index)
                expiring[end] = expiring.get(end, 0) + nbytes
        peak = max(peak, live)
        live -= expiring.pop(index, 0)
    return peak


def _branch_bytes(node: ir.Node, func_graph: FuncGraph) -> list[tuple[str, ir.Attr]]:
    """Workspace of an If, Case or opaque call: the largest body with nothing freed in it, an upper estimate."""
    operation = func_graph.get_operation_by_name(node.name)
    bodies = [_body(func_graph, name) for name in _body_names(operation)]
    largest = max((_body_peak(body) for body in bodies if body is not None), default=0)
    return [("workspace_bytes", largest)] if largest else []


_VIEWS = frozenset({"Placeholder", "Const", "Identity", "IdentityN", "ReadVariableOp", "Reshape"})


def _body(func_graph: FuncGraph, name: str) -> FuncGraph | None:
    graph: Any = func_graph
    while graph is not None:
        function = graph._get_function(name)
        if function is not None:
            return getattr(function, "graph", None)
        graph = getattr(graph, "outer_graph", None)
    return None


def _nbytes(tensor: tf.Tensor) -> int:
    shape = _shape(tensor)
    if shape is None or None in shape:
        return 0
    return ir.ITEM_BYTES.get(tensor.dtype.name, 0) * math.prod(d or 0 for d in shape)


def _shape(tensor: tf.Tensor) -> Shape:
    return None if tensor.shape.rank is None else tuple(tensor.shape.as_list())


def _ref(tensor: tf.Tensor) -> str:
    return ir.ref(tensor.op.name, tensor.value_index)


# --- what TensorFlow's optimiser will do -------------------------------------------------------------------------


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
    return _optimized(func_graph, func_graph.as_graph_def(), "constfold") if _folds_constants() else None


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
        if operation.type in _LOOPS:
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
    live = {node.name for node in _live(list(map(_edges, func_graph.get_operations())), func_graph, {})}
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
    order = _topological(list(map(_defined_edges, after.values())))
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
    setattr(func_graph, _REPLACED, {**getattr(func_graph, _REPLACED, {}), **replaced})
    for operation in func_graph.get_operations():
        controls = [made.get(control.name, control) for control in operation.control_inputs]
        if controls != operation.control_inputs:
            operation._remove_all_control_inputs()
            operation._add_control_inputs(controls)


def _edges(operation: Any) -> ir.Node:
    """An operation without its outputs."""
    return ir.Node(
        operation.name,
        operation.type,
        tuple(map(_ref, operation.inputs)),
        tuple(control.name for control in operation.control_inputs),
        stateful=bool(operation.op_def.is_stateful),
    )


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
        and all(_shape(new) == _shape(old) for new, old in zip(inputs, operation.inputs, strict=True) if new is not old)
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
            inputs, wanted = _data_inputs(node), _data_inputs(after)
            if inputs != wanted:
                old_inputs[node.name] = inputs
                changes[node.name] = wanted if after.op == node.op else ()
    for group in _connected(old_inputs, changes):
        outer = [sorted(r for name in group for r in table[name] if r not in group) for table in (old_inputs, changes)]
        if outer[0] == outer[1] and all(changes[name] for name in group):
            _replace_group(func_graph, {name: changes[name] for name in group})


def _folds_constants() -> bool:
    return _optimizes("constant_folding")


def _optimizes(option: str) -> bool:
    """Whether an optimiser of TensorFlow's is on."""
    options = tf.config.optimizer.get_experimental_options()
    return options.get(option, True) and not options.get("disable_meta_optimizer", False)


_REGROUPED_SUFFIX = "/regrouped"
_REGROUPED = frozenset({"Mul", "Add", "AddV2", "Sub", "RealDiv", "Div"})


def _data_inputs(node: Any) -> tuple[str, ...]:
    return tuple(name.removesuffix(":0") for name in node.input if not name.startswith("^"))


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
    nodes = _topological([ir.Node(name, "", tuple(references)) for name, references in inputs.items()])
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
                name=f"{node.name}{_REGROUPED_SUFFIX}",
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


# --- export -----------------------------------------------------------------------------------------------------


def export_function(func_graph: FuncGraph, graph: ir.Graph, far_tiers: tiers.Tiers, rank: int = 0) -> None:
    """Makes a traced function compute `graph`, in place: adds the new nodes, rewires and orders the old ones.

    Args:
        func_graph: The function that the graph was imported from.
        graph: The rewritten graph.
        far_tiers: Where swapped values go.
        rank: Which part of what is divided among workers is this one's.
    """
    exporter = _Exporter(func_graph, func_graph, graph.inputs, far_tiers, rank)
    for node in graph.nodes:
        exporter.add(node)
    elsewhere = [*graph.placed, *graph.shards]
    accesses = [exporter.inputs[variable].outputs[0].consumers() for variable in elsewhere]
    sums = {str(dict(node.attrs)["sum"]) for node in graph.nodes if node.op == ir.EXCHANGE}
    removed = [*itertools.chain.from_iterable(accesses), *map(func_graph.get_operation_by_name, sorted(sums))]
    if removed:
        _remove_with_readers(func_graph, removed)
        kept = set(func_graph.get_operations())
        func_graph.outputs = [
            tensor if tensor.op in kept else exporter.tensor(reference)
            for tensor, reference in zip(func_graph.outputs, graph.outputs, strict=True)
        ]
        ends = [op for node in graph.nodes if _replaces_updates(node) for op in exporter.done[node.name]]
        func_graph.control_outputs = [*func_graph.control_outputs, *ends]


def _replaces_updates(node: ir.Node) -> bool:
    """Whether the node, or what waits for it, does what a function was to have done when it ends."""
    is_update = node.stateful and not node.outputs and bool(dict(node.attrs).get("is_divided"))
    return is_update or node.op in (ir.STORE, ir.UPDATE, ir.AWAIT)


def _remove_with_readers(func_graph: FuncGraph, operations: Sequence[Any]) -> None:
    """Takes operations out, what reads or writes variables or what others stand for, and what reads that."""
    pending = [*operations]
    removed = set(pending)
    while pending:
        found = {reader for tensor in pending.pop().outputs for reader in tensor.consumers()} - removed
        removed |= found
        pending += found
    _remove(func_graph, removed)


def _remove(func_graph: FuncGraph, removed: set[Any]) -> None:
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


def build_function(
    func_graph: FuncGraph, graph: ir.Graph, far_tiers: tiers.Tiers
) -> concrete_function_lib.ConcreteFunction:
    """Builds a new function that computes `graph` with the arguments and captures of `func_graph`.

    Args:
        func_graph: The function that the graph was imported from; it stays as it is.
        graph: The graph; its nodes are those of `func_graph` or inserted ones.
        far_tiers: Where swapped values go.

    Returns:
        A function of `func_graph.inputs`, captures passed by the caller like arguments, flat.
    """
    target = FuncGraph(f"{func_graph.name}_measured")
    exporter = _Exporter(func_graph, target, graph.inputs, far_tiers)
    for node in graph.nodes:
        exporter.add(node)
    target.inputs = [exporter.tensor(name) for name in graph.inputs]
    target.outputs = [exporter.tensor(reference) for reference in graph.outputs]
    target.structured_outputs = list(target.outputs)
    target.control_outputs = [op for name in graph.control_outputs for op in exporter.done[name]]
    signature = [tf.TensorSpec.from_tensor(tensor) for tensor in target.inputs]
    target.structured_input_signature = (tuple(signature), {})
    return concrete_function_lib.ConcreteFunction.from_func_graph(target, None, {})


def as_planned(function: concrete_function_lib.ConcreteFunction) -> concrete_function_lib.ConcreteFunction:
    """The same function, from now on called without TensorFlow's memory optimiser, in whatever thread."""

    class Planned(type(function)):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with without_memory_optimizer():
                return super().__call__(*args, **kwargs)

    function.__class__ = Planned
    return function


def run_built(
    function: concrete_function_lib.ConcreteFunction, func_graph: FuncGraph, arguments: Sequence[tf.Tensor]
) -> Any:
    """Runs what `build_function` made of `func_graph`, on its arguments and its captures as they are now.

    What is captured only when it is called, the keys of collectives, is 0: asking for a key would use it up.
    """
    captures = [external for external, _ in func_graph.captures]
    keys = [tf.zeros(tensor.shape, tensor.dtype) for tensor in func_graph.deferred_internal_captures]
    with without_memory_optimizer():
        return function._call_flat([*arguments, *captures, *keys], [])


def hlo(func_graph: FuncGraph, graph: ir.Graph) -> Any:
    """What TensorFlow's bridge to XLA makes of the graph.

    Args:
        func_graph: The function that the graph was imported from.
        graph: The graph, without swaps.

    Returns:
        An HloModuleProto. Its parameters are `graph.inputs`, of a variable its value; its results are `graph.outputs`
        and then the new values of variables; `input_output_alias` says whose they are.

    Raises:
        UnsupportedGraphError: If XLA can't compile an op.
    """
    device = tf.config.list_logical_devices("CPU")[0].name
    function = build_function(func_graph, graph, tiers.Tiers())
    return hlo_pb2.HloModuleProto.FromString(_compiler_ir(func_graph, function, graph, device, "hlo_serialized"))


def compiled_hlo(
    func_graph: FuncGraph, function: concrete_function_lib.ConcreteFunction, graph: ir.Graph, device: str
) -> Any:
    """What XLA compiles the graph to, for one of TensorFlow's devices. Nothing runs.

    Args:
        func_graph: The function that the graph was imported from.
        function: What `build_function` made of the graph.
        graph: The graph, without swaps.
        device: "CPU:0" or "GPU:0".

    Returns:
        An HloProto: the module and its buffer assignment.

    Raises:
        UnsupportedGraphError: If XLA can't compile an op.
    """
    device = f"/job:localhost/replica:0/task:0/device:{device}"
    stage = "optimized_hlo_proto_serialized"
    return hlo_pb2.HloProto.FromString(_compiler_ir(func_graph, function, graph, device, stage))


def _compiler_ir(
    func_graph: FuncGraph, function: concrete_function_lib.ConcreteFunction, graph: ir.Graph, device: str, stage: str
) -> bytes:
    captures = [external for external, _ in func_graph.captures]
    count = len(graph.inputs) - len(captures)
    arguments = zip(graph.inputs[:count], func_graph.inputs[:count], strict=True)
    specs = [tf.TensorSpec(graph.value(name).shape, tensor.dtype) for name, tensor in arguments]
    try:
        with tf.init_scope():
            return context_lib.context().get_compiler_ir(
                device_name=device,
                platform_name=None,
                function_name=function.name,
                flat_args=specs,
                captured_inputs=captures,
                stage=stage,
            )
    except tf.errors.ResourceExhaustedError:
        raise
    except (tf.errors.OpError, ValueError, TypeError) as error:
        raise UnsupportedGraphError(_not_compiled(graph.name, str(error))) from error


def _not_compiled(name: str, message: str) -> str:
    """What XLA's refusal of a step means, in one line."""
    node = re.search(r"\{\{node ([^}]+)\}\}", message)
    where = f" at node '{node[1]}'" if node else ""
    missing = re.search(r"No registered '(\w+)' OpKernel", message)
    if missing:
        dtype = " for strings" if "DT_STRING" in message else ""
        return (
            f"'{name}': expected ops that XLA has kernels for, received '{missing[1]}'{dtype}{where}. "
            "Leave it out of the step, or do its work before the step, such as in the dataset."
        )
    if "fixed tensor list size" in message:
        return (
            f"'{name}': expected loops whose trips XLA can count, received one{where} that piles up a list of unknown "
            "length. Give tf.while_loop maximum_iterations=..., or use keras.layers.RNN(unroll=True)."
        )
    line = message.splitlines()[0].removeprefix("Failed getting HLO text: ").strip("'").rstrip(".")
    return f"'{name}': expected a step that XLA compiles, received one of which it says{where}: {line}."


def captured_values(func_graph: FuncGraph) -> list[tf.Tensor]:
    """What the function captures, of variables their values as they are now.

    Raises:
        UnsupportedGraphError: If it captures something else.
    """
    values = []
    for number, (external, internal) in enumerate(func_graph.captures):
        entry = _variable_type(internal) if internal.dtype == tf.resource else None
        if entry is not None:
            external = tf.raw_ops.ReadVariableOp(resource=external, dtype=tf.dtypes.as_dtype(entry.dtype))
        elif internal.dtype.name not in ir.ITEM_BYTES:
            raise UnsupportedGraphError(
                f"'{func_graph.name}': expected variables and arrays among what it captures, received number {number}, "
                f"a {internal.dtype.name}. Leave tables, datasets and strings out of the step."
            )
        values.append(external)
    return values


def called_definitions(definition: Any) -> list[Any]:
    """The definitions of all functions that a definition's nodes run, and of those that these run."""
    known = {definition.signature.name: definition}
    pending = [definition]
    while pending:
        for node in pending.pop().node_def:
            for attr in node.attr.values():
                for name in (attr.func.name, *(called.name for called in attr.list.func)):
                    if name and name not in known:
                        known[name] = context_lib.context().get_function_def(name)
                        pending.append(known[name])
    return list(known.values())[1:]


def write_fingerprint(directory: str) -> None:
    """Writes the fingerprint of the SavedModel in a directory, as TensorFlow does when it saves one."""
    fingerprinting_utils.write_fingerprint(directory)


class _Exporter:
    """Adds nodes of a Graph to `target`, in execution order."""

    def __init__(
        self, source: FuncGraph, target: FuncGraph, inputs: Sequence[str], far_tiers: tiers.Tiers, rank: int = 0
    ):
        self.source = source
        self.rank = rank
        self.inputs = {name: tensor.op for name, tensor in zip(inputs, source.inputs, strict=True)}
        self.target = target
        self.remote = [source.get_operation_by_name(name) for name in _homes(source)]
        self.tiers = far_tiers
        self.tensors: dict[str, tf.Tensor] = {}
        self.copies: dict[str, Any] = {}  # SwapOut node -> what its tier keeps
        self.done: dict[str, list[Any]] = {}  # node -> operations to wait for

    def tensor(self, reference: str) -> tf.Tensor:
        found = self.tensors.get(reference)
        if found is None:
            raise KeyError(reference)
        return found

    def add(self, node: ir.Node) -> None:
        if "home" in dict(node.attrs):
            self._add_remote(node)
        elif node.op in (ir.SWAP_OUT, ir.SWAP_IN):
            self._add_swap(node)
        elif node.op in (ir.FETCH, ir.VIEW, ir.STORE):
            self._add_access(node)
        elif node.op == ir.UPDATE:
            self._add_update(node)
        elif node.op in (ir.EXCHANGE, ir.AWAIT):
            self._add_exchange(node)
        elif node.op == ir.SHARD:
            self._add_shard(node)
        elif node.op == ir.ALL_GATHER:
            self._add_gather(node)
        elif dict(node.attrs).get("is_inserted"):
            self._add_inserted(node)
        elif node.op in (ir.BARRIER, ir.PLACE):
            self._add_for_xla(node)
        elif node.op == ir.ANCHOR:
            self._add_anchor(node)
        elif dict(node.attrs).get("is_enclosed"):
            self._add_enclosed(node)
        elif node.like or self.target is not self.source or dict(node.attrs).get("is_divided"):
            self._add_copy(node)
        else:
            self._rewire(node)

    def _original(self, node: ir.Node) -> Any:
        name = node.like or node.name
        return self.inputs.get(name) or self.source.get_operation_by_name(name)

    def _bind(self, node: ir.Node, operation: Any) -> None:
        self.done[node.name] = [operation]
        for reference, tensor in zip(node.refs(), operation.outputs, strict=True):
            self.tensors[reference] = tensor

    def _controls(self, node: ir.Node) -> list[Any]:
        return [operation for name in node.control_inputs for operation in self.done[name]]

    def _rewire(self, node: ir.Node) -> None:
        operation = self._original(node)
        if node.op == "Const":
            if operation.type not in _SHAPES:
                self._detach(operation)
            self.done[node.name] = [operation]
            self.tensors.update(zip(node.refs(), map(self._constant, operation.outputs), strict=True))
            return
        for index, (reference, tensor) in enumerate(zip(node.inputs, operation.inputs, strict=True)):
            wanted = self.tensor(reference)
            if wanted is not tensor:
                operation._update_input(index, wanted)
        present = {control.name for control in operation.control_inputs}
        missing = [control for control in self._controls(node) if control.name not in present]
        if missing:
            operation._add_control_inputs(missing)
        self._bind(node, operation)

    def _detach(self, operation: Any) -> None:
        """Lets a constant wait for nothing: what it is folded from may only run later in the plan's order."""
        operation._remove_all_control_inputs()
        for index, tensor in enumerate(operation.inputs):
            constant = self._constant(tensor)
            if constant is not tensor:
                operation._update_input(index, constant)
            elif tensor.op.type != "Const" and tensor.op.name not in self.done:
                self.done[tensor.op.name] = [tensor.op]
                self._detach(tensor.op)

    def _constant(self, tensor: tf.Tensor) -> tf.Tensor:
        """The tensor, or if it is a known shape, a constant in its place."""
        if tensor.op.type not in _SHAPES or not _has_static_inputs(tensor.op):
            return tensor
        with self.target.as_default(), tf.control_dependencies(None):
            return tf.constant(tensor.op.inputs[tensor.value_index].shape.as_list(), tensor.dtype)

    def _add_copy(self, node: ir.Node) -> None:
        original = self._original(node)
        if node.op == "Const" and original.type in _SHAPES and _has_static_inputs(original):
            shapes = [self._constant(tensor) for tensor in original.outputs]
            self.done[node.name] = [tensor.op for tensor in shapes]
            self.tensors.update(zip(node.refs(), shapes, strict=True))
            return
        if node.op != original.type:  # a folded constant: copy what it is folded from
            node = dataclasses.replace(node, op=original.type, inputs=tuple(_ref(t) for t in original.inputs))
            for tensor in original.inputs:
                constant = self._constant(tensor)
                if constant is not tensor:
                    self.tensors[_ref(tensor)] = constant
                elif _ref(tensor) not in self.tensors:
                    source = tensor.op
                    outputs = tuple(ir.Value(t.dtype.name, _shape(t)) for t in source.outputs)
                    self._add_copy(ir.Node(source.name, "Const", outputs=outputs, device=source.device))
        attrs = {name: value for name, value in original.node_def.attr.items() if name != "_class"}
        with self.target.as_default(), tf.control_dependencies(None), tf.control_dependencies(self._controls(node)):
            operation = self.target.create_op(
                node.op,
                [self.tensor(reference) for reference in node.inputs],
                [tensor.dtype for tensor in original.outputs],
                name=node.name,
                attrs=attrs,
                op_def=original.op_def,
                compute_device=False,
            )
        for tensor, counterpart, value in zip(operation.outputs, original.outputs, node.outputs, strict=True):
            tensor.set_shape(value.shape if dict(node.attrs).get("is_divided") else counterpart.shape)
            if tensor.dtype == tf.resource:
                handle_data_util.copy_handle_data(counterpart, tensor)
        if node.device:
            operation._set_device(node.device)
        self._bind(node, operation)

    def _add_swap(self, node: ir.Node) -> None:
        attrs = dict(node.attrs)
        with self._placed(node):
            if node.op == ir.SWAP_OUT:
                copy = self.tiers.swap_out(self.tensor(node.inputs[0]), str(attrs["tier"]))
                self.copies[node.name] = copy
                self.done[node.name] = copy.operations
                # The handle has no tensor of its own: readers find the copy by the node's name.
                return
            copy = self.copies[ir.producer(node.inputs[0])]
            value = node.outputs[0]
            tensor = self.tiers.swap_in(copy, value.dtype, value.shape)
        self.tensors[node.name] = tensor
        self.done[node.name] = [tensor.op]

    def _add_access(self, node: ir.Node) -> None:
        """Adds the ops that read or write a variable in a far tier."""
        inputs = [self.tensor(reference) for reference in node.inputs]
        with self._placed(node):
            if node.op == ir.STORE:
                self.done[node.name] = far_memory.store(*inputs)
                return
            read = far_memory.fetch if node.op == ir.FETCH else far_memory.read
            value = node.outputs[0]
            tensor = read(inputs[0], value.dtype, value.shape)
        self.tensors[node.name] = tensor
        self.done[node.name] = [tensor.op]

    def _add_update(self, node: ir.Node) -> None:
        """Adds the ops that compute new values of variables in far tiers; if nothing may change, they go nowhere."""
        attrs: Any = dict(node.attrs)
        inputs = [self.tensor(reference) for reference in node.inputs]
        values, handles = inputs[: attrs["values"]], inputs[attrs["values"] :]
        pairs = list(zip(handles[::2], handles[1::2], strict=True))
        program = Program.parse(attrs["program"])
        stored = attrs["stored"] if node.stateful else None
        with self._placed(node):
            count = len(node.outputs)
            made, done = far_memory.update(program, values, pairs, stored, count, attrs["dtype"], attrs["shape"])
        self.tensors.update(zip(node.refs(), made, strict=True))
        self.done[node.name] = [*done, *(tensor.op for tensor in made)]

    def _add_exchange(self, node: ir.Node) -> None:
        """Adds a sum over all replicas, like the one that it is a part of, or what waits for it."""
        if node.op == ir.AWAIT:
            with self._placed(node):
                tensor = tf.identity(self.tensor(node.inputs[0]))
            self.tensors[node.name] = tensor
            self.done[node.name] = [tensor.op]
            return
        attrs = dict(node.attrs)
        original = self.source.get_operation_by_name(str(attrs["sum"]))
        value, size, group, *tokens = map(self.tensor, node.inputs)
        with self.target.as_default(), tf.control_dependencies(None):
            key = tf.constant(attrs["instance_key"], tf.int32, name=f"{node.name}/instance_key")
            with tf.control_dependencies(self._controls(node)):
                operation = self.target.create_op(
                    original.type,
                    [value, size, group, key, *tokens],
                    [value.dtype],
                    name=node.name,
                    attrs={name: attr for name, attr in original.node_def.attr.items() if name != "_class"},
                    op_def=original.op_def,
                    compute_device=False,
                )
        operation._set_device(original.device)
        operation.outputs[0].set_shape(value.shape)
        self.tensors[node.name] = operation.outputs[0]
        self.done[node.name] = [operation]

    def _add_shard(self, node: ir.Node) -> None:
        """Adds what copies this worker's part of a value."""
        whole_length: Any = dict(node.attrs)["length"]
        length = math.prod(size or 0 for size in node.outputs[0].shape or ())
        begin = min(self.rank * length, whole_length)
        size = min(length, whole_length - begin)
        with self._placed(node):
            whole = tf.reshape(self.tensor(node.inputs[0]), (-1,))
            part = tf.raw_ops.Slice(input=whole, begin=[begin], size=[size])
            # Copied: a slice may be a view, which would keep the whole value.
            tensor = tf.pad(part, [[0, length - size]]) if size < length else tf.raw_ops.DeepCopy(x=part)
        self.tensors[node.name] = tensor
        self.done[node.name] = [tensor.op]

    def _add_gather(self, node: ir.Node) -> None:
        """Adds what makes a value whole of all workers' parts, by a collective of the kind that sums gradients."""
        attrs = dict(node.attrs)
        original = self.source.get_operation_by_name(str(attrs["sum"]))
        part, size, group, *tokens = map(self.tensor, node.inputs)
        value = node.outputs[0]
        with self._placed(node):
            gathered = tf.raw_ops.CollectiveGatherV2(
                input=part,
                group_size=size,
                group_key=group,
                instance_key=tf.constant(attrs["instance_key"], tf.int32),
                ordering_token=tokens,
                communication_hint=original.get_attr("communication_hint").decode(),
                timeout_seconds=original.get_attr("timeout_seconds"),
            )
            own = tf.raw_ops.Slice(input=gathered, begin=[0], size=[math.prod(d or 0 for d in value.shape or ())])
            tensor = tf.reshape(own, value.shape)
        self.tensors[node.name] = tensor
        self.done[node.name] = [tensor.op]

    def _add_remote(self, node: ir.Node) -> None:
        """Adds what moves a value between this worker and a parameter server, and what waits for it on either side.

        TensorFlow moves a tensor once to each device that reads it, as soon as it is there. So the server makes another
        tensor of it for each fetch, when the worker asks for it.
        """
        attrs = dict(node.attrs)
        home = str(attrs["home"])
        if node.op == ir.STORE:
            value = self.tensor(node.inputs[0])
            with self._placed(node):
                # As strings: what is sent as it is stays on the device until gRPC lets go of it, some time later.
                leaving = tiers.strings(value)
                with tf.device(home):
                    copy = tiers.FarCopy(leaving, [])
                    arrived = self.tiers.swap_in(copy, value.dtype.name, tuple(value.shape.as_list()))
            for operation in self.remote:
                for index, tensor in enumerate(operation.inputs):
                    if _copied(tensor) == attrs["value"]:
                        operation._update_input(index, arrived)
            self.done[node.name] = [string.op for string in leaving]
            return
        handle = str(attrs.get("handle") or node.inputs[0])
        with self._placed(node):
            with tf.device(home):
                read = self._read(str(attrs["source"]), handle)
                asked = tf.identity(read) if node.op == ir.FETCH else read
            # Grappler takes an Identity out, and would let others wait for the server itself.
            tensor = tf.raw_ops.EnsureShape(input=asked, shape=asked.shape)
        self.tensors[node.name] = tensor
        self.done[node.name] = [tensor.op]

    def _read(self, name: str, handle: str) -> tf.Tensor:
        """What a server's read of a variable makes, in the graph that is built."""
        operation = self.source.get_operation_by_name(name)
        if self.target is self.source:
            return operation.outputs[0]
        with tf.control_dependencies(None):
            dtype = operation.outputs[0].dtype
            read = tf.raw_ops.ReadVariableOp(resource=self.tensor(handle), dtype=dtype)
        read.set_shape(operation.outputs[0].shape)
        return read

    def _add_inserted(self, node: ir.Node) -> None:
        """Adds what stands in the place of an op on a variable itself, or joins and splits blocks of gradients."""
        inputs = [self.tensor(reference) for reference in node.inputs]
        if node.op == "SplitV":
            with self.target.as_default(), tf.control_dependencies(None):
                sizes: Any = dict(node.attrs)["sizes"]
                lengths = tf.constant(sizes, tf.int32, name=f"{node.name}/sizes")
            with self._placed(node):
                parts = tf.raw_ops.SplitV(value=inputs[0], size_splits=lengths, axis=inputs[1], num_split=len(sizes))
            self._bind(node, parts[0].op)
            return
        with self._placed(node):
            if node.op == "ConcatV2":
                tensor = tf.raw_ops.ConcatV2(values=inputs[:-1], axis=inputs[-1])
            elif node.op == "GatherV2":
                axis = self.source.get_operation_by_name(node.like or node.name).get_attr("batch_dims")
                tensor = tf.raw_ops.GatherV2(params=inputs[0], indices=inputs[1], axis=axis, batch_dims=axis)
            else:
                tensor = getattr(tf.raw_ops, node.op)(x=inputs[0], y=inputs[1])
        self.tensors[node.name] = tensor
        self.done[node.name] = [tensor.op]

    @contextlib.contextmanager
    def _placed(self, node: ir.Node) -> Iterator[None]:
        """For ops of an inserted node: after what it waits for, on its device, named after it."""
        with (
            self.target.as_default(),
            tf.control_dependencies(None),
            tf.control_dependencies(self._controls(node)),
            tf.device(node.device or None),
            tf.name_scope(node.name + "/"),
        ):
            yield

    def _add_for_xla(self, node: ir.Node) -> None:
        inputs = [self.tensor(reference) for reference in node.inputs]
        dtypes = attr_value_pb2.AttrValue(list={"type": [tensor.dtype.as_datatype_enum for tensor in inputs]})
        op, attrs = node.op, {"T": dtypes}
        if op == ir.PLACE:
            frontend = xla_data_pb2.FrontendAttributes(map={"_xla_buffer_placement": dict(node.attrs)["memory_kind"]})
            shapes = attr_value_pb2.AttrValue(list={"shape": [tensor.shape.as_proto() for tensor in inputs]})
            op = "XlaCustomCallV2"
            attrs = {
                "call_target_name": attr_value_pb2.AttrValue(s=b"annotate_device_placement"),
                "backend_config": attr_value_pb2.AttrValue(s=b""),
                "has_side_effect": attr_value_pb2.AttrValue(b=True),
                "operand_dtypes": dtypes,
                "result_dtypes": dtypes,
                "result_shapes": shapes,
                "_XlaFrontendAttributes": attr_value_pb2.AttrValue(s=frontend.SerializeToString()),
            }
        with self.target.as_default(), tf.control_dependencies(None):
            operation = self.target.create_op(op, inputs, [t.dtype for t in inputs], name=node.name, attrs=attrs)
        for tensor, source in zip(operation.outputs, inputs, strict=True):
            tensor.set_shape(source.shape)
        self._bind(node, operation)

    def _add_anchor(self, node: ir.Node) -> None:
        value, *tokens = map(self.tensor, node.inputs)
        with self.target.as_default(), tf.control_dependencies(None), tf.name_scope(node.name + "/"):
            anchored = tf.where(_are_there(tokens), value, tf.zeros((), value.dtype))
        self.tensors[node.name] = anchored
        self.done[node.name] = [anchored.op]

    def _add_enclosed(self, node: ir.Node) -> None:
        """Runs the op in a branch: XLA begins nothing of it before it has all inputs, whatever it makes of it."""
        original = self._original(node)
        inputs = [self.tensor(reference) for reference in node.inputs]

        def branch() -> Any:
            return (
                tf.compat.v1.get_default_graph()
                .create_op(
                    node.op,
                    inputs,
                    [tensor.dtype for tensor in original.outputs],
                    attrs=dict(original.node_def.attr),
                    op_def=original.op_def,
                )
                .outputs
            )

        def never() -> list[tf.Tensor]:
            return [tf.zeros(value.shape, value.dtype) for value in node.outputs]

        with self._placed(node):
            outputs = tf.cond(_are_there(inputs[-1:]), branch, never)
        self.tensors.update(zip(node.refs(), outputs, strict=True))
        self.done[node.name] = [outputs[0].op]


def _are_there(tokens: Sequence[tf.Tensor]) -> tf.Tensor:
    """A condition that always holds, which XLA can't know: an integer has a last bit of 0 or 1.

    Args:
        tokens: Floats.
    """
    conditions = []
    for token in tokens:
        bits = tf.bitcast(tf.reshape(token, [-1])[0], _BITS[token.dtype.size])
        one = tf.ones((), bits.dtype)
        conditions.append(tf.bitwise.bitwise_and(bits, one) <= one)
    return functools.reduce(tf.logical_and, conditions)


_BITS = {2: tf.uint16, 4: tf.uint32, 8: tf.uint64}
"""Size of a float in bytes -> integers that hold its bits."""


# --- variables --------------------------------------------------------------------------------------------------


def variables(func_graph: FuncGraph) -> list[placement.Variable]:
    """The variables that the function captures."""
    assigned = {
        _source(operation.inputs[0]).name
        for operation in func_graph.get_operations()
        if operation.type == "AssignVariableOp"
    }
    found = []
    for external, internal in func_graph.captures:
        entry = _variable_type(internal) if internal.dtype == tf.resource and hasattr(external, "numpy") else None
        if entry is not None:
            dtype = tf.dtypes.as_dtype(entry.dtype)
            found.append(placement.Variable(external, dtype, internal.op.name in assigned))
    return found


ResourceVariable: TypeAlias = resource_variable_ops.ResourceVariable


def watch(variable: ResourceVariable) -> None:
    """Tells gradient tapes and the function being traced that the variable is read."""
    resource_variable_ops.variable_accessed(variable)


def captured_variables(func_graph: FuncGraph) -> dict[str, ResourceVariable]:
    """The variables that the function captures, by the names that `import_function` gives them."""
    names = _capture_names(func_graph)
    alive = [variable for reference in func_graph._weak_variables if (variable := reference()) is not None]
    by_handle = {id(variable.handle): variable for variable in alive}
    return {
        names[internal.op.name]: by_handle[id(external)]
        for external, internal in func_graph.captures
        if id(external) in by_handle
    }


def capture(func_graph: FuncGraph, handles: Sequence[tf.Tensor]) -> None:
    """Lets a function that is traced completely capture more resources, behind what else it captures when traced."""
    with func_graph.as_default():
        for handle in handles:
            func_graph.capture(handle)
    late = {id(tensor) for tensor in func_graph.deferred_internal_captures}  # which come last when it is called
    func_graph.inputs = sorted(func_graph.inputs, key=lambda tensor: id(tensor) in late)


def _variable_type(handle: Any) -> Any:
    is_symbolic = not hasattr(handle, "numpy")
    data = handle_data_util.get_resource_handle_data(handle) if is_symbolic else handle._handle_data
    return data.shape_and_type[0] if data is not None and data.is_set and data.shape_and_type else None


# --- inlining ---------------------------------------------------------------------------------------------------


def has_calls(func_graph: FuncGraph) -> bool:
    """Whether the function calls others that `call_inline` would dissolve."""
    return any(_callee(func_graph, operation) is not None for operation in func_graph.get_operations())


def call_inline(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Traces `step` and adds its operations to the graph being built, nested function calls dissolved.

    Calling it would leave one opaque node for every nested tf.function.
    """
    outer: Any = tf.compat.v1.get_default_graph()

    def planned(*args: Any, **kwargs: Any) -> Any:
        setattr(tf.compat.v1.get_default_graph(), _PLANNED, True)
        return step(*args, **kwargs)

    traced = tf.function(planned, autograph=False).get_concrete_function(*args, **kwargs)
    arguments = [leaf for leaf in tf.nest.flatten((args, kwargs), expand_composites=True) if tf.is_tensor(leaf)]
    captures = _captured(outer, traced)
    tensors = _copy_operations(traced.graph, outer, [*arguments, *captures], [], "")[0]

    def counterpart(leaf: Any) -> Any:
        return tensors[_ref(leaf)] if tf.is_tensor(leaf) else leaf

    return tf.nest.map_structure(counterpart, traced.structured_outputs, expand_composites=True)


def call_concrete(concrete: Any, arguments: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Adds the operations of a concrete function to the graph being built, under their own names.

    Args:
        concrete: The function.
        arguments: Its arguments, flat.

    Returns:
        Its results, flat.
    """
    outer: Any = tf.compat.v1.get_default_graph()
    tensors = _copy_operations(concrete.graph, outer, [*arguments, *_captured(outer, concrete)], [], "")[0]
    return [tensors[_ref(tensor)] for tensor in concrete.graph.outputs]


def decidable_branches(func_graph: FuncGraph) -> Callable[[], tuple[bool, ...]] | None:
    """A function that tells which branches the step will take, where its variables alone decide on that.

    Such as whether this step of several that accumulate gradients updates the weights. Only branches that assign
    variables are asked for, in the order of the trace; None if there are none.
    """
    conditions = [operation.inputs[0] for operation in _decidable(func_graph)]
    if not conditions:
        return None
    externals = {internal.op.name: external for external, internal in func_graph.captures}

    def decide() -> list[tf.Tensor]:
        outer: Any = tf.compat.v1.get_default_graph()
        made: dict[str, tf.Tensor] = {}

        def copied(tensor: tf.Tensor) -> tf.Tensor:
            operation = tensor.op
            if _ref(tensor) not in made and operation.type == "Placeholder":
                made[_ref(tensor)] = outer.capture(externals[operation.name])
            elif _ref(tensor) not in made:
                inputs = [copied(read) for read in operation.inputs]
                dtypes = [result.dtype for result in operation.outputs]
                attrs = dict(operation.node_def.attr)
                twin = outer.create_op(operation.type, inputs, dtypes, attrs=attrs, compute_device=False)
                made.update(zip(map(_ref, operation.outputs), twin.outputs, strict=True))
            return made[_ref(tensor)]

        return [copied(condition) for condition in conditions]

    with tf.init_scope():
        function = tf.function(decide, autograph=False).get_concrete_function()
    return lambda: tuple(bool(condition) for condition in function())


def take_branches(func_graph: FuncGraph, taken: Sequence[bool]) -> None:
    """Puts the operations of the branches that will be taken in the place of `decidable_branches`, in place."""
    for operation, is_true in zip(_decidable(func_graph), taken, strict=True):
        body = _body(func_graph, operation.get_attr("then_branch" if is_true else "else_branch").name)
        controls = list(operation.control_inputs)
        prefix = f"{operation.name}/"
        tensors, ends = _copy_operations(cast(FuncGraph, body), func_graph, operation.inputs[1:], controls, prefix)
        results = [tensors[_ref(result)] for result in cast(FuncGraph, body).outputs]
        for tensor, result in zip(operation.outputs, results, strict=True):
            for reader in tensor.consumers():
                for index, read in enumerate(reader.inputs):
                    if read is tensor:
                        reader._update_input(index, result)
        stand_ins = dict(zip(map(_ref, operation.outputs), results, strict=True))
        func_graph.outputs = [stand_ins.get(_ref(tensor), tensor) for tensor in func_graph.outputs]
        for waiting in operation._control_outputs:
            waits = [control for control in waiting.control_inputs if control is not operation]
            waiting._remove_all_control_inputs()
            waiting._add_control_inputs(list(dict.fromkeys([*waits, *ends])))
        func_graph.control_outputs = list(dict.fromkeys([*func_graph.control_outputs, *ends]))
        _remove(func_graph, {operation})


def _decidable(func_graph: FuncGraph) -> list[Any]:
    captured = {internal.op.name for _, internal in func_graph.captures}

    def is_known(operation: Any) -> bool:
        """Whether the step's variables decide on its results, as they are before the step."""
        pending, seen = [operation], {operation}
        while pending:
            operation = pending.pop()
            is_read = operation.type == "ReadVariableOp"
            if (
                (operation.type == "Placeholder" and operation.name not in captured)
                or (is_read and operation.control_inputs)  # perhaps after an update
                or (operation.op_def.is_stateful and not is_read)
                or operation.type in OPAQUE
            ):
                return False
            found = {tensor.op for tensor in operation.inputs} - seen
            seen |= found
            pending += found
        return True

    return [
        operation
        for operation in func_graph.get_operations()
        if operation.type == "If"
        and all(_body(func_graph, name) is not None for name in _body_names(operation))
        and not _only_reads(func_graph, operation)
        and is_known(operation.inputs[0].op)
    ]


def _captured(outer: Any, concrete: Any) -> list[tf.Tensor]:
    """What a concrete function captures, captured by the graph being built, too."""
    for variable in concrete.variables:
        outer.watch_variable(variable)
    return [outer.capture(external) for external in concrete.captured_inputs]


def _copy_operations(
    body: FuncGraph, outer: Any, arguments: Sequence[tf.Tensor], controls: Sequence[Any], prefix: str
) -> tuple[dict[str, tf.Tensor], list[Any]]:
    """Copies a function's body into `outer`.

    Args:
        body: The function.
        outer: The graph to add to.
        arguments: What the function is called with.
        controls: What the call runs after.
        prefix: For the names of the copies.

    Returns:
        The tensors of the copies by reference in `body`, and the operations whose end is the call's end.
    """
    tensors = {_ref(inner): given for inner, given in zip(body.inputs, arguments, strict=True)}
    done: dict[str, list[Any]] = {
        inner.op.name: [given.op] for inner, given in zip(body.inputs, arguments, strict=True)
    }
    for function in body._functions.values():
        outer._add_function_recursive(function)
    for node in _topological(list(map(_edges, body.get_operations()))):
        if node.name in done:
            continue
        operation = body.get_operation_by_name(node.name)
        inputs = [tensors[_ref(tensor)] for tensor in operation.inputs]
        waits = [end for control in operation.control_inputs for end in done[control.name]]
        if operation.op_def.is_stateful:
            waits += controls
        callee = _callee(body, operation)
        if callee is not None:
            results, done[node.name] = _copy_operations(callee, outer, inputs, waits, f"{prefix}{node.name}/")
            for tensor, result in zip(operation.outputs, callee.outputs, strict=True):
                tensors[_ref(tensor)] = results[_ref(result)]
            continue
        attrs = {name: value for name, value in operation.node_def.attr.items() if name != "_class"}
        with outer.as_default(), tf.control_dependencies(None), tf.control_dependencies(waits):
            copied = outer.create_op(
                operation.type,
                inputs,
                [tensor.dtype for tensor in operation.outputs],
                name=f"{prefix}{node.name}",
                attrs=attrs,
                op_def=operation.op_def,
                compute_device=False,
            )
        if operation.device:
            copied._set_device(operation.device)
        done[node.name] = [copied]
        for tensor, counterpart in zip(copied.outputs, operation.outputs, strict=True):
            tensor.set_shape(counterpart.shape)
            if tensor.dtype == tf.resource:
                handle_data_util.copy_handle_data(counterpart, tensor)
            tensors[_ref(counterpart)] = tensor
    ends = [end for operation in body.control_outputs for end in done[operation.name]]
    return tensors, ends or list(controls)


def _callee(func_graph: FuncGraph, operation: Any) -> FuncGraph | None:
    """The body that a call runs, if it can be dissolved: XLA-compiled functions can't."""
    if operation.type not in _CALLS:
        return None
    if any(name in operation.node_def.attr and operation.node_def.attr[name].b for name in _KEPT_WHOLE):
        return None
    return _body(func_graph, operation.get_attr("f").name)


_KEPT_WHOLE = ("_XlaMustCompile", "_noinline")


# --- trace time -------------------------------------------------------------------------------------------------

_MARK = "_graphswap_step"
_PLANNED = "_graphswap_planned"
"""Attributes of a FuncGraph: of a step, and of one whose operations will be copied into a step."""


def mark_current_graph(mark: object) -> bool:
    """Marks the function being traced, so that `on_traced` callbacks see it. False outside of any trace."""
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    setattr(graph, _MARK, mark)
    return True


def traces_variables() -> bool:
    """Whether what is traced now is to read variables as if they were on the device.

    A step that will be rewritten is, branches and loops in it included, and what goes into a SavedModel.
    """
    graph: Any = tf.compat.v1.get_default_graph()
    while isinstance(graph, _BODIES):
        graph = graph.outer_graph
    return hasattr(graph, _MARK) or hasattr(graph, _PLANNED) or save_context.in_save_context()


_BODIES = (
    control_flow_v2_func_graphs.CondBranchFuncGraph,
    control_flow_v2_func_graphs.WhileCondFuncGraph,
    control_flow_v2_func_graphs.WhileBodyFuncGraph,
)


def on_traced(callback: Callable[[FuncGraph, Any], None]) -> None:
    """Calls `callback(func_graph, mark)` for every marked function, after its trace and before it is made runnable."""
    if not any(isinstance(known, _Transform) for known in transform.FUNC_GRAPH_TRANSFORMS):
        transform.FUNC_GRAPH_TRANSFORMS.append(_Transform(callback))


def off_traced() -> None:
    """Undoes `on_traced`."""
    transform.FUNC_GRAPH_TRANSFORMS[:] = [t for t in transform.FUNC_GRAPH_TRANSFORMS if not isinstance(t, _Transform)]


class _Transform:
    def __init__(self, callback: Callable[[FuncGraph, Any], None]):
        self.callback = callback

    def __call__(self, func_graph: FuncGraph) -> None:
        mark = getattr(func_graph, _MARK, None)
        if mark is not None:
            self.callback(func_graph, mark)
