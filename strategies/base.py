"""What a strategy is, and what it raises when no plan fits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan


@runtime_checkable
class Strategy(Protocol):
    """Decides what to do. Never touches a graph."""

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        """Returns a plan whose simulated peak is at most `memory_budget` bytes.

        Raises:
            InfeasibleBudgetError: If it finds none.
        """
        ...


@runtime_checkable
class Placing(Strategy, Protocol):
    """A strategy that says itself which variables leave the device together."""

    def groups(self, graph: ir.Graph, movable: Collection[str]) -> Sequence[Sequence[str]]:
        """Returns groups of variables, in the order in which they leave.

        Args:
            graph: The step, all variables on the device.
            movable: Names of variables that may leave.
        """
        ...


class InfeasibleBudgetError(ValueError):
    """No plan keeps the budget.

    Attributes:
        memory_budget: What was asked for, in bytes.
        smallest_bytes: The smallest peak that was found; with the allocator's losses, a budget a little above
            it may be needed. `pipeline` replaces it by a budget that a plan was found for.
        node: Name of the node that sets it.
        bound_bytes: The memory bound: no plan of the strategy's class has a peak below; 0 if none is known.
        spent_seconds: Planning time after which the search was cut off; None if it came to its end.
    """

    def __init__(
        self,
        memory_budget: int,
        smallest_bytes: int,
        node: str,
        bound_bytes: int = 0,
        spent_seconds: float | None = None,
    ):
        self.memory_budget = memory_budget
        self.smallest_bytes = smallest_bytes
        self.node = node
        self.bound_bytes = bound_bytes
        self.spent_seconds = spent_seconds
        budget, smallest = _mib(memory_budget), _mib(smallest_bytes)
        # Rounded down, so that the message does not say more than what holds.
        proven = f"{bound_bytes * 10 // 2**20 / 10:.1f}MiB"
        bound = f"No plan of its class (docs/limits.md) has a peak below {proven}. " if bound_bytes else ""
        if spent_seconds is not None:
            message = (
                f"memory_budget={budget}: no plan was found before {spent_seconds:g} s of planning were over; the "
                f"smallest peak found is {smallest}, set by node '{node}'. {bound}"
                "Raise planning_seconds or memory_budget, or reduce the batch size."
            )
        elif smallest_bytes > memory_budget:
            message = (
                f"memory_budget={budget} is below the smallest reachable peak, {smallest}, set by node '{node}'. "
                f"{bound}"
                f"Raise memory_budget to at least {smallest} or reduce the batch size."
            )
        else:
            message = (
                f"memory_budget={budget} has room for the smallest reachable peak, {smallest}, set by node '{node}', "
                f"but not for what the device's allocator loses beside it. {bound}"
                "Raise memory_budget or reduce the batch size."
            )
        super().__init__(message)


def _mib(nbytes: int) -> str:
    return f"{-(-nbytes * 10 // 2**20) / 10:.1f}MiB"
