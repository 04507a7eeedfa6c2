"""Plans for devices that are not here, judged by simulation. Imports no TensorFlow.

Also a script, which plans a pickled graph in a process of its own, for what that takes in time and memory:

    python -m graphswap.tools.planning --graph=step.pickle --percent=50 --planning_seconds=30
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import pickle
import re
import sys
import time
from collections.abc import Collection, Iterable, Sequence

from absl import app, flags

from graphswap import ir, simulator
from graphswap.cost_model import CostModel
from graphswap.devices import DEVICES
from graphswap.plan import Plan
from graphswap.strategies import Joint, Strategy, gaps
from graphswap.strategies.base import InfeasibleBudgetError


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a strategy made of a budget.

    Attributes:
        planning_seconds: How long it took.
        plan: None if it found none.
        seconds: Of the step under the plan, simulated; infinite without one.
        peak_bytes: Likewise; without a plan the smallest peak that was found.
    """

    planning_seconds: float
    plan: Plan | None
    seconds: float
    peak_bytes: int


def plain(graph: ir.Graph, cost_model: CostModel) -> simulator.Timeline:
    """The step without swaps and recompute, in the order that strategies plan for."""
    return simulator.simulate(graph, Plan(order=gaps.problem(graph, cost_model).order), cost_model)


def attempt(strategy: Strategy, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Outcome:
    """Plans and simulates.

    Raises:
        RuntimeError: If the simulated plan breaks the budget: the strategy is at fault.
    """
    start = time.perf_counter()
    try:
        plan = strategy.plan(graph, cost_model, memory_budget)
    except InfeasibleBudgetError as error:
        return Outcome(time.perf_counter() - start, None, float("inf"), error.smallest_bytes)
    seconds = time.perf_counter() - start
    timeline = simulator.simulate(graph, plan, cost_model)
    if timeline.peak_bytes > memory_budget:
        raise RuntimeError(
            f"{type(strategy).__name__} was given a budget of {memory_budget} bytes for graph '{graph.name}' and "
            f"returned a plan with a simulated peak of {timeline.peak_bytes} bytes. Report this."
        )
    return Outcome(seconds, plan, timeline.seconds, timeline.peak_bytes)


def check_names(flag: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raises absl's UsageError for a name that nobody knows."""
    for name in names:
        if name not in known:
            raise app.UsageError(f"--{flag}: expected names out of {', '.join(known)}, received '{name}'.")


def peak_rss_bytes() -> int:
    """The most memory that this process has held, which Linux knows.

    Not `resource.getrusage`: its number includes what the parent held when it started this process.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def main(argv: Sequence[str]) -> None:
    """Plans with `Joint` at a share of the plain peak; prints a JSON object."""
    values = flags.FlagValues()
    path = flags.DEFINE_string("graph", None, "File with a pickled ir.Graph.", required=True, flag_values=values)
    device = flags.DEFINE_enum("device", "v100", list(DEVICES), "Name of devices.DEVICES.", flag_values=values)
    percent = flags.DEFINE_integer("percent", 50, "Of the plain peak.", lower_bound=1, flag_values=values)
    seconds = flags.DEFINE_float("planning_seconds", 30.0, "For the plan.", lower_bound=0.0, flag_values=values)
    try:
        values(argv)
    except flags.Error as error:
        sys.exit(f"planning: {error}")
    graph = pickle.loads(pathlib.Path(path.value).read_bytes())
    spec = DEVICES[device.value]
    budget = plain(graph, CostModel(spec)).peak_bytes * percent.value // 100
    gaps.problem.cache_clear()  # what is measured starts from nothing
    outcome = attempt(Joint(seconds.value), graph, CostModel(spec), budget)
    certificate = None if outcome.plan is None else outcome.plan.certificate
    found = {
        "nodes": len(graph.nodes),
        "budget_bytes": budget,
        "planning_seconds": outcome.planning_seconds,
        "planned_seconds": None if outcome.plan is None else outcome.seconds,
        "peak_bytes": outcome.peak_bytes,
        "bound_seconds": None if certificate is None else certificate.seconds(budget),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv)
