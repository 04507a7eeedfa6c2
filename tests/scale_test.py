import json

import pytest
import testing

from graphswap.tools import scale


def test_planning_in_processes_of_its_own():
    found = scale.measure(testing.chain(8), planning_seconds=5.0)
    assert found["whole"]["peak_bytes"] <= found["whole"]["budget_bytes"]
    assert found["first"]["budget_bytes"] == found["whole"]["budget_bytes"]
    cells = scale.row(found)
    assert len(cells) == len(scale.COLUMNS)
    assert cells[0] == "18"


def test_graphs_of_two_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "graph_of", lambda nodes: testing.chain(nodes // 2))
    out = tmp_path / "scale.json"
    scale.main(["scale", "--nodes=16,32", "--planning_seconds=1", f"--out={out}"])
    results = json.loads(out.read_text())
    assert [found["whole"]["nodes"] for found in results] == [18, 34]
    assert capsys.readouterr().out.count("MiB") >= 4


def test_a_process_that_fails(monkeypatch):
    monkeypatch.setattr(scale.pickle, "dumps", lambda _: b"no graph")
    with pytest.raises(RuntimeError, match="(?s)expected '.*graphswap.tools.planning .*' to print.*UnpicklingError"):
        scale.measure(testing.chain(2), planning_seconds=5.0)


def test_without_bound_or_plan():
    found = {
        "planned_seconds": None,
        "planning_seconds": 1.0,
        "bound_seconds": None,
        "nodes": 5,
        "budget_bytes": 1 << 30,
    }
    cells = scale.row({"first": found, "whole": {**found, "planned_seconds": 2.0, "peak_rss_bytes": 1 << 20}})
    assert cells == ("5", "1.0GiB", "1.0 s", "no plan", "1.0 s", "2.000 s", "none in time", "1.0MiB")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--nodes=many", "scale: --nodes: expected whole numbers such as 5000, received 'many'."),
        ("--nodes=0", "scale: --nodes: expected whole numbers such as 5000, received '0'."),
        ("--planning_seconds=-1", "scale: flag --planning_seconds=-1: -1.0 is not a non-negative number"),
        ("more", "scale: expected flags, received more."),
    ],
)
def test_bad_flags(flag, message):
    with pytest.raises(SystemExit, match=message):
        scale.main(["scale", flag])
