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


# --- whole numbers ------------------------------------------------------------------------------------------------


def knapsack():
    """Three bytes are missing; evicting two of them costs 3 seconds, the other two cost 2 seconds each."""
    builder = bound.Builder()
    large, small, other = builder.column(cost=3.0), builder.column(cost=2.0), builder.column(cost=2.0)
    builder.row([(large, 2.0), (small, 1.0), (other, 1.0)], lower=3.0, share=1.0)
    return builder.program(constant=10.0)


def whole(program):
    return solver.IntegerSolver(program, np.arange(len(program.cost)), 1e-6)


def test_the_best_in_whole_numbers(capfd):
    found = whole(knapsack()).solve_integers(0.5, 10.0)
    assert found.is_proven
    assert found.columns[0] == 1.0 and sorted(found.columns[1:]) == [0.0, 1.0]
    assert found.bound == pytest.approx(15.0)
    assert capfd.readouterr() == ("", "")


def test_what_is_excluded_is_not_found_again():
    program = whole(knapsack())
    seen = []
    for _ in range(3):
        found = program.solve_integers(0.0, 10.0)
        seen.append(tuple(found.columns))
        program.exclude(found, np.arange(3))
    assert set(seen) == {(1.0, 1.0, 0.0), (1.0, 0.0, 1.0), (1.0, 1.0, 1.0)}
    with pytest.raises(solver.SolverError, match="[Ii]nfeasible"):
        program.solve_integers(0.0, 10.0)


def test_whole_numbers_that_are_not_found_in_time_are_an_error(monkeypatch):
    monkeypatch.setattr(highspy.Highs, "run", lambda self: None)
    monkeypatch.setattr(highspy.Highs, "getModelStatus", lambda self: highspy.HighsModelStatus.kTimeLimit)
    with pytest.raises(solver.OutOfTimeError, match="Time limit reached"):
        whole(knapsack()).solve_integers(0.0, 0.0)


def test_whole_numbers_may_be_the_best_found_in_time(monkeypatch):
    monkeypatch.setattr(highspy.Highs, "getModelStatus", lambda self: highspy.HighsModelStatus.kTimeLimit)
    found = whole(knapsack()).solve_integers(0.0, 10.0)
    assert not found.is_proven and found.columns[0] == 1.0
