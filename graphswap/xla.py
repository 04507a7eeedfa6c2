"""Plans a step that XLA compiles: the simulator proposes, and the compiled program's own memory decides.

XLA fuses nodes, orders them itself and copies values into other layouts, so that the simulator's peak is not
the program's. A plan is compiled before it is taken; where it needs more than the budget, the next one is
made for less. Nothing is swapped: XLA inside TensorFlow keeps a value that is placed on the host on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from graphswap import ir, planning, rewrites, simulator
from graphswap.cost_model import NO_LINK, CostModel
from graphswap.plan import Plan
from graphswap.plan_file import PlanError
from graphswap.profiler import Compiled
from graphswap.strategies import budgets
from graphswap.strategies.base import InfeasibleBudgetError, Strategy

_ATTEMPTS = 7
_DESCENT = 0.8
"""How fast simulated peaks fall until one fits: what is repeated first, XLA often would not have kept."""
_NEAR = 0.97
"""A plan that needs this share of the budget is taken: the next one would hardly be faster."""
_CHEAP = 1.02
"""So is a plan that makes the step no more than so many times as long."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan whose program fits.

    Attributes:
        planned: The plan; its timelines are the simulator's, whose peaks are not the program's.
        rewritten: What is to be compiled. The same object as the step's graph if that fits as it is.
        plain_bytes: Peak of the step as it was.
        peak_bytes: Peak under the plan.
    """

    planned: planning.Planned
    rewritten: ir.Graph
    plain_bytes: int
    peak_bytes: int


def costs(cost_model: CostModel) -> CostModel:
    """The costs of a step that XLA compiles: nothing is swapped, and buffers and workspace are XLA's own business."""
    device = dataclasses.replace(
        cost_model.device, memory_bytes=None, has_cpu_kernels=False, links={"host": NO_LINK, "disk": NO_LINK}
    )
    return dataclasses.replace(cost_model, device=device)


def plan(
    strategy: Strategy,
    graph: ir.Graph,
    cost_model: CostModel,
    memory_budget: int | str,
    compiled: Callable[[ir.Graph], Compiled],
) -> Planned:
    """Finds a plan whose compiled program keeps the budget, the fastest that a few attempts come by.

    Plans of falling simulated peaks are compiled until one fits, or until none is found; then the gap to the last
    one that was too large is halved, as long as attempts are left. A program may need more than that of a plan with a
    larger simulated peak, so that a faster plan may be missed.

    Args:
        strategy: Makes the plans.
        graph: The step.
        cost_model: From `costs`.
        memory_budget: Bytes; or "min": as few as the attempts find, or "free": what costs nothing but anchors.
        compiled: Has XLA compile a graph.

    Raises:
        InfeasibleBudgetError: If no attempt fits.
        PlanError: If the strategy's plan swaps.
        UnsupportedGraphError: If XLA can't compile the step.
    """
    search = _Search(graph, cost_model, compiled)
    plain_bytes = search.bytes_of(graph)
    budget = memory_budget if isinstance(memory_budget, int) else 0
    if plain_bytes <= budget:
        return search.planned(Plan(), graph, plain_bytes, plain_bytes, budget, "it fits the budget as it is")
    anchored = search.attempt(Plan())
    if anchored <= budget or memory_budget == "free":
        return search.best(plain_bytes, budget)
    if memory_budget == "min":
        search.attempt(budgets.smallest(strategy, graph, cost_model))
        return search.best(plain_bytes, search.least_bytes)
    plain = simulator.simulate(graph, Plan(), cost_model)
    # Simulated peaks: for the lower one no plan was found, or one that fits; for the higher one a plan that does not.
    low, high = 0, plain.peak_bytes
    target = int(high * budget / anchored)
    for _ in range(_ATTEMPTS):
        try:
            proposed = strategy.plan(graph, cost_model, target)
        except InfeasibleBudgetError:
            low = target
        else:
            needed = search.attempt(proposed)
            if needed > budget:
                high = target
                if not low:
                    target = int(target * min(_DESCENT, budget / needed))
                    continue
            else:
                low = target
                seconds = simulator.simulate(graph, proposed, cost_model).seconds
                if needed >= _NEAR * budget or seconds <= _CHEAP * plain.seconds:
                    break
        if low >= _NEAR * high:
            break
        target = (low + high) // 2
    if search.least_bytes > budget:
        worst = simulator.simulate(graph, search.least_plan, cost_model).peak_step.name
        raise InfeasibleBudgetError(budget, search.least_bytes, worst)
    return search.best(plain_bytes, budget)


class _Search:
    """What was compiled so far."""

    def __init__(self, graph: ir.Graph, cost_model: CostModel, compiled: Callable[[ir.Graph], Compiled]):
        self._graph, self._cost_model, self._compiled = graph, cost_model, compiled
        self._tried: list[tuple[int, Plan, ir.Graph]] = []

    @property
    def least_bytes(self) -> int:
        return min(nbytes for nbytes, _, _ in self._tried)

    @property
    def least_plan(self) -> Plan:
        return min(self._tried, key=lambda tried: tried[0])[1]

    def bytes_of(self, graph: ir.Graph) -> int:
        program = self._compiled(graph)
        resident = self._cost_model.resident_bytes + planning.argument_bytes(graph)
        return resident + program.temporary_bytes + program.result_bytes

    def attempt(self, proposed: Plan) -> int:
        """Compiles the step under a plan. Returns its peak in bytes."""
        if proposed.swaps:
            raise PlanError(
                f"expected a plan without swaps for jit_compile=True, received one with {len(proposed.swaps)} from "
                f"'{proposed.strategy}': XLA inside TensorFlow keeps on the device what is placed on the host. "
                "Take a strategy that recomputes, or set jit_compile=False."
            )
        for nbytes, known, _ in self._tried:
            if known.decisions == proposed.decisions:
                return nbytes
        rewritten = rewrites.rewrite_for_jit(self._graph, proposed)
        self._tried.append((self.bytes_of(rewritten), proposed, rewritten))
        return self._tried[-1][0]

    def best(self, plain_bytes: int, budget: int) -> Planned:
        """The fastest plan that fits; in a budget of 0, of all."""
        fitting = [tried for tried in self._tried if not budget or tried[0] <= budget]
        nbytes, taken, rewritten = min(
            fitting, key=lambda tried: simulator.simulate(self._graph, tried[1], self._cost_model).seconds
        )
        return self.planned(taken, rewritten, plain_bytes, nbytes, budget)

    def planned(
        self, taken: Plan, rewritten: ir.Graph, plain_bytes: int, peak_bytes: int, budget: int, *notes: str
    ) -> Planned:
        plain = simulator.simulate(self._graph, Plan(), self._cost_model)
        timeline = simulator.simulate(self._graph, taken, self._cost_model)
        notes = (*notes, f"{len(self._tried) + 1} programs were compiled: their memory decided, seconds are estimates")
        return Planned(
            planning.Planned(self._graph, self._cost_model, budget, taken, timeline, plain, notes),
            rewritten,
            plain_bytes,
            peak_bytes,
        )
