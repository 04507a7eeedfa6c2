"""Training with parameter servers, as the chief sees it: what the workers are, and the plan of what they run.

A step is traced and planned on the chief for a worker's device. Workers are alike, so that all carry out one plan.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from graphswap import distribute, graphdef, pipeline, planning, progress, rewrites, server, tiers
from graphswap.cost_model import CostModel, DeviceSpec, Link
from graphswap.distribute import WorkerError
from graphswap.options import Options, format_bytes
from graphswap.report import Report, StepReport

_TIGHTENING = 0.97
_TIGHTEST = 0.75
_LINK_BYTES = 4 << 20
_LEAST_LINK_BYTES = 64 << 10
_LINK_COPIES = 4


class Workers:
    """The workers and parameter servers of a distribution.

    Args:
        distribution: The strategy, in the chief.

    Attributes:
        count: How many workers there are.

    Raises:
        ValueError: If TF_CONFIG lacks something.
    """

    def __init__(self, distribution: tf.distribute.ParameterServerStrategy):
        task = server.Task.from_environment()
        self.coordinator = tf.distribute.coordinator.ClusterCoordinator(distribution)
        self.count = len(task.cluster["worker"])
        self._facts: Mapping[str, server.Facts] = {}
        self.devices = {
            f"{job} {index}": f"/job:{job}/replica:0/task:{index}"
            for job in ("worker", "ps")
            for index in range(len(task.cluster[job]))
        }

    def own(self) -> list[str]:
        """Devices of the workers."""
        return [device for name, device in self.devices.items() if name.startswith("worker")]

    def facts(self) -> Mapping[str, server.Facts]:
        """What the others have said of themselves at the start, by their names, workers first.

        Raises:
            WorkerError: If they differ in what must be the same. It is raised in all of them.
        """
        if self._facts:
            return self._facts
        found = {name: server.read_facts(device) for name, device in self.devices.items()}
        own = {"chief 0": server.versions()}
        difference = distribute.first_difference(own | {name: dict(facts.versions) for name, facts in found.items()})
        devices = {name: facts.device for name, facts in found.items() if facts.device is not None}
        budgets = {
            name: {"memory of the device": format_bytes(device.memory_bytes) if device.memory_bytes else "unknown"}
            for name, device in devices.items()
        }
        difference = difference or distribute.first_difference(budgets)
        if difference:
            raise self.refused(WorkerError(difference))
        self._facts = found
        return found

    def refused(self, error: WorkerError) -> WorkerError:
        """The error, which the other processes are told."""
        server.tell(list(self.devices.values()), error)
        return error

    def expect_room(self, nbytes: int) -> None:
        """Raises a WorkerError, in all processes, if the servers can't hold so many bytes together."""
        facts = self.facts()
        has = {name: one.memory_bytes for name, one in facts.items() if one.device is None}
        if nbytes > sum(has.values()):
            raise self.refused(
                WorkerError(
                    "graphswap: expected parameter servers with room for weights, optimizer state and the workers' "
                    f"gradients, {format_bytes(nbytes)}, received {format_bytes(sum(has.values()))} in "
                    f"{', '.join(has)}. Add servers, or give them more memory."
                )
            )


class WorkerSession:
    """The plans of what workers run of a training step, and the report of them.

    Args:
        options: What the user asked for; None to trace without planning.
        workers: Who runs the steps.

    Raises:
        ValueError: If the options ask for what workers can't do.
    """

    def __init__(self, options: Options | None, workers: Workers):
        if options is not None and options.swap_to not in ("auto", "host"):
            raise ValueError(
                f"graphswap: expected swap_to='auto' or 'host' under ParameterServerStrategy, received "
                f"'{options.swap_to}'. Workers keep no files; leave swap_to out."
            )
        if options is not None and options.on_unsupported != "raise":
            raise ValueError(
                f"graphswap: expected on_unsupported='raise' under ParameterServerStrategy, received "
                f"'{options.on_unsupported}'. Leave it out, or compile without graphswap."
            )
        self.options = options
        self.report = Report()
        self._workers = workers
        self._tiers = tiers.Tiers()
        self._planner = None if options is None else planning.Planner(options, self._tiers)
        self._scale = 1.0
        self._inlines = False
        self._arguments: list[Any] = []
        self._functions: dict[Any, Any] = {}
        self._steps: dict[Any, StepReport] = {}

    def function(self, step: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """The step as a worker runs it on such arguments, planned on the first call with their shapes.

        Args:
            step: Of nested tensors and lists of variables.
            arguments: Such.

        Returns:
            A concrete function for `ClusterCoordinator.schedule`.

        Raises:
            InfeasibleBudgetError: If no plan keeps the budget.
            UnsupportedGraphError: If the step can't be planned.
        """
        key = _key(arguments)
        if key not in self._functions:
            self._arguments = [
                leaf.handle if isinstance(leaf, tf.Variable) else leaf
                for leaf in tf.nest.flatten(arguments)
                if leaf is not None
            ]
            self._functions[key] = self._traced(step, arguments)
            if self._planner is not None:
                self._steps[key] = self.report.steps[-1]
        return self._functions[key]

    def is_planned(self, arguments: Sequence[Any]) -> bool:
        """Whether `function` was called with arguments of such shapes."""
        return _key(arguments) in self._functions

    def tighten(self, error: tf.errors.OpError) -> bool:
        """Has the next call plan for less, as a worker ran out of memory. Whether there is less to plan for."""
        if self._planner is None or not planning.is_out_of_memory(error) or self._scale < _TIGHTEST:
            return False
        self._replan(f"ran out of memory ({planning.summary(error)[:120]})")
        return True

    def _replan(self, why: str) -> None:
        self._scale *= _TIGHTENING
        for step in self.report.steps:
            step.notes.append(f"{why}; planned again, tighter")
        self._functions.clear()
        self._steps.clear()
        server.look(self._workers.own(), forgets=True)

    def record(self, seconds: float, arguments: Sequence[Any]) -> None:
        """Notes how long a step took. If the first one of a plan has passed the budget, the next is planned tighter.

        Args:
            seconds: For all shares.
            arguments: Of the largest of them.
        """
        step = self._steps.get(_key(arguments))
        if step is None:
            return
        step.measured_seconds.append(seconds)
        budget = step.memory_budget
        if len(step.measured_seconds) > 1 or self.options is None or not isinstance(self.options.memory_budget, int):
            return
        peak = self._peak() or 0
        if peak > budget and self._scale >= _TIGHTEST:
            self._replan(f"took {format_bytes(peak)}")

    def record_peaks(self) -> None:
        """Notes the highest peak that a worker's allocator has counted."""
        peak = self._peak() if self.report.steps else None
        for step in self.report.steps:
            step.measured_peak_bytes = peak

    def _peak(self) -> int | None:
        peaks = (facts.peak_bytes for facts in server.look(self._workers.own()))
        return max((peak for peak in peaks if peak is not None), default=None)

    def _traced(self, step: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        def planned(*args: Any) -> Any:
            if self._planner is not None:
                graphdef.mark_current_graph(self)
                graphdef.on_traced(pipeline.optimize_marked)
            if self._inlines:
                return graphdef.call_inline(step, args, {})
            return step(*args)

        try:
            concrete = tf.function(planned, autograph=False).get_concrete_function(*arguments)
        except pipeline.NestedCalls:
            self._inlines = True
            return self._traced(step, arguments)
        return graphdef.as_planned(concrete)

    def optimize(self, func_graph: graphdef.FuncGraph) -> None:
        """Rewrites the traced step in place so that it keeps the budget of a worker.

        Raises:
            InfeasibleBudgetError: If no plan keeps the budget.
            UnsupportedGraphError: If the step can't be planned.
        """
        planner = self._planner
        assert planner is not None and self.options is not None
        if not self._inlines and graphdef.has_calls(func_graph):
            raise pipeline.NestedCalls
        with progress.shown(func_graph.name) as show:
            clock = progress.Clock(show)
            with clock("measure"), tf.init_scope():
                facts = next(iter(self._workers.facts().values()))
                device = self._device(facts)
                in_use_bytes = max((facts.in_use_bytes for facts in server.look(self._workers.own())), default=0)
            with clock("import"):
                shapes = [tuple(argument.shape) for argument in self._arguments]
                graph = rewrites.host_update(pipeline.imported(func_graph, shapes))
            far_tier = "disk" if device.links["host"].is_closed else "host"
            cost_model = CostModel(device, resident_bytes=in_use_bytes, far_tier=far_tier)
            budget, share = planner.budget(device, self._scale)
            with pipeline.as_asked(budget, share):
                planned = planner.plan(func_graph, graph, self._arguments, cost_model, budget, clock)
            with clock("rewrite"):
                rewritten = rewrites.rewrite_for_worker(graph, planned.plan)
                graphdef.export_function(func_graph, rewritten, self._tiers)
        notes = (*planned.notes, f"costs of kernels are the chief's, the device that of {self._workers.count} workers")
        planned = dataclasses.replace(planned, notes=notes)
        self.report.steps.append(
            pipeline.step_report(planned, share / self._scale, clock.seconds, (), self.options.memory_budget)
        )

    def _device(self, facts: server.Facts) -> DeviceSpec:
        assert facts.device is not None
        return dataclasses.replace(facts.device, links={**facts.device.links, rewrites.PS_TIER: self._link})

    @functools.cached_property
    def _link(self) -> Link:
        """The way between a worker and a parameter server, as measured from one to the other."""
        worker, ps = self._workers.devices["worker 0"], self._workers.devices["ps 0"]

        room = min((facts.memory_bytes for facts in self._workers.facts().values()), default=_LINK_BYTES)
        nbytes = min(_LINK_BYTES, max(_LEAST_LINK_BYTES, room // 8))

        def seconds(count: int, source: str, target: str) -> float:
            start = time.perf_counter()
            with tf.device(source):
                value = tf.zeros([count // 4])
            for _ in range(_LINK_COPIES):
                with tf.device(target):
                    tf.identity(value).shape.assert_is_fully_defined()
            with tf.device(target):
                tf.reduce_sum(tf.identity(value)).numpy()
            return (time.perf_counter() - start) / _LINK_COPIES

        seconds(4, ps, worker)
        latency = seconds(4, ps, worker)
        out, back = (nbytes / max(1e-9, seconds(nbytes, *way) - latency) for way in ((worker, ps), (ps, worker)))
        server.look(self._workers.own(), forgets=True)
        return Link(out, back, latency, overlaps=True)


def _key(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What a step is traced anew for."""
    leaves = tf.nest.flatten(arguments)
    return tuple(None if leaf is None else (leaf.dtype, tuple(leaf.shape)) for leaf in leaves)
