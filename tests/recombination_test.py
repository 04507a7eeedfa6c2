import numpy as np
import pytest
import testing

from graphswap.cost_model import Link
from graphswap.strategies import fitting, gaps, recombination
from graphswap.strategies.recombination import Change

MIB = 1 << 20


@pytest.fixture
def problem():
    return gaps.problem(testing.chain(6), testing.seconds_per_node(1.0, Link(MIB / 4, MIB / 4, 0.0)))


def change(problem, base, other, *parts):
    seconds = other.outline.seconds - base.outline.seconds
    return Change(other, parts, other.outline.live - base.outline.live, seconds)


def test_parts_have_as_many_bytes(problem):
    among = range(len(problem.gaps))
    found = recombination.parts(problem, among, 2, 0.0)
    assert [part for _, part in sorted(found.items(), key=lambda item: problem.gaps[item[0]].end)] == [0, 0, 1, 1]
    assert set(recombination.parts(problem, among, 1, 0.5).values()) == {0, 1}
    assert sorted(found) == list(among)


def test_a_part_of_another_state(problem):
    base = fitting.evictions(problem, {0: "swap", 1: "swap"})
    other = fitting.evictions(problem, {1: "recompute", 2: "swap"}, since={2: problem.gaps[2].start + 1})
    assert recombination.changed(base, other) == {0, 1, 2}
    found = recombination.with_part_of(problem, base, other, {1, 2})
    assert (found.evicted, found.since) == ({0: "swap", 1: "recompute", 2: "swap"}, other.since)
    assert recombination.with_part_of(problem, base, base, {0}).evicted == base.evicted


def test_changes_are_merged_with_their_anchors(problem):
    base = fitting.evictions(problem, {0: "swap", 1: "swap"}, frozenset({4, 5}))
    one = fitting.evictions(problem, {1: "swap"}, frozenset({4, 5, 6}))
    other = fitting.evictions(problem, {0: "swap", 1: "swap", 2: "recompute"}, frozenset({4}))
    found = recombination.merged(problem, base, [one, other])
    assert found.evicted == {1: "swap", 2: "recompute"}
    assert found.anchors == {4, 6}


def test_what_one_change_needs_another_frees(problem):
    base = fitting.evictions(problem, {0: "recompute", 2: "swap"})
    stays = fitting.evictions(problem, {2: "swap"})
    goes = fitting.evictions(problem, {0: "recompute", 1: "recompute", 2: "swap"})
    changes = [change(problem, base, stays, 0), change(problem, base, goes, 1)]
    budget = base.outline.peak_bytes
    assert stays.outline.peak_bytes > budget  # alone it does not fit, and the other one only costs
    cheap = Change(goes, (1,), changes[1].live, 0.5)
    assert recombination.chosen([changes[0], cheap], base.outline.live, budget, 1.0, 10.0) == [0, 1]
    assert recombination.chosen(changes[:1], base.outline.live, budget, 1.0, 10.0) == []


def test_of_a_part_one_change_is_made():
    live = np.array([1.0, 3.0, 1.0]) * MIB
    saving = [Change(None, (0,), np.array([0.0, -MIB, 0.0]), seconds) for seconds in (0.2, 0.1)]  # pyright: ignore
    assert recombination.chosen(saving, live, 2 * MIB, 1.0, 10.0) == [1]
    apart = [saving[0], Change(None, (1,), saving[1].live, 0.1)]  # pyright: ignore
    assert recombination.chosen(apart, live, 1 * MIB, 1.0, 10.0) == [0, 1]
    assert recombination.chosen(apart, live, 2 * MIB, 1.0, 10.0) == [1]
    assert recombination.chosen([], live, 2 * MIB, 1.0, 10.0) == []


def test_places_that_overflow_only_under_the_changes_are_seen():
    count = 10 * 150
    live = np.full(count, 1.0 * MIB)
    live[5::10] = 2.0 * MIB  # the fullest place of each stretch
    moved = np.zeros(count)
    moved[7], moved[5] = 9.0 * MIB, -1.0 * MIB
    assert recombination.chosen([Change(None, (0,), moved, -1.0)], live, 3.0 * MIB, 1.0, 10.0) == []  # pyright: ignore
    assert recombination.chosen([Change(None, (0,), moved, -1.0)], live, 20.0 * MIB, 1.0, 10.0) == [0]  # pyright: ignore
