"""Measures graphswap on a GPU beside plain Keras, under TensorFlow's executor and XLA: memory, time, bits.

    python -m graphswap.tools.gpu_bench --models=gpt_gpu,resnet50_gpu --budgets=60%,40% --out=gpu.json

Every run is a process of its own whose TensorFlow is given so much of the GPU's memory: plenty for the plain step, the
budget for the others; with --nocapped plenty for all, which shows by how much a plan misses its budget. The file is
written anew after each run, so that what was measured survives what goes wrong; it begins with the device and its
links, as `graphswap calibrate` measures them. Kernels are deterministic. Budgets are shares of the executor's plain
peak, for XLA, too; times and bits are compared within a back end.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags

from graphswap.options import Options, format_bytes, parse_bytes
from graphswap.tools import benchmark, trial
from graphswap.tools.models import GPU_MODELS, MODELS
from graphswap.tools.trial import Result, Trial

BACK_ENDS = ("executor", "XLA")
COLUMNS = ("model", "memory", "strategy", "plain peak", "predicted", "measured", "step", "predicted step", "bits")


@dataclasses.dataclass(frozen=True)
class Run:
    """A trial and what came of it.

    Attributes:
        trial: What ran.
        result: What came of it.
        took_seconds: From the start of the process to its end.
    """

    trial: Trial
    result: Result
    took_seconds: float


def measure(
    model: str,
    budgets: Sequence[str],
    strategies: Sequence[str],
    back_ends: Sequence[str],
    steps: int,
    planning_seconds: float,
    ample_bytes: int,
    is_capped: bool,
    say: Callable[[str], None],
) -> Iterator[Run]:
    """Runs a model plainly, and under every strategy in every budget, under every back end.

    Args:
        model: A name of `models.MODELS` or `models.GPU_MODELS`.
        budgets: As `benchmark.budget_bytes` takes them.
        strategies: Names of strategies.
        back_ends: Out of `BACK_ENDS`; the executor's plain run is made in any case.
        steps: How many a run trains.
        planning_seconds: As in `Options`.
        ample_bytes: Memory of the plain run.
        is_capped: Whether the others have no more memory than their budget.
        say: Gets lines of progress.

    Raises:
        RuntimeError: If the plain step fails in plenty of memory.
    """

    def run(one: Trial) -> Run:
        title = f"{model}, {' in '.join(_what(one))}"
        start = time.perf_counter()
        result = trial.run(one, lambda line: say(f"{title}: {line}"))
        if result.error:
            say(f"{title}: {result.error}")
        return Run(one, result, time.perf_counter() - start)

    plain = run(Trial(model, ample_bytes, steps=steps, on_gpu=True))
    yield plain
    if plain.result.error:
        raise RuntimeError(f"expected {model} to train in {format_bytes(ample_bytes)}, received {plain.result.error}")
    if "XLA" in back_ends:
        yield run(dataclasses.replace(plain.trial, jit_compile=True))
    for budget in budgets:
        nbytes = benchmark.budget_bytes(budget, plain.result.peak_bytes)
        within = Trial(
            model,
            nbytes if is_capped else ample_bytes,
            f"{nbytes >> 20}MiB",
            steps,
            planning_seconds=planning_seconds,
            on_gpu=True,
        )
        for back_end, strategy in itertools.product(back_ends, strategies):
            yield run(dataclasses.replace(within, strategy=strategy, jit_compile=back_end == "XLA"))


def row(run: Run, plain: Result) -> tuple[str, ...]:
    """A run for people, beside the plain one of the same back end."""
    result, report = run.result, run.result.report
    start = (run.trial.model, *reversed(_what(run.trial)))
    if result.error:
        return (*start, format_bytes(plain.peak_bytes), "", result.error.splitlines()[0][:60], "", "", "")
    seconds = statistics.median(result.steady_seconds)
    ratio = "" if plain.error else f", {seconds / statistics.median(plain.steady_seconds):.2f}x"
    return (
        *start,
        format_bytes(plain.peak_bytes),
        format_bytes(report["predicted_peak_bytes"]) if report else "",
        format_bytes(result.peak_bytes),
        f"{1000 * seconds:.1f} ms{ratio}",
        f"{1000 * report['predicted_seconds']:.1f} ms" if report else "",
        "equal" if result.equals(plain) else "different",
    )


def _what(one: Trial) -> tuple[str, str]:
    """Strategy, with XLA if it is that, and budget."""
    strategy, budget = (one.strategy, one.graphswap) if one.graphswap else ("plain", format_bytes(one.memory_bytes))
    return f"{strategy}, XLA" if one.jit_compile else strategy, budget


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
    back_ends = flags.DEFINE_list("back_ends", [*BACK_ENDS], "Out of executor and XLA.", flag_values=values)
    steps = flags.DEFINE_integer("steps", 12, "Steps of a run.", flag_values=values)
    planning_seconds = flags.DEFINE_float("planning_seconds", 30.0, "As in Options.", flag_values=values)
    ample = flags.DEFINE_string("ample", "60GiB", "Memory of the plain runs.", flag_values=values)
    is_capped = flags.DEFINE_bool(
        "capped", True, "Whether the device has no more memory than the budget.", flag_values=values
    )
    out = flags.DEFINE_string("out", "gpu.json", "File for the results.", flag_values=values)
    try:
        if values(argv)[1:]:
            raise app.UsageError(f"expected flags, received {', '.join(values(argv)[1:])}.")
        for model in models.value:
            if model not in (names := (*MODELS, *GPU_MODELS)):
                raise app.UsageError(f"--models: expected names out of {', '.join(names)}, received '{model}'.")
        for back_end in back_ends.value:
            if back_end not in BACK_ENDS:
                raise app.UsageError(f"--back_ends: expected executor or XLA, received '{back_end}'.")
        for budget in budgets.value:
            benchmark.budget_bytes(budget, 0)
        for strategy in strategies.value:
            Options("auto", strategy=strategy, planning_seconds=planning_seconds.value)
        ample_bytes = parse_bytes(ample.value)
        if not pathlib.Path(out.value).resolve().parent.is_dir():
            raise app.UsageError(f"--out: expected a file in a folder that exists, received '{out.value}'.")
    except (flags.Error, app.UsageError, ValueError) as error:
        sys.exit(f"gpu_bench: {error}")
    machine, device, command = (
        benchmark.machine(),
        calibrated(),
        ["python", "-m", "graphswap.tools.gpu_bench", *argv[1:]],
    )
    runs: list[Run] = []
    rows: list[tuple[str, ...]] = []
    for model in models.value:
        plain: dict[bool, Result] = {}  # by whether it ran under XLA
        for run in measure(
            model,
            budgets.value,
            strategies.value,
            back_ends.value,
            steps.value,
            planning_seconds.value,
            ample_bytes,
            is_capped.value,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        ):
            beside = plain.setdefault(run.trial.jit_compile, run.result)
            runs.append(run)
            rows.append(row(run, beside))
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
