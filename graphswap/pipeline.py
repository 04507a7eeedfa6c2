"""import -> measure -> plan -> rewrite -> run: what happens to a training step, top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from graphswap import (
    argument_shapes,
    back_ends,
    blocks,
    distribute,
    graphdef,
    ir,
    model_data,
    placement,
    planning,
    profiler,
    progress,
    replanning,
    replicas,
    rewrites,
    shards,
    step_variables,
    tiers,
    xla,
)
from graphswap.argument_shapes import Shapes
from graphswap.cost_model import MEMORY_VARIABLE, CostModel, DeviceSpec, Link, Profile
from graphswap.graphdef import UnsupportedGraphError
from graphswap.host_variable import can_adopt, host_variables, sharded_variables
from graphswap.options import Options, format_bytes
from graphswap.plan import Exchange, Place, Plan, Shard
from graphswap.plan_file import PlanFile
from graphswap.report import Report, StepReport
from graphswap.sharded_value import Sharding
from graphswap.step_variables import StepVariables
from graphswap.strategies.base import InfeasibleBudgetError

_TIGHTENING = 0.97
_TIGHTEST = 0.75
_STATIC_TRACES = 4
_NO_REPEAT = (
    "graphswap: the step was not repeated, as the other workers may have gone on. "
    "Start all of them again, from the last checkpoint, with a memory_budget that is 3 % lower."
)


@dataclasses.dataclass
class _Watched:
    """A plan whose steps are held against its predictions (`replanning`).

    Attributes:
        planned: The plan.
        rewritten: The step's graph under it.
        step: Its report.
        memory_budget: Bytes that the steps must not pass; 0 if as few as possible were asked for.
        counted_bytes: The most that the allocator had counted before the step that runs now.
        peak_bytes: The most that it counted during the plan's steps; None if it had counted more before.
        due: The steps that the plan was wrong about, if it was: the next step is to be measured.
        costs: As measured within that step.
    """

    planned: planning.Planned
    rewritten: ir.Graph
    step: StepReport
    memory_budget: int
    counted_bytes: int | None = None
    peak_bytes: int | None = None
    due: replanning.Observation | None = None
    costs: Profile | None = None

    def seen(self) -> replanning.Observation:
        """The steps so far."""
        return replanning.Observation(
            self.planned.seconds,
            tuple(self.step.measured_seconds),
            self.memory_budget,
            self.step.predicted_peak_bytes,
            self.peak_bytes,
        )


class Session:
    """Everything about one training step: its options, plans, trial runs and report.

    Args:
        options: What the user asked for.
        jit_compile: Whether XLA compiles the step.
        report: To add to; a new one by default.
        variables: Returns, by their names, what the state of a training consists of; None for what the step uses.
        slots: Returns the optimizer's variables, of which several workers may each keep a part.

    Raises:
        ValueError: If XLA can't do what the options ask for.
    """

    def __init__(
        self,
        options: Options,
        jit_compile: bool = False,
        report: Report | None = None,
        variables: Callable[[], Mapping[str, tf.Variable]] | None = None,
        slots: Callable[[], Collection[tf.Variable]] = list,
    ):
        if jit_compile and options.swap_to != "auto":
            raise ValueError(
                f"graphswap: expected swap_to='auto' with jit_compile=True, received '{options.swap_to}'. XLA inside "
                "TensorFlow keeps on the device what is placed on the host, so that nothing can be swapped; the plan "
                "recomputes. Leave swap_to out, or set jit_compile=False."
            )
        self.options = options
        self.jit_compile = jit_compile
        self.report = Report() if report is None else report
        self._tiers = tiers.Tiers(options.swap_directory())
        self._planner = planning.Planner(options, self._tiers)
        self._inlines = False  # whether nested function calls are to be dissolved
        self._branches: Callable[[], tuple[bool, ...]] | None = None  # tells which ones the next step takes
        self._variants: dict[tuple[bool, ...], Session] = {}  # one for each choice of branches
        self._taken: tuple[bool, ...] | None = None  # the branches of this variant
        self._scale = 1.0  # of the budget; lowered when memory ran out in spite of a plan
        self._largest = argument_shapes.Largest()
        self._planned: list[tuple[Shapes, Shapes, StepReport]] = []
        self._functions: dict[Shapes, Callable[..., Any]] = {}
        self._arguments: list[Any] = []  # of the step that runs now
        self._variables = StepVariables(self._tiers, variables, jit_compile)
        self._workers = distribute.Workers()  # that train together
        self._parts: replicas.Parts | None = None  # of the step that is planned, if it runs on several devices
        self._has_agreed = False  # whether they have planned together
        self._network: Link | None = None  # as measured with the other workers
        self._sharding = Sharding()  # of what is divided among them
        self._slots = slots
        self._exchanged: tuple[tuple[Exchange, ...], ir.Graph] | None = None  # what they exchange, of which trace
        self._watched: dict[Shapes, _Watched] = {}
        self._replanned: dict[Shapes, tuple[planning.Planned, list[replanning.Round]]] = {}

    # --- running -----------------------------------------------------------------------------------------------

    def run(self, make: Callable[[Session], Callable[..., Any]], *args: Any, **kwargs: Any) -> Any:
        """Runs one step; plans when it is traced, and again if memory runs out.

        Every shape of arguments gets a trace of its own, so that its plan knows all sizes. From the
        fifth on they share one trace with open dimensions, planned for the largest shape seen.

        Args:
            make: Makes a function that calls the session's `trace` with the step when it is traced.
            *args: For the step; nested tensors or arrays.
            **kwargs: Likewise.

        Raises:
            InfeasibleBudgetError: If no plan keeps the budget.
            UnsupportedGraphError: If the step can't be planned.
            SwapSpaceError: If the swap directory is full or can't be written.
        """
        if self._branches is not None:
            return self._variant(self._branches()).run(make, *args, **kwargs)
        self._arguments = argument_shapes.arrays((args, kwargs))
        shapes = self._largest.see(self._arguments)
        if self._variables.is_stale():
            self._forget()
        key = shapes if shapes in self._functions or len(self._functions) < _STATIC_TRACES else ()
        if key == () and self._outgrown(shapes):
            del self._functions[()]
        self._review(key)
        while True:
            self._variables.prepare()
            start, counted = time.perf_counter(), profiler.memory_in_use("peak") or 0
            planned_seconds = self._planning_seconds()
            try:
                placed_args, placed_kwargs = step_variables.placed((args, kwargs), is_new=key not in self._functions)
                if key not in self._functions:
                    self._functions[key] = make(self)
                with distribute.noting_lost_processes(), graphdef.without_memory_optimizer():
                    result = self._call(key, placed_args, placed_kwargs)
            except NestedCalls:
                self._inlines = True
                self._forget()
            except _Branches as found:
                self._branches = found.decide
                self._forget()
                return self.run(make, *args, **kwargs)
            except (tf.errors.ResourceExhaustedError, tf.errors.InvalidArgumentError) as error:
                can_repeat = self._variables.restore()
                self._raise_explained(error)
                if self._workers.count > 1 and planning.is_out_of_memory(error):
                    error.add_note(_NO_REPEAT)
                    raise
                if not planning.is_out_of_memory(error) or not can_repeat or self._scale < _TIGHTEST:
                    raise
                self._tighten(f"ran out of memory ({_what_ran_out(error)[:120]})")
            except tf.errors.OpError as error:
                self._variables.restore()
                self._raise_explained(error)
                raise
            except BaseException:
                self._variables.restore()
                raise
            else:
                seconds = time.perf_counter() - start - (self._planning_seconds() - planned_seconds)
                self._variables.commit(self._record(shapes, seconds, counted))
                self._arguments.clear()
                return step_variables.released(result)

    def resume(self) -> None:
        """Lays the variables out anew, where others have run steps in between."""
        self._variables.resume()

    def far_variables(
        self, memory_bytes: int, variables: Sequence[tf.Variable]
    ) -> contextlib.AbstractContextManager[None]:
        """For variables that are made inside: in host memory as far as the options let them, then on disk.

        Args:
            memory_bytes: Of the device.
            variables: That are there already.
        """
        return self._planner.far_variables(memory_bytes, variables)

    def trace(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the step while it is traced, so that the function being traced will be rewritten.

        Raises:
            ValueError: If the step is run eagerly.
        """
        if not graphdef.mark_current_graph(self):
            raise ValueError(
                "graphswap: expected a step that is traced, received one that runs eagerly. graphswap rewrites the "
                "step's graph, and an eager step has none. Set run_eagerly=False and "
                "tf.config.run_functions_eagerly(False), or train without graphswap."
            )
        graphdef.on_traced(optimize_marked)
        if self._inlines:
            return graphdef.call_inline(step, args, kwargs)
        return step(*args, **kwargs)

    def _variant(self, taken: tuple[bool, ...]) -> Session:
        """The session of the steps that take these branches: each choice has a plan of its own."""
        if taken not in self._variants:
            variant = self._variants[taken] = Session(self.options, self.jit_compile, self.report, slots=self._slots)
            variant._taken, variant._inlines = taken, self._inlines
            variant._variables = self._variables.variant(variant._tiers)
        return self._variants[taken]

    def _call(self, shapes: Shapes, args: Any, kwargs: Any) -> Any:
        """Runs a traced step; under the profiler if a round waits for that."""
        function, watched = self._functions[shapes], self._watched.get(shapes)
        if watched is not None:
            watched.counted_bytes = profiler.memory_in_use("peak")
        if watched is None or watched.due is None:
            return function(*args, **kwargs)
        start, result = time.perf_counter(), None
        ran_seconds: float | None = None
        try:
            with profiler.recording() as events:
                begun = time.perf_counter()
                result = function(*args, **kwargs)
                ran_seconds = time.perf_counter() - begun
            planned, seconds = watched.planned, watched.due.seconds
            watched.costs = profiler.step_costs(
                events, watched.rewritten, seconds, planned.cost_model, planned.graph.fingerprint
            )
        except profiler.CantMeasure as error:
            self._end_watch(shapes, replanning.Round(watched.due, outcome=f"not measured: {error}"))
        if ran_seconds is None:
            return function(*args, **kwargs)
        breakdown = watched.step.breakdown
        breakdown["replan"] = breakdown.get("replan", 0.0) + time.perf_counter() - start - ran_seconds
        return result

    def _planning_seconds(self) -> float:
        return sum(sum(step.breakdown.values()) for step in self.report.steps)

    def _outgrown(self, shapes: Shapes) -> bool:
        """Whether the trace that would serve these shapes was planned for smaller ones."""
        fitting = [entry for entry in self._planned if argument_shapes.accepts(entry[0], shapes)]
        if not fitting or any(entry[0] == shapes for entry in fitting):
            return False
        return not any(argument_shapes.covers(planned, shapes) for _, planned, _ in fitting)

    def _forget(self) -> None:
        """Drops all traces, so that the next call plans anew."""
        self._functions.clear()
        self._planned.clear()
        self._watched.clear()
        self._replanned.clear()
        self._variables.forget()

    def _record(self, shapes: Shapes, seconds: float, counted: int) -> StepReport | None:
        """Notes how long a step took, and its peak if that lies above what the allocator had counted before.

        Under XLA, where no step is held against its plan, a peak beyond the budget has the next step planned anew.
        """
        self._variables.done(seconds)
        for accepted, _, step in reversed(self._planned):
            if argument_shapes.accepts(accepted, shapes):
                step.measured_seconds.append(seconds)
                step.measured_peak_bytes = self._counted_peak()
                watched = self._watched.get(shapes)
                if watched is not None and (step.measured_peak_bytes or 0) > (watched.counted_bytes or 0):
                    watched.peak_bytes = step.measured_peak_bytes
                peak, budget = step.measured_peak_bytes or 0, self.options.memory_budget
                is_over = isinstance(budget, int) and peak > max(counted, budget)
                if is_over and self.jit_compile and step.file is not None and self._scale >= _TIGHTEST:
                    self._tighten(f"took {format_bytes(peak)}")
                return step
        return None

    def _counted_peak(self) -> int | None:
        """The most that the allocator has counted, of one replica."""
        counted = profiler.memory_in_use("peak")
        return counted and -(-counted // self._replicas_in_memory())

    def _tighten(self, why: str) -> None:
        """Has the next call plan anew, for less."""
        self._scale *= _TIGHTENING
        for _, _, step in self._planned:
            step.notes.append(f"{why}; planned again, tighter")
        self._forget()

    def _raise_explained(self, error: tf.errors.OpError) -> None:
        explained = self._tiers.explained(error)
        if explained is not None:
            raise explained from error

    # --- planning ----------------------------------------------------------------------------------------------

    def _review(self, shapes: Shapes) -> None:
        """Holds a plan against its steps, and plans again where it was wrong; between two steps of the training."""
        watched = self._watched.get(shapes)
        if watched is None:
            return
        if watched.due is not None and watched.costs is not None:
            self._replan(shapes, watched, watched.due, watched.costs)
            return
        seen = watched.seen()
        verdict = replanning.judge(seen, len(watched.step.rounds))
        if verdict is replanning.Verdict.REPLAN:
            watched.due = seen
        elif verdict is replanning.Verdict.KEEP:
            self._planner.settle(watched.planned)
            self._end_watch(shapes, replanning.Round(seen))

    def _replan(
        self,
        shapes: Shapes,
        watched: _Watched,
        seen: replanning.Observation,
        costs: Profile,
    ) -> None:
        """Takes a better plan, which needs the step to be traced again; else corrects the predictions of this one."""
        step = watched.step
        what = f"{step.name}, round {len(step.rounds) + 1} of {replanning.MOST_ROUNDS}"
        with progress.shown(what) as show, progress.Clock(show, step.breakdown)("replan"):
            planned, done = self._planner.replan(watched.planned, costs, seen)
        self._end_watch(shapes, done)
        if planned.plan is watched.planned.plan:
            step.correct(planned.time_scale)
            if seen.is_in_budget:
                self._planner.settle(planned)
        else:
            self._replanned[shapes] = planned, step.rounds
            self._planned = [entry for entry in self._planned if entry[2] is not step]
            del self._functions[shapes]
            gc.collect()  # the old function's constants lie on the device

    def _end_watch(self, shapes: Shapes, last: replanning.Round) -> None:
        self._watched.pop(shapes).step.rounds.append(last)

    def optimize(self, func_graph: graphdef.FuncGraph) -> None:
        """Rewrites a traced step in place so that it keeps the budget.

        Raises:
            InfeasibleBudgetError: If no plan keeps the budget.
            UnsupportedGraphError: If the step can't be planned and `on_unsupported` is "raise".
        """
        with tf.init_scope():
            if not placement.are_initialized(graphdef.variables(func_graph)):
                return  # the trace that makes the variables; TensorFlow traces again
        if not self._inlines and graphdef.has_calls(func_graph):
            raise NestedCalls
        if self._taken is not None:
            graphdef.take_branches(func_graph, self._taken)
        elif not self.jit_compile and (decide := graphdef.decidable_branches(func_graph)) is not None:
            raise _Branches(decide)
        if not self.jit_compile:
            graphdef.join_branches(func_graph)
        with progress.shown(func_graph.name) as show:
            clock = progress.Clock(show)
            shapes = self._largest.of(func_graph)
            captured = self._variables.captured(func_graph)
            with clock("measure"):
                device = self._planner.device(can_swap=not self.jit_compile)
                self._variables.arrange(func_graph, captured, device, self._arguments)
            self._workers = distribute.Workers(graphdef.group_size(func_graph))
            imports = functools.partial(self._import, func_graph, shapes, clock)
            try:
                graph, leads = self._agree(imports, device) if self._plans_together() else (imports(), None)
                device = dataclasses.replace(device, network=self._network or device.network)
            except UnsupportedGraphError as error:
                if self.options.on_unsupported == "raise":
                    raise
                self._variables.move(captured, ())
                self._add_report(
                    func_graph,
                    shapes,
                    StepReport(func_graph.name, 0, 0, Plan(), f"runs unchanged: {error}", 0, 0, 0.0, 0.0),
                )
                return
            divided = self._divided(graph, captured)
            self._variables.shard(func_graph, captured, divided, self._sharding, device, self._arguments)
            parts, replicas_here = self._parts, self._replicas_in_memory()
            replica_count = 1 if parts is None else len(parts.devices)
            far = self._planner.far(device, graph, step_variables.hosted_bytes(captured), replica_count)
            if parts is not None:
                device = dataclasses.replace(
                    device,
                    memory_bytes=device.memory_bytes and device.memory_bytes // replicas_here,
                    holes=device.holes // replicas_here,
                    network=dataclasses.replace(device.links["host"], overlaps=True),  # within one machine
                )
            there = graph if parts is None or replicas_here == 1 else parts.whole
            away, fence_bytes = step_variables.away(captured), self._variables.fence_bytes
            laid_bytes = fence_bytes + step_variables.shard_bytes(captured)
            cost_model = self._planner.cost_model(device, there, laid_bytes, away, far.tier)
            cost_model = dataclasses.replace(cost_model, resident_bytes=cost_model.resident_bytes // replicas_here)
            if leads is not None:
                resident = self._workers.together("weigh their devices", lambda: str(cost_model.resident_bytes))
                cost_model = dataclasses.replace(cost_model, resident_bytes=max(map(int, resident.values())))
            budget, share = self._planner.budget(device, self._scale)
            with clock("place"):
                places = self._places(graph, captured, cost_model, budget, far.room)
                self._variables.place(func_graph, graph, captured, places, device, self._arguments, divided)
                if places:
                    graph = rewrites.place(graph, Plan(decisions=places))
                graph = rewrites.shard(graph, Plan(decisions=tuple(map(Shard, divided))))
                graph = self._exchange(graph, leads, cost_model, budget)
            replanned, rounds = self._replanned.pop(shapes, (None, []))

            def plan() -> planning.Planned:
                with as_asked(budget, share):
                    return self._planner.plan(
                        func_graph, graph, self._variables.batch, cost_model, budget, clock, parts
                    )

            if self.jit_compile:
                with as_asked(budget, share):
                    self._compile(func_graph, shapes, graph, cost_model, budget, share, clock)
                return
            if replanned is not None and replanned.graph.fingerprint == graph.fingerprint:
                with clock("plan"), as_asked(budget, share):
                    planned = self._planner.resume(replanned, cost_model)
            elif leads is None:
                planned = plan()
            else:
                planned = self._plan_together(plan if leads else None, graph, cost_model, budget)
            rewritten = graph
            if not planned.plan.is_empty:
                with clock("rewrite"):
                    rewritten = rewrites.rewrite(graph, planned.plan)
                    whole = rewritten if parts is None else parts.merged(rewritten)
                    graphdef.export_function(func_graph, whole, self._tiers, self._sharding.rank)
            step = step_report(planned, share / self._scale, clock.seconds, rounds, self.options.memory_budget)
            if self.options.shard_optimizer and self._workers.count > 1 and not divided:
                step.notes.append(
                    "no optimizer state is divided: there is none that only updates of single elements read"
                )
            if parts is not None:
                step.notes.append(_on_devices(parts, replicas_here))
            step.state_bytes = self._variables.state_bytes(captured, planned.plan.places)
            self._add_report(func_graph, shapes, step)
            # Else steps last as long as the slowest worker's, or as long as replicas take that share a host.
            is_alone = self._workers.count == 1 and parts is None
            if is_alone and not (planned.plan.is_empty or planned.is_settled) and profiler.is_synchronous():
                self._watched[shapes] = _Watched(
                    planned, rewritten, step, int(budget / share), profiler.memory_in_use("peak")
                )

    def _import(self, func_graph: graphdef.FuncGraph, shapes: Shapes, clock: progress.Clock) -> ir.Graph:
        self._parts = None
        with clock("import"):
            graph = (graphdef.import_function if self.jit_compile else imported)(func_graph, shapes)
        parts = distribute.parts(graph)
        if parts is None:
            return graph
        if self.jit_compile:
            raise UnsupportedGraphError(
                f"expected jit_compile=False with {len(parts.devices)} devices, received True. XLA compiles a step for "
                "one device. Leave jit_compile out."
            )
        if self._workers.count > 1:
            raise UnsupportedGraphError(
                f"expected one device in each of {self._workers.count} processes, received {', '.join(parts.devices)}. "
                "Start a process for each device, with CUDA_VISIBLE_DEVICES naming its GPU"
            )
        self._parts = parts
        return parts.first

    def _replicas_in_memory(self) -> int:
        """How many replicas are in the memory that the device's allocator counts: all that are on a CPU's devices."""
        return 1 if self._parts is None or profiler.device_name() != "CPU:0" else len(self._parts.devices)

    def _plans_together(self) -> bool:
        """Whether all workers plan now. Later traces are one worker's own, as when its last batch is a smaller one."""
        return self._workers.count > 1 and not self._has_agreed

    def _agree(self, imports: Callable[[], ir.Graph], device: DeviceSpec) -> tuple[ir.Graph, bool]:
        """The step, if it is the same in all workers, and whether this one is to plan it."""
        graphs: list[ir.Graph] = []

        def facts() -> dict[str, str]:
            graphs.append(imports())
            nbytes, _ = self._planner.budget(device, self._scale)
            step = f"step ({len(graphs[0].nodes)} nodes, fingerprint {graphs[0].fingerprint[:12]})"
            return {
                "options": str(self.options),
                "moment": "tracing the step",
                "version of graphswap": distribute.version(),
                "version of TensorFlow": tf.__version__,
                "budget": format_bytes(nbytes) if nbytes else str(self.options.memory_budget),
                "step": step,
            }

        self._has_agreed = True
        leads = self._workers.agree(facts)
        self._network = self._workers.network()
        return graphs[0], leads

    def _places(
        self,
        graph: ir.Graph,
        captured: Mapping[str, tf.Variable],
        cost_model: CostModel,
        budget: int,
        room: model_data.Room,
    ) -> tuple[Place, ...]:
        """Chooses where variables will live between steps: those that are not on the device."""
        if self._parts is not None:
            step_variables.expect_on_device(captured)
            return ()
        if self.jit_compile or self._workers.count > 1:  # several take one graph, and links differ
            return ()
        movable = [name for name, variable in captured.items() if can_adopt(variable)]
        fixed = self._variables.fixed(graph, captured)
        return self._planner.place(graph, cost_model, budget, movable, fixed, room)

    def _divided(self, graph: ir.Graph, captured: Mapping[str, tf.Variable]) -> tuple[str, ...]:
        """The variables of which each worker will keep a part."""
        if not self.options.shard_optimizer:
            return ()
        if self._parts is not None:
            raise ValueError(
                f"graphswap: expected shard_optimizer=False with {len(self._parts.devices)} devices in one process, "
                "received True. Start a process for each device, or leave shard_optimizer out."
            )
        if self.divide_among(self._workers.count) is None:
            return ()
        own = {id(variable) for variable in self._slots()}
        names = [name for name, variable in captured.items() if id(variable) in own and can_adopt(variable)]
        return shards.divisible(graph, names)

    def divide_among(self, count: int) -> Sharding | None:
        """How optimizer state is divided; None if it is not. All workers call this together the first time.

        Those that do not divide it call this, too: a worker that waits here is none to make variables with.

        Args:
            count: How many workers there are.

        Raises:
            WorkerError: If other workers have other options, or one did not join in time.
        """
        if count == 1:
            return None
        if self._sharding.workers != count:
            workers = distribute.Workers(count)
            workers.agree(lambda: {"options": str(self.options), "moment": "making the optimizer's state"})
            self._sharding = workers.sharding()
        return self._sharding if self.options.shard_optimizer else None

    def _exchange(self, graph: ir.Graph, leads: bool | None, cost_model: CostModel, budget: int) -> ir.Graph:
        """The step with its gradients summed block by block, if several workers or replicas do so.

        Args:
            graph: The step.
            leads: Whether this worker chooses the blocks for all; None if it plans alone: then they are those that
                all had chosen, as the others may run another trace of the step meanwhile.
            cost_model: Its costs.
            budget: Bytes to plan for.

        Raises:
            WorkerError: If this trace has other gradients than the one that all have planned.
        """
        if self.jit_compile or (self._workers.count == 1 and self._parts is None):
            return graph
        if self._parts is not None:  # one trace holds all replicas
            exchanges = self._planner.exchange(graph, cost_model, budget)
        elif leads is None:
            exchanges = blocks.transferred(*self._exchanged, graph) if self._exchanged else ()
            if exchanges is None:
                raise distribute.WorkerError(
                    "graphswap: expected the same gradients in all traces of a step, received others in "
                    f"'{graph.name}', so that the workers would not meet in their sums. Compile the model again."
                )
        else:

            def choose() -> str:
                exchanges = self._planner.exchange(graph, cost_model, budget) if leads else ()
                return Plan(decisions=exchanges).to_json()

            answers = self._workers.together("choose the blocks of gradients", choose)
            exchanges = Plan.from_json(next(iter(answers.values()))).exchanges
            self._exchanged = exchanges, graph
        return rewrites.exchange(graph, Plan(decisions=exchanges))

    def _plan_together(
        self, plan: Callable[[], planning.Planned] | None, graph: ir.Graph, cost_model: CostModel, budget: int
    ) -> planning.Planned:
        """The leader's plan, on every worker.

        Args:
            plan: Makes it; None if this worker does not lead.
            graph: The step.
            cost_model: Its costs.
            budget: Bytes to plan for.
        """
        found: list[planning.Planned] = []

        def lead() -> str:
            found.extend([plan()] if plan is not None else [])
            return found[0].to_json() if found else ""

        def follow() -> str:
            found.extend([] if found else [self._planner.adopt(text, graph, cost_model, budget)])
            return ""

        text = next(iter(self._workers.together("plan the step", lead).values()))
        self._workers.together("carry out the leader's plan", follow)
        return found[0]

    def _compile(
        self,
        func_graph: graphdef.FuncGraph,
        shapes: Shapes,
        graph: ir.Graph,
        cost_model: CostModel,
        budget: int,
        share: float,
        clock: progress.Clock,
    ) -> None:
        """Rewrites a step that XLA will compile."""

        def compiled(candidate: ir.Graph) -> profiler.Compiled:
            with clock("compile"):
                return profiler.compiled(func_graph, candidate)

        with clock("plan"):
            found = xla.plan(
                self._planner.strategy(graph),
                graph,
                cost_model,
                budget or self.options.memory_budget,
                compiled,
            )
        clock.seconds["plan"] -= clock.seconds["compile"]
        gc.collect()  # the constants of what was compiled lie on the device
        if found.rewritten is not graph:
            with clock("rewrite"):
                graphdef.export_function(func_graph, found.rewritten, self._tiers)
        if found.is_fenced:
            self._variables.fence(budget)
        step = step_report(found.planned, share / self._scale, clock.seconds, [], self.options.memory_budget)
        step.status = "needs nothing" if found.rewritten is graph else "rewritten for XLA"
        step.plain_peak_bytes, step.predicted_peak_bytes = found.plain_bytes, found.peak_bytes
        self._add_report(func_graph, shapes, step)

    def _add_report(self, func_graph, shapes: Shapes, step: StepReport) -> None:
        step.earlier_peak_bytes = self._counted_peak() or 0
        self.report.steps.append(step)
        self._planned.append((argument_shapes.accepted(func_graph, len(shapes)), shapes, step))
        self._variables.try_out()


def imported(func_graph: graphdef.FuncGraph, shapes: Sequence[graphdef.Shape]) -> ir.Graph:
    """The graph of a traced function, which is brought into the form that it will run in, in place.

    Args:
        func_graph: The traced function.
        shapes: Of its arguments.

    Raises:
        UnsupportedGraphError: If it can't be planned.
    """
    graphdef.run_trips_in_turn(func_graph)
    if (architecture := profiler.gpu_architecture()) is not None:
        graphdef.transpose_layout(func_graph, architecture)
    folding = graphdef.constant_folding(func_graph)
    if folding is not None:
        graphdef.regroup(func_graph, folding)
    return graphdef.import_function(func_graph, shapes, folding)


def _on_devices(parts: replicas.Parts, in_memory: int) -> str:
    """What to tell users of a plan that several replicas carry out."""
    names = ", ".join(map(replicas.short, parts.devices))
    shared = "; they share one allocator, of whose peak this is one replica's share" if in_memory > 1 else ""
    return f"the plan is that of each of {len(parts.devices)} replicas, on {names}{shared}"


def making_optimizer(
    session: Session | back_ends.Choice, weights: Sequence[Any]
) -> contextlib.AbstractContextManager[None]:
    """For an optimizer's variables that are made inside: in far tiers if an emulated device may have no room.

    Args:
        session: Of the step.
        weights: What is trained: an optimizer of TensorFlow's or Keras's has up to two variables for each.
    """
    limit, in_use = os.environ.get(MEMORY_VARIABLE), profiler.memory_in_use()
    distribution = tf.distribute.get_strategy()
    if distribution.num_replicas_in_sync > 1:  # then no variables are in far tiers
        is_multi_worker = isinstance(distribution, tf.distribute.MultiWorkerMirroredStrategy)
        if not (weights and isinstance(session, Session) and is_multi_worker):
            return contextlib.nullcontext()
        sharding = session.divide_among(distribution.num_replicas_in_sync)
        shapes = {tuple(weight.shape) for weight in weights}
        return contextlib.nullcontext() if sharding is None else sharded_variables(sharding, shapes)
    if limit is None or in_use is None or getattr(session, "jit_compile", False):
        return contextlib.nullcontext()
    nbytes = sum(math.prod(weight.shape) * tf.as_dtype(weight.dtype).size for weight in weights)
    if in_use + 2 * nbytes <= int(limit):
        return contextlib.nullcontext()
    if isinstance(session, Session) and session.options.names_disk:
        return session.far_variables(int(limit), [getattr(weight, "value", weight) for weight in weights])
    return host_variables()


def session(
    options: Options,
    jit_compile: bool = False,
    variables: Callable[[], Mapping[str, tf.Variable]] | None = None,
    slots: Callable[[], Collection[tf.Variable]] = list,
) -> Session | back_ends.Choice:
    """What runs a step under the back end that the options name, by default under the one that the caller names.

    Args:
        options: What the user asked for.
        jit_compile: Whether that is XLA, where the options leave it open.
        variables: As in `Session`.
        slots: Likewise.

    Raises:
        ValueError: If XLA can't do what the options ask for.
    """
    if options.jit_compile != "auto":
        is_xla = jit_compile if options.jit_compile is None else bool(options.jit_compile)
        return Session(options, is_xla, variables=variables, slots=slots)
    report = Report()
    runners = {
        name: Session(options, is_xla, report, variables) for name, is_xla in (("XLA", True), ("executor", False))
    }
    return back_ends.Choice(runners, report)


def function(step: Callable[..., Any] | None = None, *, memory_budget: int | str, **options: Any) -> Any:
    """Makes a `tf.function` of a training step that keeps a memory budget. Also a decorator.

    Args:
        step: A Python function or tf.function: forward pass, gradients and updates.
        memory_budget: As in `Options`.
        **options: Further fields of `Options`, such as `jit_compile`.

    Returns:
        A function with the arguments and results of `step`. `graphswap.report` takes it.
    """
    if step is None:
        return functools.partial(function, memory_budget=memory_budget, **options)
    asked = Options(memory_budget, **options)
    if asked.shard_optimizer:
        raise ValueError(
            "graphswap.function: expected shard_optimizer=False, received True. Only of a Keras model it is known "
            "which variables are the optimizer's. Use model.compile, or leave shard_optimizer out."
        )
    owner = session(asked)
    python_function = getattr(step, "python_function", step)

    def make(running: Session) -> Callable[..., Any]:
        @functools.wraps(python_function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            return running.trace(python_function, *args, **kwargs)

        return tf.function(traced, reduce_retracing=True, jit_compile=running.jit_compile or None)

    @functools.wraps(python_function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return owner.run(make, *args, **kwargs)

    setattr(call, "_graphswap_session", owner)  # noqa: B010 (a function has no such attribute to type checkers)
    return call


@contextlib.contextmanager
def as_asked(budget: int, share: float) -> Iterator[None]:
    """Turns the numbers of an InfeasibleBudgetError into those that the user would ask for.

    Args:
        budget: Bytes that were planned for.
        share: Of the user's budget.
    """
    try:
        yield
    except InfeasibleBudgetError as error:
        asked, smallest, bound = (int(nbytes / share) for nbytes in (budget, error.smallest_bytes, error.bound_bytes))
        raise InfeasibleBudgetError(asked, smallest + 1, error.node, bound, error.spent_seconds) from None


class NestedCalls(Exception):
    """The trace calls other tf.functions: trace again and dissolve them."""


class _Branches(Exception):
    """The step takes branches that are known before it runs: trace it again for each choice of them."""

    def __init__(self, decide: Callable[[], tuple[bool, ...]]):
        super().__init__()
        self.decide = decide


def _what_ran_out(error: tf.errors.OpError) -> str:
    return planning.summary(error) if isinstance(error, tf.errors.ResourceExhaustedError) else "when a value came back"


def optimize_marked(func_graph: graphdef.FuncGraph, mark: Any) -> None:
    """For `graphdef.on_traced`: has the session that marked a function rewrite it."""
    mark.optimize(func_graph)


def step_report(
    planned: planning.Planned,
    share: float,
    breakdown: dict[str, float],
    rounds: Sequence[replanning.Round],
    asked: int | str,
) -> StepReport:
    """What a report says of a plan.

    Args:
        planned: The plan.
        share: Of the user's budget that was planned for.
        breakdown: Seconds that planning took, by phase.
        rounds: Of replanning that led to it.
        asked: The budget as the user gave it.
    """
    plan, timeline, scale = planned.plan, planned.timeline, planned.time_scale
    free_bound_bytes = planned.free_bound_bytes
    return StepReport(
        name=planned.graph.name,
        nodes=len(planned.graph.nodes),
        memory_budget=int((planned.budget or plan.memory_budget or 0) / share),
        plan=plan,
        status="needs nothing" if plan.is_empty else "rewritten",
        plain_peak_bytes=planned.plain.peak_bytes,
        predicted_peak_bytes=timeline.allocated_peak_bytes,
        plain_seconds=planned.plain.seconds * scale,
        predicted_seconds=timeline.seconds * scale,
        swapped_bytes=timeline.swapped_bytes,
        recomputed_seconds=timeline.recomputed_seconds * scale,
        time_scale=scale,
        breakdown=breakdown,
        rounds=[*rounds],
        notes=[*planned.notes, *distribute.advice(planned.graph)],
        file=PlanFile(plan, planned.graph, planned.cost_model),
        budget_word=asked if isinstance(asked, str) else "",
        memory_bound_bytes=planned.memory_bound_bytes,
        free_bound_bytes=None if free_bound_bytes is None else int(free_bound_bytes / share),
    )
