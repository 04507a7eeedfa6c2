import itertools
import time

import numpy as np
import pytest
import testing
from hypothesis import given, settings
from hypothesis import strategies as st

from graphswap import bound
from graphswap.cost_model import CostModel, DeviceSpec, Link
from graphswap.plan import Plan
from graphswap.simulator import simulate
from graphswap.strategies import STRATEGIES, fitting, gaps, joint, relaxation, solver, timing
from graphswap.strategies.base import InfeasibleBudgetError

MIB = 1 << 20
CHAIN = testing.chain(8)
LINKS = {
    "beside compute": Link(MIB, MIB, 0.0, overlaps=True),
    "instead of compute": Link(2 * MIB, 2 * MIB, 0.0, overlaps=False),
}


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("budget_mib", [5, 6, 8, 10])
def test_the_plan_keeps_the_budget_and_its_bound(link, budget_mib):
    model = testing.seconds_per_node(1.0, link)
    plan = joint.Joint().plan(CHAIN, model, budget_mib * MIB).check(CHAIN)
    timeline = simulate(CHAIN, plan, model)
    assert plan.certificate is not None
    assert timeline.peak_bytes <= budget_mib * MIB
    assert timeline.seconds >= plan.certificate.seconds(budget_mib * MIB) - 1e-6


def test_a_step_that_fits_is_bounded_by_its_compute():
    model = testing.seconds_per_node(1.0, LINKS["beside compute"])
    plain = simulate(CHAIN, Plan(order=gaps.problem(CHAIN, model).order), model)
    found = joint.certificate(CHAIN, model, plain.peak_bytes)
    assert found.seconds(plain.peak_bytes) == pytest.approx(plain.seconds)


def test_the_bound_is_written_into_the_plan_file():
    model = testing.seconds_per_node(1.0, LINKS["beside compute"])
    plan = joint.Joint().plan(CHAIN, model, 6 * MIB)
    again = Plan.from_json(plan.to_json())
    assert plan.certificate is not None and again.certificate is not None
    assert again.certificate.seconds(6 * MIB) == plan.certificate.seconds(6 * MIB)
    assert again.replace(certificate=None) == plan.replace(certificate=None)


def test_one_certificate_bounds_all_budgets():
    model = testing.seconds_per_node(1.0, LINKS["beside compute"])
    of_six, of_eight = (joint.certificate(CHAIN, model, budget * MIB) for budget in (6, 8))
    for budget in (6, 8):
        best = max(of_six.seconds(budget * MIB), of_eight.seconds(budget * MIB))
        assert best == pytest.approx((of_six if budget == 6 else of_eight).seconds(budget * MIB), rel=1e-3)
        planned = simulate(CHAIN, joint.Joint().plan(CHAIN, model, budget * MIB), model).seconds
        assert best <= planned + 1e-6
    assert of_six.seconds_per_byte() >= of_eight.seconds_per_byte() >= 0


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_no_evictions_beat_the_bound(link):
    """All ways to swap, recompute or keep the values of a short chain."""
    graph = testing.chain(5)
    model = testing.seconds_per_node(1.0, link)
    problem = gaps.problem(graph, model)
    relaxed = relaxation.Relaxation(problem)
    outcomes = []
    for ways in itertools.product(("", "swap", "recompute"), repeat=len(problem.gaps)):
        evicted = {gap: way for gap, way in enumerate(ways) if way}
        tight = fitting.evictions(problem, evicted)
        outlines = [timing.timed(problem, tight.decisions, target)[1] for target in (5 * MIB, 6 * MIB)]
        outcomes += [(outline.peak_bytes, outline.seconds) for outline in (tight.outline, *outlines)]
    for budget in range(4 * MIB, 9 * MIB, MIB):
        best = min((seconds for peak, seconds in outcomes if peak <= budget), default=None)
        if best is None:
            continue
        solution = solver.solve(relaxed.program, budget, relaxed.prices, 60.0)
        least = bound.certificate(relaxed.program, solution.duals).seconds(budget)
        assert least <= best + 1e-6
        found = simulate(graph, joint.Joint().plan(graph, model, budget), model).seconds
        assert least - 1e-6 <= found
        # One gap at a time finds the best of these short chains, or ends one node's second or one copy's short of it.
        assert found <= best + 2.0, f"{found} s, the best is {best} s"


@settings(max_examples=25, deadline=None)
@given(graph=testing.random_graphs(), share=st.sampled_from([0.5, 0.6, 0.7, 0.85]), is_beside=st.booleans())
def test_no_strategy_beats_the_bound(graph, share, is_beside):
    link = Link(1e8, 1e8, 0.0, overlaps=is_beside)
    model = CostModel(DeviceSpec(launch_seconds=1e-5, links={"host": link, "disk": link}))
    problem = gaps.problem(graph, model)
    budget = int(share * problem.live.max())
    try:
        found = joint.certificate(graph, model, budget)
    except solver.SolverError:
        found = None  # then nobody may keep the budget
    for name, strategy in STRATEGIES.items():
        try:
            plan = testing.brief(strategy).plan(graph, model, budget)
        except InfeasibleBudgetError:
            continue
        assert found is not None, f"{name} keeps a budget that the relaxation does not"
        seconds = simulate(graph, plan, model).seconds
        assert seconds >= found.seconds(budget) - 1e-9, f"{name} takes {seconds} s"


@pytest.mark.parametrize("failure", ["no answer", "no time left", "garbage"])
def test_without_a_usable_solver_there_is_still_a_plan(monkeypatch, failure):
    late = []
    now = time.monotonic
    monkeypatch.setattr(joint.time, "monotonic", lambda: now() + 1e6 * len(late))

    def solve(self, memory_budget, seconds):
        if failure == "no answer":
            raise solver.SolverError("injected")
        if failure == "no time left":
            late.append(seconds)  # all of the planning time is over
            raise solver.SolverError("Time limit reached")
        generator = np.random.default_rng(0)
        columns, rows = self._highs.getNumCol(), self._highs.getNumRow()
        return solver.Solution(generator.normal(size=columns), generator.normal(size=rows))

    monkeypatch.setattr(solver.Solver, "solve", solve)
    model = testing.seconds_per_node(1.0, LINKS["beside compute"])
    plan = joint.Joint().plan(CHAIN, model, 6 * MIB).check(CHAIN)
    timeline = simulate(CHAIN, plan, model)
    assert timeline.peak_bytes <= 6 * MIB
    assert plan.certificate is None or timeline.seconds >= plan.certificate.seconds(6 * MIB)


def test_the_first_plan_waits_for_no_solver(monkeypatch):
    asked = []
    monkeypatch.setattr(solver.Solver, "solve", lambda self, memory_budget, seconds: asked.append(memory_budget))
    model = testing.seconds_per_node(1.0, LINKS["beside compute"])
    plan = joint.Joint(planning_seconds=0.0).plan(CHAIN, model, 6 * MIB).check(CHAIN)
    assert simulate(CHAIN, plan, model).peak_bytes <= 6 * MIB
    assert plan.decisions and not asked


def test_a_budget_that_nothing_keeps():
    model = testing.seconds_per_node(1.0, LINKS["beside compute"])
    with pytest.raises(InfeasibleBudgetError, match="below the smallest reachable peak"):
        joint.Joint().plan(CHAIN, model, 2 * MIB)


def test_what_came_back_early_is_evicted_again_where_it_overflows():
    model = testing.seconds_per_node(1.0, LINKS["beside compute"])
    problem = gaps.problem(testing.chain(60), model)
    search = joint._Search(problem, relaxation.Relaxation(problem), 46 * MIB, seconds=10.0)
    recomputed = dict.fromkeys(range(len(problem.gaps)), "recompute")
    early = fitting.evictions(problem, recomputed).outline.peak_bytes
    least = fitting.evictions(problem, dict.fromkeys(recomputed, gaps.AGAIN)).outline.peak_bytes
    assert least < early
    again, swapped = (
        search._repaired(recomputed, {}, frozenset(), float(least), again=again) for again in (True, False)
    )
    assert again.outline.peak_bytes <= least and swapped.outline.peak_bytes <= least
    assert "swap" not in again.evicted.values()
    assert "swap" in swapped.evicted.values()
