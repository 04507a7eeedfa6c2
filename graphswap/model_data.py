"""Which variables leave the device: as few as the budget asks for, those first that are cheapest to move.

They go to host memory as far as there is room, and beyond that to the disk: of what is away, what is used least for
its bytes. So the slots of an optimizer lie on disk, and weights in host memory.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Collection, Sequence

from graphswap import ir, rewrites, simulator, strategies
from graphswap.cost_model import CostModel, Link
from graphswap.plan import Place, Plan
from graphswap.strategies import budgets, gaps, timing
from graphswap.strategies.base import InfeasibleBudgetError, Placing, Strategy
from graphswap.variables import far_bytes, trips, values, worth_moving

_PARTS = 256
"""How finely the share of variables that leave is chosen."""
_SEGMENTS = (16, 8)
"""For greedy plans: a share that fits by neither is taken not to fit."""
_EASY = 0.9
"""A step whose buffers take no more of the budget is left alone."""
_NEGLIGIBLE = 0.005
"""Of a step: to save less, no further share is tried."""


class HostMemoryError(ValueError):
    """Host memory has no room for what has to leave the device.

    Attributes:
        host_bytes: What variables may take there during a step.
        needed_bytes: What they would take.
    """

    def __init__(self, host_bytes: float, needed_bytes: int):
        self.host_bytes = host_bytes
        self.needed_bytes = needed_bytes
        super().__init__(
            f"host_memory={_mib(host_bytes)} is less than the {_mib(needed_bytes)} that variables take there in this "
            "memory budget, where each one that is updated counts twice, as its old value stays until the step's end. "
            "Raise host_memory or memory_budget, or let what has no room lie on disk with "
            'graphswap.Options(swap_to="disk") or a directory.'
        )


@dataclasses.dataclass(frozen=True)
class Room:
    """Where variables may go.

    Attributes:
        host_bytes: What they may take of host memory during a step (`variables.far_bytes`).
        has_disk: Whether what finds no room there may go to the disk.
    """

    host_bytes: float = math.inf
    has_disk: bool = False


def choose(
    graph: ir.Graph,
    cost_model: CostModel,
    memory_budget: int,
    strategy: Strategy,
    movable: Collection[str],
    fixed: Sequence[Place] = (),
    planning_seconds: float = math.inf,
    room: Room = Room(),
) -> tuple[Place, ...]:
    """Chooses the variables that leave the device, and where to.

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
        room: Where variables may go.

    Raises:
        HostMemoryError: If no more may leave than what host memory has room for, and a plan would need that.
    """
    has_groups = isinstance(strategy, Placing)
    there = cost_model.device.computes_there
    judge = strategy if has_groups else strategies.Greedy(planning_seconds=0.0, segments=_SEGMENTS)
    groups = strategy.groups(graph, movable) if has_groups else _one_by_one(graph, cost_model, movable)
    gone, known, journeys = {place.variable for place in fixed}, values(graph), trips(graph)
    taken = far_bytes(graph)
    host_bytes = room.host_bytes - sum(taken.get(place.variable, 0) for place in fixed if place.tier == "host")
    all_left = left = [[name for name in group if name not in gone] for group in groups]
    if not room.has_disk:
        needed = itertools.accumulate(sum(taken[name] for name in group) for group in all_left)
        left = all_left[: sum(nbytes <= host_bytes for nbytes in needed)]
    sizes = [sum(known[name].nbytes for name in group) for group in left]
    total = list(itertools.accumulate(sizes, initial=0))
    counts = [bisect.bisect_left(total, total[-1] * part / _PARTS) for part in range(_PARTS + 1)]

    def uses(name: str) -> float:
        """Copies of a variable in a step, for the bytes that it takes in host memory."""
        is_updated = taken[name] > known[name].nbytes
        return (journeys[name] + is_updated) / (1 + is_updated)

    def places(count: int) -> tuple[Place, ...]:
        leaving = list(itertools.chain.from_iterable(left[:count]))
        tier_of, free = dict.fromkeys(leaving, "disk"), host_bytes
        for name in sorted(leaving, key=uses, reverse=True):
            if taken[name] <= free:
                tier_of[name], free = "host", free - taken[name]
        return (*fixed, *(Place(name, tier, there) for name, tier in tier_of.items()))

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

    tiers = [*(["host"] if host_bytes > 0 else []), *(["disk"] if room.has_disk else [])]
    links = [cost_model.link(tier) for tier in tiers]

    def once(name: str) -> float:
        if there and journeys[name] <= 1:  # only its update reads it
            return 0.0
        return min(0.0 if link.overlaps else link.in_seconds(known[name].nbytes) for link in links)

    def travelling(name: str) -> float:
        # Twice where there are two tiers: what stays makes room for something else to move from one to the other.
        return len(links) * max(_travel_seconds(known[name], journeys[name], link) for link in links)

    least, most = (
        list(itertools.accumulate((sum(map(found, group)) for group in left), initial=0.0))
        for found in (once, travelling)
    )
    unmoved = rewrites.place(graph, Plan(decisions=places(0)))
    if simulator.simulate(unmoved, Plan(), cost_model).peak_bytes <= memory_budget * _EASY:
        return places(0)
    # What is away already may be copied beside compute.
    least_seconds = timing.timed(gaps.problem(unmoved, cost_model), (), math.inf)[1].seconds
    stop = time.monotonic() + planning_seconds
    best = reach = _PARTS

    def is_worth(count: int) -> bool:
        """Whether with so many away the step could be noticeably faster: copies cost something, the rest never less."""
        now = seconds(counts[best])
        saved = min(now - least_seconds - least[count], abs(most[counts[best]] - most[count]))
        return math.isinf(now) or saved > _NEGLIGIBLE * now

    while reach and time.monotonic() < stop:
        fewer, more = counts[max(0, best - reach)], counts[min(_PARTS, best + reach)]
        now = seconds(counts[best])
        if is_worth(fewer) and seconds(fewer) < math.inf and seconds(fewer) <= now:
            best = max(0, best - reach)
        elif is_worth(more) and seconds(more) < now:
            best = min(_PARTS, best + reach)
        reach //= 2
    if len(left) < len(all_left) and math.isinf(seconds(counts[best])):
        wanted = choose(graph, cost_model, memory_budget, strategy, movable, fixed, planning_seconds)
        raise HostMemoryError(room.host_bytes, sum(taken.get(place.variable, 0) for place in wanted))
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


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f}MiB"
