"""Puts the nodes into the plan's order."""

from __future__ import annotations

from graphswap import ir
from graphswap.plan import Plan


def schedule(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with its nodes in `plan.order`."""
    if not plan.order:
        return graph
    return graph.replace(nodes=tuple(graph.by_name[name] for name in plan.order))
