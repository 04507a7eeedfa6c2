"""trace(picture) -> str: one step in the trace event format, which Perfetto and chrome://tracing open.

The plain step, the planned one and, if it was recorded, the measured one are processes of their own. The simulated
ones have a lane that computes and one for each direction of each link. All have a counter of the bytes in use.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from graphswap import ir
from graphswap.picture import Picture, decided, moments
from graphswap.plan import Decision, Plan, Prefetch, Swap, WriteBack
from graphswap.simulator import Step, Timeline

_Event = dict[str, Any]


def trace(picture: Picture) -> str:
    """The trace as JSON text."""
    processes = {
        "plain, simulated": _simulated(picture, Plan(), picture.plain),
        "planned, simulated": _simulated(picture, picture.plan, picture.planned),
    }
    if picture.measured:
        processes["measured"] = _counter(picture.measured)
    events = [
        {"pid": pid, **event}
        for pid, (name, process) in enumerate(processes.items(), start=1)
        for event in (_naming("process_name", 0, name), *process)
    ]
    whole = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"title": picture.title, **picture.facts}}
    return json.dumps(whole, separators=(",", ":"))


def _simulated(picture: Picture, plan: Plan, timeline: Timeline) -> Iterator[_Event]:
    scale = picture.time_scale
    lanes = {"compute": 1}
    for step, decision in zip(timeline.steps, decided(picture.graph, plan, timeline), strict=True):
        lane = lanes.setdefault(_lane(picture.graph, step, decision), len(lanes) + 1)
        start, end = _nanoseconds(step.start * scale), _nanoseconds(step.end * scale)
        yield {
            "ph": "X",
            "tid": lane,
            "name": step.name,
            "cat": step.kind,
            "ts": start / 1000,
            "dur": (end - start) / 1000,
            **_why(decision),
        }
    for name, lane in lanes.items():
        yield _naming("thread_name", lane, name)
    levels = zip(moments(timeline), (step.live_bytes for step in timeline.steps), strict=True)
    yield from _counter((seconds * scale, nbytes) for seconds, nbytes in levels)


def _counter(levels: Iterable[tuple[float, int]]) -> Iterator[_Event]:
    """Seconds and bytes as a counter; where nothing changes it needs no event."""
    last = None
    for seconds, nbytes in levels:
        if nbytes != last:
            microseconds = _nanoseconds(seconds) / 1000
            yield {"ph": "C", "name": "bytes in use", "ts": microseconds, "args": {"bytes": nbytes}}
            last = nbytes


def _lane(graph: ir.Graph, step: Step, decision: Decision | None) -> str:
    if isinstance(decision, Swap):
        return f"swap out to {decision.tier}" if step.kind == "swap_out" else f"swap in from {decision.tier}"
    if isinstance(decision, Prefetch | WriteBack):
        tier = dict(graph.by_name[decision.node].attrs)["tier"]
        return f"variables from {tier}" if step.kind == "fetch" else f"variables to {tier}"
    return "network" if step.kind == "exchange" else "compute"


def _why(decision: Decision | None) -> _Event:
    return {"args": {"reason": decision.reason}} if decision and decision.reason else {}


def _naming(what: str, lane: int, name: str) -> _Event:
    return {"ph": "M", "tid": lane, "name": what, "args": {"name": name}}


def _nanoseconds(seconds: float) -> int:
    # Whole numbers, so that one event ends exactly where the next one begins.
    return round(seconds * 1e9)
