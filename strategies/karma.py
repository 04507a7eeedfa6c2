"""KARMA's two decisions (Wahib et al., SC'20, arXiv 2008.11421), per storage and gap instead of per layer.

1. Capacity-based swapping: only what does not fit is swapped, and of that what is needed last first. So
   the tail of the network, which the backward pass needs first, stays on the device.
2. Interleaved recompute: where a swapped-in storage would stall the step for longer than recomputing it
   takes, it is recomputed instead.

Written after the paper's outline; its code was never published, and the paper places blocks by an
ant-colony solver. Known weaknesses: stage 1 does not know prices, stage 2 can't undo its choices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping

import numpy as np

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.strategies import fitting, gaps

_ROUNDS = 8
_BLOCKS = (16, 32, 8)


@dataclasses.dataclass(frozen=True)
class Karma:
    """See the module's text.

    Attributes:
        planning_seconds: When to stop looking for a faster plan.
        gives_up: Whether to stop then even if none is found: the budget is taken to be infeasible.
    """

    planning_seconds: float = math.inf
    gives_up: bool = False

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        """Implements `Strategy.plan`."""
        problem = gaps.problem(graph, cost_model)
        attempts = [functools.partial(_evict, problem, problem.anchors(blocks)) for blocks in _BLOCKS]
        return fitting.fit(
            problem, attempts, memory_budget, "karma", planning_seconds=self.planning_seconds, gives_up=self.gives_up
        )


def _evict(problem: gaps.Gaps, anchors: Collection[int], target: float) -> fitting.Evictions:
    state = fitting.evictions(problem, {}, anchors)
    for _ in range(_ROUNDS):
        live = state.outline.live
        if live.max() <= target:
            break
        swapped = _needed_last(problem, state.evicted, live, target)
        if not swapped:
            break
        evicted = {**state.evicted, **dict.fromkeys(swapped, "swap")}
        for gap in swapped:
            if fitting.offer(problem, gap, evicted, anchors, fitting.BOTH)[2] == "recompute":
                evicted[gap] = "recompute"
        state = fitting.at_worst_swapped(problem, evicted, anchors)
    return state


def _needed_last(problem: gaps.Gaps, evicted: Mapping[int, str], live: np.ndarray, target: float) -> list[int]:
    """Gaps to evict so that nothing overflows: those that end last, of those that cover an overflow."""
    over = live - target
    chosen = []
    for gap in sorted(range(len(problem.gaps)), key=lambda gap: -problem.gaps[gap].end):
        item = problem.gaps[gap]
        stretch = over[item.start + 1 : item.end]
        if gap not in evicted and len(stretch) and stretch.max() > 0:
            stretch -= item.nbytes
            chosen.append(gap)
    return chosen
