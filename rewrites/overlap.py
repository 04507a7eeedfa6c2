"""Lets copies of variables run beside compute, from where the plan says, instead of where they stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from graphswap import ir
from graphswap.plan import Plan
from graphswap.rewrites.ordering import floats
from graphswap.rewrites.swap import anchors, runs_before


def overlap(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with the plan's `Prefetch` and `WriteBack` decisions carried out.

    A FETCH that starts ahead stands behind the copies that start after the same node, and runs after that one. A STORE
    that is written back stays, and the node that the plan names waits for it. Neither is in the way of others: what
    would have been gone before it ran, the next node waits for; copies that would have started right after it start
    after the node before it. A run that nobody reads is not there any more.
    """
    if not (plan.prefetches or plan.write_backs):
        return graph
    starts = {(decision.node, decision.before): decision.after for decision in plan.prefetches}
    places = {run: place for place, run in enumerate(starts)}
    stores = {decision.node for decision in plan.write_backs}
    fences: dict[str, list[str]] = {}  # node -> what is written back by then
    for decision in plan.write_backs:
        fences.setdefault(decision.freed_before, []).append(decision.node)
    anchor_of = anchors(graph)
    starting_after: dict[str, list[tuple[int, ir.Node]]] = {}  # a node -> FETCHes, each with its decision's place
    ahead: set[str] = set()
    for node in graph.nodes:
        run = node.like or node.name, anchor_of[node.name]
        if run in starts:
            starting_after.setdefault(starts[run], []).append((places[run], node))
            ahead.add(node.name)

    nodes: list[ir.Node] = []
    starting: list[ir.Node] = []
    previous = ""  # the last node that others may wait for: no copy beside compute
    stood_after: dict[str, str] = {}  # what runs beside compute now -> the node before its place
    handed_on: tuple[str, ...] = ()
    for node in graph.nodes:
        if node.op not in (ir.SWAP_OUT, ir.SWAP_IN):
            nodes += (_started(graph, fetch, runs_before(graph, previous)) for fetch in starting)
            starting = []
        if node.name in ahead or node.name in stores:
            handed_on += tuple(name for name in node.control_inputs if _is_copy_out(graph, name))
            handed_on += tuple(fences.get(node.name, ()))
            stood_after[node.name] = runs_before(graph, previous)
        if node.name in stores:
            nodes.append(_started(graph, node, stood_after[node.name]))
        elif floats(node):
            nodes.append(_waiting(node, (stood_after.get(name, name) for name in node.control_inputs)))
        elif node.name not in ahead:
            # What a repeat has to do with the node before it, or that one with a repeat, is their order alone.
            passed = {
                name for name in stood_after.keys() & {*node.control_inputs} if node.like or graph.by_name[name].like
            }
            kept = (name for name in node.control_inputs if name not in passed)
            fenced = fences.get(node.name, ()) if not node.like else ()
            nodes.append(_waiting(node, (*kept, *handed_on, *fenced)))
            previous, handed_on = node.name, ()
        starting += [fetch for _, fetch in sorted(starting_after.get(node.name, ()), key=lambda entry: entry[0])]
    return graph.replace(nodes=tuple(nodes))


def _started(graph: ir.Graph, node: ir.Node, previous: str) -> ir.Node:
    """A FETCH or STORE that starts after a node and beside the next ones.

    Not earlier: a STORE may not come before what fetches the old value once more.
    """
    kept = [] if node.like else [name for name in node.control_inputs if not _is_copy_out(graph, name)]
    added = "" if previous in kept else previous
    attrs = tuple(sorted((*node.attrs, (ir.OVERLAPS, added))))
    return _waiting(dataclasses.replace(node, attrs=attrs), (*kept, previous))


def _waiting(node: ir.Node, names: Iterable[str]) -> ir.Node:
    """The node, waiting for other nodes."""
    controls = tuple(dict.fromkeys(names))
    return node if controls == node.control_inputs else dataclasses.replace(node, control_inputs=controls)


def _is_copy_out(graph: ir.Graph, name: str) -> bool:
    return graph.by_name[name].op == ir.SWAP_OUT
