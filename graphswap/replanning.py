"""When to plan again: holds a plan's predictions against the steps that ran under it.

The steps are those of the training itself. A round compares; only if the plan was wrong is one more step run under the
profiler and a new plan looked for. So a plan that keeps its word costs nothing, and no round takes a step that the
training would not have taken.
"""

from __future__ import annotations

import dataclasses
import enum
import statistics
from collections.abc import Sequence

MOST_ROUNDS = 3
AGREEMENT = 0.10
"""How far a step may be off its prediction, as a share of what was measured."""
WORTH = 0.05
"""What share of the step a new plan must save: it has to be traced, and the costs of one step flatter it."""
STEADY_STEPS = 3
"""How many steps a round waits for after the first, which also sets kernels up."""


class Verdict(enum.Enum):
    """What to do about a plan."""

    WAIT = "wait for more steps"
    KEEP = "as predicted"
    REPLAN = "measure the step and plan again"


@dataclasses.dataclass(frozen=True)
class Observation:
    """Steps that ran under a plan beside what was predicted of them.

    Attributes:
        predicted_seconds: Length of a step.
        step_seconds: Lengths of the steps so far, the first one's included.
        memory_budget: Bytes that the steps have to keep to; 0 if as few as possible were asked for.
        predicted_peak_bytes: As the allocator should count it.
        peak_bytes: The most that the allocator counted during the steps; None if it does not count, or if it had
            counted more before them, which hides their peak.
    """

    predicted_seconds: float
    step_seconds: Sequence[float]
    memory_budget: int = 0
    predicted_peak_bytes: int = 0
    peak_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """Length of a steady step: the median of the last ones."""
        return statistics.median(self.step_seconds[1:][-STEADY_STEPS:] or self.step_seconds)

    @property
    def excess_bytes(self) -> int:
        """What the steps took beyond the prediction: fragmentation and whatever else the model does not know."""
        return max(0, (self.peak_bytes or 0) - self.predicted_peak_bytes)

    @property
    def is_in_time(self) -> bool:
        return abs(self.seconds - self.predicted_seconds) <= AGREEMENT * self.seconds

    @property
    def is_in_budget(self) -> bool:
        return not self.memory_budget or (self.peak_bytes or 0) <= self.memory_budget


@dataclasses.dataclass(frozen=True)
class Round:
    """One round, for the report.

    Attributes:
        seen: The plan's predictions and its steps.
        corrected_seconds: Predicted length of the same plan by costs measured within its step; None if nothing was
            measured.
        new_seconds: That of the new plan, by the same costs; None if there is none.
        outcome: What came of it.
    """

    seen: Observation
    corrected_seconds: float | None = None
    new_seconds: float | None = None
    outcome: str = Verdict.KEEP.value

    def __str__(self) -> str:
        seen = self.seen
        text = f"{seen.predicted_seconds:.3f} s predicted, {seen.seconds:.3f} s measured"
        if seen.excess_bytes:
            text += f", peak {seen.excess_bytes / 2**20:.1f}MiB above prediction"
        if self.corrected_seconds is not None:
            text += f"; by costs measured within the step {self.corrected_seconds:.3f} s"
        if self.new_seconds is not None:
            text += f", with a new plan {self.new_seconds:.3f} s"
        return f"{text}: {self.outcome}"


def judge(seen: Observation, rounds: int) -> Verdict:
    """Says whether a plan has to be made anew.

    Args:
        seen: Its steps.
        rounds: How many rounds there were before.
    """
    if rounds >= MOST_ROUNDS:
        return Verdict.KEEP
    if not seen.is_in_budget:
        return Verdict.REPLAN
    if len(seen.step_seconds) <= STEADY_STEPS:
        return Verdict.WAIT
    return Verdict.KEEP if seen.is_in_time else Verdict.REPLAN


def is_better(seen: Observation, old_seconds: float, new_seconds: float) -> bool:
    """Whether a new plan, judged by the same costs as the old one, is to replace it.

    A plan that broke the budget goes in any case: the new one has more bytes reserved.
    """
    return not seen.is_in_budget or new_seconds < (1 - WORTH) * old_seconds


def reserve(seen: Observation, planned_bytes: int) -> int:
    """Bytes to leave free in the next plan, beyond those that this one left of the budget.

    Args:
        seen: The steps of this plan.
        planned_bytes: What it was planned for.
    """
    if not seen.memory_budget:
        return 0
    return max(0, planned_bytes - (seen.memory_budget - seen.excess_bytes))
