"""Swaps every buffer that waits for the backward pass (vDNN, Rhu et al., MICRO 2016: vDNN_all), a baseline.

Known weakness: it swaps whether or not the memory is needed.
"""

from __future__ import annotations

import dataclasses
import functools

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.strategies import fitting, gaps


@dataclasses.dataclass(frozen=True)
class SwapAll:
    """See the module's text."""

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        """Implements `Strategy.plan`."""
        problem = gaps.problem(graph, cost_model)
        attempts = [functools.partial(_swap_all, problem)]
        return fitting.fit(problem, attempts, memory_budget, "swap_all", actions=("swap",))


def _swap_all(problem: gaps.Gaps, target: float) -> fitting.Evictions:
    del target  # all or nothing
    return fitting.evictions(problem, dict.fromkeys(problem.saved.values(), "swap"))
