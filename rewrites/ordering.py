"""Holds the planned order with control edges, so that the peak is the same in every run."""

from __future__ import annotations

import dataclasses

from graphswap import ir
from graphswap.plan import Plan

FLOATING = frozenset({ir.SWAP_OUT, ir.SWAP_IN})
"""Nodes outside the chain: copies run beside compute; the plan says what waits for them."""


def ordering(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with a chain of control edges through its nodes, in their order.

    Without it TensorFlow's executor starts whatever is ready, and the peak wanders from run to run.
    """
    del plan  # the order is the graph's own by now
    nodes = []
    previous = ""
    for node in graph.nodes:
        if node.op in FLOATING or node.op in ir.RESIDENT_OPS:
            nodes.append(node)
            continue
        if previous and previous not in node.control_inputs and previous not in map(ir.producer, node.inputs):
            node = dataclasses.replace(node, control_inputs=(*node.control_inputs, previous))
        nodes.append(node)
        previous = node.name
    return graph.replace(nodes=tuple(nodes))
