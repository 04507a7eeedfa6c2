"""Measures graphswap beside plain Keras on emulated accelerators: memory, time, and whether the bits are the same.

    python -m graphswap.tools.benchmark --models=resnet50,gpt --runs=3 --steps=20 --out=measurements.json

Every run is a process of its own; plain and graphswap runs take turns, so that both meet the same noise.
A graphswap run has its budget as the device's hard limit; a plain one has memory in plenty.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from absl import app, flags

from graphswap.options import format_bytes, parse_bytes
from graphswap.tools import trial
from graphswap.tools.trial import Result, Trial

BUDGETS: Mapping[str, tuple[str, ...]] = {
    "resnet50": ("300MiB", "220MiB"),
    "gpt": ("165MiB",),
    "unet": ("40%",),
    "efficientnet": ("50%",),
    "lstm": ("90%",),
}
"""Of each model by default: bytes, or a share of the plain peak."""

_MIB = 1 << 20


@dataclasses.dataclass
class Case:
    """A model in a budget.

    Attributes:
        model: A name of `models.MODELS`.
        memory_bytes: The budget, which is the device's memory.
        plain: Runs of plain Keras with memory in plenty.
        reference: A run of plain Keras without TensorFlow's memory optimiser, for its bits.
        plain_within: The run of plain Keras within the budget.
        graphswap: Runs within the budget.
    """

    model: str
    memory_bytes: int
    plain: list[Result]
    reference: Result
    plain_within: Result
    graphswap: list[Result] = dataclasses.field(default_factory=list)


def budget_bytes(budget: str, plain_peak_bytes: int) -> int:
    """Returns the bytes that a budget such as "300MiB" or "40%" (of the plain peak) means, in whole MiB.

    Raises:
        ValueError: If it is neither.
    """
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", budget)
    nbytes = float(share[1]) / 100 * plain_peak_bytes if share else parse_bytes(budget)
    return int(nbytes) // _MIB * _MIB


def measure(model: str, budgets: Iterable[str], runs: int, steps: int, say: Callable[[str], None]) -> list[Case]:
    """Runs one model plainly and within each budget, in turns."""
    with tempfile.TemporaryDirectory() as cache:  # the first run in a budget measures costs, later ones know them

        def run(title: str, nbytes: int, graphswap: str = "", steps: int = steps, optimizer: bool = True) -> Result:
            result = trial.run(
                Trial(model, nbytes, graphswap, steps, optimizer),
                lambda line: say(f"{model}, {title}: {line}"),
                {"XDG_CACHE_HOME": cache},
            )
            if result.error:
                say(f"{model}, {title}: {result.error.splitlines()[-1]}")
            return result

        plain: list[Result] = []
        cases: list[Case] = []
        for number in range(1, runs + 1):
            plain.append(run(f"plain, run {number}", trial.AMPLE_BYTES))
            if plain[-1].error:
                raise RuntimeError(f"expected {model} to train in plenty of memory, received {plain[-1].error}")
            if not cases:
                reference = run("plain without memory optimiser", trial.AMPLE_BYTES, optimizer=False)
                for nbytes in (budget_bytes(budget, plain[0].peak_bytes) for budget in budgets):
                    within = run(f"plain in {format_bytes(nbytes)}", nbytes, steps=1)
                    cases.append(Case(model, nbytes, plain, reference, within))
            for case in cases:
                size = f"{case.memory_bytes // _MIB}MiB"
                case.graphswap.append(run(f"graphswap in {size}, run {number}", case.memory_bytes, size))
    return cases


def machine() -> dict[str, str]:
    """What the measurements were taken on."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    installed = {distribution.name.lower() for distribution in metadata.distributions()}
    tensorflow = next((n for n in ("tensorflow_cpu", "tensorflow-cpu", "tensorflow") if n in installed), None)
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "tensorflow": metadata.version(tensorflow) if tensorflow else "not installed",
        "keras": metadata.version("keras"),
    }


def memory_table(cases: Iterable[Case]) -> str:
    """What the budget did to memory, time and numbers."""
    header = (
        "model, budget, plain peak, plain in the budget, predicted peak, measured peak, plain step, graphswap step, "
    )
    header += "ratio, losses and variables"
    return markdown_table(header.split(", "), map(_memory_row, cases))


def planning_table(cases: Iterable[Case]) -> str:
    """What planning took, in the first run, and what came out."""
    header = (
        "model, budget, nodes, plans, strategy, swaps, nodes repeated, import, measure, plan, rewrite, first step, "
    )
    header += "plain first step"
    rows = (_planning_row(case) for case in cases if not case.graphswap[0].error)
    return markdown_table(header.split(", "), rows)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that is readable as text, too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def median_seconds(results: Iterable[Result]) -> float:
    """The median step of several runs, first steps left out."""
    return statistics.median(second for result in results for second in result.steady_seconds)


def _memory_row(case: Case) -> list[str]:
    plain = case.plain
    begin = [case.model, format_bytes(case.memory_bytes), _range(format_bytes, [r.peak_bytes for r in plain])]
    begin.append(_outcome(case.plain_within))
    failed = [result for result in case.graphswap if result.error]
    if failed:
        return [*begin, *["-"] * 5, f"{len(failed)} of {len(case.graphswap)} runs failed: {_outcome(failed[0])}"]
    before, after = median_seconds(plain), median_seconds(case.graphswap)
    return [
        *begin,
        _range(format_bytes, [result.report["predicted_peak_bytes"] for result in case.graphswap]),
        _range(format_bytes, [result.peak_bytes for result in case.graphswap]),
        f"{before:.2f} s",
        f"{after:.2f} s",
        f"{after / before:.2f}x",
        _comparison(case),
    ]


def _planning_row(case: Case) -> list[str]:
    first, report = case.graphswap[0], case.graphswap[0].report
    phases = (f"{report['breakdown'].get(phase, 0.0):.1f} s" for phase in ("import", "measure", "plan", "rewrite"))
    counts = (str(report[field]) for field in ("nodes", "plans", "strategy", "swaps", "repeated_nodes"))
    first_steps = (f"{result.seconds[0]:.1f} s" for result in (first, case.plain[0]))
    return [case.model, format_bytes(case.memory_bytes), *counts, *phases, *first_steps]


def _comparison(case: Case) -> str:
    """Whether the bits are those of plain Keras; without its memory optimiser if plain runs differ with it."""
    if all(result.equals(case.reference) for result in case.plain):
        reference = "plain"
    else:
        reference = "plain without memory optimiser"
    equal, runs = sum(result.equals(case.reference) for result in case.graphswap), len(case.graphswap)
    return f"equal to {reference}" if equal == runs else f"{equal} of {runs} runs equal {reference}"


def _outcome(result: Result) -> str:
    """The name of the error that ended a run."""
    found = re.findall(r"\w+Error\b", result.error)
    return found[0] if found else result.error.splitlines()[-1] if result.error else "trains"


def _range(text: Callable[[float], str], numbers: Sequence[float]) -> str:
    ends = dict.fromkeys((text(min(numbers)), text(max(numbers))))
    return " to ".join(ends)


def _progress() -> Callable[[str], None]:
    start = time.monotonic()
    return lambda line: print(f"{time.monotonic() - start:7.1f} s  {line}", flush=True)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark, prints its tables and writes them to a file."""
    values = flags.FlagValues()
    models = flags.DEFINE_list("models", list(BUDGETS), "Names of models.MODELS.", flag_values=values)
    budgets = flags.DEFINE_list("budgets", None, "Budgets for each model: 300MiB or 40%.", flag_values=values)
    runs = flags.DEFINE_integer("runs", 3, "Runs of each kind.", lower_bound=1, flag_values=values)
    steps = flags.DEFINE_integer("steps", 20, "Steps in each run.", lower_bound=1, flag_values=values)
    out = flags.DEFINE_string("out", None, "File for all numbers, as JSON.", flag_values=values)
    try:
        if values(argv)[1:]:
            raise app.UsageError(f"expected flags, received {', '.join(values(argv)[1:])}.")
        for model in models.value:
            if model not in BUDGETS and budgets.value is None:
                raise app.UsageError(f"--models: expected names out of {', '.join(BUDGETS)}, received '{model}'.")
        for budget in budgets.value or ():
            budget_bytes(budget, 0)
    except (flags.Error, app.UsageError, ValueError) as error:
        sys.exit(f"benchmark: {error}")

    described = machine()
    print(", ".join(f"{name} {value}" for name, value in described.items()), flush=True)
    say = _progress()
    cases: list[Case] = []
    for model in models.value:
        cases += measure(model, budgets.value or BUDGETS[model], runs.value, steps.value, say)
        if out.value is not None:  # after each model: a long run that is cut off leaves what it has
            write(pathlib.Path(out.value), described, argv, cases)
    print(f"\n{memory_table(cases)}\n\n{planning_table(cases)}")


def write(path: pathlib.Path, described: Mapping[str, str], argv: Sequence[str], cases: Sequence[Case]) -> None:
    """Writes all numbers of all runs as JSON."""
    contents: dict[str, Any] = {
        "machine": dict(described),
        "command": ["python", "-m", "graphswap.tools.benchmark", *argv[1:]],
        "cases": [dataclasses.asdict(case) for case in cases],
    }
    path.write_text(json.dumps(contents, indent=1))


if __name__ == "__main__":
    main(sys.argv)
