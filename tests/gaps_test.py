import math

import numpy as np
import pytest
import testing
import tiny_graphs
from hypothesis import given
from hypothesis import strategies as st

from graphswap import parser
from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile
from graphswap.plan import Recompute, Swap
from graphswap.strategies import gaps, order
from graphswap.strategies.gaps import Gap

MIB = 1 << 20
# Every node takes a second. A MiB takes two seconds to the host and one back.
FAST = Link(MIB / 2, MIB, 0.0, overlaps=True)
SLOW = Link(MIB / 2, MIB, 0.0, overlaps=False)

CHAIN = """
graph chain(%x, %w) -> (%b1) {
  %x = Placeholder() : (float32[512,512])
  %w = Placeholder() : (float32[512,512])
  %f1 = MatMul(%x, %w) : (float32[512,512])
  %f2 = MatMul(%f1, %w) : (float32[512,512])
  %f3 = MatMul(%f2, %w) : (float32[512,512])
  %f4 = MatMul(%f3, %w) : (float32[512,512])
  %b4 = MatMul(%f4, %w) : (float32[512,512])
  %b3 = MatMul(%b4, %f3) : (float32[512,512])
  %b2 = MatMul(%b3, %f2) : (float32[512,512])
  %b1 = MatMul(%b2, %f1) : (float32[512,512])
}
"""


def problem(text=CHAIN, link=FAST):
    graph = parser.parse(text)
    model = CostModel(DeviceSpec(launch_seconds=1.0, links={"host": link}), Profile("", {}, {}))
    return gaps.Gaps(graph, order.traced(graph), model)


def swaps(found, evicted):
    return [decision for decision in found.decide(evicted) if isinstance(decision, Swap)]


def gap_of(found, value):
    """The number of the longest gap of a value's storage."""
    return found.long_gap[found.storage_of[value]]


# --- gaps -------------------------------------------------------------------------------------------------------


def test_gaps_lie_between_uses():
    found = problem()
    # f1 is made at 2, read at 3 and 9. Between f3's uses at 5 and 7 there is only one node.
    f1, f2 = found.storage_of["f1"], found.storage_of["f2"]
    assert found.gaps == (Gap(f1, 3, 9, MIB), Gap(f2, 4, 8, MIB))
    assert found.by_storage == {f1: [0], f2: [1]}


@pytest.mark.parametrize(("old", "new"), [("512,512", "128,128"), ("-> (%b1)", "-> (%b1, %f1, %f2)")])
def test_small_and_held_storages_have_no_gaps(old, new):
    assert problem(CHAIN.replace(old, new)).gaps == ()


def test_live_counts_what_is_inserted_for_the_node_after_it():
    found = problem()
    assert found.live.tolist() == [units * MIB for units in (2, 2, 3, 4, 5, 6, 7, 7, 6, 5)]
    outline = found.outline((Recompute(("f1", "f2"), before="b2"),))
    # At b2: x w b3 f1 f2 b2.
    assert outline.live.tolist() == [units * MIB for units in (2, 2, 3, 4, 4, 4, 5, 5, 6, 5)]


def test_saved_is_what_waits_at_the_peak():
    found = problem()
    assert found.saved == {found.storage_of["f1"]: 0, found.storage_of["f2"]: 1}


# --- swap -------------------------------------------------------------------------------------------------------


def test_a_swap_takes_as_little_memory_as_it_can():
    found = problem()
    assert found.decide({0: "swap"}) == (Swap("f1", out_after="f1", freed_before="f3", in_after="b2", in_before="b1"),)
    assert found.swap_seconds(0) == 0.0  # hidden behind compute, given time


def test_a_gap_that_is_too_short_for_both_copies_costs_the_rest():
    found = problem(link=Link(MIB / 3, MIB / 3, 0.0, overlaps=True))
    assert found.swap_seconds(1) == 3.0  # six seconds of copies, three of compute


def test_a_storage_may_stay_for_a_part_of_its_gap():
    found = problem()
    late = Swap("f1", out_after="f1", freed_before="b4", in_after="b2", in_before="b1")
    assert found.decide({0: "swap"}, since={0: found.graph.position["f4"]}) == (late,)


def test_what_is_needed_at_once_does_not_leave():
    found = problem()
    assert found.decide({0: "swap"}, since={0: found.graph.position["b2"]}) == ()


def test_a_swap_that_compute_waits_for_leaves_at_once_and_comes_back_at_the_end():
    found = problem(link=SLOW)
    swap = Swap("f1", out_after="f2", freed_before="f3", in_after="b2", in_before="b1", is_synchronous=True)
    assert found.decide({0: "swap"}) == (swap,)
    assert found.swap_seconds(0) == 3.0


def test_the_copy_runs_beside_uses_that_leave_the_value_as_it_is():
    assert [swap.out_after for swap in swaps(problem(), {0: "swap"})] == ["f1"]
    # Relu would write over f1, were the copy complete by then.
    relu = problem(CHAIN.replace("%f2 = MatMul(%f1, %w)", "%f2 = Relu(%f1)"))
    assert [swap.out_after for swap in swaps(relu, {0: "swap"})] == ["f2"]


def test_what_was_recomputed_is_copied_after_its_last_use():
    found = problem(CHAIN.replace("%b4 = MatMul(%f4, %w)", "%b4 = MatMul(%f4, %f1)"))
    first, second = found.by_storage[found.storage_of["f1"]]
    assert [swap.out_after for swap in swaps(found, {first: "recompute", second: "swap"})] == ["b4"]
    assert [swap.out_after for swap in swaps(found, {first: "swap", second: "swap"})] == ["f1", "b4"]


def test_a_value_that_another_output_makes_anew_is_copied_after_its_last_use():
    both = CHAIN.replace(
        "%f1 = MatMul(%x, %w) : (float32[512,512])", "%f1 = Op(%x, %w) : (float32[512,512], float32[])"
    )
    assert [swap.out_after for swap in swaps(problem(both), {0: "swap"})] == ["f2"]


# --- recompute --------------------------------------------------------------------------------------------------


def test_recompute_reads_what_is_there():
    found = problem()
    assert found.decide({1: "recompute"}) == (Recompute(("f2",), before="b2"),)
    assert found.recompute_seconds(1, {}, ()) == 1.0


def test_recompute_brings_back_what_it_reads():
    found = problem()
    assert found.decide({0: "recompute", 1: "recompute"}) == (Recompute(("f1", "f2"), before="b2"),)
    assert found.recompute_seconds(1, {0: "recompute"}, ()) == 2.0
    assert found.recompute_seconds(1, {0: "recompute"}, (), most=2.0) == 2.0
    assert found.recompute_seconds(1, {0: "recompute"}, (), most=1.9) == math.inf
    # The swapped value comes back one node early.
    assert found.decide({0: "swap", 1: "recompute"}) == (
        Swap("f1", out_after="f1", freed_before="f3", in_after="b3", in_before="b2"),
        Recompute(("f2",), before="b2"),
    )
    assert found.recompute_seconds(1, {0: "swap"}, ()) == 1.0


# Two values are made of a third one, which the backward pass does not need.
SHARED = """
graph shared(%x) -> (%end) {
  %x = Placeholder() : (float32[512,512])
  %base = Op(%x) : (float32[512,512])
  %one = Op(%base) : (float32[512,512])
  %two = Op(%base) : (float32[512,512])
  %f = Op(%one, %two) : (float32[512,512])
  %g = Op(%f) : (float32[512,512])
  %h = Op(%g) : (float32[512,512])
  %use_two = Op(%h, %two) : (float32[512,512])
  %i = Op(%use_two) : (float32[512,512])
  %end = Op(%i, %one) : (float32[512,512])
}
"""


def shared():
    found = problem(SHARED)
    return found, {gap_of(found, "one"): "recompute", gap_of(found, "two"): "recompute"}


def test_what_was_repeated_is_kept_for_the_next_reader_nearby():
    found, evicted = shared()
    nearby = (Recompute(("base", "two"), before="use_two"), Recompute(("one",), before="end"))
    far = (Recompute(("base", "two"), before="use_two"), Recompute(("base", "one"), before="end"))
    assert found.decide(evicted, reuse=2) == nearby
    assert found.decide(evicted, reuse=1) == far


def test_anchors_are_relied_upon_after_their_last_use():
    found, evicted = shared()
    anchors = {found.storage_of["base"]}
    assert found.decide(evicted, anchors) == (Recompute(("two",), before="use_two"), Recompute(("one",), before="end"))
    assert found.recompute_seconds(gap_of(found, "one"), {}, anchors) == 1.0
    assert found.recompute_seconds(gap_of(found, "one"), {}, ()) == 2.0


STATEFUL = """
graph stateful(%x) -> (%end) {
  %x = Placeholder() : (float32[512,512])
  %mask = RandomUniform!() : (float32[512,512])
  %y = Mul(%x, %mask) : (float32[512,512])
  %f = Op(%y) : (float32[512,512])
  %g = Op(%f) : (float32[512,512])
  %h = Op(%g) : (float32[512,512])
  %i = Op(%h, %y) : (float32[512,512])
  %end = Op(%i) : (float32[512,512])
}
"""


def test_what_depends_on_something_that_is_gone_and_can_t_be_repeated_can_t_be_recomputed():
    found = problem(STATEFUL)
    gap = gap_of(found, "y")
    with pytest.raises(gaps.CantRecompute) as error:
        found.decide({gap: "recompute"})
    assert str(error.value) == "'mask' (RandomUniform) can't be repeated"
    assert found.recompute_seconds(gap, {}, ()) == math.inf
    # While the mask is there, it can.
    found = problem(STATEFUL.replace("Op(%i)", "Op(%i, %mask)"))
    assert found.decide({gap_of(found, "y"): "recompute"}) == (Recompute(("y",), before="i"),)


@pytest.mark.parametrize(
    ("line", "can"),
    [
        ("%n = Op() : (int8[])", True),
        ("%n = NoOp() : ()", True),
        ("%n = Op!() : (int8[])", False),
        ("%n = Op() : (variant[])", False),
        ("%n = StatelessWhile() : (int8[])", False),
        ("%n = Const() : (int8[])", False),
    ],
)
def test_what_can_be_repeated(line, can):
    found = problem(f"graph g() -> () {{ {line} }}")
    assert found.can_repeat(found.graph.by_name["n"]) is can


# --- aliases ----------------------------------------------------------------------------------------------------

ALIASED = """
graph aliased(%x) -> (%end) {
  %x = Placeholder() : (float32[512,512])
  %a = Op(%x) : (float32[512,512])
  %flat = Reshape(%a) : (float32[262144])
  %f = Op(%flat) : (float32[512,512])
  %g = Op(%f) : (float32[512,512])
  %h = Op(%g) : (float32[512,512])
  %i = Op(%h, %flat) : (float32[512,512])
  %end = Op(%i) : (float32[512,512])
}
"""


@pytest.mark.parametrize(
    ("action", "decisions"),
    [
        (
            "swap",
            (
                Swap("a", out_after="a", freed_before="g", in_after="h", in_before="i"),
                Recompute(("flat",), before="i"),
            ),
        ),
        ("recompute", (Recompute(("a", "flat"), before="i"),)),
    ],
)
def test_an_alias_is_made_again_from_what_came_back(action, decisions):
    found = problem(ALIASED)
    assert found.decide({gap_of(found, "a"): action}) == decisions


def test_what_an_identityn_names_beside_other_values_stays():
    # To make the alias again would take x2 as well.
    both = ALIASED.replace(
        "%flat = Reshape(%a) : (float32[262144])",
        """
      %x2 = Op(%x) : (float32[512,512])
      %flat = IdentityN(%a, %x2) : (float32[512,512], float32[512,512])""",
    )
    assert problem(both).gaps == ()
    assert problem(both.replace("%x2 = Op(%x)", "%x2 = Placeholder()")).gaps


def test_making_an_alias_ends_a_gap():
    # The alias of the first buffer would keep it.
    late = ALIASED.replace("Op(%flat)", "Op(%a)").replace("%flat = Reshape(%a) : (float32[262144])\n", "")
    late = late.replace("%i = ", "%flat = Reshape(%a) : (float32[262144])\n  %i = ")
    found = problem(late)
    assert found.decide({gap_of(found, "a"): "recompute"}) == (Recompute(("a",), before="flat"),)


@pytest.mark.parametrize(
    ("size", "is_kept", "nodes"),
    [("4194304", False, ("stat", "a")), ("4194304", True, ("a",)), ("262144", False, ("a",))],
    ids=["large", "kept", "tiny"],
)
def test_what_is_dead_is_made_again_unless_it_is_kept_or_tiny(size, is_kept, nodes):
    # The last use of stat comes before a, which is made of it, is due.
    text = """
    graph layer(%x) -> (%out) {
      %x = Placeholder() : (float32[8192,8192])
      %stat = Mean(%x) : (float32[SIZE])
      %a = Mul(%x, %stat) : (float32[8192,8192])
      %f = Op(%a) : (float32[8192,8192])
      %g = Op(%f) : (float32[8192,8192])
      %h = Op(%g) : (float32[8192,8192])
      %i = Op(%h, %stat) : (float32[8192,8192])
      %j = Op(%i) : (float32[8192,8192])
      %out = Op(%j, %a) : (float32[8192,8192])
    }
    """
    found = problem(text.replace("SIZE", size))
    anchors = [found.storage_of["stat"]] if is_kept else []
    assert found.decide({gap_of(found, "a"): "recompute"}, anchors) == (Recompute(nodes, before="out"),)


# --- segments ---------------------------------------------------------------------------------------------------


def test_anchors_stand_where_segments_meet():
    found = problem()
    # Two values wait for the backward pass: the border of two segments lies between them.
    assert {found.storages[index].root for index in found.anchors(2)} == {"f1"}
    assert found.anchors(1) == found.anchors(0) == frozenset()


def test_checkpoints_stand_where_no_part_has_more_than_its_share():
    found = gaps.problem(testing.chain(12), CostModel())

    def checkpoints(segments):
        return sorted(int(found.storages[index].root[1:]) for index in found.checkpoints(segments))

    # Ten values of one size wait for the backward pass. What a border keeps is none of a part.
    assert checkpoints(3) == [3, 6, 9]
    assert checkpoints(2) == [5]
    assert checkpoints(1) == checkpoints(0) == []


@given(testing.random_graphs(16, batch=4096), st.integers(2, 40))
def test_anchors_and_checkpoints_are_never_held(graph, segments):
    found = gaps.problem(graph, CostModel())
    kept = found.anchors(segments) | found.checkpoints(segments)
    assert not any(found.storages[index].is_held for index in kept)


# --- evictions on random graphs ---------------------------------------------------------------------------------


@given(testing.random_graphs(16, batch=4096), st.booleans())
def test_a_swap_frees_its_gap(graph, overlaps):
    links = {"host": Link(math.inf, math.inf, 0.0, overlaps)}
    found = gaps.problem(graph, CostModel(DeviceSpec(links=links)))
    for index, gap in enumerate(found.gaps):
        live = found.outline(found.decide({index: "swap"})).live
        inside = slice(gap.start + 2, gap.end - 1)
        assert np.all(live[inside] <= found.live[inside] - gap.nbytes)


def test_the_problem_of_a_graph_is_worked_out_once():
    graph, model = parser.parse(tiny_graphs.CHAIN), CostModel()
    assert gaps.problem(graph, model) is gaps.problem(graph, model)
    assert gaps.problem(graph, model).order == order.depth_first(graph)


def test_a_plan_says_what_it_was_made_for():
    found = problem()
    plan = found.plan(found.decide({0: "swap"}), "greedy", 5 * MIB).check(parser.parse(CHAIN))
    assert (plan.strategy, plan.memory_budget, plan.order) == ("greedy", 5 * MIB, found.order)
    assert plan.fingerprint == parser.parse(CHAIN).fingerprint


def test_what_came_back_early_may_go_again():
    found = gaps.problem(testing.chain(6), CostModel())
    by_name = {found.storages[gap.storage].root: index for index, gap in enumerate(found.gaps)}
    early, late = by_name["f2"], by_name["f3"]  # f3 is due first, and is made of f2
    stays = found.outline(found.decide({early: "recompute", late: "recompute"}))
    goes = found.outline(found.decide({early: gaps.AGAIN, late: "recompute"}, reuse=0))
    between = slice(found.gaps[late].end + 1, found.gaps[early].end)
    assert (goes.live[between] < stays.live[between]).all()
    assert goes.recomputed_seconds > stays.recomputed_seconds


def test_what_was_swapped_back_early_may_go_again():
    found = gaps.problem(testing.chain(6), testing.seconds_per_node(1.0, SLOW))
    f1, f2, f3 = (found.by_storage[found.storage_of[name]][0] for name in ("f1", "f2", "f3"))  # f3 is due first
    stays = found.decide({f1: "swap", f2: "recompute", f3: "recompute"})
    goes = found.decide({f1: gaps.SWAP_AGAIN, f2: "recompute", f3: "recompute"}, reuse=0)
    swap = Swap("f1", "f2", "f3", "b4", "b3", is_synchronous=True)
    repeat = Recompute(("f2", "f3"), "b3")
    assert stays == (swap, repeat)
    assert goes == (swap, repeat, Swap("f1", "b3", "b2", "b2", "b1", is_synchronous=True))
    place = found.graph.position["b2"]
    assert found.outline(goes).live[place] == found.outline(stays).live[place] - MIB


@pytest.mark.parametrize(("layers", "is_repeatable"), [(150, True), (600, False)])
def test_chains_that_are_recomputed_are_not_endless(layers, is_repeatable):
    found = gaps.problem(testing.chain(layers), CostModel())
    everything = dict.fromkeys(range(len(found.gaps)), "recompute")
    deepest = max(everything, key=lambda gap: found.gaps[gap].start)
    assert np.isfinite(found.recompute_seconds(deepest, everything, ())) == is_repeatable
    if not is_repeatable:
        with pytest.raises(gaps.CantRecompute, match="more than 200 nodes"):
            found.decide({deepest: "recompute", **everything})
