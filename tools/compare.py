"""Measures planners beside baselines on emulated accelerators: step times, peaks, and how far both were foreseen.

    python -m graphswap.tools.compare --models=resnet50,gpt --budgets=50%,35% --rounds=3 --out=compared.json

Every strategy trains the model in a process of its own that has the budget as the hard limit of its device. All are
started and plan one after the other, from the same measured costs. Then they take turns, step by step: plain Keras,
the first strategy, the second, ..., again plain Keras. So a noisy machine is noisy for all of them alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import app, flags

from graphswap.options import Options, format_bytes
from graphswap.tools import benchmark, trial
from graphswap.tools.trial import Result, Trial

BASELINES = ("swap_all", "chen", "karma")
PLANNERS = ("joint", "auto")
MODELS = ("resnet50", "gpt", "unet", "vit")

_RATIOS = ("model", "budget", "best baseline", *(f"{planner} / best" for planner in PLANNERS))
_DETAILS = (
    "model",
    "budget",
    "strategy",
    "plan",
    "swaps",
    "nodes repeated",
    "predicted peak",
    "measured peak",
    "bound",
    "predicted step",
    "measured step",
    "of plain",
    "bits",
)


@dataclasses.dataclass
class Case:
    """A model in a budget.

    Attributes:
        model: A name of `models.MODELS`.
        budget: As it was asked for: bytes, or a share of the plain peak.
        memory_bytes: The budget, which is the device's memory.
        plain: Runs of plain Keras with memory in plenty, one a round.
        reference: A run of plain Keras without TensorFlow's memory optimiser, for its bits.
        planned: Strategy to its runs, one a round; only one if it found no plan.
    """

    model: str
    budget: str
    memory_bytes: int
    reference: Result
    plain: list[Result] = dataclasses.field(default_factory=list)
    planned: dict[str, list[Result]] = dataclasses.field(
        default_factory=lambda: {name: [] for name in (*BASELINES, *PLANNERS)}
    )

    def step_seconds(self, strategy: str) -> float:
        """The median step of a strategy; infinite unless all its runs went well."""
        runs = self.planned[strategy]
        return math.inf if any(run.error for run in runs) else benchmark.median_seconds(runs)

    def of_plain(self, strategy: str) -> float:
        """Step time as a multiple of plain Keras's, the median over the turns; infinite unless all runs went well."""
        is_measured = math.isfinite(self.step_seconds(strategy))
        return _ratio(self.planned[strategy], self.plain) if is_measured else math.inf

    def best_baseline(self) -> str | None:
        """The fastest of the baselines; None if none kept the budget."""
        best = min(BASELINES, key=self.of_plain)
        return best if math.isfinite(self.of_plain(best)) else None

    def ratio(self, strategy: str) -> float | None:
        """Step time as a multiple of that of the best baseline; None without such, infinite if a run failed.

        It is the median over the turns, each of which compares steps that ran right after one another.
        """
        best = self.best_baseline()
        if best is None or math.isinf(self.step_seconds(strategy)):
            return None if best is None else math.inf
        return _ratio(self.planned[strategy], self.planned[best])


def measure(
    model: str, budgets: Iterable[str], rounds: int, steps: int, planning_seconds: float, say: Callable[[str], None]
) -> list[Case]:
    """Trains one model plainly and with every strategy, in every budget.

    Raises:
        RuntimeError: If plain Keras fails with memory in plenty.
    """
    ample = Trial(model, trial.AMPLE_BYTES, steps=steps)
    without = dataclasses.replace(ample, memory_optimizer=False)
    with tempfile.TemporaryDirectory() as cache:  # of measured costs: whoever comes first measures them for all

        def run(title: str, trials: Mapping[str, Trial]) -> dict[str, Result]:
            return trial.in_turns(trials, lambda name, line: say(f"{title}, {name}: {line}"), {"XDG_CACHE_HOME": cache})

        first = run(model, {"plain": ample, "plain without memory optimiser": without})
        plain, reference = first.values()
        if plain.error:
            raise RuntimeError(f"expected {model} to train in plenty of memory, received {plain.error}")
        sizes = {budget: benchmark.budget_bytes(budget, plain.peak_bytes) for budget in budgets}
        cases = [Case(model, budget, nbytes, reference) for budget, nbytes in sizes.items()]
        for number, case in itertools.product(range(1, rounds + 1), cases):
            size = f"{case.memory_bytes >> 20}MiB"
            trials = {
                strategy: Trial(model, case.memory_bytes, size, steps, True, strategy, planning_seconds)
                for strategy, runs in case.planned.items()
                if not (runs and found_no_plan(runs[0]))
            }
            results = run(f"{model} in {size}, round {number}", {"plain": ample, **trials})
            case.plain.append(results.pop("plain"))
            for strategy, result in results.items():
                case.planned[strategy].append(result)
    return cases


def found_no_plan(result: Result) -> bool:
    """Whether the strategy itself said that it can't keep the budget."""
    return "InfeasibleBudgetError" in result.error


def ratio_table(cases: Iterable[Case]) -> str:
    """Step times of the planners as multiples of the best baseline's."""
    return benchmark.markdown_table(_RATIOS, map(_ratio_row, cases))


def detail_table(cases: Iterable[Case]) -> str:
    """What every strategy planned, promised and did."""
    return benchmark.markdown_table(_DETAILS, (_detail_row(case, name) for case in cases for name in case.planned))


def summary(cases: Sequence[Case]) -> str:
    """Medians and extremes over all cases, a line for each planner."""
    lines = []
    for planner in PLANNERS:
        ratios = [ratio for case in cases if (ratio := case.ratio(planner)) is not None]
        runs = [(case, run) for case in cases for run in case.planned[planner] if not run.error]
        texts = [f"{planner}:"]
        if ratios:
            texts.append(
                f"step time {statistics.median(ratios):.2f}x that of the best baseline in the median, "
                f"{max(ratios):.2f}x at most;"
            )
        if runs:
            seconds = max((_seconds_error(run) for _, run in runs), key=abs)
            peak = max((_peak_error(run) for _, run in runs), key=abs)
            kept = sum(run.peak_bytes <= case.memory_bytes for case, run in runs)
            texts.append(
                f"furthest from the prediction: step time {seconds:+.1%}, peak {peak:+.1%}; "
                f"{kept} of {len(runs)} runs within the budget"
            )
        lines.append(" ".join(texts) if len(texts) > 1 else f"{planner}: no run went well")
    return "\n".join(lines)


def _ratio_row(case: Case) -> list[str]:
    best = case.best_baseline()
    row = [case.model, _budget(case), "none fits" if best is None else f"{best}, {case.step_seconds(best):.3f} s"]
    for planner in PLANNERS:
        ratio = case.ratio(planner)
        if math.isinf(case.step_seconds(planner)):
            row.append(_failure(case.planned[planner]))
        else:
            row.append("fits" if ratio is None else f"{ratio:.2f}x")
    return row


def _detail_row(case: Case, strategy: str) -> list[str]:
    runs = case.planned[strategy]
    start = [case.model, _budget(case), strategy]
    if math.isinf(case.step_seconds(strategy)):
        return [*start, _failure(runs), *["-"] * (len(_DETAILS) - len(start) - 1)]
    reports, peaks = [run.report for run in runs], [run.steady_peak_bytes for run in runs]
    seconds, bounds = case.step_seconds(strategy), [report["bound_seconds"] for report in reports]
    equal = sum(run.equals(case.reference) for run in runs)
    return [
        *start,
        ", ".join(dict.fromkeys(report["strategy"] for report in reports)),
        _range(str, [report["swaps"] for report in reports]),
        _range(str, [report["repeated_nodes"] for report in reports]),
        _range(format_bytes, [report["predicted_peak_bytes"] for report in reports]),
        f"{_range(format_bytes, peaks)} ({max(map(_peak_error, runs), key=abs):+.1%})",
        "-" if None in bounds else f"{statistics.median(bounds):.3f} s",
        f"{statistics.median(report['predicted_seconds'] for report in reports):.3f} s",
        f"{seconds:.3f} s ({statistics.median(map(_seconds_error, runs)):+.1%})",
        f"{case.of_plain(strategy):.2f}x",
        "equal" if equal == len(runs) else f"{equal} of {len(runs)} runs equal",
    ]


def _ratio(runs: Sequence[Result], others: Sequence[Result]) -> float:
    pairs = (zip(a.steady_seconds, b.steady_seconds, strict=True) for a, b in zip(runs, others, strict=True))
    return statistics.median(seconds / other for seconds, other in itertools.chain.from_iterable(pairs))


def _seconds_error(run: Result) -> float:
    """By which share of the prediction a run's median step was longer."""
    return benchmark.median_seconds([run]) / run.report["predicted_seconds"] - 1


def _peak_error(run: Result) -> float:
    return run.steady_peak_bytes / run.report["predicted_peak_bytes"] - 1


def _budget(case: Case) -> str:
    size = format_bytes(case.memory_bytes)
    return f"{case.budget}, {size}" if case.budget.endswith("%") else size


def _failure(runs: Sequence[Result]) -> str:
    if found_no_plan(runs[0]):
        return "does not fit"
    failed = [run for run in runs if run.error]
    return f"{len(failed)} of {len(runs)} runs failed: {failed[0].error.splitlines()[0]}"


def _range(text: Callable[[float], str], numbers: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys((text(min(numbers)), text(max(numbers)))))


def main(argv: Sequence[str]) -> None:
    """Runs the comparison, prints its tables and writes all numbers to a file."""
    values = flags.FlagValues()
    models = flags.DEFINE_list("models", list(MODELS), "Names of models.MODELS.", flag_values=values)
    budgets = flags.DEFINE_list("budgets", ["50%", "35%"], "300MiB, or 40% of the plain peak.", flag_values=values)
    rounds = flags.DEFINE_integer("rounds", 2, "Processes of each strategy.", lower_bound=1, flag_values=values)
    steps = flags.DEFINE_integer("steps", 15, "Steps of each process.", lower_bound=1, flag_values=values)
    planning_seconds = flags.DEFINE_float(
        "planning_seconds", Options.planning_seconds, "As in graphswap.Options.", flag_values=values
    )
    out = flags.DEFINE_string("out", None, "File for all numbers, as JSON.", flag_values=values)
    try:
        if values(argv)[1:]:
            raise app.UsageError(f"expected flags, received {', '.join(values(argv)[1:])}.")
        for model in models.value:
            if model not in MODELS:
                raise app.UsageError(f"--models: expected names out of {', '.join(MODELS)}, received '{model}'.")
        for budget in budgets.value:
            benchmark.budget_bytes(budget, 0)
        Options("auto", planning_seconds=planning_seconds.value)
        if out.value is not None and not pathlib.Path(out.value).resolve().parent.is_dir():
            raise app.UsageError(f"--out: expected a file in a folder that exists, received '{out.value}'.")
    except (flags.Error, app.UsageError, ValueError) as error:
        sys.exit(f"compare: {error}")

    described = benchmark.machine()
    say = _progress()
    cases: list[Case] = []
    for model in models.value:
        cases += measure(model, budgets.value, rounds.value, steps.value, planning_seconds.value, say)
        if out.value is not None:  # after each model: a long run that is cut off leaves what it has
            write(pathlib.Path(out.value), described, argv, cases)
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    print(f"\n{ratio_table(cases)}\n\n{summary(cases)}\n\n{detail_table(cases)}")


def write(path: pathlib.Path, described: Mapping[str, str], argv: Sequence[str], cases: Sequence[Case]) -> None:
    """Writes all numbers of all runs as JSON."""
    contents: dict[str, Any] = {
        "machine": dict(described),
        "command": ["python", "-m", "graphswap.tools.compare", *argv[1:]],
        "cases": [dataclasses.asdict(case) for case in cases],
    }
    path.write_text(json.dumps(contents, indent=1))


def _progress() -> Callable[[str], None]:
    """Tells a terminal what is going on, and nobody else."""
    if not sys.stderr.isatty():
        return lambda line: None
    start = time.monotonic()
    return lambda line: print(f"{time.monotonic() - start:7.1f} s  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv)
