"""Lower bounds on the time of a step, and on the budget for a time, checkable without trusting a solver.

A linear program that every plan of a class satisfies has, by weak duality, a lower bound for every choice of
multipliers ("duals") of its rows; a solver is only asked for good ones. `Certificate.seconds` works the bound out anew
from the rows, so that a wrong or unlucky solver makes it weaker but never wrong. As the budget stands on the right-hand
side only, one certificate bounds all budgets: a straight line under the whole curve of budget and time. An `Envelope`
is the highest of several such lines.

Known weakness: that a program is a relaxation of the step is the work of whoever wrote it (`strategies.relaxation`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Terms = Sequence[tuple[int, float]]
"""Columns and their coefficients."""


@dataclasses.dataclass(frozen=True, eq=False)
class LinearProgram:
    """Minimise `constant + cost x` so that `lower <= x <= upper` and `row_lower - share * budget <= A x <= row_upper`.

    Attributes:
        constant: Seconds.
        cost: Seconds per unit of each column, shape (columns,).
        lower: Of each column; finite.
        upper: Of each column; finite, so that any duals give a bound.
        rows: Row of each entry of A, rising, shape (entries,).
        columns: Column of each entry.
        values: Value of each entry.
        row_lower: Of each row; may be infinite.
        row_upper: Likewise.
        share: Of each row: how much its lower side falls per byte of budget.
    """

    constant: float
    cost: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    row_lower: np.ndarray
    row_upper: np.ndarray
    share: np.ndarray

    def row_lower_at(self, memory_budget: float) -> np.ndarray:
        """Lower sides of the rows at a budget in bytes."""
        return self.row_lower - self.share * memory_budget

    def least_budget(self, extra_seconds: float, most_bytes: float) -> LinearProgram:
        """The program that asks for the least budget at which the optimum is at most `constant + extra_seconds`.

        Its "seconds" are the budget as a share of `most_bytes`, above which it does not look.
        """
        budget, row = len(self.cost), len(self.row_lower)
        limited, paid = np.flatnonzero(self.share), np.flatnonzero(self.cost)
        rows = np.concatenate([self.rows, limited, np.full(len(paid), row)])
        order = rows.argsort(kind="stable")
        return LinearProgram(
            constant=0.0,
            cost=np.append(np.zeros(budget), 1.0),
            lower=np.append(self.lower, 0.0),
            upper=np.append(self.upper, 1.0),
            rows=rows[order],
            columns=np.concatenate([self.columns, np.full(len(limited), budget), paid])[order],
            values=np.concatenate([self.values, self.share[limited] * most_bytes, self.cost[paid]])[order],
            row_lower=np.append(self.row_lower, -np.inf),
            row_upper=np.append(self.row_upper, extra_seconds),
            share=np.zeros(row + 1),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """A program and duals of its rows: a lower bound on the step's time at every budget.

    Attributes:
        program: Only the rows whose dual is not zero are needed.
        duals: Of each row, shape (rows,); positive where its lower side binds, negative where the upper one does.
    """

    program: LinearProgram
    duals: np.ndarray

    def seconds(self, memory_budget: float) -> float:
        """The bound at a budget in bytes: no plan of the program's class that keeps it takes less."""
        program, duals = self.program, self.duals
        sides = np.where(duals > 0, program.row_lower_at(memory_budget), program.row_upper)
        paid = np.bincount(program.columns, weights=program.values * duals[program.rows], minlength=len(program.cost))
        reduced = program.cost - paid
        least = np.where(reduced > 0, reduced * program.lower, reduced * program.upper)
        used = duals != 0
        return float(program.constant + (duals[used] * sides[used]).sum() + least.sum())

    def seconds_per_byte(self) -> float:
        """By how much the bound falls with each byte of budget."""
        return float((np.maximum(self.duals, 0.0) * self.program.share).sum())

    def fields(self) -> dict[str, Any]:
        """As plain lists, for JSON. Infinite sides become None."""
        arrays = {
            field.name: [None if np.isinf(v) else v for v in getattr(self.program, field.name).tolist()]
            for field in dataclasses.fields(LinearProgram)
            if field.name != "constant"
        }
        return {"constant": self.program.constant, **arrays, "duals": self.duals.tolist()}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Certificate:
        """Reads what `fields` gave."""
        missing = {"row_lower": -np.inf, "row_upper": np.inf}
        arrays = {
            name: np.array([missing.get(name, 0.0) if v is None else v for v in values])
            for name, values in fields.items()
            if name not in ("constant", "duals")
        }
        for name in ("rows", "columns"):
            arrays[name] = arrays[name].astype(int)
        return cls(LinearProgram(constant=float(fields["constant"]), **arrays), np.array(fields["duals"], float))


@dataclasses.dataclass(frozen=True, eq=False)
class Envelope:
    """Lines under the curve of budget and time: together convex, and falling as the budget grows.

    Attributes:
        certificates: Of one step; at least one.
    """

    certificates: tuple[Certificate, ...]

    def seconds(self, memory_budget: float) -> float:
        """The bound at a budget in bytes: what the best of the certificates says."""
        return max(certificate.seconds(memory_budget) for certificate in self.certificates)

    def fields(self) -> dict[str, Any]:
        """As plain lists, for JSON."""
        return {"certificates": [certificate.fields() for certificate in self.certificates]}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Envelope:
        """Reads what `fields` gave."""
        return cls(tuple(map(Certificate.from_fields, fields["certificates"])))


def certificate(program: LinearProgram, duals: np.ndarray) -> Certificate:
    """Keeps what the bound needs: the rows with a dual, without those that push towards an infinite side."""
    side = np.where(duals > 0, program.row_lower, program.row_upper)
    duals = np.where(np.isfinite(side) & np.isfinite(duals), duals, 0.0)
    kept = np.flatnonzero(duals)
    number = np.full(len(duals), -1)
    number[kept] = np.arange(len(kept))
    entries = number[program.rows] >= 0
    reduced = dataclasses.replace(
        program,
        rows=number[program.rows[entries]],
        columns=program.columns[entries],
        values=program.values[entries],
        row_lower=program.row_lower[kept],
        row_upper=program.row_upper[kept],
        share=program.share[kept],
    )
    return Certificate(reduced, duals[kept])


class Builder:
    """Collects columns and rows of a program."""

    def __init__(self) -> None:
        self._cost: list[float] = []
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._entries: tuple[list[int], list[int], list[float]] = ([], [], [])
        self._row_lower: list[float] = []
        self._row_upper: list[float] = []
        self._share: list[float] = []

    def column(self, upper: float = 1.0, *, lower: float = 0.0, cost: float = 0.0) -> int:
        """Adds a column and returns its number."""
        self._cost.append(cost)
        self._lower.append(lower)
        self._upper.append(upper)
        return len(self._cost) - 1

    def row(self, terms: Terms, lower: float = -np.inf, upper: float = np.inf, share: float = 0.0) -> None:
        """Adds `lower - share * budget <= terms <= upper`."""
        rows, columns, values = self._entries
        for column, value in terms:
            rows.append(len(self._row_lower))
            columns.append(column)
            values.append(value)
        self._row_lower.append(lower)
        self._row_upper.append(upper)
        self._share.append(share)

    def program(self, constant: float) -> LinearProgram:
        """The program of what was added."""
        rows, columns, values = self._entries
        return LinearProgram(
            constant=constant,
            cost=np.array(self._cost, float),
            lower=np.array(self._lower, float),
            upper=np.array(self._upper, float),
            rows=np.array(rows, int),
            columns=np.array(columns, int),
            values=np.array(values, float),
            row_lower=np.array(self._row_lower, float),
            row_upper=np.array(self._row_upper, float),
            share=np.array(self._share, float),
        )
