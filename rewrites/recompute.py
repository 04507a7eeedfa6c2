"""Repeats nodes before a late consumer, so that what they made need not be kept until then."""

from __future__ import annotations

import dataclasses

from graphswap import ir
from graphswap.plan import Plan


def recompute(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with the plan's `Recompute` decisions carried out.

    Every repeated node runs after the node that stands before it, so it can't be merged with the first
    one or run early.

    Raises:
        ir.GraphError: If a stateful node is to be repeated.
    """
    repeats: dict[str, list[str]] = {}
    for decision in plan.recomputes:
        repeats.setdefault(decision.before, []).extend(decision.nodes)
    if not repeats:
        return graph
    taken = set(graph.by_name)
    origins = ir.origin(graph)
    current: dict[str, str] = {}
    nodes: list[ir.Node] = []

    def copy_of(original: ir.Node) -> ir.Node:
        if original.stateful:
            raise ir.GraphError(f"node '{original.name}' ({original.op}) is stateful and must not run twice.")
        return dataclasses.replace(
            original,
            name=ir.fresh_name(f"{original.name}/recompute", taken),
            inputs=tuple(current.get(origins[r], r) for r in original.inputs),
            control_inputs=(nodes[-1].name,),
            like=original.like or original.name,
        )

    for node in graph.nodes:
        for name in repeats.get(node.name, ()):
            original = graph.by_name[name]
            repeated = copy_of(original)
            nodes.append(repeated)
            current.update(zip(original.refs(), repeated.refs(), strict=True))
        inputs = tuple(current.get(origins[r], r) for r in node.inputs)
        nodes.append(node if inputs == node.inputs else dataclasses.replace(node, inputs=inputs))
    return graph.replace(nodes=tuple(nodes))
