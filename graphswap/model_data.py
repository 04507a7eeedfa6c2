"""Which variables leave the device: as few as the budget asks for, those first that are cheapest to move."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Collection, Sequence

from graphswap import ir, liveness, rewrites, simulator, strategies
from graphswap.cost_model import CostModel
from graphswap.plan import Place, Plan
from graphswap.rewrites.place import unplaceable, values
from graphswap.strategies.base import InfeasibleBudgetError

SMALL_BYTES = 64 << 10
"""Variables up to this size stay on the device: moving them costs more than it frees."""
_PARTS = 8
"""In how many steps the share of variables that leave is tried."""
_GAIN = 0.97
"""A plan with more variables away is taken if it makes the step no longer than this share of it."""


def choose(
    graph: ir.Graph,
    cost_model: CostModel,
    memory_budget: int,
    movable: Collection[str],
    fixed: Sequence[Place] = (),
) -> tuple[Place, ...]:
    """Chooses the variables that leave the device.

    They are tried in the order of what moving a byte costs: a slot of an optimizer is fetched once and stored once, a
    weight is fetched for each pass. Of a few shares of all their bytes that is taken which a greedy plan of the
    activations makes fastest; so the two compete for the same budget. If no plan keeps it, all leave.

    Known weaknesses: variables leave in one order; a variable leaves for the whole step.

    Args:
        graph: The step, all variables on the device.
        cost_model: Its costs.
        memory_budget: Bytes.
        movable: Names of variables that may leave.
        fixed: What has left already.
    """
    gone = {place.variable for place in fixed}
    order = [variable for variable in _by_price(graph, movable) if variable not in gone]
    known = values(graph)
    total = list(itertools.accumulate((known[variable].nbytes for variable in order), initial=0))
    counts = sorted({bisect.bisect_left(total, total[-1] * part / _PARTS) for part in range(_PARTS + 1)})

    def places(count: int) -> tuple[Place, ...]:
        return (*fixed, *(Place(variable, cost_model.far_tier) for variable in order[:count]))

    @functools.cache
    def seconds(count: int) -> float:
        placed = rewrites.place(graph, Plan(decisions=places(count)))
        try:
            plan = strategies.Greedy(planning_seconds=0.0).plan(placed, cost_model, memory_budget)
        except InfeasibleBudgetError:
            return math.inf
        return simulator.simulate(placed, plan, cost_model).seconds

    best = counts[-1]
    for count in reversed(counts[:-1]):
        if math.isinf(seconds(count)):
            break
        if seconds(count) * _GAIN <= seconds(best):
            best = count
    return places(best)


def _by_price(graph: ir.Graph, movable: Collection[str]) -> list[str]:
    """The variables worth moving, by how often a byte of theirs would travel, the largest first."""
    known, declined = values(graph), unplaceable(graph)
    trips: dict[str, int] = dict.fromkeys(known, 0)
    heavy = _products(graph)
    for node in graph.nodes:
        variable = node.inputs[0] if node.inputs else ""
        if variable not in known:
            continue
        if node.op in liveness.ASSIGNS | liveness.UPDATES:
            trips[variable] += 1
        for reader in graph.consumers.get(node.name, ()) if node.op == "ReadVariableOp" else ():
            trips[variable] += reader in heavy
    fit = [v for v, value in known.items() if v in movable and v not in declined and value.nbytes > SMALL_BYTES]
    return sorted(fit, key=lambda variable: (trips[variable], -known[variable].nbytes))


def _products(graph: ir.Graph) -> Collection[str]:
    """Nodes that compute with weights: each may have to fetch them anew."""
    return {node.name for node in graph.nodes if "MatMul" in node.op or "Conv" in node.op or node.op == "Einsum"}
