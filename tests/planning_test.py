import json
import math
import pickle

import pytest
import testing

from graphswap.cost_model import CostModel
from graphswap.devices import DEVICES
from graphswap.plan import Plan
from graphswap.strategies import SwapAll
from graphswap.tools import planning

MIB = 1 << 20


def test_an_attempt_is_simulated():
    cost_model = CostModel(DEVICES["v100"])
    graph = testing.chain(8)
    plain = planning.plain(graph, cost_model)
    found = planning.attempt(SwapAll(), graph, cost_model, plain.peak_bytes - MIB)
    assert found.plan is not None and found.plan.swaps
    assert found.peak_bytes < plain.peak_bytes and found.seconds > plain.seconds


def test_no_plan():
    found = planning.attempt(SwapAll(), testing.chain(8), CostModel(DEVICES["v100"]), MIB)
    assert found.plan is None and found.peak_bytes > MIB and math.isinf(found.seconds)


def test_a_plan_that_breaks_the_budget():
    class Careless:
        def plan(self, graph, cost_model, memory_budget):
            return Plan()

    with pytest.raises(RuntimeError, match="Careless was given a budget of 1048576 bytes for graph 'chain' and"):
        planning.attempt(Careless(), testing.chain(8), CostModel(DEVICES["v100"]), MIB)


def test_a_pickled_graph(tmp_path, capsys):
    path = tmp_path / "graph.pickle"
    path.write_bytes(pickle.dumps(testing.chain(8)))
    planning.main(["planning", f"--graph={path}", "--percent=60", "--planning_seconds=5"])
    found = json.loads(capsys.readouterr().out)
    assert found["nodes"] == 18 and found["peak_bytes"] <= found["budget_bytes"]
    assert found["bound_seconds"] <= found["planned_seconds"]
    assert found["peak_rss_bytes"] > 10 * MIB


def test_no_graph():
    with pytest.raises(SystemExit, match="planning: .*--graph.*"):
        planning.main(["planning"])
