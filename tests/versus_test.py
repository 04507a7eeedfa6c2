import dataclasses
import json
import math

import pytest
import testing

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.devices import DEVICES
from graphswap.tools import planning, steps, versus


def chain(batch: int) -> ir.Graph:
    """As `testing.chain`, with rows for the batch; what it multiplies by stays as it is."""
    graph = testing.chain(8)
    value = ir.Value("float32", (batch, 512))
    nodes = [node if node.name == "w" else dataclasses.replace(node, outputs=(value,)) for node in graph.nodes]
    return graph.replace(nodes=tuple(nodes))


def made_up(**seconds: float | None) -> dict:
    strategies = {name: {"seconds": seconds.get(name), "peak_bytes": 3 << 30} for name in ("joint", *versus.BASELINES)}
    return {
        "model": "m",
        "batch": 8,
        "nodes": 9,
        "memory_budget": 100,
        "plain_peak_bytes": 150,
        "plain_seconds": 1.0,
        "strategies": strategies,
    }


def test_all_strategies_plan_for_one_budget():
    budget = int(planning.plain(testing.chain(8), CostModel(DEVICES["v100"])).peak_bytes / 1.5)
    found = versus.compare(testing.chain(8), budget, planning_seconds=5.0)
    for name, outcome in found["strategies"].items():
        assert outcome["seconds"] is None or outcome["peak_bytes"] <= budget, name
    assert found["strategies"]["joint"]["seconds"] >= found["plain_seconds"] * 0.999


def test_models_at_several_times_the_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(versus, "STEPS", {"chain": steps.Step(chain, 512)})
    out = tmp_path / "versus.json"
    versus.main(["versus", "--models=chain", "--times=1.2,1.5", "--planning_seconds=5", f"--out={out}"])
    cases = json.loads(out.read_text())
    ratios = [case["plain_peak_bytes"] / case["memory_budget"] for case in cases]
    assert ratios == pytest.approx([1.2, 1.5], rel=0.01)
    assert versus.tables(cases) in capsys.readouterr().out


def test_speed_ups():
    found = made_up(joint=1.0, swap_all=1.5, chen=1.2, karma=1.1)
    assert versus.speedup(found, versus.SINGLE) == 1.2
    assert versus.speedup(found, ("karma",)) == 1.1
    assert math.isinf(versus.speedup(made_up(joint=1.0, karma=1.1), versus.SINGLE))
    assert math.isnan(versus.speedup(made_up(swap_all=1.5), versus.SINGLE))


def test_averages_count_what_does_not_fit():
    cases = [made_up(joint=1.0, swap_all=2.0, karma=1.0), made_up(joint=1.0, swap_all=8.0), made_up(chen=1.0)]
    row = versus.average_row("all", cases)
    assert row == ("all", "3", "0", "1", "4.00x", "5.00x", "2.00x", "0", "1.00x", "1.00x", "1.00x", "1")
    assert versus.average_row("none", [made_up()])[:4] == ("none", "1", "1", "0")
    text = versus.tables(cases)
    assert text.startswith("Simulated on the data sheet of v100 with 16.0GiB, not measured.")
    assert "5.00x in the arithmetic mean, simulated. KARMA's published average" in text
    assert "3.0GiB at best" in text and "none fits" in text and "joint does not fit" in text


def test_batches_for_peaks():
    peaks = [planning.plain(chain(batch), CostModel(DEVICES["v100"])).peak_bytes for batch in (32, 48, 640)]
    assert versus.batches_for(chain, 32, [*peaks, 0]) == [32, 48, 640, 1]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--models=resnet", "versus: --models: expected names out of resnet50, .*, received 'resnet'."),
        ("--times=much", "versus: --times: expected numbers above 0 such as 1.5, received 'much'."),
        ("--times=-1", "versus: --times: expected numbers above 0 such as 1.5, received '-1'."),
        ("more", "versus: expected flags, received more."),
    ],
)
def test_bad_flags(flag, message):
    with pytest.raises(SystemExit, match=message):
        versus.main(["versus", flag])
