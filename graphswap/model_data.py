"""Which variables leave the device: as few as the budget asks for, those first that are cheapest to move."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import time
from collections.abc import Collection, Sequence

from graphswap import ir, rewrites, simulator, strategies
from graphswap.cost_model import CostModel
from graphswap.plan import Place, Plan
from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.variables import values, worth_moving

_PARTS = 8
"""In how many steps the share of variables that leave is tried."""
_GAIN = 0.97
"""A plan with more variables on the device is taken unless it makes the step longer by more than the rest."""
_EASY = 0.9
"""A step whose buffers take no more of the budget is left alone."""


def choose(
    graph: ir.Graph,
    cost_model: CostModel,
    memory_budget: int,
    movable: Collection[str],
    fixed: Sequence[Place] = (),
    planning_seconds: float = math.inf,
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
        planning_seconds: When to stop looking for a better choice.
    """
    gone = {place.variable for place in fixed}
    order = [variable for variable in worth_moving(graph, movable) if variable not in gone]
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

    as_it_is = rewrites.place(graph, Plan(decisions=places(0)))
    if simulator.simulate(as_it_is, Plan(), cost_model).peak_bytes <= memory_budget * _EASY:
        return places(0)
    stop = time.monotonic() + planning_seconds
    best = counts[-1]
    for count in reversed(counts[:-1]):
        if time.monotonic() > stop or math.isinf(seconds(count)):
            break
        if seconds(count) * _GAIN <= seconds(best):
            best = count
    return places(best)
