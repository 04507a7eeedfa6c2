"""Measures graphswap on a GPU beside plain Keras, JAX and PyTorch: memory, time, bits.

    python -m graphswap.tools.gpu_bench --models=gpt_gpu,resnet50_gpu --budgets=60%,40% --out=gpu.json

Every run is a process of its own whose library is given so much of the GPU's memory: plenty for the plain step, the
budget for the others; with --nocapped plenty for all, which shows by how much a plan misses its budget. The file is
written anew after each run, so that what was measured survives what goes wrong; it begins with the device and its
links, as `graphswap calibrate` measures them. TensorFlow's kernels are deterministic, the others' what they are by
default. Budgets are shares of the peak of the plain step under TensorFlow's executor, for all; times and numbers are
compared with the plain step at the same place. The peers, JAX and PyTorch, train models of the same sizes with their
own ways to save memory, which know no budget: it is only what they have.
"""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags

from graphswap.devices import DEVICES
from graphswap.options import Options, format_bytes, parse_bytes
from graphswap.tools import benchmark, jax_gpt, trial
from graphswap.tools.models import GPU_MODELS, MODELS
from graphswap.tools.trial import Result, Trial

BACK_ENDS = ("executor", "XLA", "PJRT")
_KNOWN = {**MODELS, **GPU_MODELS}
COLUMNS = ("model", "memory", "strategy", "plain peak", "predicted", "measured", "step", "predicted step", "bits")


class Peer(NamedTuple):
    """A library beside TensorFlow.

    Attributes:
        models: Beginnings of the names of those it has.
        ways: In which it trains them, the plain one first.
    """

    models: tuple[str, ...]
    ways: tuple[str, ...]


PEERS: Mapping[str, Peer] = {
    "JAX": Peer(("gpt",), jax_gpt.WAYS),
    "torch": Peer(("gpt", "resnet50"), ("plain", "torch.utils.checkpoint", "save_on_cpu")),  # as torch_peers has them
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        budgets: As `benchmark.budget_bytes` takes them.
        strategies: Names of strategies.
        back_ends: Out of `BACK_ENDS`; the executor's plain run is made in any case.
        peers: Out of `PEERS`.
        steps: How many a run trains.
        planning_seconds: As in `Options`.
        ample_bytes: Memory of the plain run.
        is_capped: Whether the others have no more memory than their budget.
        data_sheet: Of `devices.DEVICES`, what plans for PJRT are made with.
    """

    budgets: Sequence[str]
    strategies: Sequence[str]
    back_ends: Sequence[str]
    peers: Sequence[str]
    steps: int
    planning_seconds: float
    ample_bytes: int
    is_capped: bool
    data_sheet: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A trial and what came of it.

    Attributes:
        place: Where it ran: one of `BACK_ENDS` or `PEERS`.
        way: "plain", a strategy, or a way of the peer.
        trial: What ran.
        result: What came of it.
        took_seconds: From the start of the process to its end.
    """

    place: str
    way: str
    trial: Trial
    result: Result
    took_seconds: float


def measure(model: str, asked: Asked, say: Callable[[str], None]) -> Iterator[Run]:
    """Runs a model plainly, under every strategy in every budget and back end, and in every way of the peers.

    Args:
        model: A name of `models.MODELS` or `models.GPU_MODELS`.
        asked: What to measure.
        say: Gets lines of progress.

    Raises:
        RuntimeError: If the plain step fails in plenty of memory.
    """

    def run(place: str, way: str, one: Trial) -> Run:
        title = f"{model}, {_titled(way, place)} in {_memory(one)}"
        start = time.perf_counter()
        result = _result(place, way, one, asked.data_sheet, lambda line: say(f"{title}: {line}"))
        say(f"{title}: {result.error or f'peak {_counted(result.peak_bytes)}'}")
        return Run(place, way, one, result, time.perf_counter() - start)

    ample = Trial(model, asked.ample_bytes, steps=asked.steps, planning_seconds=asked.planning_seconds, on_gpu=True)
    plain = run("executor", "plain", ample)
    yield plain
    if plain.result.error:
        raise RuntimeError(
            f"expected {model} to train in {format_bytes(ample.memory_bytes)}, received {plain.result.error}"
        )
    for back_end in asked.back_ends:
        if back_end != "executor":
            yield run(back_end, "plain", dataclasses.replace(ample, jit_compile=back_end == "XLA"))
    peers = [(peer, way) for peer in asked.peers for way in PEERS[peer].ways if model.startswith(PEERS[peer].models)]
    for peer, way in peers:
        if way == "plain" or not asked.is_capped:
            yield run(peer, way, ample)
    for budget in asked.budgets:
        nbytes = benchmark.budget_bytes(budget, plain.result.peak_bytes)
        within = dataclasses.replace(ample, memory_bytes=nbytes) if asked.is_capped else ample
        for back_end, strategy in itertools.product(asked.back_ends, asked.strategies):
            size = f"{nbytes >> 20}MiB"
            planned = dataclasses.replace(within, graphswap=size, strategy=strategy, jit_compile=back_end == "XLA")
            yield run(back_end, strategy, planned)
        for peer, way in peers if asked.is_capped else ():
            yield run(peer, way, within)


def _result(place: str, way: str, one: Trial, data_sheet: str, say: Callable[[str], None]) -> Result:
    """Runs a trial where it belongs."""
    if place in ("executor", "XLA"):
        return trial.run(one, say)
    if place == "PJRT":
        asked = {"trial": dataclasses.asdict(one), "device": "gpu", "data_sheet": data_sheet}
        return elsewhere("pjrt_trial", asked, _jax_memory(one.memory_bytes))
    if place == "JAX":
        asked = {"size": sizes(one.model), "way": way, "steps": one.steps, "device": "gpu"}
        return elsewhere("jax_gpt", asked, _jax_memory(one.memory_bytes))
    asked = {"model": one.model.partition("_")[0], "sizes": sizes(one.model), "way": way, "steps": one.steps}
    return elsewhere("torch_peers", {**asked, "device": "cuda", "memory_bytes": one.memory_bytes})


def elsewhere(module: str, asked: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> Result:
    """Runs a module of `tools` that prints a `Result`, in a process of its own.

    Args:
        module: Its name.
        asked: What it takes, as JSON.
        variables: More of its environment.
    """
    command = [sys.executable, "-m", f"graphswap.tools.{module}", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(variables or {})})
    if done.returncode:
        return Result(trial.telling_lines(done.stderr) or f"ended with exit status {done.returncode}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def sizes(model: str) -> dict[str, int]:
    """The sizes that a model of `models` is made with, without its rate of learning."""
    given = {name: one.default for name, one in inspect.signature(_KNOWN[model]).parameters.items()}
    return {name: size for name, size in given.items() if isinstance(size, int)}


def _jax_memory(nbytes: int) -> dict[str, str]:
    """The variables that give JAX so much of the first GPU's memory, all of it taken at the start."""
    return {"XLA_CLIENT_MEM_FRACTION": f"{min(1.0, nbytes / _device_bytes()):.6f}"}


def _device_bytes() -> int:
    """Memory of the first GPU, as NVIDIA's driver tells it."""
    driver, device, nbytes = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_size_t()
    for status in (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceTotalMem_v2(ctypes.byref(nbytes), device),
    ):
        if status:
            raise RuntimeError(
                f"expected NVIDIA's driver to tell the memory of the first GPU, received error {status}."
            )
    return nbytes.value


def row(run: Run, plain: Result) -> tuple[str, ...]:
    """A run for people, beside the plain one at the same place."""
    result, report = run.result, run.result.report
    start = (run.trial.model, _memory(run.trial), _titled(run.way, run.place))
    beside = "" if plain.error else _counted(plain.peak_bytes)
    if result.error:
        return (*start, beside, "", result.error.splitlines()[0][:60], "", "", "")
    seconds = statistics.median(result.steady_seconds)
    ratio = "" if plain.error else f", {seconds / statistics.median(plain.steady_seconds):.2f}x"
    planned = report if "predicted_seconds" in report else None
    return (
        *start,
        beside,
        format_bytes(planned["predicted_peak_bytes"]) if planned else "",
        _counted(result.peak_bytes),
        f"{1000 * seconds:.1f} ms{ratio}",
        f"{1000 * planned['predicted_seconds']:.1f} ms" if planned else "",
        _bits(result, plain),
    )


def _titled(way: str, place: str) -> str:
    """TensorFlow's executor goes without saying."""
    return way if place == "executor" else f"{way}, {place}"


def _memory(one: Trial) -> str:
    return one.graphswap or format_bytes(one.memory_bytes)


def _counted(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes else "not counted"


def _bits(result: Result, plain: Result) -> str:
    """How a run's numbers compare with the plain ones."""
    if result.variables:
        return "equal" if result.equals(plain) else "different"
    off = max((abs(ours / theirs - 1) for ours, theirs in zip(result.losses, plain.losses, strict=False)), default=0.0)
    return f"losses within {off:.0e}" if off else "losses equal"


def calibrated() -> dict[str, Any]:
    """The device with its links to the host, measured in a process of its own; or why it could not be."""
    command = [sys.executable, "-m", "graphswap", "calibrate", "--format=json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": trial.telling_lines(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str]) -> None:
    """Parses the flags, measures, prints the table and writes the JSON."""
    values = flags.FlagValues()
    models = flags.DEFINE_list("models", ["gpt_gpu", "resnet50_gpu"], "Of models.GPU_MODELS.", flag_values=values)
    budgets = flags.DEFINE_list(
        "budgets", ["100%", "60%", "40%"], "2GiB, or 40% of the plain peak.", flag_values=values
    )
    strategies = flags.DEFINE_list("strategies", ["auto"], "Names of strategies.", flag_values=values)
    back_ends = flags.DEFINE_list("back_ends", [*BACK_ENDS], f"Out of {', '.join(BACK_ENDS)}.", flag_values=values)
    peers = flags.DEFINE_list("peers", [*PEERS], f"Out of {', '.join(PEERS)}.", flag_values=values)
    steps = flags.DEFINE_integer("steps", 12, "Steps of a run.", flag_values=values)
    planning_seconds = flags.DEFINE_float("planning_seconds", 30.0, "As in Options.", flag_values=values)
    ample = flags.DEFINE_string("ample", "60GiB", "Memory of the plain runs.", flag_values=values)
    is_capped = flags.DEFINE_bool(
        "capped", True, "Whether the device has no more memory than the budget.", flag_values=values
    )
    data_sheet = flags.DEFINE_string("data_sheet", "h200", "What plans for PJRT are made with.", flag_values=values)
    out = flags.DEFINE_string("out", "gpu.json", "File for the results.", flag_values=values)
    try:
        if values(argv)[1:]:
            raise app.UsageError(f"expected flags, received {', '.join(values(argv)[1:])}.")
        for flag, names, known in (
            ("models", models.value, _KNOWN),
            ("back_ends", back_ends.value, BACK_ENDS),
            ("peers", peers.value, PEERS),
            ("data_sheet", [data_sheet.value], DEVICES),
        ):
            for name in names:
                if name not in known:
                    raise app.UsageError(f"--{flag}: expected names out of {', '.join(known)}, received '{name}'.")
        for budget in budgets.value:
            benchmark.budget_bytes(budget, 0)
        for strategy in strategies.value:
            Options("auto", strategy=strategy, planning_seconds=planning_seconds.value)
        ample_bytes = parse_bytes(ample.value)
        if not pathlib.Path(out.value).resolve().parent.is_dir():
            raise app.UsageError(f"--out: expected a file in a folder that exists, received '{out.value}'.")
    except (flags.Error, app.UsageError, ValueError) as error:
        sys.exit(f"gpu_bench: {error}")
    asked = Asked(
        budgets.value,
        strategies.value,
        back_ends.value,
        peers.value,
        steps.value,
        planning_seconds.value,
        ample_bytes,
        is_capped.value,
        data_sheet.value,
    )
    machine, device, command = (
        benchmark.machine(),
        calibrated(),
        ["python", "-m", "graphswap.tools.gpu_bench", *argv[1:]],
    )
    runs: list[Run] = []
    rows: list[tuple[str, ...]] = []
    for model in models.value:
        plain: dict[str, Result] = {}  # by place
        for run in measure(model, asked, say=lambda line: print(line, file=sys.stderr, flush=True)):
            runs.append(run)
            rows.append(row(run, plain.setdefault(run.place, run.result)))
            found = {
                "machine": machine,
                "device": device,
                "command": command,
                "runs": [dataclasses.asdict(one) for one in runs],
            }
            pathlib.Path(out.value).write_text(json.dumps(found))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(benchmark.markdown_table(COLUMNS, rows))


if __name__ == "__main__":
    main(sys.argv)
