"""Shapes of a step's arguments: which trace takes them, and what a trace with open dimensions is planned for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from graphswap import graphdef

Shapes = tuple[graphdef.Shape, ...]
"""Of all arguments of a step; None for one of unknown rank."""


def arrays(arguments: Any) -> list[Any]:
    """The leaves of nested arguments that have shapes; of one that holds a value for each replica these."""
    leaves = []
    for leaf in tf.nest.flatten(arguments):
        is_distributed = isinstance(leaf, tf.distribute.DistributedValues)
        leaves += tf.nest.flatten(leaf, expand_composites=True) if is_distributed else [leaf]
    return [leaf for leaf in leaves if hasattr(leaf, "shape")]


def accepted(func_graph: graphdef.FuncGraph, count: int) -> Shapes:
    """What a traced step accepts as its first `count` arguments, None for open dimensions."""
    return tuple(_shape(tensor) for tensor in func_graph.inputs if tensor.dtype != tf.resource)[:count]


def accepts(accepted: Shapes, shapes: Shapes) -> bool:
    """Whether a trace that accepts the ones accepts the others."""
    return len(accepted) == len(shapes) and all(
        a is None or (s is not None and len(a) == len(s) and all(x in (None, y) for x, y in zip(a, s, strict=True)))
        for a, s in zip(accepted, shapes, strict=True)
    )


def covers(planned: Shapes, shapes: Shapes) -> bool:
    """Whether a plan for the ones leaves room for the others."""
    return all(
        p is None or s is None or all((x or 0) >= (y or 0) for x, y in zip(p, s, strict=False))
        for p, s in zip(planned, shapes, strict=False)
    )


class Largest:
    """The largest shapes that a step's arguments have had."""

    def __init__(self):
        self._shapes: dict[int, graphdef.Shape] = {}  # by the argument's number

    def see(self, arguments: Sequence[Any]) -> Shapes:
        """The arguments' shapes, which from now on are among those that they have had."""
        shapes = tuple(tuple(int(d) for d in leaf.shape) for leaf in arguments)
        for index, shape in enumerate(shapes):
            known = self._shapes.get(index)
            if known is None or len(known) != len(shape):
                self._shapes[index] = shape
            else:
                self._shapes[index] = tuple(max(a or 0, b or 0) for a, b in zip(known, shape, strict=True))
        return shapes

    def of(self, func_graph: graphdef.FuncGraph) -> Shapes:
        """Shapes of a traced step's arguments, their open dimensions as large as they have been."""
        return tuple(
            tuple(
                seen if d is None else d
                for d, seen in zip(_shape(tensor) or (), self._shapes.get(index) or (), strict=False)
            )
            if _shape(tensor) is not None
            else self._shapes.get(index)
            for index, tensor in enumerate(graphdef.arguments(func_graph))
        )


def _shape(tensor: tf.Tensor) -> graphdef.Shape:
    return None if tensor.shape.rank is None else tuple(tensor.shape.as_list())
