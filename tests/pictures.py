"""A step of a few nodes to draw: with a swap, a recompute and candidates that were declined."""

from __future__ import annotations

import dataclasses
from typing import Any

import testing

from graphswap import ir, parser, simulator
from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile
from graphswap.picture import CurvePoint, Picture
from graphswap.plan import Declined, Plan, Prefetch, Recompute, Swap, WriteBack

MIB = 1 << 20
LINK = Link(1e9, 1e9, 1e-4, overlaps=True)
COSTS = CostModel(DeviceSpec(launch_seconds=1e-3, links={"host": LINK, "disk": LINK, "ps": LINK}), Profile("", {}, {}))
CURVE = (CurvePoint(5 * MIB, 0.014, None), CurvePoint(7 * MIB, 0.011, 0.012), CurvePoint(9 * MIB, 0.0105, 0.0105))
MEASURED = ((0.0, 2 * MIB), (0.004, 5 * MIB), (0.010, 3 * MIB))


FAR = parser.parse("""
graph far(%x) -> (%loss) after(%store) {
  %w = Placeholder() : (resource[])
  %x = Placeholder() : (float32[512,512])
  %a = MatMul(%x, %x) : (float32[512,512])
  %b = MatMul(%a, %a) : (float32[512,512])
  %fetch = Fetch(%w) {"tier": "ps"} : (float32[512,512])
  %y = MatMul(%b, %fetch) : (float32[512,512])
  %new = MatMul(%y, %fetch) : (float32[512,512])
  %store = Store!(%new) {"tier": "ps", "value": "gradient"} : ()
  %loss = MatMul(%y, %y) : (float32[512,512])
}
""")
"""A worker's part of a step whose weight a parameter server has."""
COPIED = Plan(decisions=(Prefetch("fetch", "a", "fetch"), WriteBack("store")))
"""Its fetch and its store run beside compute."""


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
