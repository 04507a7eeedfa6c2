"""The sums over all replicas in a step that TensorFlow has packed: reshaped, concatenated, reduced, split."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from graphswap import ir, liveness
from graphswap.plan import Exchange


class Packed(NamedTuple):
    """A sum over all replicas.

    Attributes:
        name: Of the node that sums.
        values: References to what is summed at once, in order.
        join: Name of the node that concatenates these; "" if it is one value.
        parts: Name of the node that splits the sum; "" if there is none.
    """

    name: str
    values: tuple[str, ...]
    join: str
    parts: str


def packed(graph: ir.Graph) -> tuple[Packed, ...]:
    """The sums of gradients, in the graph's order: their results lead to updates of variables and to no further sum."""
    updates = [node for node in graph.nodes if node.op in liveness.ASSIGNS | liveness.UPDATES or node.op == ir.STORE]
    updating = _needed_for(graph, updates)
    summed = _needed_for(graph, [node for node in graph.nodes if node.op == ir.ALL_REDUCE])
    found = []
    for node in graph.nodes:
        if node.op != ir.ALL_REDUCE or node.name not in updating - summed or "workers" not in dict(node.attrs):
            continue
        join, readers = graph.by_name[ir.producer(node.inputs[0])], graph.consumers.get(node.name, ())
        parts = graph.by_name[readers[0]] if len(readers) == 1 else None
        is_joined = join.op == "ConcatV2" and graph.consumers[join.name] == (node.name,)
        is_split = parts is not None and parts.op == "SplitV" and parts.inputs[0] == node.name
        if is_joined and is_split and len(parts.outputs) == len(join.inputs) - 1 == len(set(join.inputs[:-1])):
            values = join.inputs[:-1]
            if [graph.value(value) for value in values] == [*parts.outputs] and node.name not in graph.outputs:
                found.append(Packed(node.name, values, join.name, parts.name))
        elif not is_joined:
            found.append(Packed(node.name, node.inputs[:1], "", ""))
    return tuple(found)


def exchanges(graph: ir.Graph) -> tuple[Exchange, ...]:
    """The decisions that have made the graph what it is, in order."""
    ahead = {node.inputs[0]: dict(node.attrs)["ahead"] for node in graph.nodes if node.op == ir.AWAIT}
    return tuple(Exchange(values, int(ahead[name])) for name, values in graph.blocks.items())  # pyright: ignore[reportArgumentType]


def _needed_for(graph: ir.Graph, nodes: Iterable[ir.Node]) -> set[str]:
    """Nodes whose results the nodes depend on."""
    found = {ir.producer(reference) for node in nodes for reference in node.inputs}
    for node in reversed(graph.nodes):
        if node.name in found:
            found.update(map(ir.producer, node.inputs))
    return found
