"""Evicts the gap that is cheapest per overflowing byte, until the peak fits; picks swap or recompute per gap.

The price of a gap is the cheaper of its swap (copies not hidden behind compute) and its recompute (the
nodes to repeat, given what is evicted so far), divided by how much of the overflow over the budget it
covers; the idea of Capuchin (Peng et al., ASPLOS 2020, section 4) on all gaps and positions. After each
round of choices the plan is simulated, and the next round works on what still overflows. Storages at
segment borders are not recomputed, which bounds the length of recompute chains as in Chen et al. (2016);
several numbers of segments are tried.

Known weaknesses: choices are never taken back except by `_prune`; the price of a recompute is that of
the moment it was chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.plan import Decision, Plan
from graphswap.simulator import Timeline
from graphswap.strategies import fitting, gaps, order

_ROUNDS = 12
SEGMENTS = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64)


@dataclasses.dataclass(frozen=True)
class Greedy:
    """See the module's text.

    Attributes:
        actions: What may be done: "swap", "recompute".
    """

    actions: tuple[str, ...] = ("swap", "recompute")
    tier: str = "host"

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        """Implements `Strategy.plan`."""
        found = gaps.Gaps(graph, order.memory_greedy(graph), cost_model)
        attempts = [lambda target, a=found.anchors(n): evict(found, target, a, self.actions, self.tier) for n in SEGMENTS]
        return fitting.fit(found, attempts, memory_budget, "greedy")


def evict(
    problem: gaps.Gaps, target: float, anchors: Collection[int], actions: Collection[str], tier: str
) -> tuple[tuple[Decision, ...], Timeline]:
    """Evicts until the simulated peak is at most `target` bytes or nothing is left to evict."""
    evicted: dict[int, str] = {}
    live = problem.live
    decisions: tuple[Decision, ...] = ()
    timeline = problem.simulate(())
    starts = np.array([gap.start for gap in problem.gaps], dtype=int)
    ends = np.array([gap.end for gap in problem.gaps], dtype=int)
    sizes = np.array([gap.nbytes for gap in problem.gaps], dtype=float)
    for _ in range(_ROUNDS):
        if live.max() <= target:
            break
        chosen = _choose(problem, evicted, live, target, anchors, actions, tier, (starts, ends, sizes))
        if not chosen:
            break
        evicted.update(chosen)
        decisions = problem.decide(evicted, anchors, tier=tier)
        timeline = problem.simulate(decisions)
        live = problem.live_by_position(timeline)
    return decisions, timeline


def _choose(problem, evicted, live, target, anchors, actions, tier, arrays) -> dict[int, str]:
    """Gaps to evict in this round, by falling overflow per second."""
    starts, ends, sizes = arrays
    over = np.maximum(live - target, 0.0)
    free = np.array([index not in evicted for index in range(len(problem.gaps))], dtype=bool)
    costs: dict[int, tuple[float, str]] = {}

    def price(gap: int) -> tuple[float, str]:
        if gap not in costs:
            offers = []
            if "swap" in actions:
                offers.append((problem.swap_seconds(gap, tier), "swap"))
            if "recompute" in actions and problem.gaps[gap].storage not in anchors:
                offers.append((problem.recompute_seconds(gap, evicted, anchors), "recompute"))
            costs[gap] = min(offers, default=(float("inf"), ""))
        return costs[gap]

    chosen: dict[int, str] = {}
    while over.max() > 0:
        area = np.concatenate([[0.0], np.cumsum(over)])
        count = np.concatenate([[0], np.cumsum(over > 0)])
        benefit = np.minimum(area[ends] - area[starts + 1], sizes * (count[ends] - count[starts + 1]))
        candidates = np.flatnonzero(free & (benefit > 0))
        if not len(candidates):
            break
        ratios = [benefit[gap] / (price(int(gap))[0] + 1e-9) for gap in candidates]
        best = int(candidates[int(np.argmax(ratios))])
        free[best] = False
        if not np.isfinite(price(best)[0]):
            continue
        chosen[best] = price(best)[1]
        stretch = slice(int(starts[best]) + 1, int(ends[best]))
        over[stretch] = np.maximum(over[stretch] - sizes[best], 0.0)
    return chosen
