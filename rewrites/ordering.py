"""Holds the planned order with control edges, so that the peak is the same in every run."""

from __future__ import annotations

import dataclasses

from graphswap import ir
from graphswap.plan import Plan


def ordering(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with a chain of control edges through its nodes, in their order.

    Without it TensorFlow's executor starts whatever is ready, and the peak wanders from run to run. A node waits for
    the two before it, also where it reads them: TensorFlow's optimiser may turn either into a constant or regroup
    products, and take the edge along. The second of a pair waits for what the first one waits for. For an exchange only
    those wait that read it.
    """
    first_of = {pair.second: pair.first for pair in plan.pairs}
    nodes: list[ir.Node] = []
    stages: list[list[str]] = [[], []]  # of the chain: a node, or a pair
    lanes: dict[tuple[ir.Attr, bool], str] = {}  # tier, and whether a copy leaves -> the copy before it
    departing: list[str] = []  # SwapOuts since the last node of the chain
    for node in graph.nodes:
        if node.op in ir.RESIDENT_OPS:
            nodes.append(node)
            continue
        if floats(node):
            pair = stages[-1] if len(stages[-1]) > 1 else ()  # it starts after both
            lane = dict(node.attrs)["tier"], leaves(node)
            before = [lanes.get(lane, ""), *(() if leaves(node) else departing), *pair]
            lanes[lane] = node.name
            departing += [node.name] if node.op == ir.SWAP_OUT else []
        elif nodes and nodes[-1].name == first_of.get(node.name):
            before = [*stages[-3], *stages[-2]]
            stages[-1].append(node.name)
            node = dataclasses.replace(node, attrs=tuple(sorted((*node.attrs, ("beside", nodes[-1].name)))))
        else:
            before = [*stages[-2], *stages[-1]]
            if node.op != ir.EXCHANGE:
                stages = [*stages[-2:], [node.name]]
                departing = []
        known = {"", *node.control_inputs}
        controls = (*node.control_inputs, *(name for name in before if name not in known))
        nodes.append(dataclasses.replace(node, control_inputs=controls))
    return graph.replace(nodes=tuple(nodes))


def floats(node: ir.Node) -> bool:
    """Whether the node is outside the chain: copies run beside compute, in a chain for each direction.

    The plan says what waits for them.
    """
    attrs = dict(node.attrs)
    if node.op in (ir.FETCH, ir.STORE):
        return ir.OVERLAPS in attrs
    return node.op in (ir.SWAP_OUT, ir.SWAP_IN) and not attrs.get("is_synchronous")


def leaves(node: ir.Node) -> bool:
    """Whether the node takes a value off the device."""
    return node.op in (ir.SWAP_OUT, ir.STORE)
