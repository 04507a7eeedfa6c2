"""Programs on single elements: what an update computes of variables in far tiers, where they lie.

An op at a time would pass all elements through memory for each op. A program passes them once: block by block, and what
one op hands to the next stays in the processor's cache.

The ops are those whose results IEEE 754 fixes to the last bit, so that numpy computes what TensorFlow's kernels for
CPUs do; `exactness` makes sure of it. For that the floating-point mode has to be that of TensorFlow's threads, which
take subnormal numbers for zero: programs run inside of TensorFlow's ops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from graphswap import ir

_IDENTITY = "Identity"
FUNCTIONS: Mapping[str, np.ufunc] = {
    **dict.fromkeys(("Add", "AddV2", "AddN"), np.add),
    **dict.fromkeys(("Div", "RealDiv"), np.divide),
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Abs": np.absolute,
    "Square": np.square,
    "Sqrt": np.sqrt,
}
"""TensorFlow's ops that have a twin in numpy; an AddN only of two values."""
SELECTS = ("Select", "SelectV2")
"""Ops that have as their result one of two values, whole, as a scalar says."""
DTYPES = ("float32", "float64")
"""Types of all values of a program, but of what selects one of two: that is a bool."""

_BLOCK_ELEMENTS = 1 << 17


class Instruction(NamedTuple):
    """One op of a program.

    Attributes:
        op: Out of `FUNCTIONS` or `SELECTS`, or "Identity".
        sources: Registers that it reads.
    """

    op: str
    sources: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """What is computed of each element.

    Registers are numbered: first what is given, all of one shape and type, or scalars, of that type or bools; then what
    each instruction makes.

    Attributes:
        given: How many registers are given.
        instructions: In order.
        results: Registers that are the program's results. They may be given ones.
    """

    given: int
    instructions: tuple[Instruction, ...]
    results: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Program:
        """Reads what `str` of a program has written."""
        given, *lines, results = text.split("; ")
        words = [line.split() for line in lines]
        instructions = (Instruction(op, tuple(map(int, sources))) for op, *sources in words)
        return cls(int(given), tuple(instructions), tuple(map(int, results.split())))

    def __str__(self) -> str:
        lines = [" ".join((op, *map(str, sources))) for op, sources in self.instructions]
        return "; ".join((str(self.given), *lines, " ".join(map(str, self.results))))

    def run(self, given: Sequence[np.ndarray], results: Sequence[np.ndarray | None]) -> None:
        """Computes results.

        Args:
            given: Flat arrays of one length and type, at least one, or arrays of no dimension; they are not written to.
            results: Flat arrays of that length and type, each with room for a result; None where it is not wanted.
        """
        flat = next(array for array in given if array.ndim)
        length, dtype = flat.size, flat.dtype
        steps, kept = self._steps(results)
        slots = max((step.slot for step in steps), default=-1) + 1
        scratch = [np.empty(_BLOCK_ELEMENTS, dtype) for _ in range(slots)]
        with np.errstate(all="ignore"):
            for start in range(0, length, _BLOCK_ELEMENTS):
                block = slice(start, min(start + _BLOCK_ELEMENTS, length))
                registers = [array[block] if array.ndim else array for array in given]
                for step in steps:
                    if step.function is None:
                        registers.append(registers[step.sources[0]])
                        continue
                    target = results[step.result] if step.result >= 0 else None
                    made = scratch[step.slot][: block.stop - start] if target is None else target[block]
                    step.function(*(registers[source] for source in step.sources), out=made)
                    registers.append(made)
                for register, target in kept:
                    target[block] = registers[register]

    def _steps(self, results: Sequence[np.ndarray | None]) -> tuple[list[_Step], list[tuple[int, np.ndarray]]]:
        """Where each instruction writes; and the results that are copied at the end of a block."""
        last_read: dict[int, int] = {}
        alias: dict[int, int] = {}  # register of an Identity -> what it is another name of
        for number, (op, sources) in enumerate(self.instructions, start=self.given):
            roots = [alias.get(source, source) for source in sources]
            last_read.update(dict.fromkeys(roots, number))
            if op == _IDENTITY:
                alias[number] = roots[0]
        written: dict[int, int] = {}  # register -> the result that it is written to at once
        kept: list[tuple[int, np.ndarray]] = []
        for index, register in enumerate(self.results):
            target, root = results[index], alias.get(register, register)
            if target is None:
                continue
            if root < self.given or root in written:
                kept.append((root, target))
                last_read[root] = self.given + len(self.instructions)
            else:
                written[root] = index
        steps: list[_Step] = []
        free: list[int] = []
        slots: dict[int, int] = {}
        for number, (op, sources) in enumerate(self.instructions, start=self.given):
            if op == _IDENTITY:
                steps.append(_Step(None, sources))
                continue
            slot, result = -1, written.get(number, -1)
            done = {root for root in (alias.get(source, source) for source in sources) if last_read[root] == number}
            free += [slots.pop(root) for root in sorted(done & slots.keys())]  # it may be written over
            if result < 0:
                slot = free.pop() if free else len(slots) + len(free)
                if number in last_read:
                    slots[number] = slot
                else:
                    free.append(slot)
            steps.append(_Step(_select if op in SELECTS else FUNCTIONS[op], sources, slot, result))
        return steps, kept


def _select(condition: np.ndarray, one: np.ndarray, other: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out, one if condition else other)


class _Step(NamedTuple):
    function: Callable[..., Any] | None  # None: another name for what it reads
    sources: tuple[int, ...]
    slot: int = -1  # of the scratch memory that it writes to
    result: int = -1  # or of the results


def computes(graph: ir.Graph, node: ir.Node) -> bool:
    """Whether the node is one that a program can compute: of arrays of one shape and type, and scalars of that type.

    Nor does one compute what TensorFlow would compute in another way.
    """
    arity = _ARITY.get(node.op, -1)
    if len(node.inputs) != arity or node.stateful or len(node.outputs) != 1 or dict(node.attrs).get(ir.IS_FOLDED):
        return False
    (made,) = node.outputs
    given = list(map(graph.value, node.inputs))
    if node.op in SELECTS and given.pop(0) != ir.Value("bool", ()):
        return False
    is_array = made.is_resolved and bool(made.shape) and made.dtype in DTYPES
    return is_array and all(value == made or value == ir.Value(made.dtype, ()) for value in given)


_ARITY = {**{op: function.nin for op, function in FUNCTIONS.items()}, **dict.fromkeys(SELECTS, 3), _IDENTITY: 1}
