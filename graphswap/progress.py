"""What users see while a step is planned: the phase in one line of the terminal, later its seconds in the report."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


class Clock:
    """Adds up the seconds of named phases, and shows them.

    Attributes:
        seconds: By phase.

    Args:
        progress: Called with the name of each phase that begins.
        seconds: To add to; a new dictionary by default.
    """

    def __init__(self, progress: Callable[[str], None], seconds: dict[str, float] | None = None):
        self.seconds = {} if seconds is None else seconds
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
def shown(name: str) -> Iterator[Callable[[str], None]]:
    """Shows what is going on in one line of a terminal; says nothing elsewhere.

    Args:
        name: Of the step.
    """
    if not sys.stderr.isatty():
        yield lambda phase: None
        return

    def show(phase: str) -> None:
        print(f"\r\x1b[Kgraphswap: {phase} {name} ...", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
