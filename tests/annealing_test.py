import collections
import random
import types

import pytest
import testing

from graphswap import parser
from graphswap.cost_model import Link
from graphswap.plan import Recompute
from graphswap.strategies import annealing, fitting, gaps, order

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


def improved(found, states, budget, seconds=10.0, least_seconds=0.0, **options):
    return annealing.improved(found, states, budget, seconds, least_seconds, **options)


@pytest.mark.parametrize("link", LINKS)
def test_a_bad_plan_gets_better(link):
    found = problem(link)
    bad = everything(found)
    better = improved(found, [bad], 8 * MIB)
    assert better is not None
    assert better.outline.peak_bytes <= 8 * MIB
    assert better.outline.seconds < bad.outline.seconds


def test_what_overflows_is_made_to_fit():
    found = problem("beside compute")
    nothing = fitting.evictions(found, {})
    budget = everything(found).outline.peak_bytes + MIB
    assert nothing.outline.peak_bytes > budget
    fits = improved(found, [nothing], budget)
    assert fits is not None and fits.outline.peak_bytes <= budget


def test_without_time_the_best_of_the_states_is_taken():
    found = problem("in the way")
    states = [everything(found), fitting.evictions(found, {0: "swap"}), fitting.evictions(found, {})]
    best = improved(found, states, states[1].outline.peak_bytes, seconds=0.0)
    assert best is not None and best.evicted == {0: "swap"}


def test_nothing_is_tried_once_the_bound_is_reached(monkeypatch):
    found = problem("in the way")
    nothing = fitting.evictions(found, {})
    monkeypatch.setattr(fitting, "evictions", lambda *_: pytest.fail("a plan was tried"))
    best = improved(found, [nothing], nothing.outline.peak_bytes, least_seconds=nothing.outline.seconds)
    assert best is not None and best.evicted == {}


def test_what_was_placed_before_stays_if_nothing_is_faster():
    found = problem("in the way")
    nothing = fitting.evictions(found, {})
    bad = everything(found)
    assert improved(found, [bad], nothing.outline.peak_bytes, seconds=0.1, placed=nothing) is nothing


def test_equal_seeds_give_equal_plans():
    found = problem("beside compute")
    first, second = (improved(found, [everything(found)], 8 * MIB, seconds=60.0) for _ in range(2))
    assert first is not None and second is not None
    assert first.evicted == second.evicted


def test_only_what_the_allocator_takes_counts(monkeypatch):
    """Here it takes nothing above 7 MiB, whatever the sum of the buffers is allowed to be."""
    model = testing.seconds_per_node(1.0, LINKS["in the way"], memory_bytes=8 * MIB)
    found = gaps.Gaps(testing.chain(6), order.depth_first(testing.chain(6)), model)
    asked = []

    def place(decisions, memory_budget):
        asked.append(found.outline(decisions).peak_bytes)
        return types.SimpleNamespace(allocated_peak_bytes=asked[-1] + MIB)

    monkeypatch.setattr(found, "place", place)
    best = improved(found, [everything(found)], 8 * MIB)
    assert best is not None and best.outline.peak_bytes <= 7 * MIB
    assert any(7 * MIB < peak <= 8 * MIB for peak in asked)
    monkeypatch.setattr(found, "place", lambda *_: types.SimpleNamespace(allocated_peak_bytes=9 * MIB))
    assert improved(found, [everything(found)], 8 * MIB, seconds=0.5) is None


def test_moves_lead_to_all_ways_to_evict():
    found = problem("beside compute")
    moves = annealing._Moves(found, random.Random(0), {})
    state = fitting.evictions(found, {})
    seen = set()
    for _ in range(200):
        state = moves.neighbour(state, 8 * MIB)
        seen.update(state.evicted.values())
    assert seen == {"swap", gaps.SWAP_AGAIN, "recompute", gaps.AGAIN}


def test_what_makes_a_chain_shorter_is_kept_and_let_go_again():
    graph = parser.parse("""
    graph layer(%x) -> (%out) {
      %x = Placeholder() : (float32[1024,1024])
      %stat = Op(%x) : (float32[1024,1024])
      %a = Mul(%x, %stat) : (float32[1024,1024])
      %f = Op(%a) : (float32[1024,1024])
      %g = Op(%f, %stat) : (float32[1024,1024])
      %h = Op(%g) : (float32[1024,1024])
      %i = Op(%h) : (float32[1024,1024])
      %out = Op(%i, %a) : (float32[1024,1024])
    }
    """)
    found = gaps.problem(graph, testing.seconds_per_node(1.0, LINKS["beside compute"]))
    moves = annealing._Moves(found, random.Random(0), {})
    of_a, stat = found.long_gap[found.storage_of["a"]], found.storage_of["stat"]
    state = fitting.evictions(found, {of_a: "recompute"})
    assert state.decisions == (Recompute(("stat", "a"), before="out"),)
    assert {moves._other_anchors(state, state.anchors) for _ in range(50)} == {frozenset({stat})}
    kept = fitting.evictions(found, state.evicted, {stat})
    assert kept.decisions == (Recompute(("a",), before="out"),)
    assert {moves._other_anchors(kept, kept.anchors) for _ in range(50)} == {frozenset()}


def test_what_the_program_does_not_care_about_is_tried_most():
    found = problem("in the way", layers=60)
    undecided = {(gap, way): float(gap >= 3) for gap in range(len(found.gaps)) for way in ("swap", "recompute")}
    moves = annealing._Moves(found, random.Random(0), undecided)
    tried = collections.Counter(moves._change({}, {}) for _ in range(4000))
    usual = sum(tried[gap] for gap in tried if gap >= 3) / (moves.count - 3)
    assert min(tried[gap] for gap in range(3)) > 1.5 * usual
    assert len(tried) == moves.count  # the others are tried, too


def test_gaps_of_alike_layers_are_of_one_kind():
    found = problem("beside compute")
    kinds = {annealing._kind(found, gap) for gap in range(len(found.gaps))}
    assert len(kinds) < len(found.gaps)
