"""Takes out nodes that nobody reads any more: where all readers take the repeated value, one run is enough."""

from __future__ import annotations

import collections
import dataclasses

from graphswap import ir, liveness
from graphswap.plan import Plan
from graphswap.rewrites.ordering import floats, leaves


def prune(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph less the runs, first or repeated, of nodes of `Recompute` decisions that nobody reads,
    and less their anchors.

    TensorFlow would not run them either. What such a node waited for, the next node waits for; what waited
    for it, waits for the node before it.
    """
    users = [_as_it_was(node) for node in graph.nodes if not node.like and node.op not in (ir.SWAP_OUT, ir.SWAP_IN)]
    must_run = liveness.waited_for(graph.replace(nodes=tuple(users)))
    repeated = {name for decision in plan.recomputes for name in decision.nodes} - must_run
    readers = collections.Counter(graph.outputs)
    for node in graph.nodes:
        readers.update(node.inputs)
    unread = set()
    for node in reversed(graph.nodes):
        if (node.op == ir.ANCHOR or (node.like or node.name) in repeated) and not any(map(readers.get, node.refs())):
            unread.add(node.name)
            readers.subtract(node.inputs)
    return _without(graph, unread) if unread else graph


def _without(graph: ir.Graph, unread: set[str]) -> ir.Graph:
    nodes: list[ir.Node] = []
    stand_in: dict[str, tuple[str, ...]] = {}  # a node that is gone -> what to wait for in its place
    handed_on: tuple[str, ...] = ()
    for node in graph.nodes:
        waits = [name for wait in node.control_inputs for name in stand_in.get(wait, (wait,))]
        if node.name in unread:
            copies = (name for name in node.control_inputs if _is_copy(graph.by_name[name]))
            handed_on += tuple(name for name in copies if leaves(graph.by_name[name]))
            before = next((other.name for other in reversed(nodes) if not _is_copy(other)), None)
            stand_in[node.name] = () if before is None else (before,)
            continue
        if not _is_copy(node):
            waits, handed_on = [*handed_on, *waits], ()
        controls = tuple(dict.fromkeys(waits))
        nodes.append(node if controls == node.control_inputs else dataclasses.replace(node, control_inputs=controls))
    return graph.replace(nodes=tuple(nodes))


def _as_it_was(node: ir.Node) -> ir.Node:
    """The node without what it waits for only so as not to start earlier."""
    added = dict(node.attrs).get(ir.OVERLAPS)
    return dataclasses.replace(node, control_inputs=tuple(name for name in node.control_inputs if name != added))


def _is_copy(node: ir.Node) -> bool:
    return node.op in (ir.SWAP_OUT, ir.SWAP_IN) or floats(node)
