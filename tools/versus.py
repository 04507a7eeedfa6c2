"""KARMA's experiment on paper: its six models beyond 16 GiB of a V100. A simulation, not a measurement.

    python -m graphswap.tools.versus --models=resnet50,unet --times=1.5,3,6 --planning_seconds=30 --out=versus.json

Batch sizes are chosen so that the plain step's simulated peak is so many times the device's memory, and every
strategy plans the same step for that memory. Costs are analytic, from the device's data sheet. KARMA (Wahib et al.,
SC'20, arXiv 2008.11421) was measured on real V100s against the out-of-core tools of its day; the baselines here are
graphswap's strategies written after the papers, on one graph, one order and one cost model. So its number and those
printed here answer the same question about different programs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import app, flags

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.devices import DEVICES
from graphswap.options import format_bytes
from graphswap.strategies import STRATEGIES
from graphswap.tools import planning
from graphswap.tools.benchmark import markdown_table
from graphswap.tools.steps import STEPS, Step

MODELS = ("resnet50", "vgg16", "resnet200", "wrn28_10", "resnet1001", "unet")
"""Those of KARMA's experiment."""
SINGLE = tuple(name for name in ("swap_all", "chen", "checkmate") if name in STRATEGIES)
"""Strategies of one technique: swaps only, or recompute only."""
BASELINES = (*SINGLE, "karma")
PUBLISHED_SPEEDUP = 1.52
"""KARMA over the best other out-of-core tool, the average over six models (its abstract)."""

_DEVICE, _MEMORY_BYTES = "v100", 16 << 30


def batches_for(at: Callable[[int], ir.Graph], batch: int, peaks_bytes: Iterable[float]) -> list[int]:
    """The batch sizes, at least 1, whose plain peaks are about those given, the peak being linear in the batch.

    Args:
        at: Makes the step at a batch size.
        batch: A batch size near those wanted: the line goes through the peaks at it and at twice as much.
        peaks_bytes: What is wanted.
    """
    small, large = (planning.plain(at(size), CostModel(DEVICES[_DEVICE])).peak_bytes for size in (batch, 2 * batch))
    return [max(1, round(batch * (1 + (peak - small) / (large - small)))) for peak in peaks_bytes]


def compare(graph: ir.Graph, memory_budget: int, planning_seconds: float) -> dict[str, Any]:
    """Plans one step for one budget with all strategies.

    Args:
        graph: The step.
        memory_budget: Bytes.
        planning_seconds: For each strategy that can be given a limit.

    Returns:
        Peak and seconds of the plain step, and by strategy the seconds of the step under its plan, None if it has
        none, and those of planning.
    """
    cost_model = CostModel(DEVICES[_DEVICE])
    plain = planning.plain(graph, cost_model)
    strategies = {}
    for name in ("joint", *BASELINES):
        strategy: Any = STRATEGIES[name]
        if "planning_seconds" in (field.name for field in dataclasses.fields(strategy)):
            strategy = dataclasses.replace(strategy, planning_seconds=planning_seconds)
        outcome = planning.attempt(strategy, graph, cost_model, memory_budget)
        strategies[name] = {
            "seconds": None if outcome.plan is None else outcome.seconds,
            "peak_bytes": outcome.peak_bytes,
            "planning_seconds": outcome.planning_seconds,
        }
    return {"plain_peak_bytes": plain.peak_bytes, "plain_seconds": plain.seconds, "strategies": strategies}


def speedup(found: Mapping[str, Any], baselines: Iterable[str]) -> float:
    """How much faster `joint` is than the best of the baselines; infinite if none of them fits, NaN if it does not."""
    fastest = {name: _seconds(found, name) for name in ("joint", *baselines)}
    joint = fastest.pop("joint")
    return math.nan if math.isinf(joint) else min(fastest.values()) / joint


def case_row(case: Mapping[str, Any]) -> tuple[str, ...]:
    """A case for people: what each plan adds to the plain step, or the peak it came down to, and the speed-ups."""
    return (
        case["model"],
        str(case["batch"]),
        str(case["nodes"]),
        f"{format_bytes(case['plain_peak_bytes'])}, {case['plain_peak_bytes'] / case['memory_budget']:.1f}x",
        f"{case['plain_seconds']:.2f} s",
        *(_added(case, name) for name in ("joint", *BASELINES)),
        _ratio(speedup(case, SINGLE)),
        _ratio(speedup(case, ("karma",))),
    )


def average_row(title: str, cases: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Geometric and arithmetic mean of the speed-ups; cases in which not both fit are counted, not averaged."""
    cells = []
    for baselines in (SINGLE, ("karma",)):
        ratios = [speedup(case, baselines) for case in cases]
        finite = [ratio for ratio in ratios if math.isfinite(ratio)]
        of_all = (statistics.geometric_mean, statistics.fmean, min)
        cells += [_ratio(function(finite)) if finite else "" for function in of_all]
        cells.append(str(sum(map(math.isinf, ratios))))
    fits = [[name for name in ("joint", *BASELINES) if math.isfinite(_seconds(case, name))] for case in cases]
    only_others = sum(bool(names) and "joint" not in names for names in fits)
    return (title, str(len(cases)), str(fits.count([])), str(only_others), *cells)


def tables(cases: Sequence[Mapping[str, Any]]) -> str:
    """All cases, averages, and the published average beside them. All of it is labelled a simulation."""
    header = ("model", "batch", "nodes", "plain peak", "plain step", "joint", *BASELINES)
    header += ("over best of one technique", "over karma")
    models = dict.fromkeys(case["model"] for case in cases)
    averages = [average_row(model, [case for case in cases if case["model"] == model]) for model in models]
    averages.append(average_row("all", cases))
    columns = ["model", "cases", "nothing fits", "a baseline fits, joint does not"]
    for name in ("one technique", "karma"):
        columns += [f"over {name}: geometric mean", "arithmetic mean", "least", f"{name} does not fit"]
    overall = [ratio for case in cases if math.isfinite(ratio := speedup(case, SINGLE))]
    mean = f"{statistics.fmean(overall):.2f}x" if overall else "nothing"
    return (
        f"Simulated on the data sheet of {_DEVICE} with {format_bytes(_MEMORY_BYTES)}, not measured.\n\n"
        f"{markdown_table(header, map(case_row, cases))}\n\n{markdown_table(columns, averages)}\n\n"
        f"joint over the best strategy of one technique ({', '.join(SINGLE)}): {mean} in the arithmetic mean, "
        f"simulated. KARMA's published average over the best other tool of its day: {PUBLISHED_SPEEDUP}x, measured."
    )


def _seconds(found: Mapping[str, Any], name: str) -> float:
    seconds = found["strategies"][name]["seconds"]
    return math.inf if seconds is None else seconds


def _added(case: Mapping[str, Any], name: str) -> str:
    seconds = _seconds(case, name)
    if math.isinf(seconds):
        return f"{format_bytes(case['strategies'][name]['peak_bytes'])} at best"
    return f"{100 * (seconds / case['plain_seconds'] - 1):+.1f} %"


def _ratio(ratio: float) -> str:
    return "joint does not fit" if math.isnan(ratio) else "none fits" if math.isinf(ratio) else f"{ratio:.2f}x"


def _cases(model: str, step: Step, times: Iterable[float], planning_seconds: float) -> Iterable[dict[str, Any]]:
    at = step.at_batches()
    for batch in batches_for(at, step.batch, [factor * _MEMORY_BYTES for factor in times]):
        graph = at(batch)
        yield {
            "model": model,
            "batch": batch,
            "nodes": len(graph.nodes),
            "memory_budget": _MEMORY_BYTES,
            **compare(graph, _MEMORY_BYTES, planning_seconds),
        }


def main(argv: Sequence[str]) -> None:
    """Runs all cases, prints the tables and writes all numbers to a file."""
    values = flags.FlagValues()
    models = flags.DEFINE_list("models", list(MODELS), "Names of steps.STEPS.", flag_values=values)
    times = flags.DEFINE_list("times", ["1.5", "3", "6"], "Plain peaks, in memories.", flag_values=values)
    seconds = flags.DEFINE_float("planning_seconds", 30.0, "For each plan.", lower_bound=0.0, flag_values=values)
    out = flags.DEFINE_string("out", None, "File for all numbers, as JSON.", flag_values=values)
    try:
        if values(argv)[1:]:
            raise app.UsageError(f"expected flags, received {', '.join(values(argv)[1:])}.")
        planning.check_names("models", models.value, STEPS)
        factors = [_factor(text) for text in times.value]
    except (flags.Error, app.UsageError) as error:
        sys.exit(f"versus: {error}")

    cases = []
    for model in models.value:
        for case in _cases(model, STEPS[model], factors, seconds.value):
            cases.append(case)
            print("  ".join(case_row(case)), flush=True)
            if out.value is not None:  # after each case: a long run that is cut off leaves what it has
                pathlib.Path(out.value).write_text(json.dumps(cases, indent=1))
    print(f"\n{tables(cases)}")


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise app.UsageError(f"--times: expected numbers above 0 such as 1.5, received '{text}'.")
    return factor


if __name__ == "__main__":
    main(sys.argv)
