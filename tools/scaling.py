"""Data-parallel steps of many workers on paper: blocks of gradients beside compute, and one sum after it. A simulation.

    python -m graphswap.tools.scaling --model=resnet50 --batch=128 --workers=1,8,64,2048 --out=scaling.json

Every worker is one V100 with 16 GiB by its data sheet, and its batch stays the same whatever their number. The network
is a ring: 100 Gb/s to the next worker, of which a share is assumed to be reached, with an assumed latency. Both steps
are planned for the device's memory by the same strategy; "at once" is TensorFlow's own way, one sum of all gradients.
KARMA (Wahib et al., SC'20, arXiv 2008.11421) was run on up to 2,048 real V100s.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from absl import app, flags

from graphswap import blocks, ir, rewrites, simulator
from graphswap.cost_model import CostModel, DeviceSpec, Link
from graphswap.devices import DEVICES
from graphswap.options import format_bytes
from graphswap.plan import Plan
from graphswap.strategies import Joint, gaps
from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.tools import models, steps
from graphswap.tools.benchmark import markdown_table

_MEMORY_BYTES = 16 << 30
_BITS_PER_SECOND, _REACHED = 100e9, 0.8
"""Of the network, and the share of it that is assumed to be reached, as for `devices`' links."""


class _Summing:
    """An optimizer that sums gradients over replicas before it applies them, packed as TensorFlow packs them."""

    def __init__(self, optimizer: keras.optimizers.Optimizer):
        self._optimizer = optimizer

    def build(self, variables: Sequence[Any]) -> None:
        self._optimizer.build(variables)

    def apply(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        dense = [tf.convert_to_tensor(gradient) for gradient in reversed(gradients)]
        key = tf.raw_ops.Placeholder(dtype=tf.int32, shape=[])
        total = tf.raw_ops.CollectiveReduceV2(
            input=tf.concat([tf.reshape(gradient, [-1]) for gradient in dense], 0),
            group_size=2,
            group_key=1,
            instance_key=key,
            ordering_token=[],
            merge_op="Add",
            final_op="Id",
        )
        parts = tf.split(total, [gradient.shape.num_elements() for gradient in dense])
        summed = [tf.reshape(part, gradient.shape) for part, gradient in zip(parts, dense, strict=True)]
        self._optimizer.apply(summed[::-1], variables)


def _resnet50(batch: int) -> ir.Graph:
    model = keras.applications.ResNet50(weights=None, classes=1000)
    optimizer: Any = _Summing(keras.optimizers.SGD(0.1, momentum=0.9))
    return steps.trace(model, optimizer, keras.losses.SparseCategoricalCrossentropy(), batch)


def _gpt(batch: int) -> ir.Graph:
    training = models.gpt(blocks=12, width=768, heads=12, length=1024, batch=batch)
    optimizer: Any = _Summing(training.optimizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return steps.trace(training.model, optimizer, loss, batch)


MODELS: Mapping[str, Callable[[int], ir.Graph]] = {"resnet50": _resnet50, "gpt": _gpt}
"""Name to what traces the step of one worker; ResNet-50 at 224x224, a GPT of 12 blocks of width 768."""


def of_workers(graph: ir.Graph, workers: int) -> ir.Graph:
    """The step of one of so many workers."""
    return graph.replace(
        nodes=tuple(
            dataclasses.replace(node, attrs=(("workers", workers),)) if node.op == ir.ALL_REDUCE else node
            for node in graph.nodes
        )
    )


def simulate(
    graph: ir.Graph, device: DeviceSpec, memory_budget: int, workers: int, planning_seconds: float
) -> dict[str, Any]:
    """Plans and simulates the step of one of so many workers.

    Args:
        graph: The step, with a sum of all gradients.
        device: Each worker's.
        memory_budget: Bytes.
        workers: How many.
        planning_seconds: For each plan.

    Returns:
        `workers`; seconds of the step with one sum, `at_once`, and with blocks, `in_blocks`, None without a plan;
        `blocks`, how many; `network_seconds` of all of them.
    """
    graph, cost_model = of_workers(graph, workers), CostModel(device)
    exchanges = blocks.choose(graph, cost_model, memory_budget) if workers > 1 else ()
    exchanged = rewrites.exchange(graph, Plan(decisions=exchanges))
    return {
        "workers": workers,
        "at_once": _seconds(graph, cost_model, memory_budget, planning_seconds),
        "in_blocks": _seconds(exchanged, cost_model, memory_budget, planning_seconds),
        "blocks": len(exchanges),
        "network_seconds": sum(cost_model.network_seconds(exchanged, node) for node in exchanged.nodes),
    }


def _seconds(graph: ir.Graph, cost_model: CostModel, memory_budget: int, planning_seconds: float) -> float | None:
    problem = gaps.problem(graph, cost_model)
    plain = simulator.simulate(problem.graph, Plan(), cost_model)
    if plain.peak_bytes <= memory_budget:
        return plain.seconds
    try:
        plan = Joint(planning_seconds).plan(graph, cost_model, memory_budget)
    except InfeasibleBudgetError:
        return None
    return simulator.simulate(graph, plan, cost_model).seconds


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """All cases for people. Efficiency is the seconds of the first case over those of the case."""
    header = ("workers", "at once", "efficiency", "in blocks", "efficiency", "blocks", "on the network")
    rows = []
    for case in cases:
        cells = [str(case["workers"])]
        for name in ("at_once", "in_blocks"):
            seconds, first = case[name], cases[0][name]
            cells += [f"{seconds:.3f} s" if seconds else "no plan"]
            cells += [f"{100 * first / seconds:.1f} %" if seconds and first else ""]
        rows.append((*cells, str(case["blocks"] or ""), f"{case['network_seconds']:.3f} s"))
    return markdown_table(header, rows)


def main(argv: Sequence[str]) -> None:
    """Simulates all numbers of workers, prints a table and writes the numbers to a file."""
    values = flags.FlagValues()
    model = flags.DEFINE_enum("model", list(MODELS)[0], list(MODELS), "What to train.", flag_values=values)
    batch = flags.DEFINE_integer("batch", 128, "Examples of each worker.", lower_bound=1, flag_values=values)
    workers = flags.DEFINE_list("workers", ["1", "8", "64", "2048"], "How many there are.", flag_values=values)
    latency = flags.DEFINE_float("latency", 5e-6, "Seconds to the next worker.", lower_bound=0.0, flag_values=values)
    seconds = flags.DEFINE_float("planning_seconds", 20.0, "For each plan.", lower_bound=0.0, flag_values=values)
    out = flags.DEFINE_string("out", None, "File for all numbers, as JSON.", flag_values=values)
    try:
        if values(argv)[1:]:
            raise app.UsageError(f"expected flags, received {', '.join(values(argv)[1:])}.")
        if not all(text.isdigit() and int(text) for text in workers.value):
            raise app.UsageError(f"--workers: expected numbers from 1 on, received {','.join(workers.value)}.")
    except (flags.Error, app.UsageError) as error:
        sys.exit(f"scaling: {error}")
    speed = _REACHED * _BITS_PER_SECOND / 8
    network = Link(speed, speed, latency.value, overlaps=True)
    device = dataclasses.replace(DEVICES["v100"], network=network)
    graph = MODELS[model.value](batch.value)
    cases = []
    for count in map(int, workers.value):
        cases.append(simulate(graph, device, _MEMORY_BYTES, count, seconds.value))
        print(json.dumps(cases[-1]), flush=True)
    facts = {"model": model.value, "batch": batch.value, "latency_seconds": latency.value, "is_simulated": True}
    if out.value is not None:
        pathlib.Path(out.value).write_text(json.dumps({**facts, "cases": cases}, indent=1))
    print(
        f"\nSimulated on the data sheet of v100 with {format_bytes(_MEMORY_BYTES)} and {speed / 1e9:.1f} GB/s to the "
        f"next worker, not measured: {model.value}, {batch.value} examples a worker.\n\n{table(cases)}"
    )


if __name__ == "__main__":
    main(sys.argv)
