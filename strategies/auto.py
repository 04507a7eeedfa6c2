"""The fastest simulated plan of all strategies, with neighbours side by side where the device gains by it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.simulator import simulate
from graphswap.strategies import base, chen, greedy, joint, karma, side_by_side, swap_all


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
        quick = ((chen.Chen(), 0.0), (swap_all.SwapAll(), 0.0))
        if cost_model.link(cost_model.far_tier).overlaps:
            members = (*self._timed({joint.Joint: 3 / 4, greedy.Greedy: 1 / 16, karma.Karma: 1 / 16}), *quick)
        else:  # joint is not measured on devices whose copies take the cores that compute: it gets what time is left
            members = (
                *self._timed({greedy.Greedy: 1 / 2, karma.Karma: 1 / 4}),
                *quick,
                *self._timed({joint.Joint: 1 / 4}),
            )
        for member, share in members:
            if plans and time.monotonic() > deadline - share * self.planning_seconds:
                continue
            if plans and isinstance(member, greedy.Greedy | karma.Karma):
                member = dataclasses.replace(member, gives_up=True)
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

    def _timed(self, shares: Mapping[Callable[[float], base.Strategy], float]) -> list[tuple[base.Strategy, float]]:
        """Strategies with their share of the time."""
        return [(kind(share * self.planning_seconds), share) for kind, share in shares.items()]
