"""Costs at the edge of what there is: links that carry nothing or take no time, nodes that cost nothing."""

import math

import pytest
import testing

from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile
from graphswap.plan import Plan
from graphswap.simulator import simulate
from graphswap.strategies import STRATEGIES, budgets, fitting, gaps, joint, timing
from graphswap.strategies.base import InfeasibleBudgetError

MIB = 1 << 20
CHAIN = testing.chain(8)
SPEEDS = {"nothing out": (0.0, MIB), "nothing back": (MIB, 0.0), "nothing": (0.0, 0.0), "at once": (math.inf, math.inf)}
BUDGETS = [4, 5, 6, 8, 11]

pytestmark = pytest.mark.filterwarnings("error")


def check(name, model, budget_mib):
    """The strategy's plan, if it finds one: simulated, in finite time, above its bound."""
    try:
        plan = STRATEGIES[name].plan(CHAIN, model, budget_mib * MIB).check(CHAIN)
    except InfeasibleBudgetError as error:
        assert error.bound_bytes <= error.smallest_bytes
        return None
    timeline = simulate(CHAIN, plan, model)
    assert timeline.peak_bytes <= budget_mib * MIB
    assert math.isfinite(timeline.seconds)
    if plan.certificate is not None:
        assert plan.certificate.seconds(budget_mib * MIB) <= timeline.seconds + 1e-6
    return plan


@pytest.mark.parametrize("overlaps", [False, True], ids=["instead of compute", "beside compute"])
@pytest.mark.parametrize("speeds", SPEEDS.values(), ids=SPEEDS)
@pytest.mark.parametrize("seconds", [1.0, 0.0])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy(name, seconds, speeds, overlaps):
    link = Link(speeds[0], speeds[1], 0.0, overlaps=overlaps)
    model = testing.seconds_per_node(seconds, link)
    plans = [check(name, model, budget) for budget in BUDGETS]
    if link.is_closed:
        assert not any(plan.swaps for plan in plans if plan is not None)
    if name in ("auto", "greedy", "joint"):
        assert plans[BUDGETS.index(8)] is not None and plans[-1] is not None


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("speeds", SPEEDS.values(), ids=SPEEDS)
def test_bounds(speeds, overlaps):
    model = testing.seconds_per_node(1.0, Link(speeds[0], speeds[1], 0.0, overlaps=overlaps))
    envelope = budgets.envelope(CHAIN, model, solves=3)
    found = budgets.free(STRATEGIES["greedy"], CHAIN, model, 10.0)
    at_once = 0.0 not in speeds
    assert envelope.seconds(11 * MIB) == pytest.approx(18.0, rel=1e-3)
    assert (envelope.seconds(6 * MIB) > 18.5) == (not at_once)
    assert (found.bound_bytes < 6 * MIB) == at_once == ((found.plan.memory_budget or 0) < 6 * MIB)


@pytest.mark.parametrize("overlaps", [False, True])
def test_zero_cost_nodes_still_pay_for_copies(overlaps):
    model = testing.seconds_per_node(0.0, Link(MIB, MIB, 0.0, overlaps=overlaps))
    assert joint.certificate(CHAIN, model, 5 * MIB).seconds(5 * MIB) >= 0.0
    for name in STRATEGIES:
        check(name, model, 6)


def test_a_swap_over_a_closed_link_never_ends():
    """Whoever asks for one all the same learns what it costs."""
    model = testing.seconds_per_node(1.0, Link(0.0, 0.0, 0.0, overlaps=True))
    problem = gaps.problem(CHAIN, model)
    decisions = problem.decide({0: "swap"})
    assert problem.outline(decisions).seconds == math.inf
    assert problem.swap_seconds(0) == math.inf
    assert fitting.offer(problem, 0, {}, (), ("swap",))[2] == ""
    assert timing.timed(problem, decisions, 100 * MIB)[1].seconds == math.inf


def test_nodes_that_a_profile_misses_cost_a_launch():
    profile = Profile("", {node.name: 1.0 for node in CHAIN.nodes if node.name != "f3"}, {})
    link = Link(MIB, MIB, 0.0, overlaps=True)
    model = CostModel(DeviceSpec(launch_seconds=0.25, links={"host": link}), profile)
    assert simulate(CHAIN, Plan(), model).seconds == len(CHAIN.nodes) - 0.75
    assert check("joint", model, 6) is not None
