"""Saves training steps of real models, and trains what was saved: a script of its own processes.

python saved_steps.py save MODEL DIRECTORY         the step as a SavedModel, batches beside it
python saved_steps.py train DIRECTORY BATCHES      eight steps with TensorFlow alone; prints what came of them
python saved_steps.py plain DIRECTORY BATCHES      the same with the pins of `trainings`
python saved_steps.py rewrite DIRECTORY OUTPUT BUDGET     without Keras, with the pins of `trainings`
python saved_steps.py export DIRECTORY NAMES...    the forward functions of SavedModels there as ONNX, beside them
python saved_steps.py table                        all of that for all models, as docs/measurements.md has it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

STEPS = 8
# Of the plain peak. What the two loops of the LSTM model pile up can't leave the device.
SHARES = {"resnet50": 0.75, "gpt": 0.65, "lstm": 0.92, "unet": 0.7}
PINS = {"arithmetic_optimization": False, "constant_folding": False}


def run(*arguments: object) -> Any:
    """Runs this script on an emulated accelerator with plenty of memory. Returns what it printed last."""
    from graphswap import emulate

    command = [sys.executable, __file__, *map(str, arguments)]
    variables = {**os.environ, **emulate.environment(4 << 30)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((done.stdout.splitlines() or ["{}"])[-1])


def through(name: str, directory: pathlib.Path) -> dict[str, Any]:
    """Takes a model through all commands. Returns what each of them printed, and the budget in bytes."""
    saved, output = directory / name, directory / "rewritten"
    run("save", name, saved)
    plain = run("plain", saved, f"{saved}.npz")
    budget = int(SHARES[name] * plain["peak_bytes"])
    rewritten = run("rewrite", saved, output, budget)
    trained = run("train", output, f"{saved}.npz")
    exported = run("export", directory, saved.name, output.name)
    return {"plain": plain, "budget": budget, "rewritten": rewritten, "trained": trained, "exported": exported}


class Missing:
    """Finds that a package is not installed."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def save(name: str, directory: str) -> None:
    import functools

    import keras
    import numpy as np
    import tensorflow as tf

    from graphswap.tools import models

    makers = {
        "resnet50": functools.partial(models.resnet50, 64, 16),
        "gpt": functools.partial(models.gpt, blocks=4, width=128, length=64),
        "lstm": models.lstm,
        "unet": models.unet,
    }
    keras.utils.set_random_seed(0)
    training = makers[name]()
    model, optimizer, loss = training.model, training.optimizer, training.loss
    if isinstance(loss, str):
        words = "".join(word.title() for word in loss.split("_"))
        loss = keras.losses.deserialize({"class_name": words, "config": {}})
    optimizer.build(model.trainable_variables)
    batches = [next(training.batches) for _ in range(STEPS)]
    (inputs, targets), *_ = batches

    module = tf.Module()
    module.model, module.optimizer = model, optimizer
    module.state = [variable.value for variable in (*model.variables, *optimizer.variables)]

    @tf.function(
        input_signature=[tf.TensorSpec(inputs.shape, inputs.dtype), tf.TensorSpec(targets.shape, targets.dtype)],
        autograph=False,
    )
    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        return value

    module.step = step
    module.forward = tf.function(
        lambda x: {"scores": model(x, training=False)},
        input_signature=[tf.TensorSpec((None, *inputs.shape[1:]), inputs.dtype)],
    )
    tf.saved_model.save(module, directory)
    arrays = {f"x{i}": x for i, (x, _) in enumerate(batches)} | {f"y{i}": y for i, (_, y) in enumerate(batches)}
    np.savez(f"{directory}.npz", **arrays)


def train(directory: str, batches: str, is_plain: bool) -> None:
    if not is_plain:
        sys.meta_path.insert(0, Missing("graphswap"))
    import numpy as np
    import tensorflow as tf

    without_memory_optimizer = contextlib.nullcontext
    if is_plain:
        from graphswap import graphdef

        without_memory_optimizer = graphdef.without_memory_optimizer
        tf.config.optimizer.set_experimental_options(PINS)
    loaded = tf.saved_model.load(directory)
    data = np.load(batches)
    losses = []
    for number in range(STEPS):
        with without_memory_optimizer():
            losses.append(float(loaded.step(data[f"x{number}"], data[f"y{number}"])))
    digest = hashlib.sha256(b"".join(variable.numpy().tobytes() for variable in loaded.state)).hexdigest()
    peak_bytes = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    print(json.dumps({"losses": losses, "variables": digest, "peak_bytes": peak_bytes}))


def rewrite(directory: str, output: str, budget: str) -> None:
    import tensorflow as tf  # which looks for Keras itself

    for name in [name for name in sys.modules if name.partition(".")[0] == "keras"]:
        del sys.modules[name]
    tf.config.optimizer.set_experimental_options(PINS)
    import graphswap  # noqa: F401 (it puts a finder first)

    sys.meta_path.insert(0, Missing("keras"))
    from graphswap import explanation, graphdef, offline, saved_model
    from graphswap.options import Options

    function = saved_model.load(directory, "step")
    step = offline.from_saved_model(function)
    planner = offline.Planner(step, Options(int(budget), swap_to="host", planning_seconds=5))
    with graphdef.without_memory_optimizer():
        recorded, _ = planner.recorded()
    found = explanation.explain(step.graph, planner.cost_model()[0], recorded)
    planned, rewritten, _ = planner.fitted()
    saved_model.write(function, rewritten, output)
    explained = {"peak_bytes": found.peak_bytes, "parts_bytes": sum(one.live.nbytes for one in found.candidates)}
    print(json.dumps({**explained, "decisions": len(planned.plan.decisions), "has_keras": "keras" in sys.modules}))


def export(directory: str, *names: str) -> None:
    from graphswap import onnx_export

    folder = pathlib.Path(directory)
    done = [onnx_export.export(folder / name, folder / f"{name}.onnx", "forward") for name in names]
    print(json.dumps([{"nodes": one.nodes, "difference": one.largest_difference} for one in done]))


def table() -> None:
    print("| model | plain peak | explained | budget | peak, rewritten | losses and variables | ONNX | seconds |")
    print("| ----- | ---------- | --------- | ------ | --------------- | -------------------- | ---- | ------- |")
    for name in SHARES:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            done = through(name, pathlib.Path(directory))
        plain, rewritten, trained = done["plain"], done["rewritten"], done["trained"]
        sizes = (plain["peak_bytes"], rewritten["peak_bytes"], done["budget"], trained["peak_bytes"])
        same = all(plain[key] == trained[key] for key in ("losses", "variables"))
        nodes = " and ".join(str(one["nodes"]) for one in done["exported"])
        cells = [
            name,
            *(f"{nbytes / 2**20:.1f} MiB" for nbytes in sizes),
            "equal" if same else "different",
            f"{nodes} nodes, {max(one['difference'] for one in done['exported']):.0e}",
            f"{time.perf_counter() - begun:.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "save":
        save(*arguments)
    elif command == "rewrite":
        rewrite(*arguments)
    elif command == "export":
        export(*arguments)
    elif command == "table":
        table()
    else:
        train(*arguments, is_plain=command == "plain")
