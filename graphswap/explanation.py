"""Explains a step: what is on the device at the peak, whose it is, and what could go while it is not needed."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.options import format_bytes
from graphswap.plan import Declined, Plan
from graphswap.simulator import Live, Timeline, at_peak
from graphswap.strategies import budgets, gaps, greedy
from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.strategies.solver import SolverError
from graphswap.variables import SMALL_BYTES

if TYPE_CHECKING:  # it needs TensorFlow
    from graphswap.profiler import Recorded

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 72
_MOST_ROWS = 12
_MOST_DECLINED = 500
_KINDS = {
    "variable": "a variable stays on the device",
    "argument": "an argument of the step stays on the device",
    "constant": "a constant stays on the device",
    "workspace": "a kernel needs it while it runs",
    "inner": "a loop or a branch makes it inside, where no plan reaches",
    "other": "the graph does not show it: other tensors, and what the allocator's chunks are too large by",
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A value on the device at the peak.

    Attributes:
        live: The value.
        layer: Whose it is.
        swap_seconds: What swapping it over the peak adds to the step by itself; None if it can't be.
        recompute_seconds: Likewise for recomputing it.
        reason: Why neither, one of both, or both can be done.
    """

    live: Live
    layer: str
    swap_seconds: float | None
    recompute_seconds: float | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Where the memory of a step goes.

    Attributes:
        graph: The step.
        timeline: As it runs without a plan.
        candidates: All that is on the device at the peak, the largest first; their bytes add up to `peak_bytes`.
        least_bytes: No plan has a lower peak (the memory bound).
        peak_bytes: As measured if the step was recorded, else as predicted.
        is_measured: Whether it was.
        smallest_bytes: The smallest budget that a quick plan was found for; None if none was looked for or found.
        free_bytes: The smallest that a quick plan was found for that is no slower, likewise.
    """

    graph: ir.Graph
    timeline: Timeline
    candidates: tuple[Candidate, ...]
    least_bytes: int
    peak_bytes: int
    is_measured: bool
    smallest_bytes: int | None = None
    free_bytes: int | None = None

    @property
    def by_kind(self) -> Mapping[str, int]:
        """Bytes at the peak by kind, the most first."""
        return _totals(self.candidates, lambda candidate: candidate.live.kind)

    @property
    def by_layer(self) -> Mapping[str, int]:
        """Likewise by layer."""
        return _totals(self.candidates, lambda candidate: candidate.layer)

    def fields(self) -> dict[str, object]:
        """As plain values, for JSON."""
        return {
            "name": self.graph.name,
            "nodes": len(self.graph.nodes),
            "peak_bytes": self.peak_bytes,
            "is_measured": self.is_measured,
            "predicted_peak_bytes": self.timeline.peak_bytes,
            "peak_node": self.timeline.peak_step.name,
            "seconds": self.timeline.seconds,
            "least_bytes": self.least_bytes,
            "smallest_bytes": self.smallest_bytes,
            "free_bytes": self.free_bytes,
            "by_kind": dict(self.by_kind),
            "by_layer": dict(self.by_layer),
            "at_peak": [
                {
                    **candidate.live._asdict(),
                    "layer": candidate.layer,
                    "swap_seconds": candidate.swap_seconds,
                    "recompute_seconds": candidate.recompute_seconds,
                    "reason": candidate.reason,
                }
                for candidate in self.candidates
            ],
        }

    def _budgets(self) -> list[tuple[str, str]]:
        rows = []
        if self.smallest_bytes is not None:
            rows.append(("reached", f"{format_bytes(self.smallest_bytes)} by a quick plan; others may need less"))
        if self.free_bytes is not None:
            rows.append(("free", f"{format_bytes(self.free_bytes)} by a quick plan that is no slower"))
        return rows

    def __str__(self) -> str:
        peak, timeline = self.peak_bytes, self.timeline
        at = timeline.peak_step
        measured = f"{format_bytes(peak)} measured; " if self.is_measured else ""
        lines = [
            f"{self.graph.name}: {len(self.graph.nodes)} nodes, {timeline.seconds:.3f} s",
            f"  peak    {measured}{format_bytes(timeline.peak_bytes)} predicted, "
            f"while '{at.name}' runs at {at.start:.3f} s",
            f"  least   no plan has a peak below {format_bytes(self.least_bytes)}",
            *(f"  {title:8}{text}" for title, text in self._budgets()),
            "",
            f"  bytes in use over the step as predicted, {format_bytes(timeline.peak_bytes)} at most",
            f"  |{_curve(timeline)}|",
        ]
        for title, totals in (("kind", self.by_kind), ("layer", self.by_layer)):
            lines += ["", f"  at the peak by {title}"]
            lines += [_share(name or "-", nbytes, peak) for name, nbytes in list(totals.items())[:_MOST_ROWS]]
            if len(totals) > _MOST_ROWS:
                rest = sum(list(totals.values())[_MOST_ROWS:])
                lines.append(_share(f"{len(totals) - _MOST_ROWS} more", rest, peak))
        lines += ["", "  the largest at the peak, and what can be done"]
        for candidate in self.candidates[:_MOST_ROWS]:
            lines.append(f"  {format_bytes(candidate.live.nbytes):>10}  {candidate.live.value or '-'}")
            lines.append(f"  {'':10}  {candidate.reason}")
        return "\n".join(lines)


def explain(graph: ir.Graph, cost_model: CostModel, recorded: Recorded | None = None) -> Explanation:
    """Explains the step as it runs without a plan.

    Args:
        graph: The step.
        cost_model: Its costs.
        recorded: What the device held during a step, with TensorFlow's own order of it; if None, what it holds in the
            order of the trace is simulated.
    """
    timeline, live = at_peak(graph, Plan(), cost_model)
    if recorded is not None:
        live = _recorded_live(graph, live, recorded)
    problem = gaps.problem(graph, cost_model)
    candidates = [_candidate(problem, one) for one in sorted(live, key=lambda one: -one.nbytes)]
    return Explanation(
        graph,
        timeline,
        tuple(candidates),
        budgets.least_peak(problem).nbytes,
        timeline.peak_bytes if recorded is None else recorded.peak_bytes,
        recorded is not None,
    )


def with_budgets(explanation: Explanation, cost_model: CostModel, seconds: float) -> Explanation:
    """The explanation with the smallest and the free budget, as quick plans reach them.

    Args:
        explanation: Of a step.
        cost_model: The same.
        seconds: After them no further plan is made.
    """
    graph, quick = explanation.graph, greedy.Greedy(planning_seconds=0.0)
    smallest = free = None
    with contextlib.suppress(InfeasibleBudgetError):
        smallest = budgets.smallest(quick, graph, cost_model).memory_budget
    with contextlib.suppress(InfeasibleBudgetError, SolverError):
        free = budgets.free(quick, graph, cost_model, seconds).plan.memory_budget
    return dataclasses.replace(explanation, smallest_bytes=smallest, free_bytes=free)


def _recorded_live(graph: ir.Graph, simulated: Iterable[Live], recorded: Recorded) -> tuple[Live, ...]:
    """What was recorded at the peak, and what was there before: its variables, its batch, and the rest."""
    before = [one for one in simulated if one.kind in ("variable", "argument")]
    made = [
        Live(node, "workspace" if is_workspace else _recorded_kind(graph, node), nbytes)
        for node, nbytes, is_workspace in recorded.live
    ]
    rest = recorded.peak_bytes - sum(one.nbytes for one in (*before, *made))
    return (*made, *before, Live("", "other", rest))


def _recorded_kind(graph: ir.Graph, node: str) -> str:
    if node in graph.by_name:
        return "activation"
    return "inner" if _INNER.split(node, 1)[0] in graph.by_name else "other"


_INNER = re.compile(r"/(?:cond|body|then|else)/_\d+/")
"""Between the name of a While or If and that of a node inside, where TensorFlow runs it."""


def declined(graph: ir.Graph, plan: Plan, cost_model: CostModel) -> tuple[Declined, ...]:
    """What is on the device at the step's peak and stays there under the plan, the largest first, with reasons."""
    problem = gaps.problem(graph, cost_model)
    evicted = {swap.value for swap in plan.swaps} | {name for one in plan.recomputes for name in one.nodes}
    found = []
    for one in sorted(at_peak(graph, Plan(), cost_model)[1], key=lambda one: -one.nbytes):
        if one.kind == "activation" and not {one.value, ir.producer(one.value)} & evicted and one.nbytes:
            found.append(Declined(one.value, f"{format_bytes(one.nbytes)}: {_candidate(problem, one).reason}"))
        if len(found) == _MOST_DECLINED:
            break
    return tuple(found)


def layer(value: str) -> str:
    """The layer that a value belongs to, by its name: gradients count as their layer's."""
    parts = [part for part in ir.producer(value).split("/") if part]
    parts = [part for part in parts[:-1] if part not in _NO_LAYERS] or parts[:1]
    return "/".join(parts[:2])


_NO_LAYERS = frozenset({"gradient_tape", "StatefulPartitionedCall", "PartitionedCall"})


def _candidate(problem: gaps.Gaps, live: Live) -> Candidate:
    owner = layer(live.value)
    if live.kind in _KINDS:
        return Candidate(live, owner, None, None, _KINDS[live.kind])
    index = problem.storage_of.get(problem.root_of.get(live.value, live.value))
    if index is None or problem.storages[index].is_held:
        return Candidate(live, owner, None, None, "it outlives the step or becomes a variable")
    if live.nbytes <= SMALL_BYTES:
        return Candidate(live, owner, None, None, "it is small: moving it would cost more than it frees")
    gap = problem.long_gap.get(index)
    if gap is None:
        return Candidate(live, owner, None, None, "it is never idle: its uses follow one another")
    node = problem.graph.by_name[ir.producer(live.value)]
    swap = problem.swap_seconds(gap)
    recompute = problem.recompute_seconds(gap, {}, ())
    idle = problem.clock[problem.gaps[gap].end] - problem.clock[problem.gaps[gap].start + 1]
    start, end = (problem.order[at] for at in (problem.gaps[gap].start, problem.gaps[gap].end))
    reason = f"idle for {1000 * idle:.1f} ms between '{start}' and '{end}': "
    if math.isfinite(recompute):
        reason += f"a swap adds {1000 * swap:.1f} ms, recomputing it {1000 * recompute:.1f} ms"
    elif problem.can_repeat(node):
        reason += f"a swap adds {1000 * swap:.1f} ms; it can't be recomputed, as what it is made of can't be repeated"
    else:
        reason += f"a swap adds {1000 * swap:.1f} ms; it can't be recomputed: {node.op} must not run twice"
    return Candidate(
        live,
        owner,
        swap if math.isfinite(swap) else None,
        recompute if math.isfinite(recompute) else None,
        reason,
    )


def _totals(candidates: Iterable[Candidate], key: Callable[[Candidate], str]) -> Mapping[str, int]:
    totals: collections.Counter[str] = collections.Counter()
    for candidate in candidates:
        totals[key(candidate)] += candidate.live.nbytes
    return dict(totals.most_common())


def _share(name: str, nbytes: int, peak: int) -> str:
    return f"  {format_bytes(nbytes):>10}  {100 * nbytes / max(1, peak):5.1f} %  {name}"


def _curve(timeline: Timeline) -> str:
    """The bytes in use over the step as a line of bars, each the most of its part of the time."""
    most: Sequence[int] = [0] * _WIDTH
    bars = list(most)
    for step in timeline.steps:
        place = min(_WIDTH - 1, int(_WIDTH * step.start / timeline.seconds)) if timeline.seconds else 0
        bars[place] = max(bars[place], step.live_bytes)
    for place in range(1, _WIDTH):
        bars[place] = bars[place] or bars[place - 1]
    top = max(1, timeline.peak_bytes)
    return "".join(_BARS[round(nbytes / top * (len(_BARS) - 1))] for nbytes in bars)
