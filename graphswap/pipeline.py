"""import -> measure -> plan -> rewrite -> run: what happens to a training step, top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from graphswap import (
    allocator,
    back_ends,
    blocks,
    distribute,
    graphdef,
    ir,
    model_data,
    model_state,
    placement,
    planning,
    profiler,
    replanning,
    replicas,
    rewrites,
    tiers,
    xla,
)
from graphswap.cost_model import MEMORY_VARIABLE, CostModel, DeviceSpec, Link, Profile
from graphswap.graphdef import UnsupportedGraphError
from graphswap.host_variable import HostVariable, adopt, can_adopt, far_variables, host_variables, value_bytes
from graphswap.options import Options, format_bytes
from graphswap.plan import Exchange, Place, Plan
from graphswap.plan_file import PlanFile
from graphswap.report import Report, StepReport
from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.variables import far_bytes, values

_TIGHTENING = 0.97
_TIGHTEST = 0.75
_CHEAP = 0.05
_TRIALS = 3
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

    Raises:
        ValueError: If XLA can't do what the options ask for.
    """

    def __init__(
        self,
        options: Options,
        jit_compile: bool = False,
        report: Report | None = None,
        variables: Callable[[], Mapping[str, tf.Variable]] | None = None,
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
        self._largest: dict[int, graphdef.Shape] = {}  # argument -> largest shape seen
        self._planned: list[tuple[tuple[graphdef.Shape, ...], tuple[graphdef.Shape, ...], StepReport]] = []
        self._functions: dict[tuple[graphdef.Shape, ...], Callable[..., Any]] = {}
        self._arguments: list[Any] = []  # of the step that runs now
        self._variables = placement.Variables()
        self._hosted: list[HostVariable] = []  # what the traces' plans keep in far tiers
        self._pieces: list[tuple[HostVariable, str, list[tf.Tensor]]] = []  # what was in which tier before the step
        self._captured: dict[int, tf.Variable] = {}  # what the traces use
        self._state = variables or self._used_variables
        self._traced_tiers: list[tuple[tf.Variable, str]] = []  # where the variables were when the steps were traced
        self._fences: list[Any] = []  # behind the holes for small buffers
        self._trials = _TRIALS
        self._workers = distribute.Workers()  # that train together
        self._parts: replicas.Parts | None = None  # of the step that is planned, if it runs on several devices
        self._has_agreed = False  # whether they have planned together
        self._network: Link | None = None  # as measured with the other workers
        self._exchanged: tuple[tuple[Exchange, ...], ir.Graph] | None = None  # what they exchange, of which trace
        self._watched: dict[tuple[graphdef.Shape, ...], _Watched] = {}
        self._replanned: dict[tuple[graphdef.Shape, ...], tuple[planning.Planned, list[replanning.Round]]] = {}
        self._keeping_seconds = self._settling_seconds = self._step_seconds = 0.0

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
        shapes = self._see((args, kwargs))
        if self._is_stale():
            self._forget()
        key = shapes if shapes in self._functions or len(self._functions) < _STATIC_TRACES else ()
        if key == () and self._outgrown(shapes):
            del self._functions[()]
        self._review(key)
        while True:
            self._keep_variables()
            self._settle()
            start, counted = time.perf_counter(), profiler.memory_in_use("peak") or 0
            planned_seconds = self._planning_seconds()
            try:
                placed_args, placed_kwargs = self._placed((args, kwargs), is_new=key not in self._functions)
                if key not in self._functions:
                    self._functions[key] = make(self)
                with graphdef.without_memory_optimizer():
                    result = self._call(key, placed_args, placed_kwargs)
            except NestedCalls:
                self._inlines = True
                self._forget()
            except _Branches as found:
                self._branches = found.decide
                self._forget()
                return self.run(make, *args, **kwargs)
            except (tf.errors.ResourceExhaustedError, tf.errors.InvalidArgumentError) as error:
                can_repeat = self._restore()
                self._raise_explained(error)
                if self._workers.count > 1 and planning.is_out_of_memory(error):
                    error.add_note(_NO_REPEAT)
                    raise
                if not planning.is_out_of_memory(error) or not can_repeat or self._scale < _TIGHTEST:
                    raise
                self._tighten(f"ran out of memory ({_what_ran_out(error)[:120]})")
            except tf.errors.OpError as error:
                self._restore()
                self._raise_explained(error)
                raise
            except BaseException:
                self._restore()
                raise
            else:
                seconds = time.perf_counter() - start - (self._planning_seconds() - planned_seconds)
                self._commit(self._record(shapes, seconds, counted))
                self._arguments.clear()  # frames of planning that an error's traceback keeps alive hold this list
                return self._released(result)

    def resume(self) -> None:
        """Lays the variables out anew, where others have run steps in between."""
        if profiler.memory_in_use() is not None and not self._is_stale():
            self._variables.keep()
            self._variables.pack()

    def far_variables(
        self, memory_bytes: int, variables: Sequence[tf.Variable]
    ) -> contextlib.AbstractContextManager[None]:
        """For variables that are made inside: in host memory as far as the options let them, then on disk.

        Args:
            memory_bytes: Of the device.
            variables: That are there already.
        """
        hosted_bytes = sum(value_bytes(variable) for variable in variables if _tier(variable) == "host")
        # As in a step, where all of them are updated: so that few have to move when it is planned.
        left = self._planner.host_bytes(memory_bytes, hosted_bytes) - 2 * hosted_bytes

        def tier_of(nbytes: int) -> str:
            nonlocal left
            if 2 * nbytes > left:
                return "disk"
            left -= 2 * nbytes
            return "host"

        return far_variables(tier_of, self._tiers)

    def _is_stale(self) -> bool:
        """Whether variables have moved since the steps were traced."""
        return any(_tier(variable) != tier for variable, tier in self._traced_tiers)

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
            variant = self._variants[taken] = Session(self.options, self.jit_compile)
            variant._taken, variant._inlines = taken, self._inlines
            variant.report, variant._hosted = self.report, self._hosted
            variant._captured, variant._state = self._captured, self._state
        return self._variants[taken]

    def _call(self, shapes: tuple[graphdef.Shape, ...], args: Any, kwargs: Any) -> Any:
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

    def _see(self, arguments: Any) -> tuple[graphdef.Shape, ...]:
        self._arguments = [leaf for leaf in _flat(arguments) if hasattr(leaf, "shape")]
        shapes = tuple(tuple(int(d) for d in leaf.shape) for leaf in self._arguments)
        for index, shape in enumerate(shapes):
            known = self._largest.get(index)
            if known is None or len(known) != len(shape):
                self._largest[index] = shape
            else:
                self._largest[index] = tuple(max(a or 0, b or 0) for a, b in zip(known, shape, strict=True))
        return shapes

    def _outgrown(self, shapes: tuple[graphdef.Shape, ...]) -> bool:
        """Whether the trace that would serve these shapes was planned for smaller ones."""
        fitting = [entry for entry in self._planned if _accepts(entry[0], shapes)]
        if not fitting or any(entry[0] == shapes for entry in fitting):
            return False
        return not any(_covers(planned, shapes) for _, planned, _ in fitting)

    def _forget(self) -> None:
        """Drops all traces, so that the next call plans anew."""
        self._functions.clear()
        self._planned.clear()
        self._watched.clear()
        self._replanned.clear()
        self._traced_tiers.clear()
        self._variables = placement.Variables()
        self._trials = _TRIALS

    def _keep_variables(self) -> None:
        """Keeps the variables' values for the case that the step fails half way.

        On the emulated accelerator always: the input pipeline shares its memory, so any step may run out.
        On a GPU for the first steps of a plan, later while it costs little beside the step. Without it, an
        out-of-memory error leaves some variables updated.
        """
        self._variables.forget()
        self._keep_pieces()
        if not len(self._variables) or profiler.memory_in_use() is None:
            return
        if self._is_emulated() or self._trials > 0 or self._keeping_seconds < _CHEAP * self._step_seconds:
            start = time.perf_counter()
            self._variables.keep()
            self._keeping_seconds = time.perf_counter() - start

    def _keep_pieces(self) -> None:
        """The same for variables in far tiers. Costs nothing until they get new values."""
        hosted = {id(variable): variable for variable in self._hosted}.values()
        self._pieces = [(variable, variable.tier, variable.pieces()) for variable in hosted]

    def _settle(self) -> None:
        """Lets every step meet the same layout of memory; on a GPU unless that takes long beside the step."""
        is_dear = self._settling_seconds > _CHEAP * self._step_seconds
        if profiler.memory_in_use() is None or (is_dear and not self._is_emulated()):
            return
        start = time.perf_counter()
        self._variables.settle()
        self._settling_seconds = time.perf_counter() - start

    def _placed(self, arguments: Any, is_new: bool) -> Any:
        """The step's arguments, arrays in new buffers of the emulated device.

        In the first run of a trace these stay outside, as the variables are packed then; `optimize` puts others in
        their place.
        """
        if not self._is_emulated():
            return arguments
        return tf.nest.map_structure(placement.outside_device if is_new else self._on_device, arguments)

    def _on_device(self, argument: Any) -> Any:
        return placement.on_device(argument, profiler.device_name()) if self._is_emulated() else argument

    def _released(self, results: Any) -> Any:
        """The step's results, small ones no longer on the emulated device."""
        return tf.nest.map_structure(placement.result_outside_device, results) if self._is_emulated() else results

    def _is_emulated(self) -> bool:
        """Whether the device is a CPU that counts its bytes: numpy's memory lies outside of it."""
        return profiler.device_name() == "CPU:0" and profiler.memory_in_use() is not None

    def _record(self, shapes: tuple[graphdef.Shape, ...], seconds: float, counted: int) -> StepReport | None:
        """Notes how long a step took, and its peak if that lies above what the allocator had counted before.

        Under XLA, where no step is held against its plan, a peak beyond the budget has the next step planned anew.
        """
        self._variables.forget()
        self._trials -= 1
        self._step_seconds = seconds
        for accepted, _, step in reversed(self._planned):
            if _accepts(accepted, shapes):
                step.measured_seconds.append(seconds)
                counted_peak = profiler.memory_in_use("peak")
                step.measured_peak_bytes = counted_peak and -(-counted_peak // self._replicas_in_memory())
                watched = self._watched.get(shapes)
                if watched is not None and (step.measured_peak_bytes or 0) > (watched.counted_bytes or 0):
                    watched.peak_bytes = step.measured_peak_bytes
                peak, budget = step.measured_peak_bytes or 0, self.options.memory_budget
                is_over = isinstance(budget, int) and peak > max(counted, budget)
                if is_over and self.jit_compile and step.file is not None and self._scale >= _TIGHTEST:
                    self._tighten(f"took {format_bytes(peak)}")
                return step
        return None

    def _tighten(self, why: str) -> None:
        """Has the next call plan anew, for less."""
        self._scale *= _TIGHTENING
        for _, _, step in self._planned:
            step.notes.append(f"{why}; planned again, tighter")
        self._forget()

    def _restore(self) -> bool:
        """Gives variables the values of before the step, as far as they were kept. Whether those on the device were."""
        for variable, tier, pieces in self._pieces:
            if variable.tier == tier:
                variable.restore(pieces)
        self._pieces.clear()
        return self._variables.restore()

    def _commit(self, step: StepReport | None) -> None:
        """Makes the step that has run the one whose state a directory keeps; lets files go that nobody needs.

        Args:
            step: Its report, which gets what far tiers hold if a trace's first steps run.

        Raises:
            SwapSpaceError: If the state can't be written. The step is done; the state is that of the one before.
        """
        if self._trials < 0 or not self._hosted:
            step = None
        if step is not None:
            step.measured_host_bytes = max(step.measured_host_bytes, self._host_bytes())
        self._pieces.clear()
        if self._hosted:
            if self._tiers.keeps_state:
                model_state.commit(self._state(), self._tiers)
            with self._tiers.explaining():
                if step is not None:
                    step.measured_disk_bytes = max(step.measured_disk_bytes, self._tiers.files_bytes())
                self._tiers.clean()

    def _host_bytes(self) -> int:
        """Bytes of variables in host memory after a step: their values, and those of before where these are others."""
        total = 0
        for variable, tier, before in self._pieces:
            if tier == variable.tier == "host":
                for old, new in zip(before, variable.pieces(), strict=True):
                    total += int(tf.strings.length(new)) + (int(tf.strings.length(old)) if bool(old != new) else 0)
        return total

    def _used_variables(self) -> Mapping[str, tf.Variable]:
        return model_state.named_variables(self._captured.values())

    def _raise_explained(self, error: tf.errors.OpError) -> None:
        explained = self._tiers.explained(error)
        if explained is not None:
            raise explained from error

    # --- planning ----------------------------------------------------------------------------------------------

    def _review(self, shapes: tuple[graphdef.Shape, ...]) -> None:
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
        shapes: tuple[graphdef.Shape, ...],
        watched: _Watched,
        seen: replanning.Observation,
        costs: Profile,
    ) -> None:
        """Takes a better plan, which needs the step to be traced again; else corrects the predictions of this one."""
        step = watched.step
        what = f"{step.name}, round {len(step.rounds) + 1} of {replanning.MOST_ROUNDS}"
        with shown_progress(what) as progress, Clock(progress, step.breakdown)("replan"):
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

    def _end_watch(self, shapes: tuple[graphdef.Shape, ...], last: replanning.Round) -> None:
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
        with shown_progress(func_graph.name) as progress:
            clock = Clock(progress)
            shapes = self._argument_shapes(func_graph)
            captured = graphdef.captured_variables(func_graph)
            self._captured.update({id(variable): variable for variable in captured.values()})
            with clock("measure"):
                device = self._planner.device(can_swap=not self.jit_compile)
                self._arrange(device, func_graph, captured)
            self._workers = distribute.Workers(graphdef.group_size(func_graph))
            imports = functools.partial(self._import, func_graph, shapes, clock)
            try:
                graph, leads = self._agree(imports, device) if self._plans_together() else (imports(), None)
                device = dataclasses.replace(device, network=self._network or device.network)
            except UnsupportedGraphError as error:
                if self.options.on_unsupported == "raise":
                    raise
                self._move(captured, ())
                self._add_report(
                    func_graph,
                    shapes,
                    StepReport(func_graph.name, 0, 0, Plan(), f"runs unchanged: {error}", 0, 0, 0.0, 0.0),
                )
                return
            fences = len(self._fences) * allocator.ALIGNMENT_BYTES
            parts, replicas_here = self._parts, self._replicas_in_memory()
            if parts is not None:
                device = dataclasses.replace(
                    device,
                    memory_bytes=device.memory_bytes and device.memory_bytes // replicas_here,
                    holes=device.holes // replicas_here,
                    network=dataclasses.replace(device.links["host"], overlaps=True),  # within one machine
                )
            far = self._far(device, graph, captured)
            there = graph if parts is None or replicas_here == 1 else parts.whole
            cost_model = self._planner.cost_model(device, there, fences, _away(captured), far.tier)
            cost_model = dataclasses.replace(cost_model, resident_bytes=cost_model.resident_bytes // replicas_here)
            if leads is not None:
                resident = self._workers.together("weigh their devices", lambda: str(cost_model.resident_bytes))
                cost_model = dataclasses.replace(cost_model, resident_bytes=max(map(int, resident.values())))
            budget, share = self._planner.budget(device, self._scale)
            with clock("place"):
                graph = self._place(func_graph, graph, captured, device, cost_model, budget, far.room)
                graph = self._exchange(graph, leads, cost_model, budget)
            replanned, rounds = self._replanned.pop(shapes, (None, []))

            def plan() -> planning.Planned:
                with as_asked(budget, share):
                    return self._planner.plan(func_graph, graph, self._arguments, cost_model, budget, clock, parts)

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
                    graphdef.export_function(func_graph, whole, self._tiers)
            step = step_report(planned, share / self._scale, clock.seconds, rounds, self.options.memory_budget)
            if parts is not None:
                step.notes.append(_on_devices(parts, replicas_here))
            step.state_bytes = self._state_bytes(captured, planned.plan.places)
            self._add_report(func_graph, shapes, step)
            # Else steps last as long as the slowest worker's, or as long as replicas take that share a host.
            is_alone = self._workers.count == 1 and parts is None
            if is_alone and not (planned.plan.is_empty or planned.is_settled) and profiler.is_synchronous():
                self._watched[shapes] = _Watched(
                    planned, rewritten, step, int(budget / share), profiler.memory_in_use("peak")
                )

    def _import(self, func_graph: graphdef.FuncGraph, shapes: Sequence[graphdef.Shape], clock: Clock) -> ir.Graph:
        with clock("import"):
            graph = (graphdef.import_function if self.jit_compile else imported)(func_graph, shapes)
        self._parts = parts = distribute.parts(graph)
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
                "version of graphswap": distribute.version(),
                "version of TensorFlow": tf.__version__,
                "options": str(self.options),
                "budget": format_bytes(nbytes) if nbytes else str(self.options.memory_budget),
                "step": step,
            }

        self._has_agreed = True
        leads = self._workers.agree(facts)
        self._network = self._workers.network()
        return graphs[0], leads

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
        shapes: tuple[graphdef.Shape, ...],
        graph: ir.Graph,
        cost_model: CostModel,
        budget: int,
        share: float,
        clock: Clock,
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
            with tf.init_scope():
                room = budget - allocator.HOLE_BYTES - (profiler.memory_in_use() or 0)
                self._fences.append(placement.fence(room, profiler.device_name()))
        step = step_report(found.planned, share / self._scale, clock.seconds, [], self.options.memory_budget)
        step.status = "needs nothing" if found.rewritten is graph else "rewritten for XLA"
        step.plain_peak_bytes, step.predicted_peak_bytes = found.plain_bytes, found.peak_bytes
        self._add_report(func_graph, shapes, step)

    def _far(self, device: DeviceSpec, graph: ir.Graph, captured: Mapping[str, tf.Variable]) -> planning.Far:
        """Where the step's swaps and variables go."""
        hosted = {name: value_bytes(variable) for name, variable in captured.items() if _tier(variable) == "host"}
        far = self._planner.far(device, graph, sum(hosted.values()))
        idle = sum(nbytes for name, nbytes in hosted.items() if not graph.consumers.get(name))
        return dataclasses.replace(
            far, room=dataclasses.replace(far.room, host_bytes=max(0, far.room.host_bytes - idle))
        )

    def _place(
        self,
        func_graph: graphdef.FuncGraph,
        graph: ir.Graph,
        captured: Mapping[str, tf.Variable],
        device: DeviceSpec,
        cost_model: CostModel,
        budget: int,
        room: model_data.Room,
    ) -> ir.Graph:
        """Moves variables to where they will live between steps. Returns the step with what fetches and stores them."""
        places: tuple[Place, ...] = ()
        if self._parts is not None:
            self._expect_on_device(captured)
        elif not self.jit_compile and self._workers.count == 1:  # several take one graph, and links differ
            movable = [name for name, variable in captured.items() if can_adopt(variable)]
            hosted = {id(variable) for variable in self._hosted}
            fixed = [
                Place(name, _tier(variable))
                for name, variable in captured.items()
                if _tier(variable) != "device" and (id(variable) in hosted or not graph.consumers.get(name))
            ]
            places = self._planner.place(graph, cost_model, budget, movable, fixed, room)
        taken = far_bytes(graph)
        disk_bytes = sum(taken.get(place.variable, 0) for place in places if place.tier == "disk")
        if disk_bytes:
            self._tiers.expect_room(disk_bytes + self._state_bytes(captured, places))
        if self._move(captured, places):
            self._arrange(device, func_graph, captured)
        self._traced_tiers += [(variable, _tier(variable)) for variable in captured.values()]
        if not places:
            return graph
        used = values(graph)
        placed = [adopt(captured[place.variable]) for place in places if place.variable in used]
        self._hosted += placed
        self._keep_pieces()
        graphdef.capture(func_graph, [handle for variable in placed for handle in variable.store_handles])
        return rewrites.place(graph, Plan(decisions=places))

    def _expect_on_device(self, captured: Mapping[str, tf.Variable]) -> None:
        """Raises a ValueError if variables of a step of several devices are in far tiers."""
        away = _away(captured)
        if away:
            raise ValueError(
                f"graphswap: expected all variables on the device in a step of several devices, received '{away[0]}' "
                f"in the tier '{_tier(captured[away[0]])}'. Make the model outside of graphswap.host_variables(), or "
                "train on one device."
            )

    def _state_bytes(self, captured: Mapping[str, tf.Variable], places: Sequence[Place]) -> int:
        """The most that a state takes on disk, the last one's files included, beside the variables that lie there."""
        on_disk = {id(captured[place.variable]) for place in places if place.tier == "disk"}
        if not places or not self._tiers.keeps_state:
            return 0
        return 2 * sum(value_bytes(variable) for variable in self._state().values() if id(variable) not in on_disk)

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

    def _move(self, captured: Mapping[str, tf.Variable], places: Sequence[Place]) -> bool:
        """Brings variables to their tiers, those without a place to the device. Whether any has moved."""
        tier_of = {place.variable: place.tier for place in places}
        has_moved = False
        # What leaves goes first, to make room for what comes.
        for name in sorted(captured, key=lambda name: name not in tier_of):
            tier, variable = tier_of.get(name, "device"), captured[name]
            if tier != "device" or isinstance(variable, HostVariable):
                has_moved |= adopt(variable).tier != tier
                adopt(variable).move(tier, self._tiers)
        return has_moved

    def _arrange(self, device: DeviceSpec, func_graph: graphdef.FuncGraph, captured: Mapping[str, tf.Variable]) -> None:
        """Lays the device out as `simulator` takes it to be: building the model has left holes."""
        away = {id(captured[name].handle) for name in _away(captured)}
        self._variables = placement.Variables([v for v in graphdef.variables(func_graph) if id(v.handle) not in away])
        if profiler.memory_in_use() is None:
            return
        with tf.init_scope():
            self._fences = []
            self._variables.keep()
            self._variables.pack()
            self._arguments = [self._on_device(argument) for argument in self._arguments]
            self._fences = placement.leave_holes(device.holes, allocator.HOLE_BYTES, profiler.device_name())

    def _add_report(self, func_graph, shapes: tuple[graphdef.Shape, ...], step: StepReport) -> None:
        accepted = tuple(_shape(tensor) for tensor in func_graph.inputs if tensor.dtype != tf.resource)[: len(shapes)]
        self.report.steps.append(step)
        self._planned.append((accepted, shapes, step))
        self._trials = _TRIALS

    def _argument_shapes(self, func_graph: graphdef.FuncGraph) -> tuple[graphdef.Shape, ...]:
        return tuple(
            tuple(
                seen if d is None else d
                for d, seen in zip(_shape(tensor) or (), self._largest.get(index) or (), strict=False)
            )
            if _shape(tensor) is not None
            else self._largest.get(index)
            for index, tensor in enumerate(graphdef.arguments(func_graph))
        )


def _away(captured: Mapping[str, tf.Variable]) -> list[str]:
    """Which variables are in far tiers now."""
    return [name for name, variable in captured.items() if _tier(variable) != "device"]


def _tier(variable: tf.Variable) -> str:
    return variable.tier if isinstance(variable, HostVariable) else "device"


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
    names = ", ".join(device.rpartition("device:")[2] for device in parts.devices)
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
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:  # then all variables stay on their devices
        return contextlib.nullcontext()
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
) -> Session | back_ends.Choice:
    """What runs a step under the back end that the options name, by default under the one that the caller names.

    Args:
        options: What the user asked for.
        jit_compile: Whether that is XLA, where the options leave it open.
        variables: As in `Session`.

    Raises:
        ValueError: If XLA can't do what the options ask for.
    """
    if options.jit_compile != "auto":
        is_xla = jit_compile if options.jit_compile is None else bool(options.jit_compile)
        return Session(options, is_xla, variables=variables)
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
    owner = session(Options(memory_budget, **options))
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


def _flat(arguments: Any) -> list[Any]:
    """The leaves of nested arguments; of one that holds a value for each replica these."""
    leaves = []
    for leaf in tf.nest.flatten(arguments):
        is_distributed = isinstance(leaf, tf.distribute.DistributedValues)
        leaves += tf.nest.flatten(leaf, expand_composites=True) if is_distributed else [leaf]
    return leaves


def _accepts(accepted: Sequence[graphdef.Shape], shapes: Sequence[graphdef.Shape]) -> bool:
    return len(accepted) == len(shapes) and all(
        a is None or (s is not None and len(a) == len(s) and all(x in (None, y) for x, y in zip(a, s, strict=True)))
        for a, s in zip(accepted, shapes, strict=True)
    )


def _covers(planned: Sequence[graphdef.Shape], shapes: Sequence[graphdef.Shape]) -> bool:
    return all(
        p is None or s is None or all((x or 0) >= (y or 0) for x, y in zip(p, s, strict=False))
        for p, s in zip(planned, shapes, strict=False)
    )


def _shape(tensor: tf.Tensor) -> graphdef.Shape:
    return None if tensor.shape.rank is None else tuple(tensor.shape.as_list())


class Clock:
    """Adds up the seconds of named phases, and shows them."""

    def __init__(self, progress: Callable[[str], None], seconds: dict[str, float] | None = None):
        self.seconds = {} if seconds is None else seconds
        self._progress = progress

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._progress(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@contextlib.contextmanager
def shown_progress(name: str) -> Iterator[Callable[[str], None]]:
    """Shows what is going on in one line of a terminal; says nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda phase: None
        return

    def show(phase: str) -> None:
        print(f"\r\x1b[Kgraphswap: {phase} {name} ...", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
