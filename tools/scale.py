"""How planning grows with the graph: seconds and memory of `joint`, in a process of its own for each plan.

    python -m graphswap.tools.scale --nodes=1000,5000,20000,100000 --planning_seconds=30 --out=scale.json

The graphs are training steps of pre-activation ResNets for CIFAR (`architectures`), as deep as the number of nodes
asks for; ResNet-1001 has about 112,000. The budget is half of the plain step's simulated peak on a V100.
Tracing is not counted, and no TensorFlow is in the processes that plan.
"""

from __future__ import annotations

import json
import pathlib
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from graphswap import ir
from graphswap.options import format_bytes
from graphswap.tools.benchmark import markdown_table
from graphswap.tools.steps import cifar_resnet

COLUMNS = ("nodes", "budget", "first plan", "its step", "all planning", "its step", "bound", "peak RSS")

_FIRST_SECONDS = 0.001
_NODES_PER_BLOCK = 338


def graph_of(nodes: int) -> ir.Graph:
    """A real training step of about so many nodes, and of three blocks at least."""
    return cifar_resnet(max(1, round(nodes / (3 * _NODES_PER_BLOCK))))()


def measure(graph: ir.Graph, planning_seconds: float) -> dict[str, Any]:
    """Plans the step twice, each time in a process of its own: for a first plan, and for a good one.

    Returns:
        What `planning` prints, under "first" and "whole".

    Raises:
        RuntimeError: If a process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "graph.pickle")
        path.write_bytes(pickle.dumps(graph))
        return {
            name: _planned(path, seconds) for name, seconds in (("first", _FIRST_SECONDS), ("whole", planning_seconds))
        }


def row(found: dict[str, Any]) -> tuple[str, ...]:
    """What was found, for people: a step as what it adds to the bound."""
    first, whole = found["first"], found["whole"]
    bound = whole["bound_seconds"]
    return (
        str(whole["nodes"]),
        format_bytes(whole["budget_bytes"]),
        f"{first['planning_seconds']:.1f} s",
        _above(first, bound),
        f"{whole['planning_seconds']:.1f} s",
        _above(whole, bound),
        f"{bound:.3f} s" if bound is not None else "none in time",
        format_bytes(whole["peak_rss_bytes"]),
    )


def _above(found: dict[str, Any], bound: float | None) -> str:
    seconds = found["planned_seconds"]
    if seconds is None:
        return "no plan"
    return f"{seconds:.3f} s" if bound is None else f"{seconds:.3f} s, {100 * (seconds / bound - 1):+.2f} %"


def _planned(path: pathlib.Path, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "graphswap.tools.planning", f"--graph={path}", f"--planning_seconds={seconds}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"expected '{' '.join(command)}' to print a plan's numbers, received:\n{ended.stderr}")
    return json.loads(ended.stdout)


def main(argv: Sequence[str]) -> None:
    """Plans graphs of all sizes, prints the table and writes all numbers to a file."""
    values = flags.FlagValues()
    nodes = flags.DEFINE_list("nodes", ["1000", "5000", "20000", "100000"], "Sizes, about.", flag_values=values)
    seconds = flags.DEFINE_float("planning_seconds", 30.0, "For each plan.", lower_bound=0.0, flag_values=values)
    out = flags.DEFINE_string("out", None, "File for all numbers, as JSON.", flag_values=values)
    try:
        if values(argv)[1:]:
            raise app.UsageError(f"expected flags, received {', '.join(values(argv)[1:])}.")
        for size in nodes.value:
            if not size.isdecimal() or not int(size):
                raise app.UsageError(f"--nodes: expected whole numbers such as 5000, received '{size}'.")
    except (flags.Error, app.UsageError) as error:
        sys.exit(f"scale: {error}")

    results = []
    for size in map(int, nodes.value):
        results.append(measure(graph_of(size), seconds.value))
        print("  ".join(row(results[-1])), flush=True)
        if out.value is not None:  # after each size: a long run that is cut off leaves what it has
            pathlib.Path(out.value).write_text(json.dumps(results, indent=1))
    print(f"\n{markdown_table(COLUMNS, map(row, results))}")


if __name__ == "__main__":
    main(sys.argv)
