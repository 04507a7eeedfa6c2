"""StableHLO export: a planned training step as an artefact that any PJRT device runs (`pjrt`)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from graphswap import graphdef, ir, pjrt, rewrites
from graphswap.artefact import Array, Artefact, Manifest
from graphswap.graphdef import UnsupportedGraphError
from graphswap.plan import Plan, PlanError
from graphswap.rewrites.barriers import HOST


def export(func_graph: graphdef.FuncGraph, graph: ir.Graph, plan: Plan = Plan()) -> Artefact:  # noqa: B008 (frozen)
    """Turns a traced step into StableHLO with its state as donated arguments, planned.

    Swaps become placements in the host's memory, and barriers hold the plan's order (`rewrites.barriers`). One module
    serves all devices.

    Args:
        func_graph: The step as TensorFlow traced it.
        graph: The same, imported.
        plan: For the graph.

    Returns:
        What `artefact.write` writes; the state is what the variables hold now.

    Raises:
        ImportError: If JAX, whose converter is used, is missing or of a version that this was not tried with.
        PlanError: If the plan does not fit the graph, or if it swaps to disk.
        UnsupportedGraphError: If XLA can't compile an op, if sizes hang on values, or if there are strings.
    """
    version = pjrt.check_version()
    on_disk = next((swap.value for swap in plan.check(graph).swaps if swap.tier != "host"), None)
    if on_disk is not None:
        raise PlanError(
            f"'{graph.name}': expected a plan that swaps to the host, received one that swaps '{on_disk}' to disk, "
            "which PJRT does not know. Plan again with swap_to='host'."
        )
    _check_strings(graph)
    values = [np.asarray(value) for value in graphdef.captured_values(func_graph)]
    planned = rewrites.rewrite(graph, plan, rewrites.PJRT_PASSES)
    module = graphdef.hlo(func_graph, planned)
    _check_sizes(graph.name, module)
    aliases = {entry.parameter_number: entry.output_shape_index[0] for entry in module.input_output_alias.entries}
    updated = len(module.host_program_shape.result.tuple_shapes) - len(graph.outputs)
    if len(module.host_program_shape.parameters) != len(graph.inputs) or updated != len(aliases):
        raise UnsupportedGraphError(
            f"'{graph.name}': expected a module with {len(graph.inputs)} parameters and {len(graph.outputs)} results "
            f"besides its {len(aliases)} new values of variables, received {len(module.host_program_shape.parameters)} "
            f"and {updated + len(graph.outputs) - len(aliases)}. Let the step return no constants."
        )
    count = len(graph.inputs) - len(values)
    state = [
        Array(name, value.dtype.name, value.shape, aliases.get(number), graph.value(name).dtype == "resource")
        for number, (name, value) in enumerate(zip(graph.inputs[count:], values, strict=True), count)
    ]
    kinds = [dict(node.attrs)["memory_kind"] for node in planned.nodes if node.op == ir.PLACE]
    return Artefact(
        Manifest(
            name=graph.name,
            inputs=tuple(_array(graph, name, name) for name in graph.inputs[:count]),
            state=tuple(state),
            results=tuple(_array(graph, reference, str(n)) for n, reference in enumerate(graph.outputs)),
            fingerprint=graph.fingerprint,
            plan=None if plan.is_empty else json.loads(plan.to_json()),
            swapped=(kinds.count(HOST), len(kinds) - kinds.count(HOST)),
            versions={"jax": version},
        ),
        pjrt.portable(module.SerializeToString(), aliases),
        tuple(values),
    )


def _array(graph: ir.Graph, reference: str, name: str) -> Array:
    value = graph.value(reference)
    return Array(name, value.dtype, tuple(size or 0 for size in value.shape or ()))


def _check_strings(graph: ir.Graph) -> None:
    for node in graph.nodes:
        if any(value.dtype == "string" for value in node.outputs):
            raise UnsupportedGraphError(
                f"'{graph.name}': expected arrays of numbers, received strings at node '{node.name}' ({node.op}), "
                "which no PJRT device holds. Turn them into numbers before the step, such as in the dataset."
            )


def _check_sizes(name: str, module: Any) -> None:
    for computation in module.computations:
        for instruction in computation.instructions:
            if any(instruction.shape.is_dynamic_dimension):
                raise UnsupportedGraphError(
                    f"'{name}': expected sizes that do not hang on values, received one that does at node "
                    f"'{instruction.metadata.op_name}' ({instruction.opcode}). Pad it to a fixed size."
                )
