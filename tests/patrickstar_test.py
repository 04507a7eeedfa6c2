import model_data_test
import pytest

from graphswap import rewrites
from graphswap.plan import Place, Plan
from graphswap.simulator import simulate
from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.strategies.patrickstar import PatrickStar

STEP, ALL, MODEL = model_data_test.STEP, model_data_test.ALL, model_data_test.MODEL


def test_chunks_hold_one_kind_each_and_optimizer_state_leaves_first():
    groups = PatrickStar().groups(STEP, ALL)
    assert sorted(name for group in groups for name in group) == sorted(ALL)
    kinds = [{name[0] for name in group} for group in groups]
    assert all(len(kind) == 1 for kind in kinds)
    assert kinds == sorted(kinds, key=lambda kind: kind == {"w"})


def test_nothing_to_move_is_no_group():
    assert PatrickStar().groups(STEP, []) == []


def test_only_fetched_values_are_dropped():
    placed = rewrites.place(STEP, Plan(decisions=tuple(Place(name) for name in ALL)))
    peak = simulate(placed, Plan(order=PatrickStar().plan(placed, MODEL, 1 << 40).order), MODEL).peak_bytes
    plan = PatrickStar().plan(placed, MODEL, peak * 3 // 4)
    assert simulate(placed, plan, MODEL).peak_bytes <= peak * 3 // 4
    assert not plan.swaps
    assert {name.partition("/")[2] for decision in plan.recomputes for name in decision.nodes} == {"fetch"}


def test_activations_that_do_not_fit_are_checkpointed():
    step = model_data_test.step(2048)
    placed = rewrites.place(step, Plan(decisions=tuple(Place(name) for name in ALL)))
    roomy = PatrickStar().plan(placed, MODEL, 1 << 40)
    budget = simulate(placed, roomy, MODEL).peak_bytes * 7 // 8
    plan = PatrickStar().plan(placed, MODEL, budget)
    assert simulate(placed, plan, MODEL).peak_bytes <= budget
    assert not plan.swaps
    assert any(name.startswith("y") for decision in plan.recomputes for name in decision.nodes)


def test_what_checkpoints_pass_is_refused():
    with pytest.raises(InfeasibleBudgetError):
        PatrickStar().plan(STEP, MODEL, model_data_test.PEAK // 4)
