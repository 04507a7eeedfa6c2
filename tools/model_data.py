"""Measures steps whose variables live outside of the device beside plain Keras: peaks, CPU time, bits.

    python -m graphswap.tools.model_data --cases=mlp_24:60MiB,mlp_24_64:48MiB,mlp_96:64MiB --steps=8

Every run is a process of its own on an emulated accelerator; graphswap's has the budget as its hard limit, and makes
its model in host memory. The two take turns, step by step. A plain run in the budget shows that it runs out.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags

from graphswap.options import format_bytes, parse_bytes
from graphswap.tools import benchmark, trial
from graphswap.tools.trial import Result, Trial

PLAIN, SMALL, OURS = "plain", "plain in the budget", "graphswap"
_HEADER = (
    "model",
    "plain peak",
    "budget",
    "plain in the budget",
    "peak",
    "variables away",
    "CPU time of a step",
    "of plain",
    "step",
    "of plain",
    "losses and variables",
)


def measure(
    model: str, budget: str, steps: int, planning_seconds: float, say: Callable[[str], None]
) -> Mapping[str, Result]:
    """Trains a model plainly and within a budget.

    Args:
        model: A name of `models`.
        budget: Such as "60MiB".
        steps: Of each run; the first is not timed.
        planning_seconds: As in `Options`.
        say: Gets the lines of the runs' progress.

    Returns:
        `PLAIN`, `SMALL` and `OURS`, with what came of them.
    """
    # TensorFlow's memory optimiser adds gradients in the order of their arrival where it takes memory to be short.
    plain = Trial(model, trial.AMPLE_BYTES, steps=steps, memory_optimizer=False)
    nbytes = parse_bytes(budget)
    ours = dataclasses.replace(
        plain, memory_bytes=nbytes, graphswap="auto", planning_seconds=planning_seconds, host_variables=True
    )
    say(f"{model}: {SMALL}, {budget}")
    results = {SMALL: trial.run(dataclasses.replace(plain, memory_bytes=nbytes, steps=1), say)}
    return results | trial.in_turns({PLAIN: plain, OURS: ours}, lambda way, line: say(f"{model}: {way}: {line}"))


def row(model: str, budget: str, results: Mapping[str, Result]) -> tuple[str, ...]:
    """The line of the table for one case."""
    plain, ours = results[PLAIN], results[OURS]
    small = results[SMALL].error.splitlines()
    failed = (small[0].split(":")[0].rpartition(".")[2] if small else "trains",)
    head = (model, format_bytes(plain.peak_bytes) if not plain.error else plain.error.splitlines()[0], budget, *failed)
    if ours.error or plain.error:
        return (*head, *(ours.error.splitlines() or [""])[:1], *[""] * 6)

    def ratio(name: str) -> tuple[str, str]:
        mine, theirs = (getattr(result, name)[1:] for result in (ours, plain))
        return f"{statistics.median(mine):.2f} s", f"{statistics.median(mine) / statistics.median(theirs):.2f}x"

    same = "equal to plain" if ours.equals(plain) else "differ"
    away = str(ours.report["places"])
    return (*head, format_bytes(ours.peak_bytes), away, *ratio("cpu_seconds"), *ratio("seconds"), same)


def main(argv: Sequence[str]) -> None:
    """See the module's text."""
    values = flags.FlagValues()
    default = ["mlp_24:60MiB", "mlp_24_64:48MiB", "mlp_96:64MiB"]
    cases = flags.DEFINE_list("cases", default, "Models and budgets, as MODEL:SIZE.", flag_values=values)
    steps = flags.DEFINE_integer("steps", 8, "Steps of each run.", lower_bound=2, flag_values=values)
    seconds = flags.DEFINE_float("planning_seconds", 6.0, "As in Options.", flag_values=values)
    out = flags.DEFINE_string("out", None, "File for the results, as JSON.", flag_values=values)
    if values(argv)[1:]:
        raise app.UsageError(f"expected flags, received {values(argv)[1:]}.")
    results = {}
    for case in cases.value:
        model, _, budget = case.partition(":")
        results[model, budget] = measure(
            model, budget, steps.value, seconds.value, lambda line: print(line, file=sys.stderr)
        )
    lines = [row(model, budget, found) for (model, budget), found in results.items()]
    print(benchmark.markdown_table(_HEADER, lines))
    if out.value is not None:
        fields = {
            ":".join(case): {way: dataclasses.asdict(result) for way, result in found.items()}
            for case, found in results.items()
        }
        described = {"machine": benchmark.machine(), "results": fields}
        pathlib.Path(out.value).write_text(json.dumps(described, indent=1, default=str))


if __name__ == "__main__":
    main(sys.argv)
