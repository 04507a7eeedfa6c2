"""Inserts SwapOut and SwapIn around the gaps that the plan names."""

from __future__ import annotations

import dataclasses

from graphswap import ir
from graphswap.plan import Plan, Swap


def swap(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with the plan's `Swap` decisions carried out.

    The SwapOut stands right after `out_after` and runs after it, and `freed_before` gets a control input from it; the
    SwapIn stands right after `in_after` and runs after it. A value that is already in the far tier is not
    copied out again.
    """
    if not plan.swaps:
        return graph
    by_anchor: dict[str, dict[str, list[Swap]]] = {
        field: {} for field in ("out_after", "freed_before", "in_after", "in_before")
    }
    for decision in plan.swaps:
        for field, at_anchor in by_anchor.items():
            at_anchor.setdefault(getattr(decision, field), []).append(decision)
    taken = set(graph.by_name)
    origins = dict(ir.origin(graph))
    current: dict[str, str] = {}
    copied: dict[str, str] = {}  # value -> its SwapOut
    fences: dict[Swap, str] = {}
    arrived: dict[Swap, str] = {}
    nodes: list[ir.Node] = []
    anchor_of = anchors(graph)
    passed: set[str] = set()

    for node in graph.nodes:
        anchor = anchor_of[node.name]
        if anchor not in passed:
            passed.add(anchor)
            for decision in by_anchor["in_before"].get(anchor, ()):
                current[decision.value] = arrived[decision]
        controls = node.control_inputs
        if node.name == anchor:
            waits = (fences[d] for d in by_anchor["freed_before"].get(anchor, ()) if d in fences)
            controls = tuple(dict.fromkeys((*controls, *waits)))
        inputs = tuple(current.get(origins[r], r) for r in node.inputs)
        if (inputs, controls) != (node.inputs, node.control_inputs):
            node = dataclasses.replace(node, inputs=inputs, control_inputs=controls)
        nodes.append(node)
        for reference in node.refs():
            current[origins[reference]] = reference
        if node.name != anchor:
            continue
        for decision in by_anchor["out_after"].get(anchor, ()):
            if decision.value not in copied:
                out = _swap_out(graph, decision, current.get(decision.value, decision.value), anchor, taken)
                nodes.append(out)
                copied[decision.value] = fences[decision] = out.name
        for decision in by_anchor["in_after"].get(anchor, ()):
            back = _swap_in(graph, decision, copied[decision.value], anchor, taken)
            nodes.append(back)
            arrived[decision] = back.name
    return graph.replace(nodes=tuple(nodes))


def anchors(graph: ir.Graph) -> dict[str, str]:
    """For every node the user's node that it belongs to: repeated nodes belong to the next one."""
    found: dict[str, str] = {}
    anchor = ""
    for node in reversed(graph.nodes):
        if not node.like:
            anchor = node.name
        found[node.name] = anchor
    return found


def _swap_out(graph: ir.Graph, decision: Swap, source: str, after: str, taken: set[str]) -> ir.Node:
    value = graph.value(decision.value)
    device = graph.by_name[ir.producer(decision.value)].device
    return ir.Node(
        name=ir.fresh_name(f"{decision.value.replace(':', '_')}/swap_out", taken),
        op=ir.SWAP_OUT,
        inputs=(source,),
        # Earlier, the copy would decide by chance whether a reader may write over its source.
        control_inputs=() if ir.producer(source) == after else (runs_before(graph, after),),
        outputs=(ir.Value("variant"),),
        device=device,
        attrs=_attrs(value, decision),
    )


def _swap_in(graph: ir.Graph, decision: Swap, handle: str, after: str, taken: set[str]) -> ir.Node:
    value = graph.value(decision.value)
    device = graph.by_name[ir.producer(decision.value)].device
    return ir.Node(
        name=ir.fresh_name(f"{decision.value.replace(':', '_')}/swap_in", taken),
        op=ir.SWAP_IN,
        inputs=(handle,),
        control_inputs=(runs_before(graph, after),),
        outputs=(value,),
        device=device,
        attrs=_attrs(value, decision),
    )


def runs_before(graph: ir.Graph, after: str) -> str:
    """The node to wait for so as to run after another one: not for an exchange, which runs beside compute."""
    node = graph.by_name[after]
    return ir.producer(node.inputs[0]) if node.op == ir.EXCHANGE else after


def _attrs(value: ir.Value, decision: Swap) -> tuple[tuple[str, ir.Attr], ...]:
    synchronous = (("is_synchronous", True),) if decision.is_synchronous else ()
    return (*synchronous, ("nbytes", value.nbytes), ("tier", decision.tier))
