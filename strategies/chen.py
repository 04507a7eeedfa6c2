"""Recompute in about sqrt(n) segments (Chen et al., 2016, arXiv 1604.06174, section 4), a baseline.

What lies at the borders of segments is kept, and so is what the last segment makes, with which the backward pass
begins; everything else is recomputed when the backward pass reaches its segment. Memory O(sqrt(n)), one extra forward
pass. Of a few numbers of segments the fastest that fits is taken. Known weakness: all segments are recomputed, or none.
"""

from __future__ import annotations

import dataclasses
import functools

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.strategies import fitting, gaps


@dataclasses.dataclass(frozen=True)
class Chen:
    """See the module's text."""

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        """Implements `Strategy.plan`."""
        problem = gaps.problem(graph, cost_model)
        segments = fitting.checkpoint_segments(problem)
        attempts = [functools.partial(_recompute_all, problem, number) for number in segments]
        return fitting.fit(problem, attempts, memory_budget, "chen", actions=("recompute",))


def _recompute_all(problem: gaps.Gaps, segments: int, target: float) -> fitting.Evictions:
    del target  # all or nothing
    return fitting.checkpointed(problem, segments)
