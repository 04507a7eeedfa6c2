"""The hook at trace time, and the marks of the functions that it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager.polymorphic_function import transform
from tensorflow.python.ops import control_flow_v2_func_graphs
from tensorflow.python.saved_model import save_context

from graphswap.graphdef.traced import FuncGraph

_MARK = "_graphswap_step"

PLANNED = "_graphswap_planned"
"""Attributes of a FuncGraph: of a step, and of one whose operations will be copied into a step."""


def mark_current_graph(mark: object) -> bool:
    """Marks the function being traced, so that `on_traced` callbacks see it. False outside of any trace."""
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    setattr(graph, _MARK, mark)
    return True


def traces_variables() -> bool:
    """Whether what is traced now is to read variables as if they were on the device.

    A step that will be rewritten is, branches and loops in it included, and what goes into a SavedModel.
    """
    graph: Any = tf.compat.v1.get_default_graph()
    while isinstance(graph, _BODIES):
        graph = graph.outer_graph
    return hasattr(graph, _MARK) or hasattr(graph, PLANNED) or save_context.in_save_context()


_BODIES = (
    control_flow_v2_func_graphs.CondBranchFuncGraph,
    control_flow_v2_func_graphs.WhileCondFuncGraph,
    control_flow_v2_func_graphs.WhileBodyFuncGraph,
)


def on_traced(callback: Callable[[FuncGraph, Any], None]) -> None:
    """Calls `callback(func_graph, mark)` for every marked function, after its trace and before it is made runnable."""
    if not any(isinstance(known, _Transform) for known in transform.FUNC_GRAPH_TRANSFORMS):
        transform.FUNC_GRAPH_TRANSFORMS.append(_Transform(callback))


def off_traced() -> None:
    """Undoes `on_traced`."""
    transform.FUNC_GRAPH_TRANSFORMS[:] = [t for t in transform.FUNC_GRAPH_TRANSFORMS if not isinstance(t, _Transform)]


class _Transform:
    def __init__(self, callback: Callable[[FuncGraph, Any], None]):
        self.callback = callback

    def __call__(self, func_graph: FuncGraph) -> None:
        mark = getattr(func_graph, _MARK, None)
        if mark is not None:
            self.callback(func_graph, mark)
