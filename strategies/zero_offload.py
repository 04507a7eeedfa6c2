"""All optimizer state in host memory (ZeRO-Offload, Ren et al., USENIX ATC 2021), a baseline.

Weights, gradients and activations stay on the device; where activations have no room they are checkpointed as in
`chen`. Where the device's cores are the host's, gradients go to the state and updates are computed there, as by
ZeRO-Offload (`rewrites.far_update`). Known weakness: elsewhere they are computed on the device, for which the state
comes and goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.strategies.fetching import plan_fetched
from graphswap.variables import trips, worth_moving


@dataclasses.dataclass(frozen=True)
class ZeroOffload:
    """See the module's text."""

    def groups(self, graph: ir.Graph, movable: Collection[str]) -> Sequence[Sequence[str]]:
        """Implements `Placing.groups`: what no product reads leaves at once."""
        cost = trips(graph)
        state = [name for name in worth_moving(graph, movable) if cost[name] <= 1]
        return [state] if state else []

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        """Implements `Strategy.plan`."""
        return plan_fetched(graph, cost_model, memory_budget, "zero_offload")
