"""Plans a step that XLA compiles: the simulator proposes, and the compiled program's own memory decides.

XLA fuses nodes, orders them itself and copies values into other layouts, so that the simulator's peak is not
the program's. A plan is compiled before it is taken; where it needs more than the budget, the next one is
made for less. Inside TensorFlow nothing is swapped: there XLA keeps a value that is placed on the host on the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import NamedTuple

from graphswap import ir, planning, rewrites, simulator
from graphswap.allocator import ALIGNMENT_BYTES, HOLE_BYTES
from graphswap.cost_model import NO_LINK, CostModel
from graphswap.graphdef import UnsupportedGraphError
from graphswap.plan import Plan, PlanError
from graphswap.profiler import Compiled
from graphswap.strategies import Auto, budgets
from graphswap.strategies.base import InfeasibleBudgetError, Strategy
from graphswap.strategies.chen import Chen

_ATTEMPTS = 7
_REFINEMENTS = 2
"""Of the attempts, how many follow one that fits."""
_CHECKPOINTINGS = 4
"""How many plans of `Chen` follow where none of these fits."""
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
        plain_bytes: Peak of the step as it was, as the allocator will count it.
        peak_bytes: Peak under the plan, likewise.
        is_fenced: Whether it holds only once the device's free memory is divided at the budget (`placement.fence`): an
            allocator that has more than the program's buffer needs, but less than twice as much, hands out all of it.
    """

    planned: planning.Planned
    rewritten: ir.Graph
    plain_bytes: int
    peak_bytes: int
    is_fenced: bool


def plan(
    strategy: Strategy,
    graph: ir.Graph,
    cost_model: CostModel,
    memory_budget: int | str,
    compiled: Callable[[ir.Graph], Compiled],
) -> Planned:
    """Finds a plan for XLA inside TensorFlow whose program keeps the budget.

    Args:
        strategy: Makes the plans.
        graph: The step.
        cost_model: Of the device as it is now.
        memory_budget: Bytes; or "min": the plan of the smallest simulated peak, or "free": what anchors alone do.
        compiled: Has XLA compile a graph.

    Raises:
        InfeasibleBudgetError: If no attempt fits.
        PlanError: If the strategy's plan swaps.
        UnsupportedGraphError: If XLA can't compile the step.
    """
    budget = memory_budget if isinstance(memory_budget, int) else 0
    programs = _Programs(graph, cost_model, budget, compiled)
    if isinstance(strategy, planning.Given):
        needed = programs.needs(strategy.only)
        if budget and needed > budget:
            raise InfeasibleBudgetError(budget, needed, _worst_node(graph, strategy.only, programs.costs))
        return programs.planned(programs.made[-1], budget, f"the plan is that of '{strategy.path}'")
    if programs.plain.peak_bytes <= budget:
        return programs.planned(programs.plain, budget, "it fits the budget as it is")
    if budget:
        taken = fitted(strategy, graph, programs.costs, budget, programs.needs)
        return programs.planned(next(program for program in programs.made if program.plan is taken), budget)
    programs.needs(Plan())
    if memory_budget == "min":
        programs.needs(budgets.smallest(strategy, graph, programs.costs))
    least = min(programs.made, key=lambda program: program.peak_bytes)
    return programs.planned(least, least.peak_bytes if memory_budget == "min" else 0)


def fitted(
    strategy: Strategy,
    graph: ir.Graph,
    cost_model: CostModel,
    memory_budget: int,
    needs: Callable[[Plan], int],
) -> Plan:
    """Finds a plan whose compiled program keeps the budget: the fastest of a few attempts, as the simulator sees it.

    Plans of falling simulated peaks are compiled until one fits, or until none is found; then the gap to the last
    one that was too large is halved, some times. A program may need more than that of a plan with a
    larger simulated peak, so that a faster plan may be missed.

    Args:
        strategy: Makes the plans.
        graph: The step.
        cost_model: For the strategy.
        memory_budget: Bytes.
        needs: Has the step compiled under a plan, first under an empty one, and returns the bytes that it needs.

    Raises:
        InfeasibleBudgetError: If no attempt fits.
    """
    tried: list[tuple[int, Plan]] = []

    def attempt(proposed: Plan) -> int:
        for nbytes, known in tried:
            if (known.decisions, known.order) == (proposed.decisions, proposed.order):
                return nbytes
        tried.append((needs(proposed), proposed))
        return tried[-1][0]

    empty = Plan()
    needed = attempt(empty)
    if needed <= memory_budget:
        return empty
    plain = simulator.simulate(graph, empty, cost_model)
    # Simulated peaks: for the lower one no plan was found, or one that fits; for the higher one a plan that does not.
    low, high = 0, plain.peak_bytes
    target = int(high * memory_budget / needed)
    attempts = _ATTEMPTS
    while attempts > 0:
        attempts -= 1
        try:
            proposed = strategy.plan(graph, cost_model, target)
        except InfeasibleBudgetError:
            low = target
        else:
            needed = attempt(proposed)
            if needed > memory_budget:
                high = target
                if not low:
                    target = int(target * min(_DESCENT, memory_budget / needed))
                    continue
            else:
                low, attempts = target, min(attempts, _REFINEMENTS)
                seconds = simulator.simulate(graph, proposed, cost_model).seconds
                if needed >= _NEAR * memory_budget or seconds <= _CHEAP * plain.seconds:
                    break
        if low >= _NEAR * high:
            break
        target = (low + high) // 2
    if isinstance(strategy, Auto):
        # Checkpoints along the chain often make a smaller program than a plan of a smaller simulated peak.
        target = max(high, memory_budget)
        for _ in range(_CHECKPOINTINGS):
            if min(nbytes for nbytes, _ in tried) <= memory_budget:
                break
            try:
                proposed = budgets.smallest(Chen(), graph, cost_model, target)
            except InfeasibleBudgetError:
                break
            attempt(proposed)
            peak_bytes = simulator.simulate(graph, proposed, cost_model).peak_bytes
            if peak_bytes > target:
                break
            target = peak_bytes - 1
    if min(nbytes for nbytes, _ in tried) > memory_budget:
        with contextlib.suppress(InfeasibleBudgetError):
            attempt(budgets.smallest(strategy, graph, cost_model))
    least_bytes, least = min(tried, key=lambda one: one[0])
    if least_bytes > memory_budget:
        raise InfeasibleBudgetError(memory_budget, least_bytes, _worst_node(graph, least, cost_model))
    fitting = [(nbytes, one) for nbytes, one in tried if nbytes <= memory_budget]
    return min(fitting, key=lambda one: (simulator.simulate(graph, one[1], cost_model).seconds, one[0]))[1]


def _worst_node(graph: ir.Graph, taken: Plan, cost_model: CostModel) -> str:
    return simulator.simulate(graph, taken, cost_model).peak_step.name


class _Program(NamedTuple):
    """What was compiled under a plan; the attributes as in `Planned`. `sys.maxsize` bytes if XLA refused."""

    plan: Plan
    rewritten: ir.Graph
    peak_bytes: int
    is_fenced: bool


class _Programs:
    """What XLA inside TensorFlow makes of a step, first of the step as it is.

    Attributes:
        costs: For plans of the step: nothing is swapped, and buffers and workspace are XLA's own business.
        made: All programs so far.
        plain: The first of them.
    """

    def __init__(self, graph: ir.Graph, cost_model: CostModel, budget: int, compiled: Callable[[ir.Graph], Compiled]):
        device = dataclasses.replace(
            cost_model.device, memory_bytes=None, has_cpu_kernels=False, links={"host": NO_LINK, "disk": NO_LINK}
        )
        self.costs = dataclasses.replace(cost_model, device=device)
        self._graph, self._cost_model, self._budget, self._compiled = graph, cost_model, budget, compiled
        program = compiled(graph)
        self._known_constants = program.constant_bytes  # those of the step are on the device already
        self.made: list[_Program] = []
        self._add(Plan(), graph, program)
        (self.plain,) = self.made

    def needs(self, proposed: Plan) -> int:
        """Compiles the step under a plan. Returns the bytes that it needs, `sys.maxsize` if XLA can't compile it."""
        proposed.check(self._graph)
        if proposed.swaps:
            raise PlanError(
                f"expected a plan without swaps for jit_compile=True, received one with {len(proposed.swaps)} from "
                f"'{proposed.strategy}': XLA inside TensorFlow keeps on the device what is placed on the host. "
                "Take a strategy that recomputes, or set jit_compile=False."
            )
        rewritten = rewrites.rewrite_for_jit(self._graph, proposed)
        try:
            return self._add(proposed, rewritten, self._compiled(rewritten))
        except UnsupportedGraphError:  # the step as it was could be compiled
            self.made.append(_Program(proposed, rewritten, sys.maxsize, False))
            return sys.maxsize

    def _add(self, proposed: Plan, rewritten: ir.Graph, program: Compiled) -> int:
        """Returns the bytes that the program needs; its peak also has what chunks are larger than was asked for."""
        # It runs as one node.
        resident = tuple(node for node in self._graph.nodes if node.op == "Placeholder")
        results = tuple(ir.Value("uint8", (nbytes,)) for nbytes in program.result_bytes)
        run = ir.Node("program", "XlaLaunch", outputs=results, attrs=(("workspace_bytes", program.temporary_bytes),))
        step = ir.Graph(self._graph.name, (*resident, run))
        # From the second step on a batch may get chunks that are larger by a small one that was free beside them.
        more = ALIGNMENT_BYTES * sum(node.outputs[0].dtype != "resource" for node in resident) + max(
            0, program.constant_bytes - self._known_constants
        )
        on = dataclasses.replace(self._cost_model, resident_bytes=self._cost_model.resident_bytes + more)
        needed = simulator.simulate(step, Plan(), on).peak_bytes
        peak, is_fenced = _allocated(step, on), False
        if needed <= self._budget < peak and on.device.memory_bytes:
            room = self._budget - HOLE_BYTES  # small buffers may come to lie behind the fence
            within = dataclasses.replace(on, device=dataclasses.replace(on.device, memory_bytes=room))
            peak, is_fenced = _allocated(step, within) + HOLE_BYTES, True
        self.made.append(_Program(proposed, rewritten, peak, is_fenced))
        return needed if peak <= self._budget else max(needed, self._budget + 1)

    def planned(self, taken: _Program, budget: int, *notes: str) -> Planned:
        """The plan of a program as `plan` returns it."""
        plain = simulator.simulate(self._graph, Plan(), self.costs)
        timeline = simulator.simulate(self._graph, taken.plan, self.costs)
        refused = sum(program.peak_bytes == sys.maxsize for program in self.made)
        if refused:
            notes = (*notes, f"XLA could not compile {refused} of the plans")
        notes = (*notes, f"{len(self.made)} programs were compiled: their memory decided, seconds are estimates")
        planned = planning.Planned(self._graph, self.costs, budget, taken.plan, timeline, plain, notes)
        return Planned(planned, taken.rewritten, self.plain.peak_bytes, taken.peak_bytes, taken.is_fenced)


def _allocated(step: ir.Graph, cost_model: CostModel) -> int:
    """The peak as the device's allocator counts it; more than the device has if it finds no chunk."""
    try:
        return simulator.judge(step, Plan(), cost_model).allocated_peak_bytes
    except simulator.NoRoom:
        return max(simulator.simulate(step, Plan(), cost_model).peak_bytes, (cost_model.device.memory_bytes or 0) + 1)
