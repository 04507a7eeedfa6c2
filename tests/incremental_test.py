"""The outline of a plan is what the simulator says, for any graph and any plan."""

import random

import numpy as np
import pytest
import testing
from hypothesis import given
from hypothesis import strategies as st

from graphswap import rewrites
from graphswap.cost_model import CostModel, DeviceSpec, Link
from graphswap.incremental import Incremental
from graphswap.plan import Place, Plan
from graphswap.simulator import simulate
from graphswap.variables import values

LINKS = {"host": Link(1e9, 2e9, 1e-6, overlaps=True), "disk": Link(1e8, 1e8, 1e-5)}
NETWORK = Link(1e9, 1e9, 1e-6, overlaps=True)
BESIDE_COMPUTE = CostModel(DeviceSpec(links=LINKS, network=NETWORK))
COST_MODELS = st.sampled_from(
    [BESIDE_COMPUTE, CostModel(DeviceSpec(links=LINKS, network=NETWORK), resident_bytes=1000, far_tier="disk")]
)
RANDOMS = st.randoms(use_true_random=False)


def outlined(graph, plan, cost_model):
    """What the simulator says, in the form of an outline: live bytes and busy seconds by position."""
    timeline = simulate(graph, plan, cost_model)
    live, busy = np.zeros(len(graph.nodes)), np.zeros(len(graph.nodes))
    most = before = 0
    for step in timeline.steps:
        most = max(most, step.live_bytes)
        if step.kind in ("run", "recompute", "exchange"):
            before += cost_model.seconds(graph, graph.by_name[step.name])
        if step.kind in ("run", "exchange"):
            live[graph.position[step.name]], busy[graph.position[step.name]] = most, before
            most = before = 0
    return live, busy, timeline


def check(graph, plan, cost_model, incremental):
    live, busy, timeline = outlined(graph, plan, cost_model)
    outline = incremental.outline(plan.decisions)
    np.testing.assert_array_equal(outline.live, live)
    # Seconds are added up in another order: their sums may differ in the last bits.
    np.testing.assert_allclose(outline.busy, busy, rtol=1e-12)
    assert outline.seconds == pytest.approx(timeline.seconds, rel=1e-12)
    assert outline.recomputed_seconds == pytest.approx(timeline.recomputed_seconds, rel=1e-12)
    assert (outline.peak_bytes, outline.swapped_bytes) == (timeline.peak_bytes, timeline.swapped_bytes)


def random_plan(rng, graph):
    names = tuple(graph.position)
    makers = [testing.random_swap, testing.random_recompute]
    plan = Plan(decisions=tuple(rng.choice(makers)(rng, graph, names) for _ in range(rng.randint(0, 6))))
    ahead = testing.random_prefetches(rng, graph, names, plan)
    back = testing.random_write_backs(rng, graph, names)
    return plan.replace(decisions=(*plan.decisions, *ahead, *back)).check(graph)


def graphs():
    """Random steps, their variables on the device or not, of one replica or of several."""
    plain = testing.random_graphs()
    return st.one_of(plain, *(st.builds(change, RANDOMS, plain) for change in (with_places, with_exchanges)))


def with_places(rng, graph):
    places = [Place(variable, rng.choice(["host", "disk"])) for variable in values(graph) if rng.random() < 0.7]
    return rewrites.place(graph, Plan(decisions=tuple(places)))


def with_exchanges(rng, graph):
    graph = testing.replicated(graph, rng.randint(2, 4))
    return rewrites.exchange(graph, testing.random_exchanges(rng, graph))


@given(graphs(), COST_MODELS, RANDOMS)
def test_it_says_what_the_simulator_says(graph, cost_model, rng):
    incremental = Incremental(graph, cost_model)
    for _ in range(4):  # what it learns from a plan must not spoil the next one
        check(graph, random_plan(rng, graph), cost_model, incremental)


@pytest.mark.parametrize("seed", range(6))
def test_it_says_so_for_long_steps(seed):
    rng = random.Random(seed)
    graph = (with_places, with_exchanges)[seed % 2](rng, testing.random_graph(rng, layers=60))
    incremental = Incremental(graph, BESIDE_COMPUTE)
    for _ in range(30):
        check(graph, random_plan(rng, graph), BESIDE_COMPUTE, incremental)
