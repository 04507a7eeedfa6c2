"""Plans a step that XLA compiles: the simulator proposes, and the compiled program's own memory decides.

XLA fuses nodes, orders them itself and copies values into other layouts, so that the simulator's peak is not
the program's. A plan is compiled before it is taken; where it needs more than the budget, the next one is
made for less. Nothing is swapped: XLA inside TensorFlow keeps a value that is placed on the host on the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import NamedTuple

from graphswap import ir, planning, rewrites, simulator
from graphswap.cost_model import NO_LINK, CostModel
from graphswap.graphdef import UnsupportedGraphError
from graphswap.plan import Plan, PlanError
from graphswap.profiler import Compiled
from graphswap.strategies import budgets
from graphswap.strategies.base import InfeasibleBudgetError, Strategy

_ATTEMPTS = 7
_REFINEMENTS = 2
"""Of the attempts, how many follow one that fits."""
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
    """Finds a plan whose compiled program keeps the budget: the fastest of a few attempts, as the simulator sees it.

    Plans of falling simulated peaks are compiled until one fits, or until none is found; then the gap to the last
    one that was too large is halved, some times. A program may need more than that of a plan with a
    larger simulated peak, so that a faster plan may be missed.

    Args:
        strategy: Makes the plans.
        graph: The step.
        cost_model: From `costs`.
        memory_budget: Bytes; or "min": the plan of the smallest simulated peak, or "free": what anchors alone do.
        compiled: Has XLA compile a graph.

    Raises:
        InfeasibleBudgetError: If no attempt fits.
        PlanError: If the strategy's plan swaps.
        UnsupportedGraphError: If XLA can't compile the step.
    """
    search = _Search(graph, cost_model, compiled)
    budget = memory_budget if isinstance(memory_budget, int) else 0
    if isinstance(strategy, planning.Given):
        needed = search.attempt(strategy.only)
        if budget and needed > budget:
            raise InfeasibleBudgetError(budget, needed, _worst_node(graph, strategy.only, cost_model))
        return search.planned(search.tried[-1], budget, f"the plan is that of '{strategy.path}'")
    if search.plain_bytes <= budget:
        return search.planned(search.tried[0], budget, "it fits the budget as it is")
    anchored = search.attempt(Plan())
    if anchored <= budget or memory_budget == "free":
        return search.best(budget)
    if memory_budget == "min":
        search.attempt(budgets.smallest(strategy, graph, cost_model))
        return search.best(search.least_bytes)
    plain = simulator.simulate(graph, Plan(), cost_model)
    # Simulated peaks: for the lower one no plan was found, or one that fits; for the higher one a plan that does not.
    low, high = 0, plain.peak_bytes
    target = int(high * budget / anchored)
    attempts = _ATTEMPTS
    while attempts > 0:
        attempts -= 1
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
                low, attempts = target, min(attempts, _REFINEMENTS)
                seconds = simulator.simulate(graph, proposed, cost_model).seconds
                if needed >= _NEAR * budget or seconds <= _CHEAP * plain.seconds:
                    break
        if low >= _NEAR * high:
            break
        target = (low + high) // 2
    if search.least_bytes > budget:
        with contextlib.suppress(InfeasibleBudgetError):
            search.attempt(budgets.smallest(strategy, graph, cost_model))
    if search.least_bytes > budget:
        least = min(search.tried, key=lambda tried: tried.nbytes)
        raise InfeasibleBudgetError(budget, least.nbytes, _worst_node(graph, least.plan, cost_model))
    return search.best(budget)


def _worst_node(graph: ir.Graph, taken: Plan, cost_model: CostModel) -> str:
    return simulator.simulate(graph, taken, cost_model).peak_step.name


class _Tried(NamedTuple):
    """A program: its peak in bytes, its plan, and what was compiled."""

    nbytes: int
    plan: Plan
    rewritten: ir.Graph


class _Search:
    """What was compiled so far, first the step as it was."""

    def __init__(self, graph: ir.Graph, cost_model: CostModel, compiled: Callable[[ir.Graph], Compiled]):
        self._graph, self._cost_model, self._compiled = graph, cost_model, compiled
        self.plain_bytes = self._bytes_of(graph)
        self.tried = [_Tried(self.plain_bytes, Plan(), graph)]

    @property
    def least_bytes(self) -> int:
        return min(tried.nbytes for tried in self.tried)

    def _bytes_of(self, graph: ir.Graph) -> int:
        program = self._compiled(graph)
        resident = self._cost_model.resident_bytes + planning.argument_bytes(graph)
        return resident + program.temporary_bytes + program.result_bytes

    def attempt(self, proposed: Plan) -> int:
        """Compiles the step under a plan. Returns its peak in bytes, `sys.maxsize` if XLA can't compile it."""
        proposed.check(self._graph)
        if proposed.swaps:
            raise PlanError(
                f"expected a plan without swaps for jit_compile=True, received one with {len(proposed.swaps)} from "
                f"'{proposed.strategy}': XLA inside TensorFlow keeps on the device what is placed on the host. "
                "Take a strategy that recomputes, or set jit_compile=False."
            )
        for known in self.tried[1:]:
            if (known.plan.decisions, known.plan.order) == (proposed.decisions, proposed.order):
                return known.nbytes
        rewritten = rewrites.rewrite_for_jit(self._graph, proposed)
        try:
            nbytes = self._bytes_of(rewritten)
        except UnsupportedGraphError:  # the step as it was could be compiled
            nbytes = sys.maxsize
        self.tried.append(_Tried(nbytes, proposed, rewritten))
        return nbytes

    def best(self, budget: int) -> Planned:
        """The plan that the simulator takes for the fastest of those that fit; in a budget of 0, of all."""

        def cost(tried: _Tried) -> tuple[float, int]:
            return simulator.simulate(self._graph, tried.plan, self._cost_model).seconds, tried.nbytes

        return self.planned(min((t for t in self.tried if not budget or t.nbytes <= budget), key=cost), budget)

    def planned(self, taken: _Tried, budget: int, *notes: str) -> Planned:
        plain = simulator.simulate(self._graph, Plan(), self._cost_model)
        timeline = simulator.simulate(self._graph, taken.plan, self._cost_model)
        refused = sum(tried.nbytes == sys.maxsize for tried in self.tried)
        if refused:
            notes = (*notes, f"XLA could not compile {refused} of the plans")
        notes = (*notes, f"{len(self.tried)} programs were compiled: their memory decided, seconds are estimates")
        planned = planning.Planned(self._graph, self._cost_model, budget, taken.plan, timeline, plain, notes)
        return Planned(planned, taken.rewritten, self.plain_bytes, taken.nbytes)
