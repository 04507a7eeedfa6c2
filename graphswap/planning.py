"""measure -> plan: finds what to do with a step on this device within the budget."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import tensorflow as tf

from graphswap import (
    blocks,
    collectives,
    graphdef,
    host_memory,
    ir,
    liveness,
    model_data,
    plan_file,
    profiler,
    replanning,
    replicas,
    rewrites,
    simulator,
    strategies,
    tiers,
)
from graphswap.cost_model import MEMORY_VARIABLE, CostModel, DeviceSpec, Profile
from graphswap.host_variable import far_variables, value_bytes, value_tier
from graphswap.options import Options, format_bytes
from graphswap.plan import Exchange, Place, Plan, PlanError, Shard
from graphswap.strategies import budgets, gaps
from graphswap.strategies.base import InfeasibleBudgetError, Strategy

_USABLE = 0.99
"""Of a budget below the device's memory: the rest is for what wanders, such as the input pipeline's buffers."""
_FRUGAL = 0.93
"""Of the budget, for the first run of a step: its workspace is an estimate."""
_FREE_HOST = 0.8
"""Of the host's free memory, for variables: the rest is for the process and for other work."""
_WANDERING = 2.0
"""How far the peak of TensorFlow's own order may lie above the planned order's (two LSTMs: 1.6)."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan with what it was judged by.

    Attributes:
        graph: The step.
        cost_model: Its costs.
        budget: Bytes that were given; 0 for as few as possible.
        plan: The plan.
        timeline: Of the step under the plan.
        plain: Of the step as it was.
        notes: What the user should know.
        memory_bound_bytes: No plan of the plan's class has a lower peak; None if nothing was planned.
        free_bound_bytes: No smaller budget is free; None if no free one was asked for.
        is_settled: Whether an earlier run has held the plan against its steps (`replanning`).
    """

    graph: ir.Graph
    cost_model: CostModel
    budget: int
    plan: Plan
    timeline: simulator.Timeline
    plain: simulator.Timeline
    notes: tuple[str, ...] = ()
    memory_bound_bytes: int | None = None
    free_bound_bytes: int | None = None
    is_settled: bool = False

    @property
    def time_scale(self) -> float:
        """What the timelines' seconds are to be multiplied by."""
        return 1.0 if self.cost_model.profile is None else self.cost_model.profile.time_scale

    @property
    def seconds(self) -> float:
        """Predicted length of the step under the plan."""
        return self.timeline.seconds * self.time_scale

    def to_json(self) -> str:
        """What another worker needs to carry out the same plan (`Planner.adopt`)."""
        profile = self.cost_model.profile
        fields = {"plan": self.plan.to_json(), "profile": profile and profile.to_json(), "notes": self.notes}
        return json.dumps(fields)


@dataclasses.dataclass(frozen=True)
class Far:
    """Where what has no room on the device goes.

    Attributes:
        tier: "host" or "disk", for swaps.
        room: For variables.
    """

    tier: str
    room: model_data.Room


Clock = Callable[[str], AbstractContextManager[None]]
"""Called with the name of the phase that begins; left when it ends."""


class Planner:
    """Plans steps as the options ask.

    Args:
        options: What the user asked for.
        far_tiers: Where swaps of measured steps go.
    """

    def __init__(self, options: Options, far_tiers: tiers.Tiers):
        self._options = options
        self._tiers = far_tiers

    def device(self, can_swap: bool = True) -> DeviceSpec:
        """This machine's device, its links measured if anything can be swapped."""
        emulated = os.environ.get(MEMORY_VARIABLE)
        directory = self._options.swap_directory()
        if directory is None and can_swap and (self._options.names_disk or self._far_tier() == "disk"):
            directory = tiers.default_directory()
        asked = self._options.memory_budget
        budget = asked if isinstance(asked, int) else None
        return profiler.device_spec(int(emulated) if emulated else None, directory, can_swap, budget)

    def far(self, device: DeviceSpec, graph: ir.Graph, hosted_bytes: Mapping[str, int], replica_count: int = 1) -> Far:
        """Where the step's swaps and variables go.

        Args:
            device: The device.
            graph: The step, all variables on the device.
            hosted_bytes: What each of the step's variables takes of host memory now.
            replica_count: How many carry the step out on this host.
        """
        tier, has_disk = self._far_tier(), self._options.names_disk
        room = self.host_bytes(device.memory_bytes, sum(hosted_bytes.values()))
        # Swaps come first: they are on their way in the middle of the step, variables are stored as they are updated.
        if has_disk and room:
            swapped = replica_count * _most_swapped_bytes(graph, device)
            if swapped <= room:
                tier, room = "host", room - swapped
        idle = sum(nbytes for name, nbytes in hosted_bytes.items() if not graph.consumers.get(name))
        return Far(tier, model_data.Room(max(0, room - idle), has_disk))

    def host_bytes(self, memory_bytes: int | None, hosted_bytes: int = 0) -> int:
        """Host memory that the step's variables may take.

        Args:
            memory_bytes: Of the device; None if nothing limits it.
            hosted_bytes: What they take now.
        """
        asked = self._options.host_memory
        if isinstance(asked, int):
            return asked
        in_use = profiler.memory_in_use()
        if in_use is None and self._options.names_disk:
            return 0  # a plain CPU's memory is the host's
        free = host_memory.free_bytes() + hosted_bytes
        if profiler.device_name() == "CPU:0" and in_use is not None:
            free -= (memory_bytes or in_use) - in_use  # an emulated device takes its own of the same
        return max(0, int(free * _FREE_HOST))

    def far_variables(self, memory_bytes: int, variables: Sequence[tf.Variable]) -> AbstractContextManager[None]:
        """For variables that are made inside: in host memory as far as the options let them, then on disk.

        Args:
            memory_bytes: Of the device.
            variables: That are there already.
        """
        hosted_bytes = sum(value_bytes(variable) for variable in variables if value_tier(variable) == "host")
        # As in a step, where all of them are updated: so that few have to move when it is planned.
        left = self.host_bytes(memory_bytes, hosted_bytes) - 2 * hosted_bytes

        def tier_of(nbytes: int) -> str:
            nonlocal left
            if 2 * nbytes > left:
                return "disk"
            left -= 2 * nbytes
            return "host"

        return far_variables(tier_of, self._tiers)

    def cost_model(
        self,
        device: DeviceSpec,
        graph: ir.Graph,
        fence_bytes: int,
        away: Collection[str] = (),
        far_tier: str | None = None,
    ) -> CostModel:
        """Analytic costs of the graph on the device as it is now.

        Args:
            device: The device.
            graph: The step.
            fence_bytes: What the fences take, which `simulator` lays itself.
            away: Variables that are in far tiers now.
            far_tier: Where swaps go; as the options say by default.
        """
        resident_bytes = max(0, _resident_bytes(graph, away) - fence_bytes)
        return CostModel(device, resident_bytes=resident_bytes, far_tier=far_tier or self._far_tier())

    def budget(self, device: DeviceSpec, scale: float) -> tuple[int, float]:
        """The bytes to plan for, 0 for "min" and "free"; and their share of the budget.

        A device can't pass a budget of all its memory, whatever its allocator loses; there the strategies leave room.
        """
        asked = self._options.memory_budget
        if asked == "min":
            return 0, 1.0
        if asked == "free":
            return 0, scale * _USABLE
        whole = _memory_bytes(device)
        if not isinstance(asked, int) or asked >= whole:
            asked = whole
        share = scale * (1.0 if asked == device.memory_bytes else _USABLE)
        return int(asked * share), share

    def plan(
        self,
        func_graph: graphdef.FuncGraph,
        graph: ir.Graph,
        arguments: Sequence[Any],
        cost_model: CostModel,
        budget: int,
        clock: Clock,
        parts: replicas.Parts | None = None,
    ) -> Planned:
        """Measures the step, unless an earlier run did, and plans it.

        Args:
            func_graph: The traced step; it stays as it is.
            graph: The same, imported.
            arguments: To measure it on.
            cost_model: From `cost_model`.
            budget: Bytes to plan for; 0 for as few as the options' word asks for.
            clock: Gets the phases "measure" and "plan".
            parts: Of the traced step, if the graph is that of one of its replicas.

        Raises:
            InfeasibleBudgetError: If no plan keeps the budget.
        """
        strategy = self.strategy(graph)
        if isinstance(strategy, Given):
            return strategy.judged(graph, cost_model, budget)
        plain = simulator.simulate(graph, Plan(), cost_model)
        is_rewritten = bool(graph.blocks) or any(ir.IS_ZEROS in dict(node.attrs) for node in graph.nodes)
        if budget and plain.peak_bytes * _WANDERING <= budget and not is_rewritten:
            notes = ("it fits the budget as it is",)
            return Planned(graph, cost_model, budget, Plan(decisions=_carried_out(graph)), plain, plain, notes)
        notes = []
        with clock("measure"):
            question = self._question(budget)
            settled = question and profiler.cached_profile(graph.fingerprint, cost_model.device.name, question)
            is_free = self._options.memory_budget == "free"
            room = int(_USABLE * _memory_bytes(cost_model.device)) if is_free else budget
            profile = settled or self.profile(func_graph, graph, arguments, cost_model, room, notes, parts)
        cost_model = dataclasses.replace(cost_model, profile=profile)
        with clock("plan"):
            planned = self._settled(graph, cost_model, budget, question) if settled and question else None
            planned = planned or self._plan(graph, cost_model, budget)
        return dataclasses.replace(planned, notes=tuple(notes), is_settled=bool(settled))

    def _settled(self, graph: ir.Graph, cost_model: CostModel, budget: int, question: str) -> Planned | None:
        """The plan that an earlier run ended with, if the device has room for it as it is now."""
        plan = profiler.cached_plan(graph.fingerprint, cost_model.device.name, question)
        with contextlib.suppress(PlanError, simulator.NoRoom):
            if plan is not None and budget:
                planned = _judged(graph, plan.check(graph), cost_model, budget)
                return planned if planned.timeline.allocated_peak_bytes <= budget else None
        return None

    def replan(
        self, planned: Planned, costs: Profile, seen: replanning.Observation
    ) -> tuple[Planned, replanning.Round]:
        """One round of replanning, after a step of the plan was measured.

        Args:
            planned: The plan.
            costs: Measured within its step.
            seen: Its steps.

        Returns:
            The new plan, or if it is no better the old one with its predictions corrected; and the round.
        """
        profile = planned.cost_model.profile
        reserved_bytes = profile.reserved_bytes if profile else 0
        left = replanning.reserve(seen, planned.budget - reserved_bytes) if planned.budget else 0
        costs = dataclasses.replace(costs, reserved_bytes=reserved_bytes + left)
        cost_model = dataclasses.replace(planned.cost_model, profile=costs)
        old_seconds = simulator.simulate(planned.graph, planned.plan, cost_model).seconds
        try:
            new = self._plan(planned.graph, cost_model, planned.budget)
        except (InfeasibleBudgetError, simulator.NoRoom) as error:
            return _corrected(planned, old_seconds), replanning.Round(seen, old_seconds, None, f"no new plan: {error}")
        if replanning.is_better(seen, old_seconds, new.seconds):
            return new, replanning.Round(seen, old_seconds, new.seconds, "the new plan is taken")
        return _corrected(planned, old_seconds), replanning.Round(seen, old_seconds, new.seconds, "the plan stays")

    def resume(self, planned: Planned, cost_model: CostModel) -> Planned:
        """A plan of `replan` for the same step, traced anew; planned once more if it no longer fits.

        Args:
            planned: The plan.
            cost_model: Of the device as it is now.

        Raises:
            InfeasibleBudgetError: If no plan keeps the budget.
        """
        cost_model = dataclasses.replace(cost_model, profile=planned.cost_model.profile)
        with contextlib.suppress(simulator.NoRoom):
            again = _judged(planned.graph, planned.plan, cost_model, planned.budget)
            if not planned.budget or again.timeline.allocated_peak_bytes <= planned.budget:
                return again
        return self._plan(planned.graph, cost_model, planned.budget)

    def place(
        self,
        graph: ir.Graph,
        cost_model: CostModel,
        budget: int,
        movable: Collection[str],
        fixed: Sequence[Place],
        room: model_data.Room,
    ) -> tuple[Place, ...]:
        """Chooses the variables that leave the device, in the order in which the step takes them.

        Args:
            graph: The step, all variables on the device.
            cost_model: From `cost_model`.
            budget: Bytes to plan for; 0 for as few as the options' word asks for.
            movable: Names of variables that may leave.
            fixed: What has left already.
            room: Where variables may go.

        Raises:
            PlanError: If the options name a file that is no plan, one for another graph, or one for a device that
                computes elsewhere.
            HostMemoryError: If host memory has no room for what has to leave.
        """
        there = cost_model.device.computes_there
        fixed = [dataclasses.replace(place, computes_there=there) for place in fixed]
        if self._options.plan is not None:
            places = plan_file.first(str(self._options.plan)).places
            unknown = next((place.variable for place in places if place.variable not in graph.by_name), None)
            if unknown is not None:
                raise PlanError(
                    f"expected a plan for graph '{graph.name}', received '{self._options.plan}', which is for another "
                    f"one: it has a variable '{unknown}'. Plan again for this graph."
                )
            if any(place.computes_there for place in places) and not there:
                raise PlanError(
                    f"the plan of '{self._options.plan}' has the host compute with variables where they lie: expected "
                    "a CPU on which numpy comes to the bits of TensorFlow's kernels, received "
                    f"'{cost_model.device.name}'. Plan again on this device."
                )
        # A plain CPU's memory is the host's: its variables leave for the disk only where the user says so.
        elif not budget or (cost_model.far_tier == "disk" and self._options.swap_to == "auto"):
            places = tuple(fixed)
        else:
            seconds = self._options.planning_seconds
            places = model_data.choose(graph, cost_model, budget, self._strategy(), movable, fixed, seconds, room)
        position = {name: index for index, name in enumerate(graph.inputs)}
        return tuple(sorted(places, key=lambda place: position.get(place.variable, -1)))

    def exchange(self, graph: ir.Graph, cost_model: CostModel, budget: int) -> tuple[Exchange, ...]:
        """Chooses the blocks in which several workers sum their gradients.

        Args:
            graph: The step.
            cost_model: From `cost_model`.
            budget: Bytes to plan for; 0 for as few as the options' word asks for.

        Raises:
            PlanError: If the options name a file that is no plan.
        """
        if self._options.plan is not None:
            return plan_file.first(str(self._options.plan)).exchanges
        return blocks.choose(graph, cost_model, None if self._options.memory_budget == "free" else budget)

    def adopt(self, text: str, graph: ir.Graph, cost_model: CostModel, budget: int) -> Planned:
        """Another worker's plan for the same step, judged by its costs on this one's device.

        Args:
            text: `Planned.to_json`.
            graph: The step.
            cost_model: From `cost_model`.
            budget: Bytes to plan for; 0 for as few as the options' word asks for.

        Raises:
            InfeasibleBudgetError: If it does not keep the budget here.
            simulator.NoRoom: If the device has no room for it.
        """
        fields = json.loads(text)
        plan = Plan.from_json(fields["plan"])
        plan.check(graph)
        profile = Profile.from_json(fields["profile"]) if fields["profile"] else None
        cost_model = dataclasses.replace(cost_model, profile=profile)
        if plan.is_empty:
            plain = simulator.simulate(graph, plan, cost_model)
            planned = Planned(graph, cost_model, budget, plan, plain, plain)
        else:
            planned = _expect_kept(_judged(graph, plan, cost_model, budget), budget)
        return dataclasses.replace(planned, notes=(*fields["notes"], "the plan is the leader's"))

    def settle(self, planned: Planned) -> None:
        """Keeps the plan and the costs that led to it, so that later runs take it and leave it at that."""
        profile, question = planned.cost_model.profile, self._question(planned.budget)
        if profile is not None and question:
            device = planned.cost_model.device.name
            profiler.store_profile(profile, device, question)
            profiler.store_plan(planned.plan, device, question)

    def _question(self, budget: int) -> str:
        """What a plan depends on besides the step, the device and the costs; "" if the strategy has no name for it."""
        strategy = self._options.strategy
        if not isinstance(strategy, str) and not dataclasses.is_dataclass(strategy):
            return ""
        options = self._options
        return f"{budget} {strategy} {options.swap_to} {options.planning_seconds} {options.host_memory}"

    def _plan(self, graph: ir.Graph, cost_model: CostModel, budget: int) -> Planned:
        reserved_bytes = cost_model.profile.reserved_bytes if cost_model.profile else 0
        plan, free_bound_bytes = self._choose(graph, cost_model, max(1, budget - reserved_bytes) if budget else 0)
        plan = plan.replace(decisions=(*plan.decisions, *_carried_out(graph))).check(graph)
        return dataclasses.replace(_judged(graph, plan, cost_model, budget), free_bound_bytes=free_bound_bytes)

    def _choose(self, graph: ir.Graph, cost_model: CostModel, budget: int) -> tuple[Plan, int | None]:
        """The plan for a budget, 0 for "min" and "free"; and the bound of a free one."""
        if budget:
            return _plan_within(self._strategy(), graph, cost_model, budget), None
        if self._options.memory_budget != "free":
            return budgets.smallest(self._strategy(), graph, cost_model), None
        seconds = self._options.planning_seconds
        found = budgets.free(self._strategy(seconds / budgets.EVALUATIONS), graph, cost_model, seconds)
        has, needs = cost_model.device.memory_bytes, found.plan.memory_budget or 0
        if has is not None and needs > has * _USABLE:
            raise ValueError(
                f"memory_budget='free': expected a device with room for the step at full speed, {format_bytes(needs)}, "
                f"received one of {format_bytes(has)}, of which {_USABLE:.0%} can be planned for. "
                "Write memory_budget='auto' for the fastest plan in what the device has, or reduce the batch size."
            )
        return found.plan, found.bound_bytes

    def _far_tier(self) -> str:
        swap_to = str(self._options.swap_to)
        if swap_to == "auto":
            # A plain CPU's memory is the host's: only the disk lies beyond it.
            return "disk" if profiler.memory_in_use() is None else "host"
        return "host" if swap_to == "host" else "disk"

    def strategy(self, graph: ir.Graph) -> Strategy:
        """What makes the plans: the options' strategy, or what a file holds.

        Raises:
            PlanError: If the options name a file that is no plan, or one for another graph.
        """
        path = self._options.plan
        if path is not None:
            return Given(*plan_file.given(str(path), graph), str(path))
        return self._strategy(self._options.planning_seconds / 3)  # it will be asked several times

    def _strategy(self, planning_seconds: float | None = None) -> Strategy:
        strategy = self._options.strategy
        if isinstance(strategy, str):
            strategy = strategies.STRATEGIES[strategy]
        if isinstance(strategy, strategies.Auto | strategies.Joint | strategies.Checkmate):
            return dataclasses.replace(strategy, planning_seconds=planning_seconds or self._options.planning_seconds)
        return strategy

    def profile(
        self,
        func_graph: graphdef.FuncGraph,
        graph: ir.Graph,
        arguments: Sequence[Any],
        cost_model: CostModel,
        budget: int,
        notes: list[str],
        parts: replicas.Parts | None = None,
    ) -> Profile | None:
        """Measured costs, from the cache or from a run under a frugal plan; None if it can't be run.

        Of several replicas that share a CPU's cores each node is taken to last as long as all of them do.
        """
        if parts is not None and not profiler.is_synchronous():
            notes.append("costs are analytic, not measured: the kernels of several GPUs are not told apart")
            return None
        device = cost_model.device.name
        cached = profiler.cached_profile(graph.fingerprint, device)
        if cached is not None:
            return cached
        error: Exception | None = None
        for frugal_budget in (max(1, int(budget * _FRUGAL)), budget, 0):
            try:
                # Estimates are high for some kernels' workspace, and low for others': the run will tell.
                if frugal_budget:
                    plan = strategies.Greedy(planning_seconds=0.0).plan(graph, cost_model, frugal_budget)
                else:
                    plan = budgets.smallest(self._strategy(), graph, cost_model)
                rewritten = rewrites.rewrite(graph, plan.in_turn())
                rewritten = rewritten if parts is None else parts.merged(rewritten)
                fingerprint = graph.fingerprint
                profile = profiler.measure_step(func_graph, rewritten, arguments, self._tiers, cost_model, fingerprint)
            except (InfeasibleBudgetError, profiler.CantMeasure, tf.errors.OpError) as failure:
                error = failure
                if not (isinstance(failure, InfeasibleBudgetError) or is_out_of_memory(failure)):
                    break
            else:
                profile = dataclasses.replace(profile, links={"host": cost_model.device.links["host"]})
                if parts is not None:
                    profile = parts.of_first(profile, graph)
                profiler.store_profile(profile, device)
                gc.collect()  # the measured function's constants lie on the device
                return profile
        notes.append(f"costs are analytic, not measured: {summary(error)}")
        return None


@dataclasses.dataclass(frozen=True)
class Given:
    """A strategy that has one plan, from a file.

    Attributes:
        only: The plan.
        costs: That are in the file, if any are.
        path: The file.
    """

    only: Plan
    costs: CostModel | None
    path: str

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        return self.only

    def judged(self, graph: ir.Graph, cost_model: CostModel, budget: int) -> Planned:
        """The plan, judged by the costs in the file.

        Raises:
            InfeasibleBudgetError: If it does not keep the budget.
        """
        if self.costs is not None:
            cost_model = dataclasses.replace(cost_model, profile=self.costs.profile)
        planned = _expect_kept(_judged(graph, self.only, cost_model, self.only.memory_budget or budget), budget)
        return dataclasses.replace(planned, notes=(f"the plan is that of '{self.path}'",), is_settled=True)


def _most_swapped_bytes(graph: ir.Graph, device: DeviceSpec) -> int:
    """The most that a plan's swaps can have in a far tier at once: all that waits for a later use."""
    problem = gaps.problem(graph, CostModel(device))
    change = np.zeros(len(problem.order) + 1)
    np.add.at(change, problem.starts, problem.sizes)
    np.add.at(change, problem.ends, -problem.sizes)
    return int(np.cumsum(change).max())


def _carried_out(graph: ir.Graph) -> tuple[Place | Shard | Exchange, ...]:
    """The decisions that have made the graph what it is."""
    handles: list[Any] = [dict(graph.by_name[name].attrs) for name in graph.inputs]
    places = (Place(h["store_of"], h["tier"], h.get("computes_there", False)) for h in handles if "store_of" in h)
    return (*places, *map(Shard, graph.shards), *collectives.exchanges(graph))


def _judged(graph: ir.Graph, plan: Plan, cost_model: CostModel, budget: int) -> Planned:
    """The plan with its timelines.

    Raises:
        simulator.NoRoom: If the device has no room for it.
    """
    worst = simulator.judge(graph, plan, cost_model)
    plain = simulator.simulate(graph, Plan(), cost_model)
    memory_bound_bytes = budgets.least_peak(gaps.problem(graph, cost_model)).nbytes
    return Planned(graph, cost_model, budget, plan, worst, plain, memory_bound_bytes=memory_bound_bytes)


def _expect_kept(planned: Planned, budget: int) -> Planned:
    """The plan, made elsewhere, unless its peak lies above the budget: then an InfeasibleBudgetError is raised."""
    peak = planned.timeline.allocated_peak_bytes
    if budget and peak > budget:
        raise InfeasibleBudgetError(budget, peak, planned.timeline.peak_step.name, planned.memory_bound_bytes or 0)
    return planned


def _corrected(planned: Planned, seconds: float) -> Planned:
    """The plan with its predictions scaled to a step of so many seconds. The costs stay, and lead to it again."""
    profile = planned.cost_model.profile
    if profile is None or not planned.timeline.seconds:
        return planned
    profile = dataclasses.replace(profile, time_scale=seconds / planned.timeline.seconds)
    return dataclasses.replace(planned, cost_model=dataclasses.replace(planned.cost_model, profile=profile))


def _plan_within(strategy: Strategy, graph: ir.Graph, cost_model: CostModel, budget: int) -> Plan:
    """The strategy's plan; if it finds none, an error that names a budget it does find one for."""
    try:
        return strategy.plan(graph, cost_model, budget)
    except InfeasibleBudgetError as error:
        least_bytes = max(error.smallest_bytes, budget + 1)
        try:
            plan = budgets.smallest(strategy, graph, cost_model, least_bytes)
        except InfeasibleBudgetError:
            raise error from None
        smallest = plan.memory_budget or least_bytes
        raise InfeasibleBudgetError(budget, smallest, error.node, error.bound_bytes, error.spent_seconds) from None


def _memory_bytes(device: DeviceSpec) -> int:
    """Of the device; a plain CPU has what the machine has."""
    return device.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _resident_bytes(graph: ir.Graph, away: Collection[str]) -> int:
    """Device bytes in use that the graph does not show: other tensors, and holes' slack."""
    current = profiler.memory_in_use()
    if current is None:
        return 0
    return max(0, current - argument_bytes(graph, away))


def argument_bytes(graph: ir.Graph, away: Collection[str] = ()) -> int:
    """Device bytes of the step's arguments and variables, less those of variables that are in far tiers."""
    arguments = [node for node in graph.nodes if node.op == "Placeholder" and node.name not in away]
    return sum(sum(liveness.output_bytes(node)) for node in arguments)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device ran out. What a swap brings back is then an invalid argument to TensorFlow."""
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return True
    return isinstance(error, tf.errors.InvalidArgumentError) and "/swap_in/ParseTensor}}" in str(error)


def summary(error: Exception | None) -> str:
    """The most telling line of an error: what ran out, else the last one, which stands after the nodes."""
    lines = [line for line in str(error).splitlines() if line.strip() and "[[" not in line]
    return next((line for line in lines if line.startswith("OOM")), lines[-1] if lines else repr(error))[:300]
