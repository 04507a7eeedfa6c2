"""Which variables leave the device: as few as the budget asks for, those first that are cheapest to move."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import time
from collections.abc import Collection, Sequence

from graphswap import ir, rewrites, simulator, strategies
from graphswap.cost_model import CostModel, Link
from graphswap.plan import Place, Plan
from graphswap.strategies import budgets, gaps
from graphswap.strategies.base import InfeasibleBudgetError, Placing, Strategy
from graphswap.variables import trips, values, worth_moving

_PARTS = 256
"""How finely the share of variables that leave is chosen."""
_SEGMENTS = (16, 8)
"""For greedy plans: a share that fits by neither is taken not to fit."""
_EASY = 0.9
"""A step whose buffers take no more of the budget is left alone."""
_NEGLIGIBLE = 0.005
"""Of a step: to save less, no further share is tried."""


def choose(
    graph: ir.Graph,
    cost_model: CostModel,
    memory_budget: int,
    strategy: Strategy,
    movable: Collection[str],
    fixed: Sequence[Place] = (),
    planning_seconds: float = math.inf,
) -> tuple[Place, ...]:
    """Chooses the variables that leave the device.

    Unless the strategy has an order of its own, they are tried in the order of what moving a byte costs: a slot of an
    optimizer is fetched once and stored once, a weight is fetched for each pass. Of a few shares of all their bytes
    that is taken which a greedy plan of the activations, or such a strategy's, makes fastest; so the two compete for
    the same budget. If no plan keeps it, all leave.

    The share is looked for by halving: with more away copies take longer, with fewer activations have to go, so that
    time has one valley. A share whose memory bound passes the budget is not planned, and the search ends where hardly
    anything is left to be gained.

    Known weaknesses: variables leave in one order; a variable leaves for the whole step; fewer may be as fast.

    Args:
        graph: The step, all variables on the device.
        cost_model: Its costs.
        memory_budget: Bytes.
        strategy: What will plan the rest.
        movable: Names of variables that may leave.
        fixed: What has left already.
        planning_seconds: When to stop looking for a better choice.
    """
    has_groups = isinstance(strategy, Placing)
    judge = strategy if has_groups else strategies.Greedy(planning_seconds=0.0, segments=_SEGMENTS)
    groups = strategy.groups(graph, movable) if has_groups else _one_by_one(graph, cost_model, movable)
    gone, known, journeys = {place.variable for place in fixed}, values(graph), trips(graph)
    left = [[name for name in group if name not in gone] for group in groups]
    sizes = [sum(known[name].nbytes for name in group) for group in left]
    total = list(itertools.accumulate(sizes, initial=0))
    counts = [bisect.bisect_left(total, total[-1] * part / _PARTS) for part in range(_PARTS + 1)]

    def places(count: int) -> tuple[Place, ...]:
        leaving = itertools.chain.from_iterable(left[:count])
        return (*fixed, *(Place(name, cost_model.far_tier) for name in leaving))

    @functools.cache
    def seconds(count: int) -> float:
        placed = rewrites.place(graph, Plan(decisions=places(count)))
        if budgets.least_peak(gaps.problem(placed, cost_model)).nbytes > memory_budget:
            return math.inf
        try:
            plan = judge.plan(placed, cost_model, memory_budget)
        except InfeasibleBudgetError:
            return math.inf
        return simulator.simulate(placed, plan, cost_model).seconds

    link = cost_model.link(cost_model.far_tier)
    once = [sum(link.in_seconds(known[name].nbytes) for name in group) for group in left]
    travelling = [sum(_travel_seconds(known[name], journeys[name], link) for name in group) for group in left]
    least, most = (list(itertools.accumulate(found, initial=0.0)) for found in (once, travelling))
    as_it_is = simulator.simulate(rewrites.place(graph, Plan(decisions=places(0))), Plan(), cost_model)
    if as_it_is.peak_bytes <= memory_budget * _EASY:
        return places(0)
    stop = time.monotonic() + planning_seconds
    best = reach = _PARTS

    def is_worth(count: int) -> bool:
        """Whether with so many away the step could be noticeably faster: copies cost something, the rest never less."""
        now = seconds(counts[best])
        saved = min(now - as_it_is.seconds - least[count], abs(most[counts[best]] - most[count]))
        return math.isinf(now) or saved > _NEGLIGIBLE * now

    while reach and time.monotonic() < stop:
        fewer, more = counts[max(0, best - reach)], counts[min(_PARTS, best + reach)]
        now = seconds(counts[best])
        if is_worth(fewer) and seconds(fewer) < math.inf and seconds(fewer) <= now:
            best = max(0, best - reach)
        elif is_worth(more) and seconds(more) < now:
            best = min(_PARTS, best + reach)
        reach //= 2
    return places(counts[best])


def _travel_seconds(value: ir.Value, journeys: int, link: Link) -> float:
    """The most that a step takes longer for fetching a variable and storing it."""
    return journeys * link.in_seconds(value.nbytes) + link.out_seconds(value.nbytes)


def _one_by_one(graph: ir.Graph, cost_model: CostModel, movable: Collection[str]) -> list[list[str]]:
    """The variables, what travels least first; of those that travel as often, what is used farthest from the peak."""
    problem = gaps.problem(graph, cost_model)
    peak, position, cost = int(problem.live.argmax()), problem.graph.position, trips(graph)

    def distance(name: str) -> int:
        """Nodes between the peak and the nearest one that uses the variable."""
        direct = graph.consumers[name]
        users = [*direct, *(user for node in direct for user in graph.consumers.get(node, ()))]
        return min(abs(position[user] - peak) for user in users)

    names = worth_moving(graph, movable)
    return [[name] for name in sorted(names, key=lambda name: (cost[name], -distance(name)))]
