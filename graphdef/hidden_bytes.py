"""Bytes that a graph's types don't show: of variables, of lists that loops pile up, of what bodies hold."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from graphswap import allocator, ir
from graphswap.elementwise import FUNCTIONS
from graphswap.graphdef.captures import variable_bytes
from graphswap.graphdef.grappler import REGROUPED_SUFFIX, Folding, folds_constants
from graphswap.graphdef.traced import (
    BRANCHES,
    CALLS,
    LOOPS,
    SHAPES,
    FuncGraph,
    body_names,
    body_of,
    bytes_of,
    data_inputs,
    only_reads,
    reference_to,
    source_of,
)


def with_hidden_bytes(graph: ir.Graph, func_graph: FuncGraph, folding: Folding | None) -> ir.Graph:
    """Writes down the bytes that types don't show: of variables, and of the lists that loops pile up."""
    inputs = dict(zip(graph.inputs, func_graph.inputs, strict=True))
    handles = {name: variable_bytes(internal) for name, internal in inputs.items() if internal.dtype == tf.resource}
    late = {id(tensor) for tensor in func_graph.deferred_internal_captures}
    names = {internal.op.name: name for name, internal in inputs.items()}
    nodes = []
    constants: set[str] = set()
    for node in graph.nodes:
        facts: list[tuple[str, ir.Attr]] = []
        if node.outputs and node.outputs[0].dtype == "resource":
            nbytes = handles.get(node.name, 0)
            if node.op == "VarHandleOp":
                nbytes = variable_bytes(func_graph.get_operation_by_name(node.name).outputs[0])
            if nbytes:
                facts = [("held_bytes", (allocator.rounded(nbytes),))]
        elif node.name in inputs:
            facts = [(ir.IS_DEFERRED, True)] if id(inputs[node.name]) in late else []
        elif node.op in LOOPS:
            facts = _loop_bytes(node, func_graph)
        elif node.op == ir.ALL_REDUCE:
            workers = tf.get_static_value(func_graph.get_operation_by_name(node.name).inputs[1])
            facts = [] if workers is None else [("workers", int(workers))]
        elif node.op == "Const" and node.outputs[0].nbytes > _MERGED_BYTES:
            digest = _digest(func_graph.get_operation_by_name(node.name))
            facts = [("held_bytes", (0,))] if digest in constants else []
            constants.add(digest)
        elif node.op in _REDUCTIONS and node.outputs[0] == graph.value(node.inputs[0]) and folds_constants():
            facts = [("copy_of_input", 0)]
        elif (copied := _copied_input(node, folding, names)) is not None:
            facts = [("copy_of_input", copied)]
        elif node.op == "TensorListFromTensor" or (node.op == "ZerosLike" and node.outputs[0].dtype == "variant"):
            length, nbytes = _list_elements(func_graph.get_operation_by_name(node.name).outputs[0], func_graph)
            facts = [("held_bytes", (length * nbytes,)), ("held_pieces", (max(length, 1),))]
        elif node.op in BRANCHES or node.op in CALLS:
            facts = _branch_bytes(node, func_graph)
        if node.op in FUNCTIONS and _is_folded(func_graph.get_operation_by_name(node.name), folding):
            facts.append((ir.IS_FOLDED, True))
        if node.stateful and only_reads(func_graph, func_graph.get_operation_by_name(node.name)):
            facts.append(("only_reads", True))
        nodes.append(dataclasses.replace(node, attrs=tuple(sorted((*node.attrs, *facts)))) if facts else node)
    return graph.replace(nodes=tuple(nodes))


def _copied_input(node: ir.Node, folding: Folding | None, names: Mapping[str, str]) -> int | None:
    """Which input the node will be a copy of after constant folding, such as of a product with 1; None if of none."""
    after = None if folding is None else folding.get(node.name)
    if after is None or after.op == node.op or after.op not in ("Identity", "Snapshot"):
        return None
    (source,) = (names.get(name, name) for name in data_inputs(after))
    return node.inputs.index(source) if source in node.inputs else None


def _is_folded(operation: Any, folding: Folding | None) -> bool:
    """Whether constant folding makes another op of it or lets it read something else, `regroup` left aside."""
    if folding is None or operation.name.endswith(REGROUPED_SUFFIX):
        return False
    after = folding.get(operation.name)
    inputs = tuple(reference_to(tensor).replace(REGROUPED_SUFFIX, "") for tensor in operation.inputs)
    return after is None or after.op != operation.type or data_inputs(after) != inputs


_MERGED_BYTES = 16 << 10
"""Of equal constants above this size one is counted: TensorFlow merges them."""


def _digest(operation: Any) -> str:
    """Equal for operations that compute the same of the same constants."""
    definition = type(operation.node_def)()
    definition.CopyFrom(operation.node_def)
    definition.name = ""
    del definition.input[:]
    if operation.type in SHAPES:
        definition.input.extend(str(tensor.shape) for tensor in operation.inputs)
    else:
        definition.input.extend(f"{_digest(tensor.op)}:{tensor.value_index}" for tensor in operation.inputs)
    return hashlib.sha256(definition.SerializeToString(deterministic=True)).hexdigest()


_REDUCTIONS = frozenset({"Sum", "Mean", "Max", "Min", "Prod"})
"""Ops that TensorFlow replaces by a copy where they reduce nothing, as in the gradient of a sum of equal shapes."""


def _loop_bytes(node: ir.Node, func_graph: FuncGraph) -> list[tuple[str, ir.Attr]]:
    """Bytes of a While: what each of its results holds, and what its body needs beside them.

    A list that the body pushes to grows by one element per trip. A result that the body passes on
    unchanged is the argument's buffer.
    """
    operation = func_graph.get_operation_by_name(node.name)
    body = body_of(func_graph, operation.get_attr("body").name)
    if body is None:
        return []
    trips = _trips(func_graph, operation)
    states = {inner.op.name: source_of(result) for inner, result in zip(body.inputs, body.outputs, strict=True)}
    counted: set[str] = set()
    held, pieces = [0] * len(node.outputs), [1] * len(node.outputs)
    results = list(enumerate(zip(node.outputs, body.inputs, body.outputs, strict=True)))
    # An element may be in two lists: those that are pushed to wait for the backward loop.
    for index, (value, argument, result) in sorted(results, key=lambda r: source_of(r[1][2]).type != _PUSH):
        source = source_of(result)
        if source is argument.op:
            continue
        if value.dtype != "variant":
            held[index] = allocator.rounded(value.nbytes)
        elif source.type in _ELEMENT:
            element = source.inputs[_ELEMENT[source.type]]
            # A state that is pushed is what the trip before has made, perhaps in another list already.
            maker = states.get(source_of(element).name, source_of(element))
            # An element of a list keeps the list's buffer: once the loop is over, nothing else does.
            owner = source_of(maker.inputs[0]) if maker.type == "TensorListGetItem" else maker
            if maker.type not in _MAKE_NOTHING and owner.name not in counted:
                counted.add(owner.name)
                held[index] = trips * allocator.rounded(bytes_of(element))
                pieces[index] = trips
    return [("held_bytes", tuple(held)), ("held_pieces", tuple(pieces)), ("workspace_bytes", _body_peak(body))]


def _list_elements(tensor: tf.Tensor, func_graph: FuncGraph) -> tuple[int, int]:
    """How many elements a list has, and the bytes of each, which has a buffer of its own."""
    operation = source_of(tensor)
    if operation.type == "ZerosLike":
        return _list_elements(operation.inputs[0], func_graph)
    if operation.type == "TensorListFromTensor":
        rows = operation.inputs[0]
        length = rows.shape[0] if rows.shape.rank else None
        return (length, allocator.rounded(bytes_of(rows) // length)) if length else (0, 0)
    body = body_of(func_graph, operation.get_attr("body").name) if operation.type in LOOPS else None
    if body is not None and source_of(body.outputs[tensor.value_index]) is body.inputs[tensor.value_index].op:
        return _list_elements(operation.inputs[tensor.value_index], func_graph)
    return 0, 0


_PUSH = "TensorListPushBack"

_ELEMENT = {_PUSH: 1, "TensorListSetItem": 2}
"""Ops that put an element into a list, and which input it is."""

_MAKE_NOTHING = frozenset({"Placeholder", "Const", "ReadVariableOp"})
"""Ops of a body whose results are buffers that exist outside of the loop."""


def _trips(func_graph: FuncGraph, operation: Any) -> int:
    """How often a While runs: a static bound, that of the loop whose counter bounds it, or the length of its lists."""
    bound = operation.inputs[1]
    source = source_of(bound)
    if source.type in LOOPS and source is not operation:
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
    last_use = {
        reference_to(tensor): index for index, operation in enumerate(operations) for tensor in operation.inputs
    }
    expiring: dict[int, int] = {}
    live = peak = 0
    for index, operation in enumerate(operations):
        if operation.type not in _VIEWS:
            for tensor in operation.outputs:
                nbytes = allocator.rounded(bytes_of(tensor))
                live += nbytes
                end = last_use.get(reference_to(tensor), index)
                expiring[end] = expiring.get(end, 0) + nbytes
        peak = max(peak, live)
        live -= expiring.pop(index, 0)
    return peak


def _branch_bytes(node: ir.Node, func_graph: FuncGraph) -> list[tuple[str, ir.Attr]]:
    """Workspace of an If, Case or opaque call: the largest body with nothing freed in it, an upper estimate."""
    operation = func_graph.get_operation_by_name(node.name)
    bodies = [body_of(func_graph, name) for name in body_names(operation)]
    largest = max((_body_peak(body) for body in bodies if body is not None), default=0)
    return [("workspace_bytes", largest)] if largest else []


_VIEWS = frozenset({"Placeholder", "Const", "Identity", "IdentityN", "ReadVariableOp", "Reshape"})
