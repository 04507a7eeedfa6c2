"""The sums over all replicas in a step that TensorFlow has packed: reshaped, concatenated, reduced, split."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

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
    """The sums of gradients, in the graph's order.

    Their results lead to updates of variables, and neither by data nor through a variable to a further sum.
    """
    updates = [
        node
        for node in graph.nodes
        if node.op in liveness.ASSIGNS | liveness.UPDATES or node.op in (ir.STORE, ir.UPDATE)
    ]
    updating = _needed_for(graph, updates)
    summed = _needed_for(graph, [node for node in graph.nodes if node.op == ir.ALL_REDUCE], waits=True)
    found: list[Packed] = []
    for node in graph.nodes:
        workers: Any = dict(node.attrs).get("workers", 1)
        if node.op != ir.ALL_REDUCE or node.name not in updating - summed or workers == 1:
            continue
        join = graph.by_name[ir.producer(node.inputs[0])]
        if join.op == "ConcatV2" and graph.consumers[join.name] == (node.name,) and node.name not in graph.outputs:
            found += _split_again(graph, node.name, join)
        else:
            found.append(Packed(node.name, node.inputs[:1], "", ""))
    owner = {value: one for one in reversed(found) for value in one.values}  # of what is summed twice the first sum
    return tuple(one for one in found if all(owner[value] is one for value in one.values))


def exchanges(graph: ir.Graph) -> tuple[Exchange, ...]:
    """The decisions that have made the graph what it is, in order."""
    ahead: dict[str, Any] = {n.inputs[0]: dict(n.attrs)["ahead"] for n in graph.nodes if n.op == ir.AWAIT}
    return tuple(Exchange(values, ahead[name]) for name, values in graph.blocks.items())


def _split_again(graph: ir.Graph, name: str, join: ir.Node) -> list[Packed]:
    """The sum of what a node joins, if one node splits it into the same values again and no other reads it."""
    readers, values = graph.consumers.get(name, ()), join.inputs[:-1]
    parts = graph.by_name[readers[0]] if len(readers) == 1 else join
    if parts.op != "SplitV" or parts.inputs[0] != name or len(set(values)) < len(values):
        return []
    is_same = [graph.value(value) for value in values] == [*parts.outputs]
    return [Packed(name, values, join.name, parts.name)] if is_same else []


def instance_key(what: str, first: int, taken: set[int]) -> int:
    """A key under which workers meet in a collective: the same for the same content, on all of them.

    Args:
        what: The content, and nothing that differs between workers or traces.
        first: The lowest key, and how many there are.
        taken: Keys of the step so far, which this one is none of; gets it.
    """
    start = int.from_bytes(hashlib.sha256(what.encode()).digest()[:4])
    key = next(key for number in itertools.count(start) if (key := first + number % first) not in taken)
    taken.add(key)
    return key


def _needed_for(graph: ir.Graph, nodes: Iterable[ir.Node], waits: bool = False) -> set[str]:
    """Nodes whose results the nodes depend on; with those that they wait for, but where sums only wait their turn."""
    found = {ir.producer(reference) for node in nodes for reference in node.inputs}
    for node in reversed(graph.nodes):
        if node.name in found:
            found.update(map(ir.producer, node.inputs))
            if waits and node.op != ir.ALL_REDUCE:
                found.update(node.control_inputs)
    return found
