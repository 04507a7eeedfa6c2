"""Evicts the gap that is cheapest per overflowing byte, until the peak fits; picks swap or recompute per gap.

The price of a gap is the cheaper of its swap (copies not hidden behind compute) and its recompute (the
nodes to repeat, given what is evicted so far), divided by how much of the overflow over the budget it
covers; the idea of Capuchin (Peng et al., ASPLOS 2020, section 4) on all gaps and positions. After each
round of choices the plan is simulated, and the next round works on what still overflows. Storages at
segment borders are not recomputed, which bounds the length of recompute chains as in Chen et al. (2016);
several numbers of segments are tried.

Known weaknesses: choices are never taken back; the price of a recompute is that of the moment it was
chosen.
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

_ROUNDS = 24
_SEGMENTS = (16, 32, 8, 0, 24, 12, 4)


@dataclasses.dataclass(frozen=True)
class Greedy:
    """See the module's text.

    Attributes:
        planning_seconds: When to stop looking for a faster plan.
        gives_up: Whether to stop then even if none is found: the budget is taken to be infeasible.
        segments: Into how many segments the step is cut, one attempt each.
    """

    planning_seconds: float = math.inf
    gives_up: bool = False
    segments: tuple[int, ...] = _SEGMENTS

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        """Implements `Strategy.plan`."""
        problem = gaps.problem(graph, cost_model)
        attempts = [functools.partial(evict, problem, problem.anchors(segments)) for segments in self.segments]
        return fitting.fit(
            problem, attempts, memory_budget, "greedy", planning_seconds=self.planning_seconds, gives_up=self.gives_up
        )


def evict(problem: gaps.Gaps, anchors: Collection[int], target: float) -> fitting.Evictions:
    """Evicts until the simulated peak is at most `target` bytes or nothing is left to evict."""
    state = fitting.evictions(problem, {}, anchors)
    for _ in range(_ROUNDS):
        live = state.outline.live
        if live.max() <= target:
            break
        chosen = choose(problem, state.evicted, live, target, anchors) or swap_instead(
            problem, state.evicted, live, target
        )
        if not chosen:
            break
        state = fitting.at_worst_swapped(problem, {**state.evicted, **chosen}, anchors)
    return state


def swap_instead(problem: gaps.Gaps, evicted: Mapping[int, str], live: np.ndarray, target: float) -> dict[int, str]:
    """Gaps to swap instead: their recompute itself overflows, as all that it repeats is on the device at once."""
    if problem.cost_model.link(problem.cost_model.far_tier).is_closed:
        return {}
    return {gap: "swap" for gap, way in evicted.items() if way == "recompute" and live[problem.gaps[gap].end] > target}


def choose(
    problem: gaps.Gaps, evicted: Mapping[int, str], live: np.ndarray, target: float, anchors: Collection[int]
) -> dict[int, str]:
    """Gaps to evict in this round, by falling overflow per second."""
    starts, ends, sizes = problem.starts, problem.ends, problem.sizes
    over = np.maximum(live - target, 0.0)
    free = np.ones(len(problem.gaps), bool)
    free[list(evicted)] = False
    prices = np.full(len(problem.gaps), np.nan)  # until they are asked for
    ways: dict[int, str] = {}
    chosen: dict[int, str] = {}
    while over.max() > 0:
        area = np.concatenate([[0.0], np.cumsum(over)])
        count = np.concatenate([[0], np.cumsum(over > 0)])
        benefit = np.minimum(area[ends] - area[starts + 1], sizes * (count[ends] - count[starts + 1]))
        candidates = np.flatnonzero(free & (benefit > 0))
        if not len(candidates):
            break
        for gap in candidates[np.isnan(prices[candidates])].tolist():
            prices[gap], _, ways[gap] = fitting.offer(problem, gap, evicted, anchors, fitting.BOTH)
        best = int(candidates[(benefit[candidates] / (prices[candidates] + 1e-9)).argmax()])
        free[best] = False
        if math.isinf(prices[best]):
            continue
        chosen[best] = ways[best]
        stretch = slice(int(starts[best]) + 1, int(ends[best]))
        over[stretch] = np.maximum(over[stretch] - sizes[best], 0.0)
    return chosen
