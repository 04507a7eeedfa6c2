"""On a chain in which every node takes a second and every value a MiB, and copies take no time at all or very long."""

import random

import model_data_test
import pytest
import testing

from graphswap import bound, ir, parser, rewrites
from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile, Workspace
from graphswap.plan import Place, Plan
from graphswap.strategies import fitting, gaps, relaxation, solver, timing

MIB = 1 << 20
# The prices against idle choices cost the bound up to 1e-4 of what they price: of all runs and copies, 1e-3 of a step.
NEARLY = 1e-3
CHAIN = testing.chain(8)
QUICK, SLOW = Link(1e15, 1e15, 0.0, overlaps=True), Link(1.0, 1.0, 0.0, overlaps=True)


def least(link, budget_mib):
    relaxed = relaxation.Relaxation(gaps.problem(CHAIN, testing.seconds_per_node(1.0, link)))
    solution = solver.solve(relaxed.program, budget_mib * MIB, relaxed.prices, 60.0)
    return bound.certificate(relaxed.program, solution.duals).seconds(budget_mib * MIB)


def test_copies_that_take_no_time_cost_nothing():
    assert least(QUICK, 5) == pytest.approx(18.0, rel=NEARLY)


def test_without_a_link_everything_that_is_missing_is_recomputed():
    # f1 to f7 wait for the backward pass, beside w, x, and two at work: 11 MiB.
    assert least(SLOW, 11) == pytest.approx(18.0, rel=NEARLY)
    assert least(SLOW, 9) == pytest.approx(20.0, rel=NEARLY)


def test_less_memory_never_takes_less_time():
    bounds = [least(SLOW, budget_mib) for budget_mib in range(12, 5, -1)]
    assert bounds == sorted(bounds)


def test_what_a_change_costs_at_an_optimums_prices():
    """Where copies take no time, it does not matter which gaps are swapped; a node takes its second anywhere."""
    relaxed = relaxation.Relaxation(gaps.problem(CHAIN, testing.seconds_per_node(1.0, QUICK)))
    prices = relaxed.indifference(solver.solve(relaxed.program, 5 * MIB, relaxed.prices, 60.0))
    swaps, repeats = ([seconds for (_, how), seconds in prices.items() if how == way] for way in ("swap", "recompute"))
    assert len(swaps) == len(relaxed.stretches)
    assert swaps == pytest.approx([0.0] * len(swaps), abs=NEARLY)
    assert all(-NEARLY <= seconds <= 1.0 + NEARLY for seconds in repeats) and max(repeats) > 0.5


def test_every_gap_that_matters_has_columns():
    problem = gaps.problem(CHAIN, testing.seconds_per_node(1.0, QUICK))
    relaxed = relaxation.Relaxation(problem)
    assert set(relaxed.stretches) == set(range(len(problem.gaps)))
    for gap, stretches in relaxed.stretches.items():
        assert relaxed.checks[stretches[0].first] > problem.gaps[gap].start
        assert relaxed.checks[stretches[-1].end - 1] < problem.gaps[gap].end
        assert all(before.end == after.first for before, after in zip(stretches, stretches[1:], strict=False))


IN_PLACE = """
graph in_place(%x, %w) -> (%d) {
  %x = Placeholder() : (float32[512,512])
  %w = Placeholder() : (float32[512,512])
  %a = MatMul(%x, %w) : (float32[512,512])
  %b = Relu(%a) : (float32[512,512])
  %c = MatMul(%a, %w) : (float32[8,8])
  %d = MatMul(%b, %c) : (float32[8,8])
}
"""


def test_an_op_works_in_place_only_if_its_input_can_be_absent_afterwards():
    # x, w, a, b and the workspace of b; the next node reads a.
    profile = Profile("", {}, {"b": Workspace(late=(MIB,))})
    model = CostModel(DeviceSpec(links={"host": QUICK}), profile)
    relaxed = relaxation.Relaxation(gaps.problem(parser.parse(IN_PLACE), model))
    solver.solve(relaxed.program, 5 * MIB, relaxed.prices, 60.0)
    with pytest.raises(solver.SolverError, match="[Ii]nfeasible"):
        solver.solve(relaxed.program, 4.5 * MIB, relaxed.prices, 60.0)


LATE = """
graph late(%x, %w) -> (%out) {
  %x = Placeholder() : (float32[512,512])
  %w = Placeholder() : (float32[512,512])
  %a = MatMul(%x, %w) : (float32[512,512])
  %b = Op!(%a) : (float32[512,512])
  %c = Op!(%b) : (float32[512,512])
  %d = Op!(%c) : (float32[512,512])
  %e = Op!(%d) : (float32[512,512])
  %f = Op!(%e) : (float32[512,1024])
  %g = Op!(%f) : (float32[512,512])
  %out = Op!(%a, %g) : (float32[512,512])
}
"""


def test_a_copy_need_not_be_complete_when_its_gap_begins():
    """It takes as long as the step has until memory is full, and four times as long as until the gap begins."""
    problem = gaps.problem(parser.parse(LATE), testing.seconds_per_node(1.0, Link(MIB / 4, 1e15, 0.0, overlaps=True)))
    budget = int(problem.live.max()) - MIB
    decisions = problem.decide({problem.long_gap[problem.storage_of["a"]]: "swap"})
    _, timed = timing.timed(problem, decisions, budget)
    assert timed.peak_bytes <= budget
    assert timed.seconds == pytest.approx(len(problem.order))
    relaxed = relaxation.Relaxation(problem)
    solution = solver.solve(relaxed.program, budget, relaxed.prices, 60.0)
    assert bound.certificate(relaxed.program, solution.duals).seconds(budget) <= timed.seconds


def outcomes(problem, rng, shares, decide):
    """Peak and seconds of random evictions, as they are and with their copies timed."""
    found = []
    for share in shares:
        evicted = {}
        for gap in range(len(problem.gaps)):
            way = rng.choice(["swap", gaps.SWAP_AGAIN, "recompute", "recompute", gaps.AGAIN])
            if rng.random() < share and (way in gaps.SWAPS or problem.is_repeatable(gap)):
                evicted[gap] = way
        decisions = decide(evicted)
        tight = problem.outline(decisions)
        room = rng.choice([0.0, 0.5, 1.0]) * (problem.live.max() - tight.peak_bytes)
        _, timed = timing.timed(problem, decisions, tight.peak_bytes + room)
        found += [(outline.peak_bytes, outline.seconds) for outline in (tight, timed)]
    return found


def assert_none_below_the_bound(problem, found, budgets):
    relaxed = relaxation.Relaxation(problem)
    for budget in budgets:
        fastest = min(seconds for peak, seconds in found if peak <= budget)
        solution = solver.solve(relaxed.program, budget, relaxed.prices, 60.0)
        assert bound.certificate(relaxed.program, solution.duals).seconds(budget) <= fastest + 1e-9


# With the first four there are plans that write an output over what they make anew, or leave a first run out: below a
# bound that takes every node to need its own output where it stands. In the fifth a node may write over a buffer that
# it reads under two names.
@pytest.mark.parametrize("seed", [32, 64, 91, 129, 23, *range(8)])
def test_no_evictions_get_below_the_bound(seed):
    rng = random.Random(seed)
    graph = testing.random_graph(rng, rng.randint(2, 16), 4096)
    link = Link(1e9, 1e9, 0.0, overlaps=rng.random() < 0.5)
    problem = gaps.problem(graph, CostModel(DeviceSpec(launch_seconds=1e-5, links={"host": link})))
    shares = (0.2, 0.5, 1.0, 1.0) * 4
    found = outcomes(problem, rng, shares, lambda evicted: problem.decide(evicted, (), rng.randrange(60)))
    assert_none_below_the_bound(problem, found, sorted({peak for peak, _ in found})[:4])


@pytest.mark.parametrize("seed", range(10))
def test_no_copies_of_variables_get_below_the_bound(seed):
    """Variables lie in far tiers; some links work beside compute, and are fast or the slowest thing of all."""
    rng = random.Random(seed)
    step = model_data_test.step(rng.choice([8, 512]))
    away = [Place(name, rng.choice(["host", "disk"])) for name in model_data_test.ALL if rng.random() < 0.8]
    graph = rewrites.place(step, Plan(decisions=tuple(away)))
    speed = 10 ** rng.uniform(8.0, 10.5)
    links = {tier: Link(speed, speed, 0.0, overlaps=rng.random() < 0.7) for tier in ("host", "disk")}
    problem = gaps.problem(graph, CostModel(DeviceSpec(launch_seconds=1e-5, links=links)))
    shares = (0.0, 0.2, 0.5, 1.0) * 3
    found = outcomes(problem, rng, shares, lambda evicted: fitting.at_worst_swapped(problem, evicted).decisions)
    assert_none_below_the_bound(problem, found, sorted({peak for peak, _ in found})[::4])


@pytest.mark.parametrize("speed", [1e6, 1e9, 1e12])
def test_the_bound_counts_copies_of_variables(speed):
    """On a slow link it is the link's time, on a fast one the compute's."""
    link = Link(speed, speed, 0.0, overlaps=True)
    placed = tuple(Place(name) for name in model_data_test.ALL)
    graph = rewrites.place(model_data_test.step(8), Plan(decisions=placed))
    problem = gaps.problem(graph, CostModel(DeviceSpec(launch_seconds=1e-6, links={"host": link})))
    relaxed = relaxation.Relaxation(problem)
    budget = 2 * int(problem.live.max())
    found = bound.certificate(relaxed.program, solver.solve(relaxed.program, budget, relaxed.prices, 60.0).duals)
    _, timed = timing.timed(problem, (), budget)
    assert timed.seconds * 0.9 <= found.seconds(budget) <= timed.seconds
    copied = sum(node.outputs[0].nbytes for node in graph.nodes if node.op == ir.FETCH) / speed
    assert (found.seconds(budget) > copied) and (copied > problem.clock[-1]) == (speed < 1e12)


def test_what_is_stored_twice_is_on_the_device_once():
    text = """
    graph g(%x) -> () after(%first, %second, %large) {
      %w = Placeholder() {"store_of": "v", "tier": "host"} : (resource[])
      %w2 = Placeholder() : (resource[])
      %u = Placeholder() {"store_of": "u", "tier": "host"} : (resource[])
      %u2 = Placeholder() : (resource[])
      %x = Placeholder() : (float32[512,512])
      %new = MatMul(%x, %x) : (float32[512,512])
      %first = Store!(%new, %w, %w2) {"tier": "host", "variable": "v"} : ()
      %second = Store!(%new, %u, %u2) {"tier": "host", "variable": "u"} : ()
      %large = MatMul(%x, %x) : (float32[2048,512])
    }
    """
    graph = parser.parse(text)
    model = testing.seconds_per_node(1.0, Link(MIB / 4, MIB / 4, 0.0, overlaps=True))
    problem = gaps.Gaps(graph, tuple(graph.position), model)
    relaxed = relaxation.Relaxation(problem)
    for budget in (6 * MIB, 7 * MIB):
        _, timed = timing.timed(problem, (), budget)
        assert timed.peak_bytes <= budget
        solution = solver.solve(relaxed.program, budget, relaxed.prices, 60.0)
        assert bound.certificate(relaxed.program, solution.duals).seconds(budget) <= timed.seconds
