"""Measures plans under XLA beside plain XLA and recomputation by hand: step times and peaks.

    python -m graphswap.tools.jit --models=gpt_12,resnet50_64 --budgets=60%,40% --steps=10 --out=jit.json

Every way trains the model under `jit_compile=True` in a process of its own, on an emulated accelerator with memory in
plenty. All are started and compiled one after the other. Then they take turns, step by step: plain, the first budget,
the second, by hand.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags

from graphswap.options import format_bytes
from graphswap.tools import benchmark, trial
from graphswap.tools.trial import Result, Trial

PLAIN, BY_HAND = "plain", "tf.recompute_grad by hand"
_HEADER = (
    "model",
    "way",
    "budget",
    "predicted peak",
    "peak",
    "of plain",
    "step",
    "of plain",
    "largest loss difference",
)


def measure(
    model: str, budgets: Sequence[str], steps: int, planning_seconds: float, say: Callable[[str], None]
) -> Mapping[str, Result]:
    """Trains a model in every way.

    Args:
        model: A name of `models.JIT_MODELS` or `models.MODELS`.
        budgets: Shares of the plain peak, such as "60%".
        steps: Of each way; the first is not timed.
        planning_seconds: As in `Options`.
        say: Gets the lines of the runs' progress.

    Returns:
        `PLAIN`, the budgets and `BY_HAND`, with what came of them.

    Raises:
        RuntimeError: If plain Keras fails.
    """
    plain = Trial(model, trial.AMPLE_BYTES, steps=2, jit_compile=True, planning_seconds=planning_seconds)
    say(f"{model}: {PLAIN}")
    peak_bytes = trial.run(plain, say).peak_bytes
    if not peak_bytes:
        raise RuntimeError(f"plain Keras failed on {model} under XLA.")
    plain = dataclasses.replace(plain, steps=steps)
    trials = {PLAIN: plain}
    for budget in budgets:
        nbytes = int(peak_bytes * float(budget.rstrip("%")) / 100)
        trials[budget] = dataclasses.replace(plain, graphswap=f"{nbytes}B")
    trials[BY_HAND] = dataclasses.replace(plain, by_hand=True)
    return trial.in_turns(trials, lambda way, line: say(f"{model}: {way}: {line}"))


def rows(model: str, results: Mapping[str, Result]) -> list[tuple[str, ...]]:
    """The lines of the table for one model."""
    plain = results[PLAIN]
    found = []
    for way, result in results.items():
        is_planned = bool(result.report)
        what = "graphswap" if is_planned or way.endswith("%") else way
        budget = way if way.endswith("%") else ""
        if is_planned:
            budget += f", {format_bytes(result.report['memory_budget'])}"
        if result.error:
            found.append((model, what, budget, "", result.error.splitlines()[-1], "", "", "", ""))
            continue
        predicted = format_bytes(result.report["predicted_peak_bytes"]) if is_planned else ""
        ratios = [ours / theirs for ours, theirs in zip(result.steady_seconds, plain.steady_seconds, strict=True)]
        off = max(abs(ours / theirs - 1) for ours, theirs in zip(result.losses, plain.losses, strict=True))
        found.append(
            (
                model,
                what,
                budget,
                predicted,
                format_bytes(result.peak_bytes),
                f"{result.peak_bytes / plain.peak_bytes:.0%}",
                f"{statistics.median(result.steady_seconds):.3f} s",
                f"{statistics.median(ratios):.2f}x",
                f"{off:.0e}" if off else "none",
            )
        )
    return found


def main(argv: Sequence[str]) -> None:
    """See the module's text."""
    values = flags.FlagValues()
    names = flags.DEFINE_list("models", ["gpt_12", "resnet50_64"], "Names of models.", flag_values=values)
    budgets = flags.DEFINE_list("budgets", ["60%", "40%"], "Shares of the plain peak.", flag_values=values)
    steps = flags.DEFINE_integer("steps", 10, "Steps of each run.", lower_bound=2, flag_values=values)
    seconds = flags.DEFINE_float("planning_seconds", 6.0, "As in Options.", flag_values=values)
    out = flags.DEFINE_string("out", None, "File for the results, as JSON.", flag_values=values)
    if values(argv)[1:]:
        raise app.UsageError(f"expected flags, received {values(argv)[1:]}.")
    results = {
        name: measure(name, budgets.value, steps.value, seconds.value, lambda line: print(line, file=sys.stderr))
        for name in names.value
    }
    print(benchmark.markdown_table(_HEADER, [row for name, found in results.items() for row in rows(name, found)]))
    if out.value is not None:
        machine = benchmark.machine()
        fields = {name: {way: dataclasses.asdict(r) for way, r in found.items()} for name, found in results.items()}
        pathlib.Path(out.value).write_text(json.dumps({"machine": machine, "results": fields}, indent=1, default=str))


if __name__ == "__main__":
    main(sys.argv)
