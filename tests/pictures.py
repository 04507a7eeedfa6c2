"""A step of a few nodes to draw: with a swap, a recompute and candidates that were declined."""

from __future__ import annotations

import dataclasses
from typing import Any

import testing

from graphswap import ir, simulator
from graphswap.cost_model import Link
from graphswap.picture import CurvePoint, Picture
from graphswap.plan import Declined, Plan, Recompute, Swap

MIB = 1 << 20
COSTS = testing.seconds_per_node(1e-3, Link(1e9, 1e9, 1e-4, overlaps=True))
CURVE = (CurvePoint(5 * MIB, 0.014, None), CurvePoint(7 * MIB, 0.011, 0.012), CurvePoint(9 * MIB, 0.0105, 0.0105))
MEASURED = ((0.0, 2 * MIB), (0.004, 5 * MIB), (0.010, 3 * MIB))


def picture(**changes: Any) -> Picture:
    """The chain of four layers: f1 leaves and comes back, f3 is made twice."""
    graph = testing.chain(4)
    swap = Swap("f1", "f2", freed_before="f3", in_after="b3", in_before="b1", reason="idle for long")
    plan = Plan(
        decisions=(Recompute(("f3",), before="b3", reason="cheap to make"), swap),
        declined=(Declined("f2", "its copy would come back too late"), Declined("x", "is in memory all the time")),
        strategy="joint",
    )
    return Picture("a chain", **{**simulated(graph, plan), "facts": {"device": "none"}, "curve": CURVE, **changes})


def simulated(graph: ir.Graph, plan: Plan) -> dict[str, Any]:
    """The graph, the plan, a budget and both timelines, as a picture has them."""
    return {
        "graph": graph,
        "plan": plan.check(graph),
        "memory_budget": 7 * MIB,
        "plain": simulator.simulate(graph, Plan(), COSTS),
        "planned": simulator.simulate(graph, plan, COSTS),
    }


def renamed(graph: ir.Graph, names: dict[str, str]) -> ir.Graph:
    """The graph with other names of some nodes."""
    nodes = (
        dataclasses.replace(
            node, name=names.get(node.name, node.name), inputs=tuple(names.get(ref, ref) for ref in node.inputs)
        )
        for node in graph.nodes
    )
    return ir.verify(graph.replace(nodes=tuple(nodes)))
