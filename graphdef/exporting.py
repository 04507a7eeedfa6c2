"""A Graph as a function: the traced one, in place, or a new one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.eager.polymorphic_function import concrete_function as concrete_function_lib
from tensorflow.python.ops import handle_data_util

from graphswap import far_memory, ir, tiers
from graphswap.elementwise import Program
from graphswap.graphdef.grappler import without_memory_optimizer
from graphswap.graphdef.traced import (
    SHAPES,
    FuncGraph,
    copied_reference,
    has_static_inputs,
    reference_to,
    remove_operations,
    server_devices,
    shape_of,
)


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
    remove_operations(func_graph, removed)


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


class _Exporter:
    """Adds nodes of a Graph to `target`, in execution order."""

    def __init__(
        self, source: FuncGraph, target: FuncGraph, inputs: Sequence[str], far_tiers: tiers.Tiers, rank: int = 0
    ):
        self.source = source
        self.rank = rank
        self.inputs = {name: tensor.op for name, tensor in zip(inputs, source.inputs, strict=True)}
        self.target = target
        self.remote = [source.get_operation_by_name(name) for name in server_devices(source)]
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
        elif node.op == "SplitV" and self._splits_sum(node):
            self._add_split(node)
        elif dict(node.attrs).get("is_inserted"):
            self._add_inserted(node)
        elif ir.IS_ZEROS in dict(node.attrs):
            self._add_zeros(node)
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
            if operation.type not in SHAPES:
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
        if tensor.op.type not in SHAPES or not has_static_inputs(tensor.op):
            return tensor
        with self.target.as_default(), tf.control_dependencies(None):
            return tf.constant(tensor.op.inputs[tensor.value_index].shape.as_list(), tensor.dtype)

    def _add_copy(self, node: ir.Node) -> None:
        original = self._original(node)
        if node.op == "Const" and original.type in SHAPES and has_static_inputs(original):
            shapes = [self._constant(tensor) for tensor in original.outputs]
            self.done[node.name] = [tensor.op for tensor in shapes]
            self.tensors.update(zip(node.refs(), shapes, strict=True))
            return
        if node.op != original.type:  # a folded constant: copy what it is folded from
            node = dataclasses.replace(node, op=original.type, inputs=tuple(reference_to(t) for t in original.inputs))
            for tensor in original.inputs:
                constant = self._constant(tensor)
                if constant is not tensor:
                    self.tensors[reference_to(tensor)] = constant
                elif reference_to(tensor) not in self.tensors:
                    source = tensor.op
                    outputs = tuple(ir.Value(t.dtype.name, shape_of(t)) for t in source.outputs)
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

    def _add_zeros(self, node: ir.Node) -> None:
        """Adds an op that makes zeros whenever it runs.

        TensorFlow folds a Fill of constants when the function is first run. Then all that it folds is on the device
        twice, and it crashes if there is no room (`GraphRunner::Run` in TensorFlow 2.21 copies into memory that it did
        not get); and it stays there. An Empty is stateful, so it is left as it is.
        """
        (value,) = node.outputs
        with self._placed(node):
            tensor = tf.raw_ops.Empty(shape=value.shape, dtype=value.dtype, init=True)
        self.tensors[node.name] = tensor
        self.done[node.name] = [tensor.op]

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
                    if copied_reference(tensor) == attrs["value"]:
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

    def _splits_sum(self, node: ir.Node) -> bool:
        """Whether the node splits a sum of packed values over all replicas, or a block of one."""
        if dict(node.attrs).get("is_inserted"):
            return True
        summed = self._original(node).inputs[0]
        return summed.op.type == ir.ALL_REDUCE and summed.shape.rank == 1

    def _add_split(self, node: ir.Node) -> None:
        """Adds what splits a sum of packed values over all replicas, in copies, as is planned.

        Along the first axis TensorFlow may give views. A variable that takes over the buffer of what is written over
        one would keep the memory of the whole sum.
        """
        sizes = [math.prod(size or 0 for size in value.shape or ()) for value in node.outputs]
        with self._placed(node):
            row = tf.reshape(self.tensor(node.inputs[0]), (1, -1))
            lengths = tf.constant(sizes, tf.int32)
            parts = tf.raw_ops.SplitV(value=row, size_splits=lengths, axis=1, num_split=len(sizes))
            parts = [tf.reshape(part, (-1,)) for part in parts]
        self.tensors.update(zip(node.refs(), parts, strict=True))
        self.done[node.name] = [part.op for part in parts]

    def _add_inserted(self, node: ir.Node) -> None:
        """Adds what stands in the place of an op on a variable itself, or joins blocks of gradients."""
        inputs = [self.tensor(reference) for reference in node.inputs]
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
