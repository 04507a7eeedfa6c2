"""What XLA makes of a GPT's training step for a GPU that is not here: memory and copies, compiled, not run.

    JAX_PLATFORMS=cpu python -m graphswap.tools.targets --target=h200.txtpb --out=targets.json

The same step as Keras traces it, plain and under plans for one budget, and written in JAX, with JAX's own policies. The
budget is a share of what the plain step takes, compiled. XLA's own rematerialisation gets it as the size of the memory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from absl import app, flags

from graphswap import devices, fusion, ir, liveness, offline, pjrt, simulator, stablehlo_export, xla
from graphswap.cost_model import NO_LINK, CostModel, DeviceSpec
from graphswap.options import format_bytes
from graphswap.plan import Plan
from graphswap.strategies import Auto, gaps
from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.tools import jax_gpt, models, steps
from graphswap.tools.benchmark import markdown_table
from graphswap.tools.jax_gpt import Size

COLUMNS = (
    "step",
    "device",
    "of it temporary",
    "host",
    "predicted",
    "copies out and back",
    "beside kernels",
    "compiling",
)


def traced(size: Size) -> offline.Step:
    """The training step of `models.gpt`."""
    training = models.gpt(**dataclasses.asdict(size))
    loss: Any = training.loss
    function, specs = steps.function(training.model, training.optimizer, loss, size.batch)
    return offline.trace("gpt", function, specs, training.model)


@dataclasses.dataclass(frozen=True)
class Way:
    """A strategy that only swaps, only repeats nodes, or may do both.

    Attributes:
        name: "swap", "recompute" or "both".
        seconds: That a plan may take.
    """

    name: str
    seconds: float

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        device, candidates = cost_model.device, graph
        if self.name == "recompute":
            device = dataclasses.replace(device, links=dict.fromkeys(device.links, NO_LINK))
        if self.name == "swap":  # what is stateful is never run twice; views of what came back are made anew
            is_fixed = (node.stateful or liveness.alias_of(node, 0) is None for node in graph.nodes)
            nodes = (dataclasses.replace(n, stateful=fixed) for n, fixed in zip(graph.nodes, is_fixed, strict=True))
            candidates = graph.replace(nodes=tuple(nodes))
        found = Auto(self.seconds).plan(candidates, dataclasses.replace(cost_model, device=device), memory_budget)
        return found.replace(fingerprint=graph.fingerprint)


def rows(size: Size, target: str, device: DeviceSpec, share: float, seconds: float) -> Iterator[dict[str, Any]]:
    """Compiles everything, one after the other."""
    step = traced(size)
    view, cost_model = fusion.fused(step.graph), CostModel(device)

    def compile_(name: str, plan: Plan, text: str = target, **options: str) -> dict[str, Any]:
        exported = stablehlo_export.export(step.func_graph, step.graph, plan)
        light = dataclasses.replace(exported, state=())
        del exported
        return _row(name, functools.partial(pjrt.compile_for, light, text, options))

    plain = compile_("plain", Plan())
    predicted = simulator.simulate(view, Plan(), cost_model).peak_bytes
    yield {**plain, "predicted_bytes": predicted}
    budget = int(share * plain["device_bytes"])
    small = pjrt.with_memory(target, budget)
    yield compile_("XLA's rematerialisation", Plan(), small, xla_disable_hlo_passes="")
    offloading = {"xla_gpu_enable_host_memory_offloading": "True", "xla_disable_hlo_passes": ""}
    yield compile_("XLA's rematerialisation and offloading", Plan(), small, **offloading)
    for way in ("recompute", "swap", "both"):
        found = []

        def needs(plan: Plan, way: str = way, found: list[dict[str, Any]] = found) -> int:
            if plan.is_empty:
                return plain["device_bytes"]
            judged = simulator.simulate(view, plan, cost_model)
            planned = {
                "budget_bytes": budget,
                "predicted_bytes": judged.peak_bytes,
                "predicted_seconds": judged.seconds,
                "swaps": len(plan.swaps),
                "repeated_nodes": sum(len(decision.nodes) for decision in plan.recomputes),
                "planned_beside": copies_beside_nodes(judged),
            }
            found.append({**compile_(f"graphswap, {way}", fusion.expanded(plan, step.graph)), **planned})
            return found[-1].get("device_bytes", sys.maxsize)

        try:
            xla.fitted(Way(way, seconds), view, cost_model, budget, needs)
        except (InfeasibleBudgetError, gaps.CantRecompute) as error:
            found.append({"name": f"graphswap, {way}", "budget_bytes": budget, "error": str(error)})
        yield from found
    for way in jax_gpt.WAYS:
        yield _row(f"JAX, {way}", functools.partial(jax_step, size, target, way))


def copies_beside_nodes(timeline: simulator.Timeline) -> int:
    """How many copies of a planned step run while a node runs, at least for a part of their time."""
    copies = [step for step in timeline.steps if step.kind in ("swap_out", "swap_in")]
    nodes = [step for step in timeline.steps if step.kind in ("run", "recompute") and step.end > step.start]
    return sum(any(node.start < copy.end and copy.start < node.end for node in nodes) for copy in copies)


def _row(name: str, compile_: Callable[[], pjrt.Compiled]) -> dict[str, Any]:
    begun = time.perf_counter()
    try:
        made = compile_()
    except pjrt.DeviceError as error:
        return {"name": name, "error": str(error)}
    out = sum(copy.is_out for copy in made.copies)
    return {
        "name": name,
        "device_bytes": made.memory.device,
        "temp_bytes": made.memory.temp,
        "host_bytes": made.memory.host_temp,
        "planned_copies": made.planned,
        "copies": (out, len(made.copies) - out),
        "copied_bytes": sum(copy.nbytes for copy in made.copies),
        "beside_kernels": sum(copy.beside > 0 for copy in made.copies),
        "compile_seconds": time.perf_counter() - begun,
    }


def jax_step(size: Size, target: str, way: str) -> pjrt.Compiled:
    """The step of the same GPT in JAX, compiled.

    Args:
        size: Of the GPT.
        target: XLA's description of the GPU.
        way: Out of `jax_gpt.WAYS`.
    """
    return pjrt.inspected(jax_gpt.compiled(size, way, pjrt.target_device(target), dict(pjrt.TARGET_OPTIONS)))


# --- the table ----------------------------------------------------------------------------------------------------


def cells(row: dict[str, Any]) -> Sequence[str]:
    """A row of the table."""
    if "error" in row:
        return (row["name"], row["error"], *[""] * (len(COLUMNS) - 2))
    predicted, planned = row.get("predicted_bytes"), row.get("planned_beside")
    counts = "{} of {}, {} of {}".format(
        *(n for pair in zip(row["copies"], row["planned_copies"], strict=True) for n in pair)
    )
    return (
        row["name"],
        format_bytes(row["device_bytes"]),
        format_bytes(row["temp_bytes"]),
        format_bytes(row["host_bytes"]),
        "" if predicted is None else f"{format_bytes(predicted)} ({predicted / row['device_bytes'] - 1:+.1%})",
        counts if any(row["planned_copies"]) else str(sum(row["copies"]) or ""),
        str(row["beside_kernels"] or "") + (f", planned {planned}" if planned else ""),
        f"{row['compile_seconds']:.0f} s",
    )


def main(argv: Sequence[str]) -> int:
    """Prints the table, and writes JSON."""
    values = FLAGS
    if len(argv) > 1 or values.target is None:
        raise app.UsageError(f"expected --target=FILE and flags only, received {', '.join(argv[1:]) or 'no --target'}.")
    keras.utils.set_random_seed(0)
    size = Size(values.blocks, values.width, values.heads, values.length, values.batch)
    target = pathlib.Path(values.target).read_text(encoding="utf-8")
    found = []
    for row in rows(size, target, devices.DEVICES[values.device], values.share, values.planning_seconds):
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    if values.out:
        pathlib.Path(values.out).write_text(json.dumps({"size": dataclasses.asdict(size), "rows": found}, indent=1))
    print(markdown_table(COLUMNS, [cells(row) for row in found]))
    return 0


FLAGS = flags.FLAGS


def _define() -> None:
    flags.DEFINE_string("target", None, "XLA's description of the GPU, a GpuTargetConfigProto as text.")
    flags.DEFINE_string("device", "h200", "Whose data sheet plans are made with.")
    flags.DEFINE_string("out", None, "File for the JSON.")
    flags.DEFINE_float("share", 0.5, "Of what the plain step takes: the budget.", 0.0, 1.0)
    flags.DEFINE_float("planning_seconds", 20.0, "For each plan.")
    for name, default in dataclasses.asdict(Size(12, 1024, 16, 1024, 16)).items():
        flags.DEFINE_integer(name, default, "Of the GPT.", 1)


if __name__ == "__main__":
    _define()
    app.run(main)
