"""A step's variables: what they hold, which of them can leave the device, and how often they would travel."""

from __future__ import annotations

from collections.abc import Collection

from graphswap import ir, liveness

SMALL_BYTES = 64 << 10
"""Variables and other storages up to this size stay on the device: moving them costs more than it frees."""

FAR_DTYPES = frozenset(
    "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 "
    "float16 bfloat16 float32 float64 complex64 complex128".split()
)
"""Types of values that TensorFlow's ops read and write in far memory."""
_WRITES = liveness.ASSIGNS | liveness.UPDATES
_ACCESSES = {"ReadVariableOp", "ResourceGather"} | _WRITES


def values(graph: ir.Graph) -> dict[str, ir.Value]:
    """The graph's variables with the types of their values, as far as a node that reads or assigns them tells."""
    found: dict[str, ir.Value] = {}
    variables = {node.name for node in graph.nodes if node.op == "Placeholder" and node.outputs[0].dtype == "resource"}
    for node in graph.nodes:
        variable = node.inputs[0] if node.inputs else ""
        if variable in variables and node.op == "ReadVariableOp":
            found[variable] = node.outputs[0]
        elif variable in variables and node.op in _WRITES:
            found.setdefault(variable, graph.value(node.inputs[1]))
    return found


def updates(graph: ir.Graph) -> set[str]:
    """The variables that the graph gives new values."""
    return {node.inputs[0] for node in graph.nodes if node.op in _WRITES}


def unplaceable(graph: ir.Graph) -> dict[str, str]:
    """Variables that have to stay on the device, with the reason."""
    reasons: dict[str, str] = {}
    known = values(graph)
    updated: dict[str, str] = {}  # variable -> its last update
    read_from: dict[str, str] = {}  # value -> the variable whose old value it is
    for node in graph.nodes:
        for reference in node.inputs:
            variable = read_from.get(reference)
            if variable in updated:
                reasons[variable] = f"'{node.name}' reads its old value after its update '{updated[variable]}'"
        for index, reference in enumerate(node.inputs):
            if graph.value(reference).dtype == "resource" and (index or node.op not in _ACCESSES):
                reasons[reference] = f"'{node.name}' ({node.op}) takes the variable itself"
        variable = node.inputs[0] if node.inputs else ""
        if variable not in known:
            continue
        if node.op in _WRITES:
            updated[variable] = node.name
        elif node.op == "ReadVariableOp" and variable not in updated:
            read_from[node.name] = variable
    for variable, value in known.items():
        if not value.is_resolved or not value.nbytes:
            reasons[variable] = f"its size is open: {value}"
        elif value.dtype not in FAR_DTYPES:
            reasons[variable] = f"values of its type stay on the device: {value}"
    return reasons


def trips(graph: ir.Graph) -> dict[str, int]:
    """How often a variable that lives in a far tier would travel in a step: for each product with it, and when updated.

    Known weakness: a variable that is read twice within a few nodes is fetched once.
    """
    found: dict[str, int] = dict.fromkeys(values(graph), 0)
    products = {node.name for node in graph.nodes if "MatMul" in node.op or "Conv" in node.op or node.op == "Einsum"}
    for node in graph.nodes:
        variable = node.inputs[0] if node.inputs else ""
        if variable in found and node.op in _WRITES:
            found[variable] += 1
        elif variable in found:
            found[variable] += len(products.intersection(graph.consumers.get(node.name, ())))
    return found


def far_bytes(graph: ir.Graph) -> dict[str, int]:
    """What each variable would take of a far tier during a step.

    Twice its bytes if it is updated: its old value stays until the step's end, so that the step can be undone.
    """
    updated = updates(graph)
    return {name: value.nbytes * (1 + (name in updated)) for name, value in values(graph).items()}


def worth_moving(graph: ir.Graph, movable: Collection[str]) -> list[str]:
    """Those of the variables that can leave the device and are large, what travels least first, then the largest."""
    known, declined, cost = values(graph), unplaceable(graph), trips(graph)
    large = [name for name, value in known.items() if value.nbytes > SMALL_BYTES]
    fit = [name for name in large if name in movable and name not in declined]
    return sorted(fit, key=lambda name: (cost[name], -known[name].nbytes))
