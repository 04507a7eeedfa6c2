"""Picture: what there is to draw of one step, and which decision each entry of its timeline carries out."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from graphswap import ir
from graphswap.plan import Decision, Plan, Prefetch, Recompute, Swap
from graphswap.simulator import Timeline

_Kind = TypeVar("_Kind", Swap, Recompute, Prefetch)


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """One budget of the curve of budget and time.

    Attributes:
        memory_budget: In bytes.
        bound_seconds: Certified: no plan of its class is faster. None if there is no bound.
        planned_seconds: As simulated; None if no plan was found.
        was_planned: Whether one was looked for.
    """

    memory_budget: int
    bound_seconds: float | None
    planned_seconds: float | None
    was_planned: bool = True


@dataclasses.dataclass(frozen=True)
class Picture:
    """One step, without and with its plan.

    Attributes:
        title: What the step is called.
        graph: The user's graph.
        plan: The plan for it.
        memory_budget: Bytes that the device may hold; None without a budget.
        plain: The step without a plan, as simulated.
        planned: The step under the plan, as simulated.
        facts: What else to say about the step, in words.
        time_scale: What the seconds of both timelines are multiplied by, as measured steps took longer or shorter.
        measured: Seconds since the step's start, rising, and bytes in use; empty if no step was recorded.
        curve: Budgets and the seconds that a step takes in them, as they are to be shown.
    """

    title: str
    graph: ir.Graph
    plan: Plan
    memory_budget: int | None
    plain: Timeline
    planned: Timeline
    facts: Mapping[str, str]
    time_scale: float = 1.0
    measured: Sequence[tuple[float, int]] = ()
    curve: Sequence[CurvePoint] = ()


def moments(timeline: Timeline) -> list[float]:
    """From when on each step's bytes are in use, in rising order.

    A copy takes its bytes when it is asked for. It starts later if its lane is busy, later even than steps after it.
    """
    starts = (step.start for step in reversed(timeline.steps))
    return list(itertools.accumulate(starts, min))[::-1]


def decided(graph: ir.Graph, plan: Plan, timeline: Timeline) -> list[Decision | None]:
    """For each step of the timeline the decision that it carries out; None for the user's nodes.

    Args:
        graph: The user's graph.
        plan: The plan.
        timeline: The graph simulated under the plan.
    """
    position = {name: place for place, name in enumerate(plan.order)} or graph.position
    outs = _queues((swap.value, position[swap.out_after], swap) for swap in plan.swaps)
    ins = _queues((swap.value, position[swap.in_after], swap) for swap in plan.swaps)
    fetches = _queues((fetch.node, position[fetch.after], fetch) for fetch in plan.prefetches)
    stores = {store.node: store for store in plan.write_backs}
    repeats = _queues((name, position[repeat.before], repeat) for repeat in plan.recomputes for name in repeat.nodes)
    found: list[Decision | None] = []
    last = -1  # of the user's nodes so far
    for step in timeline.steps:
        if step.kind in ("run", "exchange"):
            last = max(last, position[step.name])
            found.append(None)
        elif step.kind == "recompute":
            queue = repeats[step.name]
            while position[queue[0].before] <= last:  # repeats that nobody would have read were left out
                queue.popleft()
            found.append(queue.popleft())
        elif step.kind == "store":
            found.append(stores[step.name])
        else:
            queue = {"swap_out": outs, "swap_in": ins, "fetch": fetches}[step.kind][step.name]
            if step.kind == "fetch":  # runs that nobody would have read were left out
                while len(queue) > 1 and position[queue[1].after] <= last:
                    queue.popleft()
            found.append(queue.popleft())
    return found


def _queues(entries: Iterable[tuple[str, int, _Kind]]) -> dict[str, collections.deque[_Kind]]:
    """The decisions by name, each name's in the order of their positions."""
    queues: dict[str, collections.deque[_Kind]] = {}
    for name, _, decision in sorted(entries, key=lambda entry: entry[1]):
        queues.setdefault(name, collections.deque()).append(decision)
    return queues
