import math

import highspy
import numpy as np
import pytest

from graphswap import bound
from graphswap.strategies import solver


def program(upper=1.0):
    """One byte that is missing must be evicted at a second."""
    builder = bound.Builder()
    builder.row([(builder.column(upper, cost=1.0), 1.0)], lower=1.0, share=1.0)
    return builder.program(constant=2.0)


def test_an_optimum_with_duals(capfd):
    found = solver.solve(program(), 0.5, np.zeros(1), 10.0)
    assert found.columns == pytest.approx([0.5])
    assert bound.certificate(program(), found.duals).seconds(0.5) == pytest.approx(2.5)
    assert capfd.readouterr() == ("", "")


def test_what_can_t_be_is_an_error():
    with pytest.raises(solver.SolverError, match="[Ii]nfeasible"):
        solver.solve(program(upper=0.25), 0.5, np.zeros(1), 10.0)


def test_time_that_runs_out_is_an_error(monkeypatch):
    monkeypatch.setattr(highspy.Highs, "getModelStatus", lambda self: highspy.HighsModelStatus.kTimeLimit)
    with pytest.raises(solver.SolverError, match="Time limit reached"):
        solver.solve(program(), 0.5, np.zeros(1), 0.0)


def test_an_answer_that_is_no_number_is_an_error(monkeypatch):
    def solution(self):
        found = highspy.HighsSolution()
        found.col_value, found.row_dual = [math.nan], [1.0]
        return found

    monkeypatch.setattr(highspy.Highs, "getSolution", solution)
    with pytest.raises(solver.SolverError, match="the answer is no number"):
        solver.solve(program(), 0.5, np.zeros(1), 10.0)
