"""Report: what was planned for a step, why, and what was measured."""

from __future__ import annotations

import collections
import dataclasses
import os
import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from graphswap import ir, liveness, page, perfetto, plan_file
from graphswap.options import format_bytes
from graphswap.picture import CurvePoint, Picture
from graphswap.plan import TIERS, Plan
from graphswap.plan_file import PlanFile
from graphswap.replanning import Round
from graphswap.strategies import budgets


@dataclasses.dataclass
class StepReport:
    """One traced step: its plan, predictions and measurements.

    Attributes:
        name: Name of the traced function.
        nodes: Number of nodes of its graph.
        memory_budget: Bytes that the plan keeps to.
        plan: The plan; empty if the step needed nothing.
        status: One sentence: what was done.
        plain_peak_bytes: Predicted peak without a plan.
        predicted_peak_bytes: Predicted peak as the allocator will count it.
        plain_seconds: Predicted length of the step without a plan.
        predicted_seconds: Predicted length of the step.
        swapped_bytes: Bytes copied to the far tier per step.
        recomputed_seconds: Seconds of repeated nodes per step.
        breakdown: Seconds that import, measuring, planning and rewriting took.
        budget_word: "auto", "min" or "free" if the user gave no size.
        memory_bound_bytes: No plan of the plan's class has a lower peak; None if nothing was planned.
        free_bound_bytes: No smaller budget is free; None if the user did not ask for a free one.
        time_scale: What the costs behind the plan were multiplied by, as measured steps took longer or shorter.
        rounds: How the plan was held against its steps (`replanning`), those of the plans before it included.
        notes: What else the user should know: costs that could not be measured, plans that were tightened.
        measured_seconds: Lengths of the steps run so far.
        measured_peak_bytes: The most that the allocator has counted so far; None if it does not count.
        earlier_peak_bytes: What it had counted before the step ran: of a model that was made on the device, say. A
            measured peak that is as high is that of the past; the step's own is at most as high.
        state_bytes: What the state of the training takes on disk beside variables that lie there, two steps' files.
        measured_host_bytes: The most that variables took of host memory in the first steps, both values of a step.
        measured_disk_bytes: The most that files of variables and of the state took.
        file: The plan with its graph and costs; None if nothing was planned.
    """

    name: str
    nodes: int
    memory_budget: int
    plan: Plan
    status: str
    plain_peak_bytes: int
    predicted_peak_bytes: int
    plain_seconds: float
    predicted_seconds: float
    swapped_bytes: int = 0
    recomputed_seconds: float = 0.0
    time_scale: float = 1.0
    breakdown: dict[str, float] = dataclasses.field(default_factory=dict)
    rounds: list[Round] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    budget_word: str = ""
    memory_bound_bytes: int | None = None
    free_bound_bytes: int | None = None
    measured_seconds: list[float] = dataclasses.field(default_factory=list)
    measured_peak_bytes: int | None = None
    earlier_peak_bytes: int = 0
    state_bytes: int = 0
    measured_host_bytes: int = 0
    measured_disk_bytes: int = 0
    file: PlanFile | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def step_seconds(self) -> float | None:
        """Median of the measured steps but the first, which also sets kernels up; None before any has run."""
        return statistics.median(self.measured_seconds[1:] or self.measured_seconds) if self.measured_seconds else None

    @property
    def far_bytes(self) -> dict[str, int]:
        """What variables outside of the device are planned to take of each tier: old values and new ones."""
        taken: dict[str, int] = {"host": 0, "disk": 0}
        if self.file is not None and self.file.plan.places:
            taken["disk"] = self.state_bytes
            for access in _accesses(self.file.graph).values():
                taken[access.tier] += access.nbytes * (2 if access.stores or access.is_updated_there else 1)
        return taken

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Bytes that a step brings to the device for variables in far tiers, and that it sends there.

        Of variables that are updated there it sends what the update reads, such as gradients.
        """
        if self.file is None:
            return 0, 0
        graph = self.file.graph
        runs = collections.Counter(name for decision in self.plan.recomputes for name in decision.nodes)
        used = _accesses(graph, runs).values()
        updates = [node for node in graph.nodes if node.op == ir.UPDATE]
        gathers = [name for node in graph.nodes if node.op == ir.VIEW for name in graph.consumers.get(node.name, ())]
        made = sum(value.nbytes for node in updates for value in node.outputs)
        made += sum(graph.value(name).nbytes * (1 + runs[name]) for name in gathers)
        read = sum(graph.value(reference).nbytes for node in updates for reference in node.inputs)
        return made + sum(a.nbytes * a.fetches for a in used), read + sum(a.nbytes * a.stores for a in used)

    def save_plan(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan with its graph and costs, for `Options(plan=...)` and the command line.

        Raises:
            ValueError: If the step was not planned.
            OSError: If the file can't be written.
        """
        plan_file.write(path, self._file().to_json())

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page that shows the plan: needs `pip install graphswap[report]`.

        Raises:
            ValueError: If the step was not planned.
            ImportError: If Bokeh is not installed.
            OSError: If the file can't be written.
        """
        plan_file.write(path, page.html(picture(self._file(), facts=self._facts())))

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the timelines as a trace, for ui.perfetto.dev.

        Raises:
            ValueError: If the step was not planned.
            OSError: If the file can't be written.
        """
        plan_file.write(path, perfetto.trace(picture(self._file(), facts=self._facts())))

    def _file(self) -> PlanFile:
        if self.file is None:
            raise ValueError(f"expected a step that was planned, received '{self.name}', which {self.status}.")
        return self.file

    def _facts(self) -> Mapping[str, str]:
        return {title: text for title, text in self._rows() if text}

    def correct(self, time_scale: float) -> None:
        """Scales the predicted seconds."""
        factor = time_scale / self.time_scale
        self.plain_seconds *= factor
        self.predicted_seconds *= factor
        self.recomputed_seconds *= factor
        self.time_scale = time_scale

    def _measured_peak(self) -> str:
        peak = self.measured_peak_bytes
        if peak is None:
            return "not counted by this device"
        if peak != self.earlier_peak_bytes:  # lower if somebody has reset the count since
            return format_bytes(peak)
        return f"at most {format_bytes(peak)}, which were in use before it ran"

    def _rows(self) -> Sequence[tuple[str, str]]:
        measured = "not run yet"
        if self.step_seconds is not None:
            measured = f"{self.step_seconds:.3f} s (median of {max(1, len(self.measured_seconds) - 1)})"
        plan = self.plan
        repeated = sum(len(decision.nodes) for decision in plan.recomputes)
        return [
            ("budget", format_bytes(self.memory_budget) + self._choice()),
            (
                "peak",
                f"plain {format_bytes(self.plain_peak_bytes)} predicted, "
                f"planned {format_bytes(self.predicted_peak_bytes)} predicted, "
                f"measured {self._measured_peak()}",
            ),
            (
                "step",
                f"plain {self.plain_seconds:.3f} s predicted, planned {self.predicted_seconds:.3f} s predicted, "
                f"measured {measured}",
            ),
            (
                "plan",
                f"{plan.strategy or 'none'}: {len(plan.swaps)} swaps ({format_bytes(self.swapped_bytes)} out), "
                f"{repeated} nodes repeated ({self.recomputed_seconds:.3f} s){self._beside()}",
            ),
            ("away", self._away()),
            ("far", self._far()),
            ("shards", self._shards()),
            ("bound", _bound(plan, self.predicted_seconds, self.time_scale)),
            ("least", _least(self.memory_bound_bytes)),
            ("took", ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self.breakdown.items())),
        ]

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.nodes} nodes): {self.status}"]
        lines += [f"  {title:<8}{text}" for title, text in self._rows() if text]
        lines += [f"  round {number} {text}" for number, text in enumerate(self.rounds, start=1)]
        lines += [f"  note    {note}" for note in self.notes]
        return "\n".join(lines)

    def _away(self) -> str:
        """What of the step's variables lives in far tiers, and how much of it moves."""
        if self.file is None or not self.plan.places:
            return ""
        used = _accesses(self.file.graph).values()
        where = [
            f"{format_bytes(sum(access.nbytes for access in used if access.tier == tier))} on {tier}"
            for tier in sorted({place.tier for place in self.plan.places}, key=TIERS.index)
        ]
        fetched, stored = map(format_bytes, self.moved_bytes)
        there = sum(access.is_updated_there for access in used)
        return (
            f"{len(self.plan.places)} variables ({', '.join(where)}{f'; {there} updated there' if there else ''}): "
            f"{fetched} fetched and {stored} stored per step"
        )

    def _beside(self) -> str:
        """How many of the copies of variables run beside compute."""
        copies = len(self.plan.prefetches) + len(self.plan.write_backs)
        return f", {copies} copies of variables beside compute" if copies else ""

    def _far(self) -> str:
        """What variables outside of the device take where they are."""
        seen = {"host": self.measured_host_bytes, "disk": self.measured_disk_bytes}
        parts = []
        for tier, nbytes in self.far_bytes.items():
            measured = f", {format_bytes(seen[tier])} measured" if self.measured_seconds else ""
            if nbytes:
                parts.append(f"{'host memory' if tier == 'host' else tier}: {format_bytes(nbytes)} planned{measured}")
        return f"{'; '.join(parts)}, old values and new ones" if parts else ""

    def _shards(self) -> str:
        """What of the step's variables is divided among workers."""
        if self.file is None or not self.plan.shards:
            return ""
        graph = self.file.graph
        kept = sum(sum(liveness.output_bytes(graph.by_name[part])) for part in graph.shards.values())
        gathered = sum(node.outputs[0].nbytes for node in graph.nodes if node.op == ir.ALL_GATHER)
        return (
            f"{len(graph.shards)} variables divided among the workers: {format_bytes(kept)} kept here, "
            f"{format_bytes(gathered)} gathered per step"
        )

    def _choice(self) -> str:
        """What the budget is, where the user left it open."""
        if self.budget_word == "auto":
            return ", what the device has"
        if self.budget_word == "min":
            return ", the smallest that a plan was found for"
        if self.free_bound_bytes is None:
            return ""
        return (
            f", the smallest found that takes no longer (by {budgets.TOLERANCE:.1%} at most); "
            f"none below {format_bytes(self.free_bound_bytes)} does"
        )


@dataclasses.dataclass
class Report:
    """All steps traced for one model or function, the newest last."""

    steps: list[StepReport] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> StepReport:
        """The step that has run most often.

        Raises:
            ValueError: If nothing has been traced yet.
        """
        if not self.steps:
            raise ValueError("no step has been traced yet. Run one training step, then ask for the report.")
        return max(self.steps, key=lambda step: len(step.measured_seconds))

    def explain(self) -> str:
        """The report with every decision and every declined candidate."""
        return "\n".join(f"{step}\n{step.plan}" for step in self.steps)

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps)) or "graphswap: no step has been traced yet."


def report(owner: Any) -> Report:
    """The report of a model compiled with `graphswap=...`, or of a function made by `graphswap.function`.

    Raises:
        ValueError: If it was not made with graphswap.
    """
    session = getattr(owner, "_graphswap_session", None)
    if session is None:
        raise ValueError(
            f"expected a model compiled with graphswap=... or a graphswap.function, received {owner!r}. "
            'Compile it with model.compile(..., graphswap="2GiB").'
        )
    return session.report


def picture(file: PlanFile, curve: Sequence[CurvePoint] = (), facts: Mapping[str, str] | None = None) -> Picture:
    """What a page or a trace shows of a plan.

    Args:
        file: The plan.
        curve: Of budget and time.
        facts: For the table at the top; by default what the simulator says.
    """
    judged = file.judge()
    return Picture(
        title=f"{file.graph.name} on {file.cost_model.device.name}",
        graph=file.graph,
        plan=file.plan,
        memory_budget=file.plan.memory_budget,
        plain=judged.plain,
        planned=judged.planned,
        facts=dict(judged.rows()) if facts is None else facts,
        time_scale=judged.time_scale,
        curve=tuple(curve),
    )


@dataclasses.dataclass
class _Access:
    """How a step uses a variable in a far tier.

    Attributes:
        tier: Where it is.
        nbytes: Of its value.
        fetches: How often it is fetched.
        stores: How often it is stored.
        is_updated_there: Whether its new value is computed where it is.
    """

    tier: str
    nbytes: int
    fetches: int = 0
    stores: int = 0
    is_updated_there: bool = False


def _accesses(graph: ir.Graph, runs: Mapping[str, int] = MappingProxyType({})) -> dict[str, _Access]:
    """The variables in far tiers that a step uses.

    Args:
        graph: The step.
        runs: How often nodes are repeated.
    """
    found: dict[str, _Access] = {}
    for node in graph.nodes:
        if node.op in (ir.FETCH, ir.VIEW, ir.STORE):
            attrs = dict(node.attrs)
            nbytes = graph.value(node.inputs[0] if node.op == ir.STORE else node.name).nbytes
            access = found.setdefault(str(attrs["variable"]), _Access(str(attrs["tier"]), nbytes))
            access.fetches += 1 + runs.get(node.name, 0) if node.op == ir.FETCH else 0
            access.stores += node.op == ir.STORE
        elif node.op == ir.UPDATE:
            attrs: Any = dict(node.attrs)
            value = ir.Value(attrs["dtype"], attrs["shape"])
            for number, handle in enumerate(ir.far_handles(node)):
                far = dict(graph.by_name[handle].attrs)
                access = found.setdefault(str(far["store_of"]), _Access(str(far["tier"]), value.nbytes))
                access.is_updated_there |= number in attrs["stored"]
    return found


def _bound(plan: Plan, predicted_seconds: float, time_scale: float) -> str:
    if plan.certificate is None or plan.memory_budget is None:
        return ""
    least = plan.certificate.seconds(plan.memory_budget) * time_scale
    above = f"; predicted is {100 * (predicted_seconds / least - 1):.1f} % above" if least > 0 else ""
    return f"no plan of its class (docs/limits.md) takes less than {least:.3f} s in this budget{above}"


def _least(memory_bound_bytes: int | None) -> str:
    if memory_bound_bytes is None:
        return ""
    return f"no plan of its class (docs/limits.md) has a peak below {format_bytes(memory_bound_bytes)}"
