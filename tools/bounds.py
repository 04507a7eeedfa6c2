"""How far plans lie above their certified bound, on accelerators that are not here. A simulation, not a measurement.

    python -m graphswap.tools.bounds --models=resnet50,gpt --devices=v100,h200 --budgets=70,50,30 --out=bounds.json

Budgets are percents of the plain step's simulated peak. Costs are analytic, from the device's data sheet. With `--away`
all variables that may leave the device lie in host memory, and "in turn" is the same plan with none of their copies
beside compute.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from graphswap import ir, rewrites
from graphswap.cost_model import CostModel
from graphswap.devices import DEVICES
from graphswap.options import format_bytes
from graphswap.plan import Place, Plan
from graphswap.simulator import simulate
from graphswap.strategies import Joint, gaps, joint
from graphswap.strategies.budgets import least_peak
from graphswap.tools import planning
from graphswap.tools.benchmark import markdown_table
from graphswap.tools.steps import STEPS
from graphswap.variables import unplaceable, values, worth_moving

_SOLVING_SECONDS = 120.0
"""For the bound, where the planning time is too short for it."""
COLUMNS = ("model", "device", "budget", "bound", "planned", "gap", "swaps", "nodes repeated", "planning")
AWAY_COLUMNS = (*COLUMNS, "in turn")


def away(graph: ir.Graph) -> ir.Graph:
    """The step with all variables that may leave the device in host memory."""
    names = worth_moving(graph, values(graph).keys() - unplaceable(graph).keys())
    return rewrites.place(graph, Plan(decisions=tuple(Place(name) for name in sorted(names))))


def measure(
    graph: ir.Graph, device: str, percent: int, planning_seconds: float, is_away: bool = False
) -> dict[str, Any]:
    """Plans one step for one budget.

    Args:
        graph: The step, all variables on the device.
        device: Name out of `devices.DEVICES`.
        percent: Of the peak of that step.
        planning_seconds: For the plan.
        is_away: Whether `away` of it is planned.

    Returns:
        Seconds of the plain step, of the bound and of the plan, peaks in bytes, and what the plan does; if no plan
        was found, "smallest_bytes", the lowest peak that was, and "bound_bytes", below which none exists.
    """
    cost_model = CostModel(DEVICES[device])
    plain = planning.plain(graph, cost_model)
    budget = plain.peak_bytes * percent // 100
    graph = away(graph) if is_away else graph
    found = planning.attempt(Joint(planning_seconds), graph, cost_model, budget)
    plan = found.plan
    if plan is None:
        bound_bytes = least_peak(gaps.problem(graph, cost_model)).nbytes
        smallest = {"smallest_bytes": found.peak_bytes, "bound_bytes": bound_bytes}
        return {"budget_bytes": budget, "plain_seconds": plain.seconds, **smallest}
    certificate = plan.certificate or joint.certificate(graph, cost_model, budget, _SOLVING_SECONDS)
    return {
        "budget_bytes": budget,
        "plain_seconds": plain.seconds,
        "bound_seconds": certificate.seconds(budget),
        "planned_seconds": found.seconds,
        "planned_peak_bytes": found.peak_bytes,
        "swaps": len(plan.swaps),
        "repeated_nodes": sum(len(decision.nodes) for decision in plan.recomputes),
        "planning_seconds": found.planning_seconds,
        "in_turn_seconds": simulate(graph, plan.in_turn(), cost_model).seconds,
    }


def row(model: str, device: str, percent: int, found: dict[str, Any], is_away: bool = False) -> tuple[str, ...]:
    """What was found, for people: bound and plan as what they add to the plain step."""
    start = (model, device, f"{percent} %, {format_bytes(found['budget_bytes'])}")
    if "smallest_bytes" in found:
        smallest, least = (format_bytes(found[f"{what}_bytes"]) for what in ("smallest", "bound"))
        return (
            *start,
            "",
            f"none; smallest peak found {smallest}, none below {least} exists",
            *[""] * (5 if is_away else 4),
        )
    plain, bound, planned, in_turn = (found[f"{what}_seconds"] for what in ("plain", "bound", "planned", "in_turn"))
    return (
        *start,
        f"{100 * (bound / plain - 1):+.2f} %",
        f"{100 * (planned / plain - 1):+.2f} %",
        f"{100 * (planned / bound - 1):.2f} %",
        str(found["swaps"]),
        str(found["repeated_nodes"]),
        f"{found['planning_seconds']:.0f} s",
        *([f"{100 * (in_turn / plain - 1):+.2f} %"] if is_away else []),
    )


def main(argv: Sequence[str]) -> None:
    """Plans all steps for all devices and budgets, prints the table and writes all numbers to a file."""
    flag_values = flags.FlagValues()
    models = flags.DEFINE_list("models", list(STEPS), "Names of steps.STEPS.", flag_values=flag_values)
    devices = flags.DEFINE_list("devices", ["v100", "h200"], "Names of devices.DEVICES.", flag_values=flag_values)
    budgets = flags.DEFINE_list(
        "budgets", ["70", "50", "30", "20"], "Percents of the plain peak.", flag_values=flag_values
    )
    seconds = flags.DEFINE_float("planning_seconds", 30.0, "For each plan.", lower_bound=0.0, flag_values=flag_values)
    batch = flags.DEFINE_integer(
        "batch", None, "Examples, if not each step's own.", lower_bound=1, flag_values=flag_values
    )
    is_away = flags.DEFINE_bool("away", False, "Variables lie in host memory.", flag_values=flag_values)
    out = flags.DEFINE_string("out", None, "File for all numbers, as JSON.", flag_values=flag_values)
    try:
        if flag_values(argv)[1:]:
            raise app.UsageError(f"expected flags, received {', '.join(flag_values(argv)[1:])}.")
        for flag, names, known in (("models", models.value, STEPS), ("devices", devices.value, DEVICES)):
            planning.check_names(flag, names, known)
        for percent in budgets.value:
            if not percent.isdecimal() or not int(percent):
                raise app.UsageError(f"--budgets: expected percents such as 50, received '{percent}'.")
    except (flags.Error, app.UsageError) as error:
        sys.exit(f"bounds: {error}")

    results, rows = [], []
    for model in models.value:
        graph = STEPS[model](batch.value)
        for device in devices.value:
            for percent in map(int, budgets.value):
                found = measure(graph, device, percent, seconds.value, is_away.value)
                results.append(
                    {"model": model, "device": device, "percent": percent, "nodes": len(graph.nodes), **found}
                )
                rows.append(row(model, device, percent, found, is_away.value))
                print("  ".join(rows[-1]), flush=True)
        if out.value is not None:  # after each model: a long run that is cut off leaves what it has
            pathlib.Path(out.value).write_text(json.dumps(results, indent=1))
    print(f"\n{markdown_table(AWAY_COLUMNS if is_away.value else COLUMNS, rows)}")


if __name__ == "__main__":
    main(sys.argv)
