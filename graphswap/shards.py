"""Which variables of a step can be divided among workers, each of which then updates a part (ZeRO).

All workers update a variable alike once its gradient is summed. A variable that only feeds updates, such as an
optimizer's slot, need not be whole on any of them: each keeps an equal part and computes on that, element by element;
what all need of the outcome, such as by how much a weight changes, is gathered (Rajbhandari et al., "ZeRO:
Memory Optimizations Toward Training Trillion Parameter Models", SC'20, stage 1). The same holds for any optimizer, as
it is read off the graph: what depends on the parts has to be of ops on single elements.

Known weaknesses: gradients are summed whole on every worker, not scattered; weights stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from graphswap import ir, liveness
from graphswap.variables import SMALL_BYTES, updates, values

_WRITES = liveness.ASSIGNS | liveness.UPDATES
_ELEMENTWISE = frozenset(
    "Abs Add AddN AddV2 Cast Div DivNoNan Equal Exp Expm1 Greater GreaterEqual Identity Inv IsFinite Less LessEqual "
    "Log Log1p LogicalAnd LogicalNot LogicalOr Maximum Minimum Mul MulNoNan Neg NotEqual OnesLike Pow RealDiv "
    "Reciprocal Relu Rsqrt Select SelectV2 Sigmoid Sign Softplus Sqrt Square SquaredDifference Sub Tanh Xdivy "
    "ZerosLike".split()
)
_GATHERED = ("float16", "float32", "float64", "int32", "int64")
"""Types that TensorFlow's gathering collective takes."""


def length(value: ir.Value) -> int:
    """How many elements a value has."""
    return math.prod(size or 0 for size in value.shape or ())


def part_length(value: ir.Value, workers: int) -> int:
    """Elements of each worker's part of a value; the last parts may be padded."""
    return -(-length(value) // workers)


def workers(graph: ir.Graph) -> int:
    """How many workers sum gradients in the step."""
    counts: list[Any] = [dict(node.attrs).get("workers", 1) for node in graph.nodes if node.op == ir.ALL_REDUCE]
    return max(counts, default=1)


def region(graph: ir.Graph, variables: Collection[str]) -> frozenset[str]:
    """Names of the nodes that compute on parts if these variables are divided, their reads and updates included.

    Known weakness: a value that a part is combined with has to be of the variable's shape, or a scalar.
    """
    nodes = _forward(graph, variables, {}, set())
    waited, kept = liveness.waited_for(graph), {*graph.outputs}
    for node in reversed(graph.nodes):
        readers = graph.consumers.get(node.name, ())
        is_free = node.name not in nodes and node.name not in waited and node.name not in kept
        is_alike = _is_elementwise(graph, node) and not _is_scalar(node.outputs[0])
        if is_free and is_alike and readers and nodes.issuperset(readers):
            nodes.add(node.name)
    return frozenset(nodes)


def divisible(graph: ir.Graph, candidates: Collection[str]) -> tuple[str, ...]:
    """Which of the variables can be divided, of more than 64 KiB, for which no more is gathered than they take.

    Args:
        graph: The step.
        candidates: Variables that are equal on all workers, and that nothing but training steps reads: an optimizer's.
    """
    known, updated = values(graph), updates(graph)
    found = {
        name
        for name in updated & known.keys() & set(candidates)
        if known[name].nbytes > SMALL_BYTES and known[name].is_resolved and _is_plain(graph, name)
    }
    while True:
        divided, whole = dict[str, frozenset[str]](), set[str]()
        _forward(graph, found, divided, whole)
        declined = _declined(graph, known, divided, whole)
        if not declined:
            return tuple(name for name in known if name in found)
        found -= declined


def _declined(
    graph: ir.Graph, known: Mapping[str, ir.Value], divided: Mapping[str, frozenset[str]], whole: Collection[str]
) -> set[str]:
    """Of the variables that the divided values come of those that had better stay whole."""
    read_whole = {
        name for ref in whole for name in divided[ref] if graph.by_name[ir.producer(ref)].op == "ReadVariableOp"
    }
    if read_whole:
        return read_whole
    odd = {name for ref in whole if graph.value(ref).dtype not in _GATHERED for name in divided[ref]}
    if odd:
        return odd
    groups: list[tuple[set[str], int]] = []  # variables that meet, and the bytes that are gathered of them
    for reference in sorted(whole):
        together, nbytes = set(divided[reference]), graph.value(reference).nbytes
        for group in [group for group in groups if not together.isdisjoint(group[0])]:
            groups.remove(group)
            together, nbytes = together | group[0], nbytes + group[1]
        groups.append((together, nbytes))
    costly = [group for group, nbytes in groups if nbytes > sum(known[name].nbytes for name in group)]
    return set().union(*costly)


def _forward(
    graph: ir.Graph, variables: Collection[str], divided: dict[str, frozenset[str]], whole: set[str]
) -> set[str]:
    """Finds the nodes that depend on parts.

    Args:
        graph: The step.
        variables: What is divided.
        divided: Gets the values that are, with the variables that each comes of.
        whole: Gets those of them that others need whole.
    """
    nodes: set[str] = set()
    for node in graph.nodes:
        parts = [reference for reference in node.inputs if reference in divided]
        if node.inputs and node.inputs[0] in variables:
            nodes.add(node.name)
            if node.op == "ReadVariableOp":
                divided[node.name] = frozenset({node.inputs[0]})
        elif parts and _is_elementwise(graph, node):
            nodes.add(node.name)
            divided[node.name] = frozenset().union(*(divided[reference] for reference in parts))
        else:
            whole.update(parts)
    whole.update(divided.keys() & set(graph.outputs))
    return nodes


def _is_elementwise(graph: ir.Graph, node: ir.Node) -> bool:
    """Whether an element of its one output hangs on the same element of each input, or on scalars."""
    if node.op not in _ELEMENTWISE or node.stateful or len(node.outputs) != 1:
        return False
    shape = node.outputs[0].shape
    given = map(graph.value, node.inputs)
    return node.outputs[0].is_resolved and all(value.shape == shape or _is_scalar(value) for value in given)


def _is_scalar(value: ir.Value) -> bool:
    return value.shape == ()


def _is_plain(graph: ir.Graph, variable: str) -> bool:
    """Whether the variable is only read whole and updated."""
    users = [graph.by_name[name] for name in graph.consumers.get(variable, ())]
    return all((user.op in _WRITES or user.op == "ReadVariableOp") and user.inputs[0] == variable for user in users)
