import random

import pytest
import testing

from graphswap.cost_model import Link
from graphswap.strategies import annealing, fitting, gaps

MIB = 1 << 20
LINKS = {
    # A MiB takes four seconds each way.
    "in the way": Link(MIB / 4, MIB / 4, 0.0),
    "beside compute": Link(MIB / 4, MIB / 4, 0.0, overlaps=True),
}


def problem(link, layers=6):
    return gaps.problem(testing.chain(layers), testing.seconds_per_node(1.0, LINKS[link]))


def everything(found, way="swap"):
    return fitting.evictions(found, dict.fromkeys(range(len(found.gaps)), way))


@pytest.mark.parametrize("link", LINKS)
def test_a_bad_plan_gets_better(link):
    found = problem(link)
    bad = everything(found)
    better = annealing.improved(found, [bad], 8 * MIB, seconds=10.0, least_seconds=0.0)
    assert better.outline.peak_bytes <= 8 * MIB
    assert annealing.worth(found, better, 8 * MIB) < annealing.worth(found, bad, 8 * MIB)


def test_what_overflows_is_made_to_fit():
    found = problem("beside compute")
    nothing = fitting.evictions(found, {})
    target = everything(found).outline.peak_bytes + MIB
    assert nothing.outline.peak_bytes > target
    fits = annealing.improved(found, [nothing], target, seconds=10.0, least_seconds=0.0)
    assert fits.outline.peak_bytes <= target


def test_without_time_the_best_of_the_states_is_taken():
    found = problem("in the way")
    states = [everything(found), fitting.evictions(found, {0: "swap"}), fitting.evictions(found, {})]
    peak = states[1].outline.peak_bytes
    assert annealing.improved(found, states, peak, seconds=0.0, least_seconds=0.0) is states[1]


def test_nothing_is_tried_once_the_bound_is_reached(monkeypatch):
    found = problem("in the way")
    nothing = fitting.evictions(found, {})
    monkeypatch.setattr(fitting, "evictions", lambda *_: pytest.fail("a plan was tried"))
    least = nothing.outline.seconds
    assert annealing.improved(found, [nothing], nothing.outline.peak_bytes, 10.0, least) is nothing


def test_equal_seeds_give_equal_plans():
    found = problem("beside compute")
    first, second = (
        annealing.improved(found, [everything(found)], 8 * MIB, seconds=60.0, least_seconds=0.0) for _ in range(2)
    )
    assert first.evicted == second.evicted


def test_moves_lead_to_all_ways_to_evict():
    found = problem("beside compute")
    moves = annealing._Moves(found, 8 * MIB, random.Random(0))
    state = fitting.evictions(found, {})
    seen = set()
    for _ in range(200):
        state = moves.neighbour(state)
        seen.update(state.evicted.values())
    assert seen == {"swap", "recompute", gaps.AGAIN}


def test_gaps_of_alike_layers_are_of_one_kind():
    found = problem("beside compute")
    kinds = {annealing._kind(found, gap) for gap in range(len(found.gaps))}
    assert len(kinds) < len(found.gaps)
