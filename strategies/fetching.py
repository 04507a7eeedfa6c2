"""Plans for baselines that move model data: activations are left alone, or recomputed without a look at model data."""

from __future__ import annotations

import collections
import functools
import heapq
from collections.abc import Callable

import numpy as np

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.strategies import fitting, gaps

_ROUNDS = 4
"""How often is dropped again what repeating activations has fetched."""


def plan_fetched(graph: ir.Graph, cost_model: CostModel, memory_budget: int, strategy: str) -> Plan:
    """A plan that drops what was fetched, and no activation where that is enough; else activations are checkpointed.

    Raises:
        InfeasibleBudgetError: If that is not enough either.
    """
    problem = gaps.problem(graph, cost_model)
    starts = [functools.partial(fitting.evictions, problem, {})]
    starts += [functools.partial(fitting.checkpointed, problem, n) for n in fitting.checkpoint_segments(problem)]

    def evict(start: Callable[[], fitting.Evictions], target: float) -> fitting.Evictions:
        return _evict_fetched(problem, start(), target)

    attempts = [functools.partial(evict, start) for start in starts]
    return fitting.fit(problem, attempts, memory_budget, strategy, actions=())


def _evict_fetched(problem: gaps.Gaps, state: fitting.Evictions, target: float) -> fitting.Evictions:
    """Where the step passes the target, drops fetched values, those first that are needed again the latest."""
    ops = [problem.graph.by_name[ir.producer(storage.root)].op for storage in problem.storages]
    fetched = [index for index, gap in enumerate(problem.gaps) if ops[gap.storage] == ir.FETCH]
    movable = sorted(filter(problem.is_repeatable, fetched), key=lambda index: problem.gaps[index].start)
    for _ in range(_ROUNDS):
        left = [index for index in movable if index not in state.evicted]
        dropped = _drop(problem, left, state.outline.live, target)
        if not dropped:
            break
        state = fitting.evictions(problem, {**state.evicted, **dropped}, state.anchors)
    return state


def _drop(problem: gaps.Gaps, movable: list[int], live: np.ndarray, target: float) -> dict[int, str]:
    """Which of the gaps, sorted by their start, to recompute so that `live` bytes come down to the target."""
    live, waiting = live.copy(), collections.deque(movable)
    idle: list[tuple[int, int]] = []  # (-end, gap)
    evicted: dict[int, str] = {}
    for position in range(len(live)):
        while waiting and problem.gaps[waiting[0]].start < position:
            index = waiting.popleft()
            heapq.heappush(idle, (-problem.gaps[index].end, index))
        while live[position] > target and idle and -idle[0][0] > position:
            _, index = heapq.heappop(idle)
            gap = problem.gaps[index]
            evicted[index] = "recompute"
            live[gap.start + 1 : gap.end] -= gap.nbytes
    return evicted
