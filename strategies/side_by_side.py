"""Lets neighbours run side by side where one alone leaves cores idle.

A chain of nodes costs a CPU what its kernels wait for: a matrix product that TensorFlow splits over a few
cores finishes when the slowest has, and a batched one does so for every matrix. Two of them at once fill
the gaps. They hold the memory of both at once, so only pairs that the allocator model accepts are kept,
whichever of the two asks first.

Known weaknesses: a product's partner is the next independent one, not the best one; at most two run at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from graphswap import ir
from graphswap.cost_model import CostModel, flops
from graphswap.plan import Plan, PlanError, Recompute, SideBySide
from graphswap.simulator import NoRoom
from graphswap.strategies import gaps

_WINDOW = 30
"""How many nodes ahead a partner may be."""
_LEAST_SECONDS = 0.5e-3
"""Of each node: on shorter ones waking another thread costs more than is won."""
_ATTEMPTS = 32


def pair(graph: ir.Graph, plan: Plan, cost_model: CostModel, memory_budget: int) -> Plan:
    """Returns the plan with as many pairs as fit the budget; the plan itself if none does.

    Args:
        graph: The user's graph.
        plan: A plan that keeps the budget.
        cost_model: Seconds and bytes.
        memory_budget: Bytes.
    """
    ordered = graph.replace(nodes=tuple(graph.by_name[name] for name in plan.order or graph.position))
    pairs = _candidates(ordered, plan, cost_model)
    for _ in range(_ATTEMPTS):
        if not pairs:
            break
        paired = _with(ordered, plan, pairs)
        try:
            timeline = gaps.place(graph, paired.check(graph), cost_model, memory_budget)
        except PlanError:
            break
        except NoRoom as error:
            worst = error.after
        else:
            if timeline.allocated_peak_bytes <= memory_budget:
                return paired
            worst = timeline.peak_step.name
        place = {name: place for place, name in enumerate(paired.order)}
        at_fault = max(pairs, key=lambda found: (place[found[0]] <= place.get(worst, 0) + 1, place[found[0]]))
        pairs.remove(at_fault)
    return plan


def _candidates(graph: ir.Graph, plan: Plan, cost_model: CostModel) -> list[tuple[str, str]]:
    """Pairs of heavy nodes that could run side by side, each with the next one that needs nothing since the first."""
    alone = {name for swap in plan.swaps for name in (swap.out_after, swap.in_after)}  # a copy stands after it
    fixed = {recompute.before for recompute in plan.recomputes} | {swap.in_before for swap in plan.swaps}
    heavy = {
        node.name
        for node in graph.nodes
        if flops(graph, node) and not node.stateful and cost_model.seconds(graph, node) >= _LEAST_SECONDS
    }
    nodes = [node for node in graph.nodes if node.op not in ir.RESIDENT_OPS]
    found: list[tuple[str, str]] = []
    paired: set[str] = set()
    for place, first in enumerate(nodes):
        if first.name not in heavy or first.name in alone or first.name in paired:
            continue
        passed = {first.name}
        for second in nodes[place + 1 : place + 1 + _WINDOW]:
            needs = {*map(ir.producer, second.inputs), *second.control_inputs}
            if second.name in heavy and passed.isdisjoint(needs) and second.name not in fixed | paired:
                found.append((first.name, second.name))
                paired |= {first.name, second.name}
                break
            passed.add(second.name)
    return found


def _with(graph: ir.Graph, plan: Plan, pairs: Sequence[tuple[str, str]]) -> Plan:
    """The plan with every second node of a pair moved up to the first."""
    second_of = dict(pairs)
    moved = set(second_of.values())
    order: list[str] = []
    for node in graph.nodes:
        if node.name not in moved:
            order.append(node.name)
        if node.name in second_of:
            order.append(second_of[node.name])
    place = {name: place for place, name in enumerate(order)}
    decisions = [
        dataclasses.replace(decision, nodes=tuple(sorted(decision.nodes, key=place.__getitem__)))
        if isinstance(decision, Recompute)
        else decision
        for decision in plan.decisions
    ]
    together = (SideBySide(first, second) for first, second in pairs)
    return plan.replace(order=tuple(order), decisions=(*decisions, *together))
