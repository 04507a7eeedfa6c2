"""Lets neighbours run side by side where one alone leaves cores idle.

A chain of nodes costs a CPU what its kernels wait for: a matrix product that TensorFlow splits over a few
cores finishes when the slowest has, and a batched one does so for every matrix. Two of them at once fill
the gaps. They hold the memory of both at once, so only pairs that the allocator model accepts are kept,
whichever of the two asks first.

Known weaknesses: a product's partner is the next independent one, not the best one; at most two run at once.
Of the 2^n ways in which n pairs may ask for memory only a few are tried (`gaps.placements`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from graphswap import ir
from graphswap.cost_model import CostModel, flops
from graphswap.plan import Decision, Plan, PlanError, Prefetch, Recompute, SideBySide, Swap, WriteBack
from graphswap.simulator import NoRoom
from graphswap.strategies import gaps

_WINDOW = 60
"""How many nodes ahead a partner may be."""
_LEAST_SECONDS = 0.5e-3
"""Of each node: on shorter ones waking another thread costs more than is won."""
_REMOVALS = 5
_ATTEMPTS = 24
_LEAST_GROUP = 6
"""A smaller group that does not fit is given up whole: trying its parts takes longer than it wins."""
_SPREAD = 0.004
"""Of the budget: how much the peak may depend on who asks for memory first, so that all runs have the same."""


def pair(
    graph: ir.Graph, plan: Plan, cost_model: CostModel, memory_budget: int, planning_seconds: float = math.inf
) -> Plan:
    """Returns the plan with as many pairs as fit the budget; the plan itself if none does, or if time runs out.

    Args:
        graph: The user's graph.
        plan: A plan that keeps the budget.
        cost_model: Seconds and bytes.
        memory_budget: Bytes.
        planning_seconds: When to give up.
    """
    deadline = time.monotonic() + planning_seconds
    nodes = [graph.by_name[name] for name in plan.order or graph.position]
    nodes.sort(key=lambda node: node.op not in ir.RESIDENT_OPS)  # what is there all the time is in nobody's way
    ordered = graph.replace(nodes=tuple(nodes))
    pairs: list[_Pair] = []
    for candidate in _candidates(ordered, cost_model):
        try:
            _with(ordered, plan, [*pairs, candidate]).check(graph)
        except PlanError:  # what stands between the two can't move
            continue
        pairs.append(candidate)
    for _ in range(_REMOVALS):
        if not pairs:
            return plan
        paired = _with(ordered, plan, pairs)
        fault = _fault(graph, paired, cost_model, memory_budget)
        if fault is None:
            return paired
        place = {name: place for place, name in enumerate(paired.order)}
        before = [found for found in pairs if place[found.first] <= place.get(fault, -1) + 1]
        if not before:
            break
        pairs.remove(max(before, key=lambda found: place[found.first]))
    best, accepted, groups = plan, [], [pairs]
    for _ in range(_ATTEMPTS):
        if not any(groups) or time.monotonic() > deadline:
            break
        group, *groups = groups
        paired = _with(ordered, plan, [*accepted, *group])
        if _fault(graph, paired, cost_model, memory_budget) is None:
            best, accepted = paired, [*accepted, *group]
        elif len(group) >= _LEAST_GROUP:
            half = len(group) // 2
            groups = [group[:half], group[half:], *groups]
    return best


def _fault(graph: ir.Graph, plan: Plan, cost_model: CostModel, memory_budget: int) -> str | None:
    """None if the plan keeps the budget, with one peak whoever asks for memory first; else a node near the fault."""
    try:
        plan.check(graph)
        runs = gaps.placements(graph, plan, cost_model, memory_budget)
        alone = gaps.placements(graph, plan.one_by_one(), cost_model, memory_budget)  # should one be over too soon
    except PlanError:
        return ""
    except NoRoom as error:
        return error.after
    peaks = [[timeline.allocated_peak_bytes for timeline in run] for run in runs]
    spread = max(max(run) - min(run) for run in peaks)
    highest = max(itertools.chain(*runs, *alone), key=lambda timeline: timeline.allocated_peak_bytes)
    if highest.allocated_peak_bytes <= memory_budget and spread <= _SPREAD * memory_budget:
        return None
    return highest.peak_step.name


class _Pair(NamedTuple):
    first: str
    second: str
    between: tuple[str, ...]  # what the second needs of what stands between the two


def _candidates(graph: ir.Graph, cost_model: CostModel) -> Iterator[_Pair]:
    """Pairs of heavy nodes that could run side by side: each with the next one that does not need it."""
    heavy = {
        node.name
        for node in graph.nodes
        if flops(graph, node) and not node.stateful and cost_model.seconds(graph, node) >= _LEAST_SECONDS
    }
    nodes = [node for node in graph.nodes if node.op not in ir.RESIDENT_OPS]
    paired: set[str] = set()
    for place, first in enumerate(nodes):
        if first.name not in heavy or first.name in paired:
            continue
        passed: dict[str, set[str]] = {first.name: {first.name}}  # node -> what it needs from the first on, and itself
        for second in nodes[place + 1 : place + 1 + _WINDOW]:
            before = {*map(ir.producer, second.inputs), *second.control_inputs}
            needs = set().union(*(passed[name] for name in before if name in passed))
            can_move = needs.isdisjoint(heavy) and not any(graph.by_name[name].stateful for name in needs)
            if second.name in heavy and second.name not in paired and can_move:
                yield _Pair(first.name, second.name, tuple(sorted(needs, key=graph.position.__getitem__)))
                paired |= {first.name, second.name}
                break
            passed[second.name] = needs | {second.name}


def _with(graph: ir.Graph, plan: Plan, pairs: Sequence[_Pair]) -> Plan:
    """The plan with every second node of a pair moved up to the first, and what it needs right before that."""
    by_first = {found.first: found for found in pairs}
    moved = {name for found in pairs for name in (found.second, *found.between)}
    order: dict[str, None] = {}
    for node in graph.nodes:
        found = by_first.get(node.name)
        if found is not None:
            order |= dict.fromkeys((*found.between, found.first, found.second))
        elif node.name not in moved:
            order[node.name] = None
    names = tuple(order)
    place = {name: place for place, name in enumerate(names)}
    first_of, second_of = {p.second: p.first for p in pairs}, {p.first: p.second for p in pairs}
    decisions: list[Decision] = []
    for decision in plan.decisions:
        if isinstance(decision, Recompute):
            nodes = tuple(sorted(decision.nodes, key=place.__getitem__))
            decision = dataclasses.replace(decision, nodes=nodes, before=first_of.get(decision.before, decision.before))
        elif isinstance(decision, Swap):
            out = second_of.get(decision.out_after, decision.out_after)
            use = first_of.get(decision.in_before, decision.in_before)
            start = names[place[decision.in_after] - (decision.in_after in second_of)]
            decision = dataclasses.replace(
                decision,
                out_after=out,
                freed_before=max(
                    decision.freed_before, names[min(place[out] + 1, len(names) - 1)], key=place.__getitem__
                ),
                in_after=min(start, names[place[use] - 1], key=place.__getitem__),
                in_before=use,
            )
        elif isinstance(decision, Prefetch):
            run = first_of.get(decision.before, decision.before)
            start = names[place[decision.after] - (decision.after in second_of)]
            decision = dataclasses.replace(
                decision, before=run, after=min(start, names[place[run] - 1], key=place.__getitem__)
            )
        elif isinstance(decision, WriteBack) and decision.freed_before:
            after = names[min(place[decision.node] + 1, len(names) - 1)]
            decision = dataclasses.replace(
                decision, freed_before=max(decision.freed_before, after, key=place.__getitem__)
            )
        decisions.append(decision)
    together = (SideBySide(found.first, found.second) for found in pairs)
    # The bound holds for the order that it was worked out for.
    return plan.replace(order=names, decisions=(*decisions, *together), certificate=None)
