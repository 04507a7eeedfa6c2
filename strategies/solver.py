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


@dataclasses.dataclass(frozen=True)
class Solution:
    """An optimum.

    Attributes:
        columns: Their values, shape (columns,).
        duals: Of the rows, shape (rows,), positive where the lower side binds.
    """

    columns: np.ndarray
    duals: np.ndarray


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
        program, highs = self._program, self._highs
        rows = np.flatnonzero(program.share)
        lower, upper = program.row_lower_at(memory_budget)[rows], program.row_upper[rows]
        highs.changeRowsBounds(len(rows), rows.astype(np.int32), lower, upper)  # pyright: ignore[reportAttributeAccessIssue]
        highs.setOptionValue("time_limit", float(highs.getRunTime() + max(seconds, 0.1)))
        highs.run()
        status = highs.getModelStatus()
        if status != highspy.HighsModelStatus.kOptimal:
            raise SolverError(highs.modelStatusToString(status))
        found = highs.getSolution()
        solution = Solution(np.array(found.col_value), np.array(found.row_dual))
        if not (np.isfinite(solution.columns).all() and np.isfinite(solution.duals).all()):
            raise SolverError("the answer is no number")
        return solution


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
