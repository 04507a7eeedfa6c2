"""One training run through JAX's PJRT client, plain or inside a memory budget, in a process of its own.

TensorFlow, which gets the CPU only, traces the step; it is planned, exported and run on the device. A plan is taken
once its compiled program keeps the budget there. Given a `trial.Trial` as JSON, it prints a `trial.Result`:

    python -m graphswap.tools.pjrt_trial '{"trial": {"model": "gpt_gpu", "memory_bytes": 8589934592,
        "graphswap": "8GiB", "steps": 12}, "device": "gpu", "data_sheet": "h200"}'
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from typing import Any

import keras
import tensorflow as tf

from graphswap import devices, offline, pjrt, simulator, stablehlo_export, xla
from graphswap.cost_model import CostModel
from graphswap.graphdef import UnsupportedGraphError
from graphswap.options import parse_bytes
from graphswap.plan import Plan
from graphswap.strategies import STRATEGIES
from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.tools import models, steps
from graphswap.tools.trial import Result, Trial


def train(trial: Trial, device: str, data_sheet: str) -> Result:
    """Trains a model of `models` in this process.

    Args:
        trial: What to run; its targets are class numbers.
        device: "cpu", "gpu" or "tpu".
        data_sheet: Of `devices.DEVICES`, what plans are made with.

    Returns:
        What came of it; the peak is 0 where the device counts no bytes. Its report has what was predicted and the bytes
        of the compiled step.

    Raises:
        DeviceError: If there is no such device, or none that can do what the plan asks for.
        ImportError: If JAX is missing, or of a version that this was not tried with.
        InfeasibleBudgetError: If no plan fits.
        UnsupportedGraphError: If the step can't be planned, or not be exported.
    """
    on = pjrt.local_device(device)
    keras.utils.set_random_seed(0)
    training = {**models.MODELS, **models.GPU_MODELS}[trial.model]()
    first = next(training.batches)
    loss: Any = keras.losses.get(training.loss)

    def mean(targets: Any, outputs: Any) -> Any:
        return tf.reduce_mean(loss(targets, outputs))

    function, _ = steps.function(training.model, training.optimizer, mean, len(first[0]))
    specs = [tf.TensorSpec(array.shape, array.dtype) for array in first]
    traced = offline.trace(trial.model, function, specs, training.model)
    costs = CostModel(devices.DEVICES[data_sheet])

    def compiled(plan: Plan) -> pjrt.Step:
        return pjrt.Step(stablehlo_export.export(traced.func_graph, traced.graph, plan), device)

    plan = Plan()
    if trial.graphswap:
        strategy: Any = STRATEGIES[trial.strategy]
        if hasattr(strategy, "planning_seconds"):
            strategy = dataclasses.replace(strategy, planning_seconds=trial.planning_seconds / 3)  # there are several
        budget = parse_bytes(trial.graphswap)
        plan = xla.fitted(strategy, traced.graph, costs, budget, lambda one: compiled(one).memory.device)
    step = compiled(plan)
    losses, seconds = [], []
    for batch in itertools.islice(itertools.chain([first], training.batches), trial.steps):
        start = time.perf_counter()
        losses.append(float(step(*batch)[0]))
        seconds.append(time.perf_counter() - start)
    judged = simulator.judge(traced.graph, plan, costs)
    report = {
        "predicted_peak_bytes": judged.allocated_peak_bytes,
        "predicted_seconds": judged.seconds,
        "compiled_bytes": step.memory.device,
        "swaps": len(plan.swaps),
        "repeated_nodes": sum(len(decision.nodes) for decision in plan.recomputes),
    }
    return Result("", losses, seconds, pjrt.peak_bytes(on), report=report)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    tf.config.set_visible_devices([], "GPU")
    try:
        result = train(Trial(**asked["trial"]), asked["device"], asked["data_sheet"])
    except (ImportError, pjrt.DeviceError, InfeasibleBudgetError, UnsupportedGraphError) as error:
        sys.exit(str(error))
    print(json.dumps(dataclasses.asdict(result)))
