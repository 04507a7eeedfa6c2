"""HiGHS: solves a `bound.LinearProgram`. The only door to it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator

import highspy
import numpy as np

from graphswap.bound import LinearProgram


class SolverError(Exception):
    """No optimum was found; the text says why."""


class OutOfTimeError(SolverError):
    """Time ran out before there was an answer."""


@dataclasses.dataclass(frozen=True)
class Solution:
    """An optimum.

    Attributes:
        columns: Their values, shape (columns,).
        duals: Of the rows, shape (rows,), positive where the lower side binds.
    """

    columns: np.ndarray
    duals: np.ndarray


@dataclasses.dataclass(frozen=True)
class IntegerSolution:
    """The best that was found in whole numbers.

    Attributes:
        columns: Their values, shape (columns,); those that are to be whole are.
        bound: No solution has a lower cost, the program's constant included.
        is_proven: Whether the solver came to its end; otherwise time ran out.
    """

    columns: np.ndarray
    bound: float
    is_proven: bool


class Solver:
    """One program for any budget. Each optimum is found from the one before, as only right-hand sides change.

    Args:
        program: To be minimised.
        prices: Added to the cost, shape (columns,).
    """

    def __init__(self, program: LinearProgram, prices: np.ndarray):
        self._program = program
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(program.cost), len(program.row_lower)
        model.col_cost_ = program.cost + prices
        model.col_lower_, model.col_upper_ = program.lower, program.upper
        model.row_lower_, model.row_upper_ = program.row_lower, program.row_upper
        matrix = model.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        matrix.num_col_, matrix.num_row_ = model.num_col_, model.num_row_
        matrix.start_ = np.concatenate([[0], np.cumsum(np.bincount(program.rows, minlength=model.num_row_))])
        matrix.index_, matrix.value_ = program.columns, program.values
        with _no_banner():
            self._highs = highspy.Highs()
        self._highs.setOptionValue("output_flag", False)
        self._highs.passModel(model)

    def solve(self, memory_budget: float, seconds: float) -> Solution:
        """The optimum at a budget.

        Args:
            memory_budget: Bytes.
            seconds: Time limit.

        Raises:
            SolverError: If there is no optimum, if time runs out, or if the answer is no number.
        """
        status = self._run(memory_budget, seconds)
        if status != highspy.HighsModelStatus.kOptimal:
            raise SolverError(self._highs.modelStatusToString(status))
        found = self._highs.getSolution()
        solution = Solution(np.array(found.col_value), np.array(found.row_dual))
        if not (np.isfinite(solution.columns).all() and np.isfinite(solution.duals).all()):
            raise SolverError("the answer is no number")
        return solution

    def _run(self, memory_budget: float, seconds: float) -> highspy.HighsModelStatus:
        program, highs = self._program, self._highs
        rows = np.flatnonzero(program.share)
        lower, upper = program.row_lower_at(memory_budget)[rows], program.row_upper[rows]
        highs.changeRowsBounds(len(rows), rows.astype(np.int32), lower, upper)  # pyright: ignore[reportAttributeAccessIssue]
        highs.setOptionValue("time_limit", float(highs.getRunTime() + max(seconds, 0.1)))
        highs.run()
        return highs.getModelStatus()


class IntegerSolver(Solver):
    """One program for any budget, some of its columns 0 or 1.

    Args:
        program: To be minimised.
        integers: Those columns.
        gap: How far above the bound the cost, without the program's constant, may lie when the solver ends, as a
            share of that cost.
    """

    def __init__(self, program: LinearProgram, integers: np.ndarray, gap: float):
        super().__init__(program, np.zeros(len(program.cost)))
        kinds = np.full(len(integers), highspy.HighsVarType.kInteger)
        self._integers = integers.astype(np.int32)
        self._highs.changeColsIntegrality(len(integers), self._integers, kinds)
        self._highs.setOptionValue("mip_rel_gap", gap)

    def solve_integers(self, memory_budget: float, seconds: float) -> IntegerSolution:
        """The optimum at a budget, or the best that was found in time. For arguments see `solve`.

        Raises:
            OutOfTimeError: If time runs out before anything is found.
            SolverError: If there is no solution, or if the answer is no number.
        """
        status, highs = self._run(memory_budget, seconds), self._highs
        info = highs.getInfo()
        is_proven = status == highspy.HighsModelStatus.kOptimal
        if not is_proven and status != highspy.HighsModelStatus.kTimeLimit:
            raise SolverError(highs.modelStatusToString(status))
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            raise OutOfTimeError(highs.modelStatusToString(status))
        columns, least = np.array(highs.getSolution().col_value), info.mip_dual_bound
        if not (np.isfinite(columns).all() and np.isfinite(least)):
            raise SolverError("the answer is no number")
        columns[self._integers] = columns[self._integers].round()
        return IntegerSolution(columns, self._program.constant + least, is_proven)

    def exclude(self, solution: IntegerSolution, among: np.ndarray) -> None:
        """From now on, at least one of some columns that are 0 or 1 differs from a solution's."""
        ones = solution.columns[among] > 0.5
        signs = np.where(ones, -1.0, 1.0)
        self._highs.addRow(1.0 - ones.sum(), highspy.kHighsInf, len(among), among.astype(np.int32), signs)


def solve(program: LinearProgram, memory_budget: float, prices: np.ndarray, seconds: float) -> Solution:
    """Solves a program at one budget. For arguments and errors see `Solver`."""
    return Solver(program, prices).solve(memory_budget, seconds)


@contextlib.contextmanager
def _no_banner() -> Iterator[None]:
    """Drops what is written to standard output: HiGHS greets when it is made, before it can be told not to."""
    try:
        kept = os.dup(1)
    except OSError:  # nobody listens
        yield
        return
    if sys.stdout is not None:
        sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
