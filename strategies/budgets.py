"""Budgets that are worked out: the smallest one, and the smallest that costs no time; with bounds of both.

The free budget is found by halving the range between a certified bound and what the planned order takes as it is. That
bound is the program of `relaxation` with the budget as a column: the least one at no extra time.

Known weaknesses: halving relies on more budget never meaning a slower plan, and is done a few times only.
"""

from __future__ import annotations

import dataclasses
import functools
import time

import numpy as np

from graphswap import bound, footprint, ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.simulator import NoRoom, simulate
from graphswap.strategies import base, gaps, relaxation, solver

TOLERANCE = 0.001
"""Of the step's seconds: what a free budget may add to them."""
EVALUATIONS = 8
"""How often `free` asks the strategy for a plan at most."""
_CLOSE = 0.01
"""Of what the planned order takes as it is: a smaller range is not halved any more."""
_WIDENING = 1.03
_WIDENINGS = 24
_SOLVING = 0.25
"""Of the planning time: for the bound of the free budget."""


@dataclasses.dataclass(frozen=True)
class Free:
    """The smallest budget without a predicted slow-down.

    Attributes:
        plan: For that budget, which it names.
        bound_bytes: No plan of its class that is as fast keeps a smaller budget.
    """

    plan: Plan
    bound_bytes: int


# --- the smallest -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def least_peak(problem: gaps.Gaps) -> footprint.LeastPeak:
    """The memory bound: no plan that evicts over the problem's gaps has a lower peak."""
    evictable: dict[str, list[tuple[int, int]]] = {}
    for gap in problem.gaps:
        evictable.setdefault(problem.storages[gap.storage].root, []).append((gap.start, gap.end))
    return footprint.least_peak(problem.graph, problem.cost_model, _repeatable(problem), evictable)


def _repeatable(problem: gaps.Gaps) -> set[str]:
    """Nodes that recomputing a gap's storage may run again: its makers, and those of what they read."""
    pending = {gap.storage for gap in problem.gaps}
    seen: set[int] = set()
    names: set[str] = set()
    while pending:
        storage = pending.pop()
        seen.add(storage)
        for value in problem.storages[storage].values:
            node = problem.graph.by_name[ir.producer(value)]
            if not problem.can_repeat(node):
                continue
            names.add(node.name)
            roots = {problem.root_of[reference] for reference in node.inputs}
            pending |= {problem.storage_of[root] for root in roots if not problem.stays(root)} - seen
    return names


def smallest(strategy: base.Strategy, graph: ir.Graph, cost_model: CostModel, least_bytes: int = 1) -> Plan:
    """The strategy's plan for the smallest budget from `least_bytes` on that it is found to keep.

    Raises:
        InfeasibleBudgetError: The first one, if none is found.
    """
    first: base.InfeasibleBudgetError | None = None
    candidate = least_bytes
    for _ in range(_WIDENINGS):
        try:
            return strategy.plan(graph, cost_model, candidate)
        except base.InfeasibleBudgetError as error:
            first = first or error
            candidate = max(error.smallest_bytes, int(candidate * _WIDENING) + 1)
    assert first is not None
    raise first


# --- the free one -------------------------------------------------------------------------------------------------


def free(strategy: base.Strategy, graph: ir.Graph, cost_model: CostModel, planning_seconds: float) -> Free:
    """The smallest budget found whose plan adds no more than `TOLERANCE` to the seconds of the planned order.

    Args:
        strategy: Asked for up to `EVALUATIONS` plans.
        graph: The user's graph.
        cost_model: Seconds and bytes.
        planning_seconds: After them the strategy is not asked again.
    """
    deadline = time.monotonic() + planning_seconds
    problem = gaps.problem(graph, cost_model)
    limit = _free_seconds(problem)

    def attempt(memory_budget: int) -> Plan | None:
        try:
            plan = strategy.plan(graph, cost_model, memory_budget)
        except base.InfeasibleBudgetError:
            return None
        return plan if simulate(graph, plan, cost_model).seconds <= limit else None

    best = _as_it_is(problem)
    high = best.memory_budget or 0
    bound_bytes = low = min(free_bound(problem, _SOLVING * planning_seconds), high)
    best = attempt(high) or best  # what it takes may be used better
    for _ in range(EVALUATIONS - 1):
        if high - low <= _CLOSE * high or time.monotonic() > deadline:
            break
        middle = (low + high) // 2
        plan = attempt(middle)
        if plan is None:
            low = middle
        else:
            best, high = plan, middle
    return Free(best, bound_bytes)


def free_bound(problem: gaps.Gaps, seconds: float) -> int:
    """Bytes: no plan that adds at most `TOLERANCE` keeps a smaller budget. The memory bound, if the solver finds none.

    Args:
        problem: The gaps.
        seconds: For the solver.
    """
    most = float(problem.live.max())
    relaxed = relaxation.Relaxation(problem).program
    program = relaxed.least_budget(_free_seconds(problem) - relaxed.constant, most)
    proven = 0
    try:
        duals = solver.solve(program, 0.0, np.zeros(len(program.cost)), seconds).duals
    except solver.SolverError:
        pass
    else:
        proven = int(most * bound.certificate(program, duals).seconds(0.0))
    return max(proven, least_peak(problem).nbytes)


def _free_seconds(problem: gaps.Gaps) -> float:
    """The most that a step with a free budget takes: hardly more than the planned order as it is."""
    late = problem.outline(()).seconds if problem.beside else float(problem.clock[-1])
    return late + TOLERANCE * float(problem.clock[-1])


def _as_it_is(problem: gaps.Gaps) -> Plan:
    """The planned order alone, with the budget that it keeps."""
    budget = int(problem.live.max())
    while True:
        try:
            peak = problem.place((), budget).allocated_peak_bytes
        except NoRoom:
            peak = int(budget * _WIDENING) + 1
        if peak <= budget:
            return problem.plan((), "order", budget)
        budget = peak


# --- all of them --------------------------------------------------------------------------------------------------


def envelope(graph: ir.Graph, cost_model: CostModel, solves: int = 10, seconds: float = 60.0) -> bound.Envelope:
    """Bounds the seconds of every plan in the strategies' order at every budget.

    Args:
        graph: The user's graph.
        cost_model: Seconds and bytes.
        solves: Of the program of `relaxation`, at budgets from the memory bound to the planned order's plain peak.
        seconds: For each of them.

    Raises:
        solver.SolverError: If the program is solved at none of them.
    """
    problem = gaps.problem(graph, cost_model)
    relaxed = relaxation.Relaxation(problem)
    solved = solver.Solver(relaxed.program, relaxed.prices)
    certificates: list[bound.Certificate] = []
    error: solver.SolverError | None = None
    for budget in np.linspace(problem.live.max(), least_peak(problem).nbytes, solves):
        try:
            duals = solved.solve(budget, seconds).duals
        except solver.SolverError as failure:
            error = failure
        else:
            certificates.append(bound.certificate(relaxed.program, duals))
    if not certificates:
        assert error is not None
        raise error
    return bound.Envelope(tuple(certificates))
