"""From attempts to a plan that fits the device's allocator, not only the sum of its buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphswap import allocator
from graphswap.plan import Decision, Plan
from graphswap.simulator import Timeline
from graphswap.strategies import base, gaps

Attempt = Callable[[float], tuple[tuple[Decision, ...], Timeline]]
"""From a target in bytes to decisions and their timeline, whose peak may still lie above the target."""

_TIGHTENING = 0.97
_TRIES = 12


def fit(problem: gaps.Gaps, attempts: Sequence[Attempt], memory_budget: int, strategy: str) -> Plan:
    """The fastest of the attempts that the allocator model accepts at the budget.

    The allocator wastes some bytes on slack and holes. An attempt that fits by the sum of its buffers but
    not in the allocator is repeated with a smaller target.

    Raises:
        InfeasibleBudgetError: If none fits.
    """
    best: tuple[float, tuple[Decision, ...]] | None = None
    lowest: Timeline | None = None
    for attempt in attempts:
        target = float(memory_budget)
        for _ in range(_TRIES):
            decisions, timeline = attempt(target)
            if lowest is None or timeline.peak_bytes < lowest.peak_bytes:
                lowest = timeline
            if timeline.peak_bytes > target or (best is not None and timeline.seconds >= best[0]):
                break
            try:
                placed = problem.place(decisions, memory_budget)
            except allocator.OutOfMemory:
                target *= _TIGHTENING
                continue
            if placed.allocated_peak_bytes <= memory_budget:
                best = (timeline.seconds, decisions)
                break
            target *= _TIGHTENING
    if best is None:
        assert lowest is not None
        raise base.InfeasibleBudgetError(memory_budget, lowest.peak_bytes, lowest.peak_step.name)
    return problem.plan(best[1], strategy, memory_budget)
