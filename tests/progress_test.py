import io
import sys

import pytest

from graphswap import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_the_phase_and_is_left_clean(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.shown("step") as show:
        show("plan")
    assert terminal.getvalue() == "\r\x1b[Kgraphswap: plan step ...\r\x1b[K"


def test_nothing_is_shown_elsewhere(capsys):
    with progress.shown("step") as show:
        show("plan")
    assert capsys.readouterr() == ("", "")


def test_a_clock_adds_up_the_seconds_of_a_phase(monkeypatch):
    times = iter([1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    phases = []
    clock = progress.Clock(phases.append, {"measure": 0.5})
    with clock("plan"):
        pass
    with pytest.raises(KeyError), clock("plan"):
        raise KeyError
    assert clock.seconds == {"measure": 0.5, "plan": 6.0}
    assert phases == ["plan", "plan"]
