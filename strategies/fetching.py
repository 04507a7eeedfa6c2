"""Plans that drop nothing but what was fetched, for baselines that leave activations alone."""

from __future__ import annotations

import functools
import heapq

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.strategies import fitting, gaps


def plan_fetched(graph: ir.Graph, cost_model: CostModel, memory_budget: int, strategy: str) -> Plan:
    """A plan that drops nothing but what was fetched.

    Raises:
        InfeasibleBudgetError: If that is not enough.
    """
    problem = gaps.problem(graph, cost_model)
    return fitting.fit(problem, [functools.partial(_evict_fetched, problem)], memory_budget, strategy, actions=())


def _evict_fetched(problem: gaps.Gaps, target: float) -> fitting.Evictions:
    """Where the step passes the target, drops fetched values, those first that are needed again the latest."""
    ops = [problem.graph.by_name[ir.producer(storage.root)].op for storage in problem.storages]
    fetched = [index for index, gap in enumerate(problem.gaps) if ops[gap.storage] == ir.FETCH]
    waiting = sorted(filter(problem.is_repeatable, fetched), key=lambda index: problem.gaps[index].start)
    live = problem.live.copy()
    idle: list[tuple[int, int]] = []  # (-end, gap)
    evicted: dict[int, str] = {}
    for position in range(len(live)):
        while waiting and problem.gaps[waiting[0]].start < position:
            index = waiting.pop(0)
            heapq.heappush(idle, (-problem.gaps[index].end, index))
        while live[position] > target and idle and -idle[0][0] > position:
            _, index = heapq.heappop(idle)
            gap = problem.gaps[index]
            evicted[index] = "recompute"
            live[gap.start + 1 : gap.end] -= gap.nbytes
    return fitting.evictions(problem, evicted)
