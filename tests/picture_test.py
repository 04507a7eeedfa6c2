"""From when on bytes are in use, and which decision each entry of a timeline carries out."""

import hypothesis
import pictures
import pytest
import testing
from hypothesis import strategies as st

from graphswap import simulator
from graphswap.picture import decided, moments
from graphswap.plan import Plan, Prefetch, Recompute, Swap, WriteBack


def test_each_copy_and_each_repeated_node_finds_its_decision():
    picture = pictures.picture()
    recompute, swap = picture.plan.decisions
    found = decided(picture.graph, picture.plan, picture.planned)
    carried_out = [
        (step.name, step.kind, decision)
        for step, decision in zip(picture.planned.steps, found, strict=True)
        if decision is not None
    ]
    assert carried_out == [
        ("f1", "swap_out", swap),
        ("f3", "recompute", recompute),
        ("f1", "swap_in", swap),
    ]


def test_a_value_that_leaves_twice_comes_back_for_each_swap():
    graph = testing.chain(3)
    early = Swap("w", "x", freed_before="f1", in_after="x", in_before="f2")
    late = Swap("w", "f2", freed_before="f3", in_after="f2", in_before="b3")
    plan = Plan(decisions=(late, early)).check(graph)
    timeline = simulator.simulate(graph, plan, pictures.COSTS)
    assert [d for d in decided(graph, plan, timeline) if d] == [early, early, late]


def test_copies_of_variables_find_their_decisions():
    """The fetch's first run is left out, as all that read it read the second one."""
    ahead, late = Prefetch("fetch", "x", "fetch"), Prefetch("fetch", "b", "y")
    back = WriteBack("store", "loss")
    plan = Plan(decisions=(Recompute(("fetch",), "y"), ahead, late, back)).check(pictures.FAR)
    timeline = simulator.simulate(pictures.FAR, plan, pictures.COSTS)
    found = zip(timeline.steps, decided(pictures.FAR, plan, timeline), strict=True)
    assert [(step.kind, decision) for step, decision in found if decision] == [("fetch", late), ("store", back)]


@hypothesis.given(st.randoms(use_true_random=False))
def test_any_plan_is_told_apart(rng):
    graph = testing.random_graph(rng, layers=4)
    names = tuple(graph.position)
    swaps = tuple(testing.random_swap(rng, graph, names) for _ in range(rng.randint(0, 2)))
    repeats = tuple(testing.random_recompute(rng, graph, names) for _ in range(rng.randint(0, 2)))
    plan = Plan(decisions=(*swaps, *repeats)).check(graph)
    timeline = simulator.simulate(graph, plan, pictures.COSTS)
    for step, decision in zip(timeline.steps, decided(graph, plan, timeline), strict=True):
        if isinstance(decision, Recompute):
            assert step.kind == "recompute" and step.name in decision.nodes
        elif isinstance(decision, Swap):
            assert step.kind in ("swap_out", "swap_in") and step.name == decision.value
        else:
            assert step.kind == "run"


def test_bytes_are_in_use_from_when_a_copy_is_asked_for():
    step = simulator.Step("late", "swap_in", 0.5, 0.9, 3)
    timeline = simulator.Timeline((step, simulator.Step("next", "run", 0.2, 0.3, 4)), 4, 4, 0.9, 0, 0.0, step)
    assert moments(timeline) == pytest.approx([0.2, 0.2])
