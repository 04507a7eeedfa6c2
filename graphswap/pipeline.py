"""import -> measure -> plan -> rewrite -> run: what happens to a training step, top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from graphswap import allocator, graphdef, ir, placement, profiler, rewrites, simulator, strategies, tiers
from graphswap.cost_model import MEMORY_VARIABLE, CostModel, DeviceSpec, Profile
from graphswap.graphdef import UnsupportedGraphError
from graphswap.options import Options, format_bytes
from graphswap.plan import Plan
from graphswap.report import Report, StepReport
from graphswap.strategies import budgets, gaps
from graphswap.strategies.base import InfeasibleBudgetError, Strategy
from graphswap.tiers import SwapSpaceError

_TIGHTENING = 0.97
_TIGHTEST = 0.75
_CHEAP = 0.05
_USABLE = 0.99
"""Of a budget below the device's memory: the rest is for what wanders, such as the input pipeline's buffers."""
_FRUGAL = 0.93
"""Of the budget, for the first run of a step: its workspace is an estimate."""
_TRIALS = 3
_STATIC_TRACES = 4
_WANDERING = 2.0
"""How far the peak of TensorFlow's own order may lie above the planned order's (two LSTMs: 1.6)."""


@dataclasses.dataclass
class Planned:
    """A plan with what it was judged by."""

    plan: Plan
    timeline: simulator.Timeline
    plain: simulator.Timeline
    notes: list[str]
    memory_bound_bytes: int | None = None
    free_bound_bytes: int | None = None


class Session:
    """Everything about one training step: its options, plans, trial runs and report.

    Args:
        options: What the user asked for.
    """

    def __init__(self, options: Options):
        self.options = options
        self.report = Report()
        self._tiers = tiers.Tiers(options.swap_directory())
        self._inlines = False  # whether nested function calls are to be dissolved
        self._scale = 1.0  # of the budget; lowered when memory ran out in spite of a plan
        self._largest: dict[int, graphdef.Shape] = {}  # argument -> largest shape seen
        self._planned: list[tuple[tuple[graphdef.Shape, ...], tuple[graphdef.Shape, ...], StepReport]] = []
        self._functions: dict[tuple[graphdef.Shape, ...], Callable[..., Any]] = {}
        self._arguments: list[Any] = []  # of the step that runs now
        self._variables = placement.Variables()
        self._fences: list[Any] = []  # behind the holes for small buffers
        self._trials = _TRIALS
        self._keeping_seconds = self._settling_seconds = self._step_seconds = 0.0

    # --- running -----------------------------------------------------------------------------------------------

    def run(self, make: Callable[[], Callable[..., Any]], *args: Any, **kwargs: Any) -> Any:
        """Runs one step; plans when it is traced, and again if memory runs out.

        Every shape of arguments gets a trace of its own, so that its plan knows all sizes. From the
        fifth on they share one trace with open dimensions, planned for the largest shape seen.

        Args:
            make: Makes a function that traces the step when it is called.
            *args: For the step; nested tensors or arrays.
            **kwargs: Likewise.

        Raises:
            InfeasibleBudgetError: If no plan keeps the budget.
            UnsupportedGraphError: If the step can't be planned.
            SwapSpaceError: If the swap directory is full or can't be written.
        """
        shapes = self._see((args, kwargs))
        key = shapes if shapes in self._functions or len(self._functions) < _STATIC_TRACES else ()
        if key == () and self._outgrown(shapes):
            del self._functions[()]
        while True:
            self._keep_variables()
            self._settle()
            start = time.perf_counter()
            planning = self._planning_seconds()
            try:
                placed_args, placed_kwargs = self._placed((args, kwargs), is_new=key not in self._functions)
                if key not in self._functions:
                    self._functions[key] = make()
                with graphdef.without_memory_optimizer():
                    result = self._functions[key](*placed_args, **placed_kwargs)
            except _NestedCalls:
                self._inlines = True
                self._forget()
            except (tf.errors.ResourceExhaustedError, tf.errors.InvalidArgumentError) as error:
                can_repeat = self._variables.restore()
                if "No space left" in str(error):
                    raise self._swap_space_error(error) from error
                if not _is_out_of_memory(error) or not can_repeat or self._scale < _TIGHTEST:
                    raise
                self._tighten(error)
                self._forget()
            except (tf.errors.PermissionDeniedError, tf.errors.NotFoundError) as error:
                self._variables.restore()
                directory = self._tiers.used_directory()
                if directory is not None and str(directory) in str(error):
                    raise self._swap_space_error(error) from error
                raise
            except BaseException:
                self._variables.restore()
                raise
            else:
                self._record(shapes, time.perf_counter() - start - (self._planning_seconds() - planning))
                self._arguments = []
                return self._released(result)

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
        graphdef.on_traced(_optimize)
        if self._inlines:
            return graphdef.call_inline(step, args, kwargs)
        return step(*args, **kwargs)

    def _planning_seconds(self) -> float:
        return sum(sum(step.breakdown.values()) for step in self.report.steps)

    def _see(self, arguments: Any) -> tuple[graphdef.Shape, ...]:
        self._arguments = [leaf for leaf in tf.nest.flatten(arguments) if hasattr(leaf, "shape")]
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
        self._trials = _TRIALS

    def _keep_variables(self) -> None:
        """Keeps the variables' values for the case that the step fails half way.

        On the emulated accelerator always: the input pipeline shares its memory, so any step may run out.
        On a GPU for the first steps of a plan, later while it costs little beside the step. Without it, an
        out-of-memory error leaves some variables updated.
        """
        self._variables.forget()
        if not len(self._variables) or profiler.memory_in_use() is None:
            return
        if self._is_emulated() or self._trials > 0 or self._keeping_seconds < _CHEAP * self._step_seconds:
            start = time.perf_counter()
            self._variables.keep()
            self._keeping_seconds = time.perf_counter() - start

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

    def _record(self, shapes: tuple[graphdef.Shape, ...], seconds: float) -> None:
        self._variables.forget()
        self._trials -= 1
        self._step_seconds = seconds
        for accepted, _, step in reversed(self._planned):
            if _accepts(accepted, shapes):
                step.measured_seconds.append(seconds)
                step.measured_peak_bytes = profiler.memory_in_use("peak")
                return

    def _tighten(self, error: tf.errors.OpError) -> None:
        self._scale *= _TIGHTENING
        why = _summary(error) if isinstance(error, tf.errors.ResourceExhaustedError) else "when a value came back"
        for _, _, step in self._planned:
            step.notes.append(f"ran out of memory ({why[:120]}); planned again, tighter")

    def _swap_space_error(self, error: tf.errors.OpError) -> SwapSpaceError:
        return SwapSpaceError(
            f"swapping to '{self._tiers.used_directory()}' failed: {error.message.splitlines()[0]}. "
            "Free space there, or name another directory in graphswap.Options(swap_to=...)."
        )

    # --- planning ----------------------------------------------------------------------------------------------

    def optimize(self, func_graph: graphdef.FuncGraph) -> None:
        """Rewrites a traced step in place so that it keeps the budget.

        Raises:
            InfeasibleBudgetError: If no plan keeps the budget.
            UnsupportedGraphError: If the step can't be planned and `on_unsupported` is "raise".
        """
        variables = graphdef.variables(func_graph)
        with tf.init_scope():
            if not placement.are_initialized(variables):
                return  # the trace that makes the variables; TensorFlow traces again
        if not self._inlines and graphdef.has_calls(func_graph):
            raise _NestedCalls
        self._variables = placement.Variables(variables)
        with _progress(func_graph.name) as progress:
            clock = _Clock(progress)
            shapes = self._argument_shapes(func_graph)
            with clock("measure"):
                device = self._device()
                self._arrange(device)
            try:
                with clock("import"):
                    folding = graphdef.constant_folding(func_graph)
                    if folding is not None:
                        graphdef.regroup(func_graph, folding)
                    graph = graphdef.import_function(func_graph, shapes, folding)
            except UnsupportedGraphError as error:
                if self.options.on_unsupported == "raise":
                    raise
                self._add_report(
                    func_graph,
                    shapes,
                    StepReport(func_graph.name, 0, 0, Plan(), f"runs unchanged: {error}", 0, 0, 0.0, 0.0),
                )
                return
            fences = len(self._fences) * allocator.ALIGNMENT_BYTES
            resident_bytes = max(0, _resident_bytes(graph) - fences)
            cost_model = CostModel(device, resident_bytes=resident_bytes, far_tier=self._far_tier())
            budget, share = self._budget(device)
            try:
                planned = self._plan(func_graph, graph, cost_model, budget, clock)
            except InfeasibleBudgetError as error:
                asked, smallest, bound = (
                    int(nbytes / share) for nbytes in (budget, error.smallest_bytes, error.bound_bytes)
                )
                raise InfeasibleBudgetError(asked, smallest + 1, error.node, bound, error.spent_seconds) from None
            if not planned.plan.is_empty:
                with clock("rewrite"):
                    rewritten = rewrites.rewrite(graph, planned.plan)
                    graphdef.export_function(func_graph, rewritten, self._tiers)
            self._add_report(
                func_graph,
                shapes,
                _step_report(graph, budget, share / self._scale, planned, clock.seconds, self.options.memory_budget),
            )

    def _arrange(self, device: DeviceSpec) -> None:
        """Lays the device out as `simulator` takes it to be: building the model has left holes."""
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
        captured = {internal.op.name for _, internal in func_graph.captures}
        arguments = [tensor for tensor in func_graph.inputs if tensor.op.name not in captured]
        return tuple(
            tuple(
                seen if d is None else d
                for d, seen in zip(_shape(tensor) or (), self._largest.get(index) or (), strict=False)
            )
            if _shape(tensor) is not None
            else self._largest.get(index)
            for index, tensor in enumerate(arguments)
        )

    def _device(self) -> DeviceSpec:
        emulated = os.environ.get(MEMORY_VARIABLE)
        directory = self.options.swap_directory()
        if directory is None and self._far_tier() == "disk":
            directory = tiers.default_directory()
        return profiler.device_spec(int(emulated) if emulated else None, directory)

    def _far_tier(self) -> str:
        swap_to = str(self.options.swap_to)
        if swap_to == "auto":
            # A plain CPU's memory is the host's: only the disk lies beyond it.
            return "disk" if profiler.memory_in_use() is None else "host"
        return "host" if swap_to == "host" else "disk"

    def _budget(self, device: DeviceSpec) -> tuple[int, float]:
        """The bytes to plan for, 0 for "min" and "free"; and their share of the budget.

        A device can't pass a budget of all its memory, whatever its allocator loses; there the strategies leave room.
        """
        asked = self.options.memory_budget
        if asked == "min":
            return 0, 1.0
        if asked == "free":
            return 0, self._scale * _USABLE
        whole = _memory_bytes(device)
        if not isinstance(asked, int) or asked >= whole:
            asked = whole
        share = self._scale * (1.0 if asked == device.memory_bytes else _USABLE)
        return int(asked * share), share

    def _plan(self, func_graph, graph: ir.Graph, cost_model: CostModel, budget: int, clock: _Clock) -> Planned:
        plain = simulator.simulate(graph, Plan(), cost_model)
        if budget and plain.peak_bytes * _WANDERING <= budget:
            return Planned(Plan(), plain, plain, ["it fits the budget as it is"])
        notes: list[str] = []
        with clock("measure"):
            is_free = self.options.memory_budget == "free"
            room = int(_USABLE * _memory_bytes(cost_model.device)) if is_free else budget
            profile = self._profile(func_graph, graph, cost_model, room, notes)
        with clock("plan"):
            cost_model = dataclasses.replace(cost_model, profile=profile)
            plan, free_bound_bytes = self._choose(graph, cost_model, budget)
        plain = simulator.simulate(graph, Plan(), cost_model)
        plan.check(graph)
        device = cost_model.device
        timelines = []
        for second_first in dict.fromkeys(((), tuple(pair.second for pair in plan.pairs))):
            memory = None
            if device.memory_bytes is not None:
                limit = max(plan.memory_budget or 0, device.memory_bytes)
                memory = allocator.Allocator(limit, device.reserves_memory)
            timelines.append(simulator.simulate(graph, plan, cost_model, allocator=memory, second_first=second_first))
        worst = max(timelines, key=lambda timeline: timeline.allocated_peak_bytes)
        memory_bound_bytes = budgets.least_peak(gaps.problem(graph, cost_model)).nbytes
        return Planned(plan, worst, plain, notes, memory_bound_bytes, free_bound_bytes)

    def _choose(self, graph: ir.Graph, cost_model: CostModel, budget: int) -> tuple[Plan, int | None]:
        """The plan for a budget, 0 for "min" and "free"; and the bound of a free one."""
        if budget:
            return _plan_within(self._strategy(), graph, cost_model, budget), None
        if self.options.memory_budget != "free":
            return budgets.smallest(self._strategy(), graph, cost_model), None
        seconds = self.options.planning_seconds
        found = budgets.free(self._strategy(seconds / budgets.EVALUATIONS), graph, cost_model, seconds)
        has, needs = cost_model.device.memory_bytes, found.plan.memory_budget or 0
        if has is not None and needs > has * self._scale * _USABLE:
            raise ValueError(
                f"memory_budget='free': expected a device with room for the step at full speed, {format_bytes(needs)}, "
                f"received one of {format_bytes(has)}, of which {self._scale * _USABLE:.0%} can be planned for. "
                "Write memory_budget='auto' for the fastest plan in what the device has, or reduce the batch size."
            )
        return found.plan, found.bound_bytes

    def _strategy(self, planning_seconds: float | None = None) -> Strategy:
        strategy = self.options.strategy
        if isinstance(strategy, str):
            strategy = strategies.STRATEGIES[strategy]
        if isinstance(strategy, strategies.Auto | strategies.Joint | strategies.Checkmate):
            return dataclasses.replace(strategy, planning_seconds=planning_seconds or self.options.planning_seconds)
        return strategy

    def _profile(self, func_graph, graph, cost_model: CostModel, budget: int, notes: list[str]) -> Profile | None:
        """Measured costs, from the cache or from a run under a frugal plan; None if it can't be run."""
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
                rewritten = rewrites.rewrite(graph, plan.one_by_one())
                profile = profiler.measure_step(func_graph, rewritten, self._arguments, self._tiers, graph.fingerprint)
            except (InfeasibleBudgetError, profiler.CantMeasure, tf.errors.OpError) as failure:
                error = failure
                if not (isinstance(failure, InfeasibleBudgetError) or _is_out_of_memory(failure)):
                    break
            else:
                profile = dataclasses.replace(profile, links={"host": cost_model.device.links["host"]})
                profiler.store_profile(profile, device)
                gc.collect()  # the measured function's constants lie on the device
                return profile
        notes.append(f"costs are analytic, not measured: {_summary(error)}")
        return None


def function(step: Callable[..., Any] | None = None, *, memory_budget: int | str, **options: Any) -> Any:
    """Makes a `tf.function` of a training step that keeps a memory budget. Also a decorator.

    Args:
        step: A Python function or tf.function: forward pass, gradients and updates.
        memory_budget: As in `Options`.
        **options: Further fields of `Options`.

    Returns:
        A function with the arguments and results of `step`. `graphswap.report` takes it.
    """
    if step is None:
        return functools.partial(function, memory_budget=memory_budget, **options)
    session = Session(Options(memory_budget, **options))
    python_function = getattr(step, "python_function", step)

    def make() -> Callable[..., Any]:
        @functools.wraps(python_function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            return session.trace(python_function, *args, **kwargs)

        return tf.function(traced, reduce_retracing=True)

    @functools.wraps(python_function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return session.run(make, *args, **kwargs)

    setattr(call, "_graphswap_session", session)  # noqa: B010 (a function has no such attribute to type checkers)
    return call


class _NestedCalls(Exception):
    """The trace calls other tf.functions: trace again and dissolve them."""


def _optimize(func_graph: graphdef.FuncGraph, mark: Any) -> None:
    mark.optimize(func_graph)


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


def _resident_bytes(graph: ir.Graph) -> int:
    """Device bytes in use that the graph does not show: other tensors, and holes' slack."""
    current = profiler.memory_in_use()
    if current is None:
        return 0
    shown = sum(
        sum(dict(node.attrs).get("held_bytes", ())) or sum(v.nbytes for v in node.outputs)  # pyright: ignore[reportArgumentType, reportCallIssue]
        for node in graph.nodes
        if node.op == "Placeholder"
    )
    return max(0, current - shown)


def _step_report(
    graph: ir.Graph, budget: int, share: float, planned: Planned, breakdown: dict[str, float], asked: int | str
) -> StepReport:
    plan, timeline, free_bound_bytes = planned.plan, planned.timeline, planned.free_bound_bytes
    return StepReport(
        name=graph.name,
        nodes=len(graph.nodes),
        memory_budget=int((budget or plan.memory_budget or 0) / share),
        plan=plan,
        status="needs nothing" if plan.is_empty else "rewritten",
        plain_peak_bytes=planned.plain.peak_bytes,
        predicted_peak_bytes=timeline.allocated_peak_bytes,
        plain_seconds=planned.plain.seconds,
        predicted_seconds=timeline.seconds,
        swapped_bytes=timeline.swapped_bytes,
        recomputed_seconds=timeline.recomputed_seconds,
        breakdown=breakdown,
        notes=planned.notes,
        budget_word=asked if isinstance(asked, str) else "",
        memory_bound_bytes=planned.memory_bound_bytes,
        free_bound_bytes=None if free_bound_bytes is None else int(free_bound_bytes / share),
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the device ran out. What a swap brings back is then an invalid argument to TensorFlow."""
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return True
    return isinstance(error, tf.errors.InvalidArgumentError) and "/swap_in/ParseTensor}}" in str(error)


def _summary(error: Exception | None) -> str:
    """The most telling line of an error: what ran out, else the last one, which stands after the nodes."""
    lines = [line for line in str(error).splitlines() if line.strip() and "[[" not in line]
    return next((line for line in lines if line.startswith("OOM")), lines[-1] if lines else repr(error))[:300]


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


class _Clock:
    """Adds up the seconds of named phases, and shows them."""

    def __init__(self, progress: Callable[[str], None]):
        self.seconds: dict[str, float] = {}
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
def _progress(name: str) -> Iterator[Callable[[str], None]]:
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
