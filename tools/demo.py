"""The main job, shown: ResNet-50 on an accelerator with less memory than its training step needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from absl import app, flags

from graphswap.options import format_bytes, parse_bytes
from graphswap.tools import benchmark, commands, trial
from graphswap.tools.trial import Result, Trial

_MODEL = "resnet50"
_COMPILE = 'model.compile(SGD(0.001), "sparse_categorical_crossentropy"'


def main(argv: Sequence[str]) -> int:
    """Trains plainly, in a budget and plainly with memory in plenty; prints what that took.

    Returns:
        0 if plain Keras ran out of memory, and graphswap kept the budget and the losses; else 1.
    """
    values = flags.FlagValues()
    memory = flags.DEFINE_string("memory", "300MiB", "Memory of the accelerator.", flag_values=values)
    steps = flags.DEFINE_integer("steps", 8, "Steps to train.", lower_bound=1, flag_values=values)
    if rest := commands.parsed(values, argv):
        raise app.UsageError(f"expected flags, received {', '.join(rest)}.")
    budget, memory_bytes = memory.value, parse_bytes(memory.value)
    stages = (
        (f"plain Keras on an accelerator of {budget}", f"{_COMPILE})", Trial(_MODEL, memory_bytes, "", steps.value)),
        (
            f"graphswap on an accelerator of {budget}",
            f'{_COMPILE}, graphswap="{budget}")',
            Trial(_MODEL, memory_bytes, budget, steps.value),
        ),
        (
            "plain Keras on an accelerator with memory in plenty",
            f"{_COMPILE})",
            Trial(_MODEL, trial.AMPLE_BYTES, "", steps.value),
        ),
    )
    say = _progress()
    print("ResNet-50 with random weights on scikit-learn's digits at 96x96, batches of 32, trained by tools/trial.py.")
    print("The accelerator is emulated: TensorFlow's CPU device with a hard memory limit.")
    results = []
    for number, (title, call, what) in enumerate(stages, 1):
        print(f"\n{number}/{len(stages)}  {title}\n     {call}", flush=True)
        results.append(trial.run(what, say))
        for line in results[-1].error.splitlines():
            say(line)
    plain_within, graphswap, plain = results
    print(f"\n{summary(budget, plain_within, graphswap, plain)}")
    return 0 if all(good for _, good in findings(memory_bytes, plain_within, graphswap, plain)) else 1


def summary(budget: str, plain_within: Result, graphswap: Result, plain: Result) -> str:
    """The table, and under it whether everything is as it should be."""
    lines = []
    if not graphswap.error and not plain.error:
        lines += [_table(budget, graphswap, plain), ""]
    lines += [
        f"{'yes' if good else 'NO ':<5}{text}"
        for text, good in findings(parse_bytes(budget), plain_within, graphswap, plain)
    ]
    return "\n".join(lines)


def findings(memory_bytes: int, plain_within: Result, graphswap: Result, plain: Result) -> list[tuple[str, bool]]:
    """What the demo claims, and whether it came out."""
    trained = not graphswap.error and not plain.error
    size = format_bytes(memory_bytes)
    return [
        (f"plain Keras runs out of {size}", "ResourceExhaustedError" in plain_within.error),
        (f"graphswap trains within {size}", trained and graphswap.peak_bytes <= memory_bytes),
        ("losses and all variables are equal, bit for bit", trained and graphswap.equals(plain)),
    ]


def _table(budget: str, graphswap: Result, plain: Result) -> str:
    before, after = benchmark.median_seconds([plain]), benchmark.median_seconds([graphswap])
    rows = [
        ("budget", "none", budget),
        ("predicted peak", "-", format_bytes(graphswap.report["predicted_peak_bytes"])),
        ("measured peak", format_bytes(plain.peak_bytes), format_bytes(graphswap.peak_bytes)),
        ("step time (median)", f"{before:.2f} s", f"{after:.2f} s, {after / before:.2f}x"),
    ]
    losses = zip(plain.losses, graphswap.losses, strict=True)
    rows += [(f"loss of step {step}", *map(repr, pair)) for step, pair in enumerate(losses, 1)]
    return benchmark.markdown_table(("", "plain Keras", "graphswap"), rows)


def _progress() -> Callable[[str], None]:
    start = time.monotonic()
    return lambda line: print(f"{time.monotonic() - start:5.0f} s  {line}", flush=True)
