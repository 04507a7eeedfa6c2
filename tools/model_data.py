"""Measures steps whose variables live outside of the device beside plain Keras: peaks, CPU time, bits.

    python -m graphswap.tools.model_data --cases=mlp_24:60MiB,mlp_24_64:48MiB,mlp_96:64MiB --steps=8

    python -m graphswap.tools.model_data --alone --cases=gpt_1b:1GiB --swap_to=disk --host_memory=9GiB --steps=5

The first compares with plain Keras; the second is for models that plain Keras has no room for on this machine, and
sets what a step moves against the least that any way to keep the budget would have to.

Every run is a process of its own on an emulated accelerator; graphswap's have the budget as their hard limit, and make
their model in host memory, one for each of `--strategies`. All take turns, step by step. A plain run in the budget
shows that it runs out.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags

from graphswap.options import format_bytes, parse_bytes
from graphswap.tools import benchmark, trial
from graphswap.tools.trial import Result, Trial

PLAIN, SMALL = "plain", "plain in the budget"
_PLAIN_BYTES = 2 * trial.AMPLE_BYTES
_HEADER = (
    "model",
    "plain peak",
    "budget",
    "plain in the budget",
    "strategy",
    "peak",
    "variables away",
    "CPU time of a step",
    "of plain",
    "step",
    "of plain",
    "losses and variables",
)


_ALONE_HEADER = (
    "model",
    "weights and optimizer state",
    "budget",
    "peak",
    "process, at most",
    "host memory planned",
    "measured",
    "disk planned",
    "measured",
    "fetched",
    "stored",
    "of the least",
    "first step",
    "step",
    "losses",
)


def alone(what: Trial, say: Callable[[str], None]) -> Result:
    """Trains a model within a budget, beside nothing.

    Args:
        what: The model, the budget and where to swap.
        say: Gets the lines of the run's progress.
    """
    result = trial.run(what, say)
    for line in result.report.get("text", result.error).splitlines():
        say(line)
    return result


def alone_row(what: Trial, result: Result) -> tuple[str, ...]:
    """The line of the table for one such run."""
    head = (what.model, format_bytes(result.updated_bytes), what.graphswap)
    if result.error:
        return (*head, result.error.splitlines()[0], *[""] * (len(_ALONE_HEADER) - 4))
    report = result.report
    moved = report["moved_bytes"]
    least = sum(least_moved_bytes(result.product_bytes, result.updated_bytes, parse_bytes(what.graphswap)))
    far = [
        report["far_bytes"]["host"],
        report["measured_host_bytes"],
        report["far_bytes"]["disk"],
        report["measured_disk_bytes"],
    ]
    return (
        *head,
        *map(format_bytes, (result.peak_bytes, result.rss_bytes, *far, *moved)),
        f"{sum(moved) / least:.2f}x" if least else "",
        f"{result.seconds[0]:.0f} s",
        f"{statistics.median(result.steady_seconds):.0f} s",
        ", ".join(f"{loss:.3f}" for loss in result.losses),
    )


def least_moved_bytes(product_bytes: int, updated_bytes: int, memory_budget: int) -> tuple[int, int]:
    """What any step within the budget has to fetch, and to send away.

    Between two steps no more than the budget is on the device, so all other weights are fetched once. At the turn
    between forward and backward pass no more than the budget is there, either: what else is read in products both
    before and after it is fetched once more. Of what is away and updated, either the new value is sent there, or the
    gradient, which is as large as the weight alone.

    Args:
        product_bytes: Weights that are read in both passes.
        updated_bytes: Weights and optimizer state.
        memory_budget: Bytes.
    """
    away = max(0, updated_bytes - memory_budget)
    return 2 * max(0, product_bytes - memory_budget), away * product_bytes // max(1, updated_bytes)


def measure(
    model: str,
    budget: str,
    strategies: Sequence[str],
    steps: int,
    planning_seconds: float,
    say: Callable[[str], None],
) -> Mapping[str, Result]:
    """Trains a model plainly and within a budget.

    Args:
        model: A name of `models`.
        budget: Such as "60MiB".
        strategies: As in `Options`, one run each.
        steps: Of each run; the first is not timed.
        planning_seconds: As in `Options`.
        say: Gets the lines of the runs' progress.

    Returns:
        `PLAIN`, `SMALL` and the strategies, with what came of them.
    """
    # TensorFlow's memory optimiser adds gradients in the order of their arrival where it takes memory to be short.
    plain = Trial(model, _PLAIN_BYTES, steps=steps, memory_optimizer=False)
    nbytes = parse_bytes(budget)
    small = dataclasses.replace(plain, memory_bytes=nbytes, steps=1)
    ours = dataclasses.replace(
        plain, memory_bytes=nbytes, graphswap="auto", planning_seconds=planning_seconds, host_variables=True
    )
    trials = {PLAIN: plain} | {name: dataclasses.replace(ours, strategy=name) for name in strategies}
    say(f"{model}: {SMALL}, {budget}")
    results = {SMALL: trial.run(small, say)}
    return results | trial.in_turns(trials, lambda way, line: say(f"{model}: {way}: {line}"))


def rows(model: str, budget: str, results: Mapping[str, Result]) -> list[tuple[str, ...]]:
    """The lines of the table for one case."""
    plain = results[PLAIN]
    small = results[SMALL].error.splitlines()
    failed = small[0].split(":")[0].rpartition(".")[2] if small else "trains"
    head = (model, format_bytes(plain.peak_bytes) if not plain.error else plain.error.splitlines()[0], budget, failed)
    return [(*head, name, *_cells(result, plain)) for name, result in results.items() if name not in (PLAIN, SMALL)]


def _cells(ours: Result, plain: Result) -> tuple[str, ...]:
    """What a strategy's row says about its run beside the plain one."""
    if ours.error or plain.error:
        return (*ours.error.splitlines()[:1], *[""] * 7)[:7]

    def ratio(name: str) -> tuple[str, str]:
        mine, theirs = (getattr(result, name)[1:] for result in (ours, plain))
        return f"{statistics.median(mine):.2f} s", f"{statistics.median(mine) / statistics.median(theirs):.2f}x"

    same = "equal to plain" if ours.equals(plain) else "differ"
    away = str(ours.report["places"])
    return (format_bytes(ours.peak_bytes), away, *ratio("cpu_seconds"), *ratio("seconds"), same)


def main(argv: Sequence[str]) -> None:
    """See the module's text."""
    values = flags.FlagValues()
    default = ["mlp_24:60MiB", "mlp_24_64:48MiB", "mlp_96:64MiB"]
    cases = flags.DEFINE_list("cases", default, "Models and budgets, as MODEL:SIZE.", flag_values=values)
    strategies = flags.DEFINE_list("strategies", ["auto"], "As in Options; each trains once.", flag_values=values)
    steps = flags.DEFINE_integer("steps", 8, "Steps of each run.", lower_bound=2, flag_values=values)
    seconds = flags.DEFINE_float("planning_seconds", 6.0, "As in Options.", flag_values=values)
    is_alone = flags.DEFINE_bool("alone", False, "Whether to run without plain Keras beside it.", flag_values=values)
    swap_to = flags.DEFINE_string("swap_to", "auto", "As in Options; with --alone.", flag_values=values)
    host_memory = flags.DEFINE_string("host_memory", "auto", "As in Options; with --alone.", flag_values=values)
    out = flags.DEFINE_string("out", None, "File for the results, as JSON.", flag_values=values)
    if values(argv)[1:]:
        raise app.UsageError(f"expected flags, received {values(argv)[1:]}.")
    results = {}

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if is_alone.value:
        lines = []
        for case, strategy in itertools.product(cases.value, strategies.value):
            model, _, budget = case.partition(":")
            what = Trial(model, parse_bytes(budget), budget, steps.value, False, strategy, seconds.value)
            ways = {"host_variables": True, "swap_to": swap_to.value, "host_memory": host_memory.value}
            what = dataclasses.replace(what, **ways)
            results[model, budget] = {strategy: alone(what, say)}
            lines.append(alone_row(what, results[model, budget][strategy]))
        _write(results, _ALONE_HEADER, lines, out.value)
        return
    for case in cases.value:
        model, _, budget = case.partition(":")
        results[model, budget] = measure(model, budget, strategies.value, steps.value, seconds.value, say)
    lines = [line for (model, budget), found in results.items() for line in rows(model, budget, found)]
    _write(results, _HEADER, lines, out.value)


def _write(
    results: Mapping[tuple[str, str], Mapping[str, Result]],
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    out: str | None,
) -> None:
    """Prints the table, and writes all results to a file."""
    print(benchmark.markdown_table(header, lines))
    if out is not None:
        fields = {
            ":".join(case): {way: dataclasses.asdict(result) for way, result in found.items()}
            for case, found in results.items()
        }
        described = {"machine": benchmark.machine(), "results": fields}
        pathlib.Path(out).write_text(json.dumps(described, indent=1, default=str))


if __name__ == "__main__":
    main(sys.argv)
