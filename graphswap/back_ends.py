"""Chooses between TensorFlow's executor and XLA by steps of the training that ran under each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from graphswap.graphdef import UnsupportedGraphError
from graphswap.report import Report, StepReport
from graphswap.strategies.base import InfeasibleBudgetError

STEPS = 3
"""That are measured under each back end, after the first one, which also traces, plans and compiles."""


class NoBackEndError(ValueError):
    """No back end can run the step in its budget. The message has all reasons."""


class Runner(Protocol):
    """Plans and runs a step under one back end: a `pipeline.Session`."""

    def run(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...

    def resume(self) -> None:
        """Called where another back end has run steps in between."""
        ...


class Choice:
    """Runs steps of the training under one back end after the other, and from then on under the faster.

    Args:
        runners: By the names of the back ends. They add to one report.
        report: That report.
    """

    def __init__(self, runners: Mapping[str, Runner], report: Report):
        self.report = report
        self._runners = dict(runners)
        self._waiting = list(runners)
        self._tried: dict[str, StepReport] = {}
        self._refused: dict[str, Exception] = {}
        self._begun = 0  # steps in the report when the back end that is being tried began

    def run(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs one step; arguments are those of `Session.run`.

        Raises:
            NoBackEndError: If no back end can run the step in its budget.
        """
        while self._waiting:
            name = self._waiting[0]
            try:
                result = self._runners[name].run(make, *args, **kwargs)
            except (InfeasibleBudgetError, UnsupportedGraphError) as error:  # nothing has run
                self._refused[name] = error
                self._go_on()
                continue
            step = max(self.report.steps[self._begun :], key=lambda step: len(step.measured_seconds))
            if len(step.measured_seconds) > STEPS:
                self._tried[name] = step
                self._go_on()
            return result
        (chosen,) = self._runners.values()
        return chosen.run(make, *args, **kwargs)

    def _go_on(self) -> None:
        """Turns to the next back end, at last to the fastest of those that were tried."""
        last = self._waiting.pop(0)
        self._begun = len(self.report.steps)
        if self._waiting:
            return
        if not self._tried:
            reasons = "\n".join(f"{name}: {error}" for name, error in self._refused.items())
            names = " or ".join(self._refused)
            raise NoBackEndError(
                f"expected a step that {names} can run in the budget, received one that none can.\n{reasons}"
            )
        fastest = min(self._tried, key=lambda name: self._tried[name].step_seconds or 0.0)
        self._tried[fastest].notes.append(self._text(fastest))
        self._runners = {fastest: self._runners[fastest]}
        gc.collect()  # the constants of the others lie on the device
        if fastest != last:
            self._runners[fastest].resume()

    def _text(self, fastest: str) -> str:
        tried = [f"{name} {step.step_seconds:.3f} s" for name, step in self._tried.items()]
        refused = [f"{name} refused: {str(error).splitlines()[0]}" for name, error in self._refused.items()]
        cost = sum(sum(step.breakdown.values()) + step.measured_seconds[0] for step in self._tried.values())
        return (
            f"back end: {', '.join(tried)} measured (median of {STEPS}); {fastest} is kept; "
            + "".join(f"{text}; " for text in refused)
            + f"the first steps took {cost:.1f} s, planning and compiling included"
        )
