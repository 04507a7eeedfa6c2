"""Runs rewrite passes: applies, verifies, names the culprit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from graphswap import ir
from graphswap.plan import Plan


class RewritePass(Protocol):
    """A pure function from a graph and a plan to a graph."""

    __name__: str

    def __call__(self, graph: ir.Graph, plan: Plan) -> ir.Graph: ...


def run_passes(graph: ir.Graph, plan: Plan, passes: Sequence[RewritePass]) -> ir.Graph:
    """Applies the passes in order and verifies the graph after each.

    Raises:
        ir.GraphError: If a pass leaves a broken graph; the message names the pass.
    """
    for rewrite in passes:
        try:
            graph = ir.verify(rewrite(graph, plan))
        except ir.GraphError as error:
            raise ir.GraphError(f"after pass '{rewrite.__name__}': {error}") from error
    return graph
