"""Trains with several workers on this machine, plainly and with blocks of gradients, and compares.

    python -m graphswap.tools.workers --model=resnet50 --workers=2 --budget=160MiB --memory=166MiB --out=workers.json

Trainings of a few steps on the same global batches, each worker with an emulated accelerator of its own: workers with a
budget, and such that divide the optimizer's state among them; and with ample memory plain ones, plain ones that sum
gradients in packs of a mebibyte, and one process alone.
Plain workers with little memory, too. What the packs change is rounding: more than two add in another order. BatchNorm
takes its statistics of all workers' examples, as one process would. The last step of those with blocks and of plain
workers with ample memory is recorded: when collectives started and how many bytes of gradients, of their packs and of
sums were on the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import graphswap
from graphswap import distribute, emulate, host_variable, ir, liveness, options, profiler
from graphswap.tools import launch, models

MODELS = {"resnet50": lambda: models.resnet50(64, 16), "gpt": lambda: models.gpt(4, 128, 4, 64, 16)}
"""Name to what makes the training."""

_RESULT = "result: "
_GRADIENTS = "gradients.json"
_AMPLE_BYTES = 2 << 30
_TRAINING_SECONDS = 900
_PACK_BYTES = 1 << 20
PAIRS = (("blocks", "plain"), ("blocks", "alone"), ("sharded", "blocks"), ("plain in packs", "plain"))
"""Trainings whose losses and variables are held against each other."""


# --- in a worker ------------------------------------------------------------------------------------------------


def train(
    model: str, budget: str, steps: int, folder: str, is_recorded: bool, pack_bytes: int, is_sharded: bool
) -> dict[str, Any]:
    """Takes the steps and writes all variables to a file.

    Args:
        model: One of `MODELS`.
        budget: For graphswap; "" for plain.
        steps: How many.
        folder: For the file, which is called after the worker's index.
        is_recorded: Whether one more step is taken, under the profiler.
        pack_bytes: Of the packs in which gradients are summed; 0 for all in one.
        is_sharded: Whether the optimizer's state is divided among the workers.

    Returns:
        Losses, peak, and of a recorded step what `seen` tells.
    """
    tf.config.experimental.enable_op_determinism()
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    keras.utils.set_random_seed(1)
    is_alone = not distribute.in_cluster()
    distribution = (
        tf.distribute.get_strategy()
        if is_alone
        else tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=tf.distribute.experimental.CommunicationOptions(bytes_per_pack=pack_bytes)
        )
    )
    count = distribution.num_replicas_in_sync
    index = 0 if is_alone else distribution.cluster_resolver.task_id  # pyright: ignore[reportOptionalMemberAccess]
    with distribution.scope():
        training = MODELS[model]()
        for layer in training.model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True
        asked = {"swap_to": "host", "planning_seconds": 5.0, "shard_optimizer": is_sharded}
        option = {"graphswap": graphswap.Options(budget, **asked)} if budget else {}
        training.model.compile(training.optimizer, training.loss, **option)  # pyright: ignore[reportCallIssue]

    def step() -> float:
        part = [
            array[index * len(array) // count : (index + 1) * len(array) // count] for array in next(training.batches)
        ]
        return float(training.model.train_on_batch(*part))

    losses = [step() for _ in range(steps)]
    found: dict[str, Any] = {"losses": losses, "peak_bytes": profiler.memory_in_use("peak")}
    found |= {"held_bytes": profiler.memory_in_use(), "optimizer_bytes": _bytes_here(training.optimizer.variables)}
    file = pathlib.Path(folder, _GRADIENTS)
    if budget:
        report = graphswap.report(training.model).steps[0]
        plan, graph = report.plan, report.file.graph  # pyright: ignore[reportOptionalMemberAccess]
        found |= {"predicted_peak_bytes": report.predicted_peak_bytes, "blocks": len(plan.exchanges)}
        found |= {"swaps": len(plan.swaps), "repeated": sum(len(one.nodes) for one in plan.recomputes)}
        if index == 0:
            file.write_text(json.dumps(_gradients(graph)))
    if is_recorded:
        with profiler.recording() as events:
            losses.append(step())
        found |= seen(events, json.loads(file.read_text())) if index == 0 else {}
    variables = [np.asarray(v.numpy()) for v in (*training.model.variables, *training.optimizer.variables)]
    np.savez(pathlib.Path(folder, f"{index}.npz"), *variables)
    distribute.Workers(count).together("end", str)  # a worker whose leader has ended is ended by TensorFlow
    digest = hashlib.sha256(b"".join(array.tobytes() for array in variables)).hexdigest()
    return {**found, "digest": digest}


def _bytes_here(variables: Sequence[Any]) -> int:
    """What variables take of this worker's device."""
    parts = [part for variable in variables for part in getattr(variable.value, "values", (variable.value,))]
    sharded = [getattr(part, "sharded", None) for part in parts]
    return sum(
        host_variable.value_bytes(part) if own is None else own.nbytes for part, own in zip(parts, sharded, strict=True)
    )


def _gradients(graph: ir.Graph) -> dict[str, Any]:
    """Which ops make gradients, and the bytes of what sums them, in blocks or at once."""
    root_of = liveness.roots(graph)
    values = [value for block in graph.blocks.values() for value in block]
    sums = {name: graph.by_name[name].outputs[0].nbytes for name in graph.blocks}
    (whole,) = {str(dict(graph.by_name[name].attrs)["sum"]) for name in graph.blocks}
    return {"makers": [ir.producer(root_of[value]) for value in values], "sums": {**sums, whole: sum(sums.values())}}


def seen(events: Sequence[profiler.Event], gradients: Mapping[str, Any]) -> dict[str, Any]:
    """What a recorded step tells of its gradients.

    Args:
        events: The step's.
        gradients: `makers`, the names of the ops that make gradients, and `sums`, bytes by the names of those that sum
            them, in blocks or at once.

    Returns:
        `sums`: how many ran; `first_start`: when the first one started, as a share of the backward pass's time;
        `backward_seconds`: this time; `beside_seconds`: of it what lay beside sums; `in_flight_bytes`: the most bytes
        that were being summed; `gradient_bytes`: the most bytes of gradients, of what joins and splits them and of
        sums.
    """
    backward = [(start, start + length) for start, length, name, _ in events if _op(name).startswith("gradient_tape/")]
    begun, ended = min(backward)[0], max(end for _, end in backward)
    sums = [(start, start + length, _op(name)) for start, length, name, _ in events if _op(name) in gradients["sums"]]
    starts = [(start, gradients["sums"][name]) for start, _, name in sums]
    ends = [(end, -gradients["sums"][name]) for _, end, name in sums]
    beside = [min(end, ended) - max(start, begun) for start, end, _ in sums]
    scope = sums[0][2].partition("/")[0]
    packs = tuple(f"{scope}/{part}" for part in (ir.ALL_REDUCE, "concat", "split"))
    makers = frozenset(gradients["makers"])
    held = [
        b for b in profiler.allocations(events) if (b.op in makers and not b.is_temporary) or b.op.startswith(packs)
    ]
    changes = [*((b.start, b.nbytes) for b in held), *((b.end, -b.nbytes) for b in held)]
    return {
        "sums": len(sums),
        "first_start": (sums[0][0] - begun) / (ended - begun),
        "backward_seconds": (ended - begun) / 1e12,
        "beside_seconds": sum(max(0, one) for one in beside) / 1e12,
        "in_flight_bytes": _most([*starts, *ends]),
        "gradient_bytes": _most(changes),
    }


def _op(event: str) -> str:
    """The op that an event tells of, "" if it is of another kind."""
    return event.rpartition(":")[0]


def _most(changes: Sequence[tuple[int, int]]) -> int:
    return max(itertools.accumulate(nbytes for _, nbytes in sorted(changes)), default=0)


# --- around them ------------------------------------------------------------------------------------------------


def run(workers: int, memory_bytes: int, *arguments: Any) -> Any:
    """Trains in so many processes.

    Args:
        workers: How many.
        memory_bytes: Of each accelerator.
        *arguments: Of `train`.

    Returns:
        What `train` returned, by worker; the last line of its errors in the place of one that failed.
    """
    configs = list(launch.cluster_configs(workers).values()) if workers > 1 else [""]
    with contextlib.ExitStack() as stack:
        started = []
        for config in configs:
            variables = {**os.environ, "TF_CONFIG": config, **emulate.environment(memory_bytes)}
            command = [sys.executable, "-m", "graphswap.emulate", __file__, "train", json.dumps(arguments)]
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            process = subprocess.Popen(command, env=variables, stdout=out, stderr=err)
            stack.callback(process.kill)
            started.append((process, out, err))
        return [_ended(*one) for one in started]


def _ended(process: subprocess.Popen[bytes], out: IO[str], err: IO[str]) -> Any:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_TRAINING_SECONDS)
    for file in (out, err):
        file.seek(0)
    results = [line for line in out if line.startswith(_RESULT)]
    errors = [line for line in err if "Error" in line]
    return json.loads(results[0].removeprefix(_RESULT)) if results else (errors or ["no result"])[-1].strip()[:200]


def compare(model: str, workers: int, budget: str, memory_bytes: int, steps: int) -> dict[str, Any]:
    """The trainings, and how far they agree.

    Returns:
        By name of the training what `run` returned, and what losses and variables differ by at most, on worker 0.
    """
    with tempfile.TemporaryDirectory() as top:
        found: dict[str, Any] = {"model": model, "workers": workers, "budget": budget, "memory_bytes": memory_bytes}
        ways = {
            "blocks": (workers, memory_bytes, budget, True, 0),
            "sharded": (workers, memory_bytes, budget, False, 0),
            "plain": (workers, _AMPLE_BYTES, "", True, 0),
            "plain in packs": (workers, _AMPLE_BYTES, "", False, _PACK_BYTES),
            "plain, little memory": (workers, memory_bytes, "", False, 0),
            "alone": (1, _AMPLE_BYTES, "", False, 0),
        }
        files = {}
        for name, (count, nbytes, given, is_recorded, pack_bytes) in ways.items():
            folder = pathlib.Path(top, name)
            folder.mkdir()
            gradients = pathlib.Path(top, "blocks", _GRADIENTS)
            if gradients.exists():
                (folder / _GRADIENTS).write_bytes(gradients.read_bytes())
            taken = steps if is_recorded else steps + 1  # as many as those with a recorded one
            arguments = (model, given, taken, str(folder), is_recorded, pack_bytes, name == "sharded")
            found[name] = run(count, nbytes, *arguments)
            files[name] = folder / "0.npz"
            print(f"{name}: {json.dumps(found[name])}", flush=True)
        for one, other in PAIRS:
            if isinstance(found[one][0], dict) and isinstance(found[other][0], dict):
                found[f"{one} differs from {other}"] = _difference(found, files, one, other)
        return found


def _difference(found: Mapping[str, Any], files: Mapping[str, pathlib.Path], one: str, other: str) -> dict[str, Any]:
    ours, theirs = np.load(files[one]), np.load(files[other])
    losses = zip(found[one][0]["losses"], found[other][0]["losses"], strict=True)
    return {
        "losses": [abs(mine - its) for mine, its in losses],
        "variables": max(float(np.abs(ours[name].astype("f8") - theirs[name]).max()) for name in ours.files),
        "is_bitwise": {_digest(worker) for worker in found[one]} == {_digest(worker) for worker in found[other]},
    }


def _digest(result: Any) -> str | None:
    """Of a worker's losses and variables; None if it failed."""
    return result["digest"] if isinstance(result, dict) else None


def main(argv: Sequence[str]) -> None:
    """Runs the trainings, prints what came of each, and writes all numbers to a file."""
    if argv[1:2] == ["train"]:
        print(_RESULT + json.dumps(train(*json.loads(argv[2]))))
        return
    values = flags.FlagValues()
    model = flags.DEFINE_enum("model", "resnet50", list(MODELS), "What to train.", flag_values=values)
    workers = flags.DEFINE_integer("workers", 2, "How many processes.", lower_bound=2, flag_values=values)
    budget = flags.DEFINE_string("budget", None, "Of each worker.", required=True, flag_values=values)
    memory = flags.DEFINE_string("memory", None, "Of each accelerator.", required=True, flag_values=values)
    steps = flags.DEFINE_integer("steps", 3, "Before the recorded one.", lower_bound=1, flag_values=values)
    out = flags.DEFINE_string("out", None, "File for all numbers, as JSON.", flag_values=values)
    try:
        if values(argv)[1:]:
            raise app.UsageError(f"expected flags, received {', '.join(values(argv)[1:])}.")
        memory_bytes = options.parse_bytes(memory.value)
    except (flags.Error, app.UsageError, ValueError) as error:
        sys.exit(f"workers: {error}")
    found = compare(model.value, workers.value, budget.value, memory_bytes, steps.value)
    if out.value is not None:
        pathlib.Path(out.value).write_text(json.dumps(found, indent=1))
    for one, other in PAIRS:
        what = f"{one} differs from {other}"
        print(f"{what}: {found.get(what)}")


if __name__ == "__main__":
    main(sys.argv)
