"""On a chain in which every node takes a second and every value a MiB, and on random steps."""

import itertools
import json

import pytest
import testing
from hypothesis import given, settings
from hypothesis import strategies as st

from graphswap import bound
from graphswap.cost_model import CostModel, DeviceSpec, Link
from graphswap.plan import Plan
from graphswap.simulator import simulate
from graphswap.strategies import STRATEGIES, Auto, Greedy, SwapAll, budgets, gaps, solver
from graphswap.strategies.base import InfeasibleBudgetError

MIB = 1 << 20
CHAIN = testing.chain(8)
AT_ONCE, SLOW = Link(1e15, 1e15, 0.0, overlaps=True), Link(1.0, 1.0, 0.0, overlaps=True)
BESIDE = Link(MIB, MIB, 0.0, overlaps=True)
INSTEAD = Link(2 * MIB, 2 * MIB, 0.0, overlaps=False)


def model(link, **device):
    return testing.seconds_per_node(1.0, link, **device)


def fail(*args):
    raise solver.SolverError("injected")


# --- the smallest -------------------------------------------------------------------------------------------------


def test_the_memory_bound_of_a_chain_is_reached():
    # w, x, two inputs and an output; everything else may be gone.
    assert budgets.least_peak(gaps.problem(CHAIN, model(BESIDE))).nbytes == 5 * MIB
    smallest = budgets.smallest(Auto(1.0), CHAIN, model(BESIDE))
    assert smallest.memory_budget == simulate(CHAIN, smallest, model(BESIDE)).peak_bytes == 5 * MIB


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_byte_below_the_memory_bound_is_refused(name):
    with pytest.raises(InfeasibleBudgetError, match="No plan of its class .* has a peak below 5.0MiB") as error:
        STRATEGIES[name].plan(CHAIN, model(BESIDE), 5 * MIB - 1)
    assert error.value.bound_bytes == 5 * MIB


def test_the_first_error_is_raised_if_no_budget_will_do():
    class Never:
        def plan(self, graph, cost_model, memory_budget):
            raise InfeasibleBudgetError(memory_budget, memory_budget + 1, f"at {memory_budget}")

    with pytest.raises(InfeasibleBudgetError, match="at 7"):
        budgets.smallest(Never(), CHAIN, model(BESIDE), 7)


@settings(max_examples=20, deadline=None)
@given(testing.random_graphs(8, batch=4096), st.booleans(), st.floats(0.2, 0.9))
def test_no_strategy_gets_below_the_memory_bound(graph, is_beside, share):
    link = Link(1e9, 2e9, 1e-6, overlaps=is_beside)
    cost_model = CostModel(DeviceSpec(memory_bytes=1, links={"host": link}), resident_bytes=1000)
    problem = gaps.problem(graph, cost_model)
    least = budgets.least_peak(problem).nbytes
    for name in STRATEGIES.keys() - {"auto"}:  # it returns what one of the others found
        try:
            plan = testing.brief(STRATEGIES[name]).plan(graph, cost_model, int(share * problem.live.max()))
        except InfeasibleBudgetError as error:
            assert error.bound_bytes == least <= error.smallest_bytes
        else:
            assert simulate(graph, plan, cost_model).peak_bytes >= least


# --- the free one -------------------------------------------------------------------------------------------------


def test_with_copies_that_take_no_time_the_free_budget_is_the_smallest():
    found = budgets.free(Auto(1.0), CHAIN, model(AT_ONCE), 20.0)
    assert found.bound_bytes == 5 * MIB
    assert found.plan.memory_budget is not None and found.plan.memory_budget <= 5.2 * MIB
    assert simulate(CHAIN, found.plan, model(AT_ONCE)).seconds <= 18.0 * (1 + budgets.TOLERANCE)


@pytest.mark.parametrize("link", [SLOW, INSTEAD, Link(0.0, 0.0, overlaps=True)])
def test_where_everything_costs_nothing_is_free_but_what_fits(link):
    # All of f1 to f7 wait for the backward pass, beside w, x, and two at work.
    found = budgets.free(Greedy(), CHAIN, model(link), 20.0)
    assert found.plan.memory_budget == 11 * MIB
    assert not found.plan.decisions
    # A thousandth of 18 seconds recomputes a fraction of a second's worth.
    assert 10.9 * MIB <= found.bound_bytes <= 11 * MIB


def test_a_strategy_that_always_evicts_leaves_the_planned_order():
    found = budgets.free(SwapAll(), CHAIN, model(SLOW), 20.0)
    assert found.plan.check(CHAIN).strategy == "order"
    assert found.plan.memory_budget == 11 * MIB


def test_the_planned_order_counts_with_what_the_allocator_loses():
    device = model(SLOW, memory_bytes=1)
    plan = budgets.free(SwapAll(), CHAIN, device, 20.0).plan
    (run, _) = gaps.placements(CHAIN, plan, device, plan.memory_budget or 0)
    assert 11 * MIB <= run[0].allocated_peak_bytes <= (plan.memory_budget or 0)


def test_without_a_solver_the_memory_bound_is_what_is_left(monkeypatch):
    monkeypatch.setattr(solver, "solve", fail)
    found = budgets.free(Greedy(), CHAIN, model(INSTEAD), 20.0)
    assert (found.bound_bytes, found.plan.memory_budget) == (5 * MIB, 11 * MIB)


def test_without_time_the_strategy_is_asked_once():
    asked = []

    class Counting:
        def plan(self, graph, cost_model, memory_budget):
            asked.append(memory_budget)
            return Greedy().plan(graph, cost_model, memory_budget)

    assert budgets.free(Counting(), CHAIN, model(AT_ONCE), 0.0).plan.memory_budget == 11 * MIB
    assert asked == [11 * MIB]


@settings(max_examples=15, deadline=None)
@given(testing.random_graphs(12, batch=512), st.booleans())
def test_no_free_plan_keeps_less_than_the_bound(graph, is_beside):
    link = Link(1e9, 1e9, 0.0, overlaps=is_beside)
    cost_model = CostModel(DeviceSpec(launch_seconds=1e-5, links={"host": link, "disk": link}))
    found = budgets.free(Auto(0.2), graph, cost_model, 5.0)
    plain = simulate(graph, Plan(order=gaps.problem(graph, cost_model).order), cost_model)
    free = simulate(graph, found.plan, cost_model)
    assert found.bound_bytes <= free.peak_bytes <= (found.plan.memory_budget or 0) <= plain.peak_bytes
    assert free.seconds <= plain.seconds * (1 + budgets.TOLERANCE)


# --- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [BESIDE, INSTEAD])
def test_the_envelope_of_a_chain(link):
    envelope = budgets.envelope(CHAIN, model(link), solves=7)
    assert envelope.seconds(11 * MIB) == pytest.approx(18.0, rel=1e-3)
    again = bound.Envelope.from_fields(json.loads(json.dumps(envelope.fields())))
    seconds = [envelope.seconds(budget * MIB / 4) for budget in range(4 * 4, 4 * 13)]
    assert seconds == [again.seconds(budget * MIB / 4) for budget in range(4 * 4, 4 * 13)]
    slopes = [after - before for before, after in itertools.pairwise(seconds)]
    assert all(slope <= 1e-9 for slope in slopes)
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(slopes))
    for budget in range(5, 12):
        planned = simulate(CHAIN, Auto(1.0).plan(CHAIN, model(link), budget * MIB), model(link)).seconds
        assert envelope.seconds(budget * MIB) <= planned + 1e-6


@settings(max_examples=15, deadline=None)
@given(testing.random_graphs(), st.booleans())
def test_no_strategy_gets_below_the_envelope(graph, is_beside):
    link = Link(1e8, 1e8, 0.0, overlaps=is_beside)
    cost_model = CostModel(DeviceSpec(launch_seconds=1e-5, links={"host": link, "disk": link}))
    envelope = budgets.envelope(graph, cost_model)
    for share, strategy in itertools.product((0.4, 0.6, 0.8, 1.0), STRATEGIES.values()):
        budget = int(share * gaps.problem(graph, cost_model).live.max())
        try:
            plan = strategy.plan(graph, cost_model, budget)
        except InfeasibleBudgetError:
            continue
        assert simulate(graph, plan, cost_model).seconds >= envelope.seconds(budget) - 1e-9


def test_no_envelope_without_a_solver(monkeypatch):
    monkeypatch.setattr(solver.Solver, "solve", fail)
    with pytest.raises(solver.SolverError, match="injected"):
        budgets.envelope(CHAIN, model(BESIDE))
