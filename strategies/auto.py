"""The fastest simulated plan of all strategies, with neighbours side by side where the device gains by it."""

from __future__ import annotations

import dataclasses
import time

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.simulator import simulate
from graphswap.strategies import base, chen, greedy, karma, side_by_side, swap_all


@dataclasses.dataclass(frozen=True)
class Auto:
    """See the module's text.

    Attributes:
        planning_seconds: When to stop looking for a faster plan.
    """

    planning_seconds: float = 30.0

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        """Implements `Strategy.plan`."""
        deadline = time.monotonic() + self.planning_seconds
        plans: list[Plan] = []
        errors: list[base.InfeasibleBudgetError] = []
        for member in (
            greedy.Greedy(self.planning_seconds / 2),
            karma.Karma(self.planning_seconds / 4),
            chen.Chen(),
            swap_all.SwapAll(),
        ):
            if plans and time.monotonic() > deadline:
                break
            try:
                plans.append(member.plan(graph, cost_model, memory_budget))
            except base.InfeasibleBudgetError as error:
                errors.append(error)
        if not plans:
            raise min(errors, key=lambda error: error.smallest_bytes)
        best = min(plans, key=lambda plan: simulate(graph, plan, cost_model).seconds)
        if not cost_model.device.runs_pairs:
            return best
        return side_by_side.pair(graph, best, cost_model, memory_budget, self.planning_seconds / 4)
