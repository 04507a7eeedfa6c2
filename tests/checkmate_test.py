import itertools
import random

import pytest
import testing

from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile
from graphswap.options import Options
from graphswap.plan import Plan, Recompute
from graphswap.simulator import simulate
from graphswap.strategies import fitting, gaps, solver
from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.strategies.checkmate import Checkmate

MIB = 1 << 20
FAST = Link(1e12, 1e12, 0.0, overlaps=True)


@pytest.mark.parametrize("cost", ["the same", "different"])
def test_no_plan_that_repeats_nodes_of_a_short_chain_is_faster(cost):
    """All ways to repeat forward nodes before backward ones."""
    graph = testing.chain(4)
    seconds = {node.name: 1.0 + number % 3 * (cost == "different") for number, node in enumerate(graph.nodes)}
    model = CostModel(DeviceSpec(links={"host": FAST}), Profile("", seconds, {}))
    order = gaps.problem(graph, model).order
    names = ("f1", "f2", "f3")
    subsets = [nodes for count in range(4) for nodes in itertools.combinations(names, count)]
    outcomes = []
    for chosen in itertools.product(subsets, repeat=3):
        places = zip(chosen, ("b3", "b2", "b1"), strict=True)
        decisions = tuple(Recompute(nodes, before) for nodes, before in places if nodes)
        timeline = simulate(graph, Plan(order=order, decisions=decisions), model)
        outcomes.append((timeline.peak_bytes, timeline.seconds))
    lowest = min(peak for peak, _ in outcomes)
    assert lowest < simulate(graph, Plan(order=order), model).peak_bytes
    for budget in range(lowest, 9 * MIB, MIB):
        best = min(seconds for peak, seconds in outcomes if peak <= budget)
        plan = Checkmate().plan(graph, model, budget)
        assert simulate(graph, plan, model).seconds == pytest.approx(best)
    with pytest.raises(InfeasibleBudgetError):
        Checkmate().plan(graph, model, lowest - 1)


@pytest.mark.parametrize("seed", range(40))
def test_no_evictions_of_a_small_step_are_faster(seed):
    """All gaps recomputed or not; a plan may do better, as it may also keep what is dead, or drop something late."""
    rng = random.Random(seed)
    graph = testing.random_graph(rng, rng.randint(2, 5), 4096)
    model = CostModel(DeviceSpec(launch_seconds=1e-5, links={"host": FAST}))
    problem = gaps.problem(graph, model)
    outcomes = []
    for count in range(min(len(problem.gaps), 8) + 1):
        for chosen in itertools.combinations(range(len(problem.gaps)), count):
            try:
                outline = fitting.evictions(problem, dict.fromkeys(chosen, "recompute")).outline
            except gaps.CantRecompute:
                continue
            outcomes.append((outline.peak_bytes, outline.seconds))
    for budget in sorted({peak for peak, _ in outcomes})[:4]:
        best = min(seconds for peak, seconds in outcomes if peak <= budget)
        plan = Checkmate().plan(graph, model, budget)
        assert not plan.swaps
        timeline = simulate(graph, plan, model)
        assert timeline.peak_bytes <= budget
        assert timeline.seconds <= best * (1 + 1e-4)


def test_it_never_swaps_however_fast_the_link():
    graph, model = testing.chain(8), testing.seconds_per_node(1.0, FAST)
    plan = Checkmate().plan(graph, model, 6 * MIB).check(graph)
    assert plan.recomputes and not plan.swaps
    assert simulate(graph, plan, model).peak_bytes <= 6 * MIB


def test_a_step_that_fits_is_left_alone():
    assert Checkmate().plan(testing.chain(8), testing.seconds_per_node(1.0, FAST), 11 * MIB).decisions == ()


def test_options_know_it_by_name():
    assert Options("1GiB", strategy="checkmate").strategy == "checkmate"


def test_a_search_that_was_cut_off_does_not_say_that_nothing_fits(monkeypatch):
    def solve(self, memory_budget, seconds):
        raise solver.OutOfTimeError("Time limit reached")

    monkeypatch.setattr(solver.IntegerSolver, "solve_integers", solve)
    with pytest.raises(InfeasibleBudgetError) as error:
        Checkmate(planning_seconds=5.0).plan(testing.chain(8), testing.seconds_per_node(1.0, FAST), 6 * MIB)
    assert str(error.value) == (
        "memory_budget=6.0MiB: no plan was found before 5 s of planning were over; the smallest peak found is "
        "11.0MiB, set by node 'b8'. No plan of its class (docs/limits.md) has a peak below 5.0MiB. "
        "Raise planning_seconds or memory_budget, or reduce the batch size."
    )
    assert error.value.spent_seconds == 5.0


def test_a_budget_that_recompute_alone_can_t_keep_is_refused_as_such():
    with pytest.raises(InfeasibleBudgetError, match="is below the smallest reachable peak") as error:
        Checkmate().plan(testing.chain(8), testing.seconds_per_node(1.0, FAST), 4 * MIB)
    assert error.value.spent_seconds is None
