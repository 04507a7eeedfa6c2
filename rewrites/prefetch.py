"""Moves FETCHes to where the plan has them start, from where they run beside compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from graphswap import ir
from graphswap.plan import Plan
from graphswap.rewrites.ordering import floats
from graphswap.rewrites.swap import anchors, runs_before


def prefetch(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with the plan's `Prefetch` decisions carried out.

    A FETCH that starts ahead stands behind the copies that start after the same node, and runs after that one. What
    would have been gone before it ran, the next node waits for; copies that would have started right after it start
    after the node before it. A run that nobody reads is not there any more.
    """
    if not plan.prefetches:
        return graph
    starts = {(decision.node, decision.before): decision.after for decision in plan.prefetches}
    places = {run: place for place, run in enumerate(starts)}
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
    stood_after: dict[str, str] = {}  # first run of a FETCH that starts ahead -> the node before its place
    handed_on: tuple[str, ...] = ()
    for node in graph.nodes:
        if node.op not in (ir.SWAP_OUT, ir.SWAP_IN):
            nodes += (_started(graph, fetch, runs_before(graph, previous)) for fetch in starting)
            starting = []
        if node.name in ahead:
            handed_on += tuple(name for name in node.control_inputs if _is_copy_out(graph, name))
            stood_after[node.name] = runs_before(graph, previous)
        elif floats(node):
            nodes.append(_waiting(node, (stood_after.get(name, name) for name in node.control_inputs)))
        else:
            repeats = {name for name in ahead.intersection(node.control_inputs) if graph.by_name[name].like}
            nodes.append(_waiting(node, (*(n for n in node.control_inputs if n not in repeats), *handed_on)))
            previous, handed_on = node.name, ()
        starting += [fetch for _, fetch in sorted(starting_after.get(node.name, ()), key=lambda entry: entry[0])]
    return graph.replace(nodes=tuple(nodes))


def _started(graph: ir.Graph, fetch: ir.Node, previous: str) -> ir.Node:
    """A FETCH that starts after a node and beside the next ones."""
    kept = () if fetch.like else (name for name in fetch.control_inputs if not _is_copy_out(graph, name))
    attrs = tuple(sorted((*fetch.attrs, (ir.IS_AHEAD, True))))
    return _waiting(dataclasses.replace(fetch, attrs=attrs), (*kept, previous))


def _waiting(node: ir.Node, names: Iterable[str]) -> ir.Node:
    """The node, waiting for other nodes."""
    controls = tuple(dict.fromkeys(names))
    return node if controls == node.control_inputs else dataclasses.replace(node, control_inputs=controls)


def _is_copy_out(graph: ir.Graph, name: str) -> bool:
    return graph.by_name[name].op == ir.SWAP_OUT
