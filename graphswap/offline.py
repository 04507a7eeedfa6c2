"""What the compile option does, on a step that was saved: trace -> measure -> plan -> rewrite."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from graphswap import graphdef, ir, loaded_step, pipeline, planning, profiler, rewrites, saved_model, tiers
from graphswap.cost_model import MEMORY_VARIABLE, CostModel
from graphswap.options import Options, format_bytes
from graphswap.plan import Plan
from graphswap.saved_model import SavedModelError
from graphswap.strategies.base import InfeasibleBudgetError


@dataclasses.dataclass(frozen=True)
class Step:
    """A traced step.

    Attributes:
        name: For people.
        func_graph: As TensorFlow traced it.
        graph: The same, imported.
        arguments: What it can be run on: zeros.
        run: Runs it on them as TensorFlow would, updates included.
        owner: Keeps its variables alive.
    """

    name: str
    func_graph: graphdef.FuncGraph
    graph: ir.Graph
    arguments: tuple[tf.Tensor, ...]
    run: Callable[[], Any]
    owner: Any


def trace(name: str, function: Callable[..., Any], specs: Sequence[tf.TensorSpec], owner: Any = None) -> Step:
    """Traces a function at fixed sizes.

    Args:
        name: For people.
        function: What to trace; it adds its operations to the graph being built, and calls no tf.function.
        specs: Of its arguments, with known shapes.
        owner: Kept in the result.

    Raises:
        UnsupportedGraphError: If it can't be planned.
    """
    concrete: Any = tf.function(function, autograph=False).get_concrete_function(*specs)
    graph = pipeline.imported(concrete.graph, [tuple(spec.shape.as_list()) for spec in specs]).replace(name=name)
    arguments = tuple(tf.zeros(spec.shape, spec.dtype) for spec in specs)
    return Step(name, concrete.graph, graph, arguments, lambda: concrete(*arguments), owner)


def from_saved_model(function: saved_model.Function, batch_size: int | None = None) -> Step:
    """Traces a function of a SavedModel.

    Args:
        function: The function.
        batch_size: For first dimensions that the function leaves open.

    Raises:
        SavedModelError: If a size stays open.
        UnsupportedGraphError: If it can't be planned.
    """
    specs = _closed(function.arguments, batch_size)
    step = trace(function.name, lambda *inputs: graphdef.call_concrete(function.concrete, inputs), specs, function)
    # Traced anew it runs in another order: a U-Net took 302 MiB for 282.
    return dataclasses.replace(step, run=lambda: function(*step.arguments))


def from_keras(path: str | os.PathLike[str], batch_size: int) -> Step:
    """Traces the training step of a model that Keras saved, compiled, as a `.keras` file.

    Args:
        path: The file.
        batch_size: Number of examples.

    Raises:
        SavedModelError: If there is no such file, or if the model was not compiled.
        UnsupportedGraphError: If the step can't be planned.
    """
    if not pathlib.Path(path).is_file():
        raise SavedModelError(
            f"expected a .keras file, received '{path}', which is none. Save it with model.save(...)."
        )
    import keras

    try:
        model: Any = keras.saving.load_model(path)
    except Exception as error:  # Keras raises what it likes for what it can't read
        raise SavedModelError(
            f"expected a model that Keras can load, received '{path}', of which it says: "
            f"{saved_model.first_line(error)}."
        ) from error
    if not model.compiled:
        raise SavedModelError(
            f"expected a compiled model, received '{path}', which has no optimizer and no loss. "
            "Call model.compile(...) before model.save(...)."
        )
    inputs = [tf.TensorSpec((batch_size, *tensor.shape[1:]), tensor.dtype) for tensor in model.inputs]
    targets = _targets(model, batch_size)
    count = len(inputs)

    def step(*arguments: tf.Tensor) -> Any:
        given, wanted = arguments[:count], arguments[count:]
        return model.train_step((given[0] if count == 1 else list(given), wanted[0] if len(wanted) == 1 else [*wanted]))

    model._symbolic_build(data_batch=tuple(tf.zeros(spec.shape, spec.dtype) for spec in (*inputs[:1], *targets[:1])))
    inlined = functools.partial(_inlined, step)
    return trace(pathlib.Path(path).stem, inlined, (*inputs, *targets), model)


def _inlined(step: Callable[..., Any], *arguments: tf.Tensor) -> Any:
    return graphdef.call_inline(step, arguments, {})


def _targets(model: Any, batch_size: int) -> list[tf.TensorSpec]:
    """What the loss compares the outputs with: class numbers where it is sparse, else values like the outputs."""
    loss = model.loss if isinstance(model.loss, str) else getattr(model.loss, "name", type(model.loss).__name__)
    is_sparse = "sparse" in str(loss).lower()
    return [
        tf.TensorSpec((batch_size, *tensor.shape[1:-1]), tf.int32)
        if is_sparse
        else tf.TensorSpec((batch_size, *tensor.shape[1:]), tensor.dtype)
        for tensor in model.outputs
    ]


def _closed(specs: Sequence[tf.TensorSpec], batch_size: int | None) -> list[tf.TensorSpec]:
    closed = []
    for spec in specs:
        shape: list[int | None] = [None, None] if spec.shape.rank is None else spec.shape.as_list()
        if shape and shape[0] is None and batch_size is not None:
            shape[0] = batch_size
        if None in shape:
            advice = "Give --batch_size=N." if shape.index(None) == 0 else "Save the step with this size fixed."
            raise SavedModelError(
                f"expected arguments of known sizes, received {spec.shape} for '{spec.name}'. {advice}"
            )
        closed.append(tf.TensorSpec(shape, spec.dtype, spec.name))
    return closed


# --- planning -----------------------------------------------------------------------------------------------------


_NOTHING = Plan()
_TIGHTENINGS = 5
_STEPS = 12
_RECORDED_STEPS = 8
_MARGIN = 0.96
"""Of the budget: what the steps of `Planner.fitted` may use, as the layout wanders with what else is allocated."""


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans a saved step on this machine.

    Attributes:
        step: The step.
        options: What is asked for.
        say: Gets the name of each phase that begins.
    """

    step: Step
    options: Options
    say: Callable[[str], None] = lambda phase: None
    _tiers: tiers.Tiers = dataclasses.field(default_factory=tiers.Tiers)

    def _begin(self) -> tuple[planning.Planner, CostModel, int]:
        """What plans the step, its costs as far as they are known, and bytes to plan for."""
        planner = planning.Planner(self.options, self._tiers)
        device = planner.device()
        return planner, planner.cost_model(device, self.step.graph, 0), planner.budget(device, 1.0)[0]

    @contextlib.contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        self.say(phase)
        yield

    def cost_model(self) -> tuple[CostModel, list[str]]:
        """Costs of the step on this machine, measured if it can be run here; and notes on what could not be."""
        planner, estimate, budget = self._begin()
        step = self.step
        notes: list[str] = []
        with self._clock("measure"):
            profile = planner.profile(step.func_graph, step.graph, step.arguments, estimate, budget, notes)
        return dataclasses.replace(estimate, profile=profile), notes

    def recorded(self, plan: Plan = _NOTHING) -> tuple[profiler.Recorded | None, list[str]]:
        """What the device holds while the step runs, None if it can't be told; and notes on why. Its variables change.

        Args:
            plan: What it runs under; by default it runs as TensorFlow would run it.
        """
        run = self.step.run if plan.is_empty else self._runner(self._built(plan))
        with self._clock("measure"):
            try:
                return profiler.record_memory(run, _RECORDED_STEPS), []
            except (profiler.CantMeasure, tf.errors.OpError) as error:
                return None, [f"memory is predicted, not measured: {planning.summary(error)}"]

    def plan(self) -> planning.Planned:
        """The plan for the options' budget on this machine.

        Raises:
            InfeasibleBudgetError: If there is none.
        """
        planner, estimate, budget = self._begin()
        step = self.step
        return planner.plan(step.func_graph, step.graph, step.arguments, estimate, budget, self._clock)

    def fitted(self) -> tuple[planning.Planned, Any, int | None]:
        """A plan that has been run: tightened until the allocator counts no more than the budget.

        Nobody packs the variables of a saved step, so that the layout of memory wanders from step to step, and with it
        what the allocator's chunks are too large by.

        Returns:
            The plan, a function of the step's arguments and captures, flat, that runs as planned, and the peak as
            measured over some steps; None on a device that does not count. The variables of `step` have changed.

        Raises:
            InfeasibleBudgetError: If there is none.
            SavedModelError: If the steps of several plans took more than the budget.
        """
        asked, options, peak = self.options.memory_budget, self.options, None
        for _ in range(_TIGHTENINGS):
            try:
                planned = dataclasses.replace(self, options=options).plan()
            except InfeasibleBudgetError:
                if peak is None:
                    raise
                break
            function = self._built(planned.plan)
            peak = self._measured_peak(function)
            if peak is None or not isinstance(asked, int) or peak <= _MARGIN * asked:
                return planned, function, peak
            tighter = int(planned.budget * _MARGIN * min(1.0, asked / peak))
            options = dataclasses.replace(options, memory_budget=tighter)
        raise SavedModelError(
            f"expected a plan whose steps keep {format_bytes(int(asked))}, received plans whose steps took "
            f"{format_bytes(peak or 0)} and more, as the layout of memory wanders. Raise the budget."
        )

    def _measured_peak(self, function: Any) -> int | None:
        """The peak of some steps; more than the device has if they run out of memory."""
        with self._clock("measure"):
            if MEMORY_VARIABLE in os.environ:
                peak = self._peak_when_loaded(function)
                return self._too_many_bytes() if peak is None else peak
            try:  # the memory of a real device is this process's
                return profiler.measure_peak(self._runner(function), _STEPS)
            except tf.errors.OpError as error:
                if not planning.is_out_of_memory(error):
                    raise
                return self._too_many_bytes()

    def _too_many_bytes(self) -> int:
        return (self._begin()[1].device.memory_bytes or 0) + 1

    def _peak_when_loaded(self, function: Any) -> int | None:
        """The peak of some steps of a copy that another process loads; None if it runs out of memory."""
        with tempfile.TemporaryDirectory() as directory:
            copy = pathlib.Path(directory, "copy")
            saved_model.write(self.step.owner, function, copy)
            shapes = [tensor.shape.as_list() for tensor in self.step.arguments]
            try:
                return loaded_step.peak(copy, self.step.name, shapes, _STEPS)
            except loaded_step.LoadedStepError as error:
                raise SavedModelError(
                    f"expected a copy of '{self.step.owner.directory}' that runs in a process of its own, received one "
                    f"that failed: {error}. Nothing was written."
                ) from error

    def _built(self, plan: Plan) -> Any:
        """A function of the step's arguments and captures, flat, that runs as planned."""
        return graphdef.build_function(self.step.func_graph, rewrites.rewrite(self.step.graph, plan), self._tiers)

    def _runner(self, function: Any) -> Callable[[], Any]:
        return functools.partial(graphdef.run_built, function, self.step.func_graph, self.step.arguments)
