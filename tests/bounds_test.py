import model_data_test
import pytest
import testing

from graphswap.tools import bounds


def test_a_plan_beside_its_bound():
    found = bounds.measure(testing.chain(8), "v100", 60, planning_seconds=5.0)
    assert found["planned_peak_bytes"] <= found["budget_bytes"]
    assert found["plain_seconds"] * 0.999 <= found["bound_seconds"] <= found["planned_seconds"]
    cells = bounds.row("chain", "v100", 60, found)
    assert len(cells) == len(bounds.COLUMNS)
    assert cells[2].startswith("60 %, ")


def test_variables_in_host_memory():
    step = model_data_test.step(64)
    found = bounds.measure(step, "v100", 80, planning_seconds=5.0, is_away=True)
    assert found["bound_seconds"] <= found["planned_seconds"] < found["in_turn_seconds"]
    assert found["planned_peak_bytes"] <= found["budget_bytes"]
    cells = bounds.row("mlp", "v100", 80, found, is_away=True)
    assert len(cells) == len(bounds.AWAY_COLUMNS)
    assert {node.op for node in bounds.away(step).nodes} >= {"Fetch", "Store"}


def test_a_budget_that_no_plan_keeps():
    found = bounds.measure(testing.chain(8), "v100", 10, planning_seconds=5.0)
    assert bounds.row("chain", "v100", 10, found)[4].startswith(
        "none; smallest peak found 5.0MiB, none below 5.0MiB exists"
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--models=resnet", "--models: expected names out of resnet50, vgg16, .*, received 'resnet'."),
        ("--devices=v200", "--devices: expected names out of v100, .*, received 'v200'."),
        ("--budgets=half", "--budgets: expected percents such as 50, received 'half'."),
        ("more", "expected flags, received more."),
    ],
)
def test_bad_flags(flag, message):
    with pytest.raises(SystemExit, match=message):
        bounds.main(["bounds", flag])
