"""Blocks are as large as the network asks for and as small as the budget does."""

import random

import pytest
import testing

from graphswap import blocks, ir, parser, rewrites
from graphswap.cost_model import CostModel, DeviceSpec, Link
from graphswap.plan import Exchange, Plan
from graphswap.simulator import simulate
from graphswap.strategies import Greedy, gaps

STEP = testing.replicated(testing.random_graph(random.Random(14), 40, 256), 4)
VALUES = [value for one in blocks.packed(STEP) for value in one.values]


def model(bytes_per_second, latency_seconds):
    return CostModel(DeviceSpec(network=Link(bytes_per_second, bytes_per_second, latency_seconds, overlaps=True)))


def exchanged(found):
    return rewrites.exchange(STEP, Plan(decisions=found))


def seconds(found, cost_model):
    return simulate(gaps.problem(exchanged(found), cost_model).graph, Plan(), cost_model).seconds


def test_a_step_of_one_worker_has_none():
    assert blocks.choose(testing.random_graph(random.Random(6), 40), model(1e9, 1e-6), 1) == ()


def test_a_network_that_answers_late_gets_few_blocks():
    late, soon = (blocks.choose(STEP, model(1e8, latency), None) for latency in (1e-1, 1e-7))
    assert len(late) == 1 < len(soon)
    for found in (late, soon):
        assert sorted(value for one in found for value in one.values) == sorted(VALUES)


def test_blocks_are_faster_than_one_sum_of_all():
    cost_model = model(2e8, 1e-6)
    found = blocks.choose(STEP, cost_model, None)
    packed = simulate(gaps.problem(STEP, cost_model).graph, Plan(), cost_model).seconds
    assert seconds(found, cost_model) < packed
    assert seconds(found, cost_model) < seconds([Exchange(tuple(VALUES))], cost_model)


def test_gradients_of_later_layers_come_first():
    first = blocks.choose(STEP, model(1e8, 1e-7), None)[0]
    layers = [int(value.rpartition("_")[2]) for value in VALUES]
    assert f"flat_grad_w_{max(layers)}" in first.values


def test_small_budgets_get_smaller_blocks_than_the_network_asks_for():
    cost_model = model(1e8, 1e-1)
    most, least = (
        gaps.problem(exchanged(blocks.choose(STEP, cost_model, budget)), cost_model).live.max() for budget in (None, 0)
    )
    assert least < most
    budget = int(least * 1.02)
    found = blocks.choose(STEP, cost_model, budget)
    assert Greedy(planning_seconds=0.0).plan(exchanged(found), cost_model, budget)


def test_another_trace_gets_the_same_blocks():
    found = blocks.choose(STEP, model(1e8, 1e-7), None)
    other = parser.parse(str(STEP).replace("%flat_", "%again_"))
    moved = blocks.transferred(found, STEP, other)
    assert moved is not None
    keys = [
        [dict(n.attrs).get("instance_key") for n in graph.nodes if n.op == ir.EXCHANGE]
        for graph in (exchanged(found), rewrites.exchange(other, Plan(decisions=moved)))
    ]
    assert keys[0] == keys[1]


def test_a_trace_with_other_gradients_gets_none():
    other = testing.replicated(testing.random_graph(random.Random(7), 40, 256), 4)
    assert blocks.transferred(blocks.choose(STEP, model(1e8, 1e-7), None), STEP, other) is None


@pytest.mark.parametrize(
    ("launches", "lasting", "ahead", "expected"),
    [
        ([1.0, 2.0], [0.5, 0.5], [1, 0], 3.5),  # the first is done when the second starts
        ([1.0, 2.0], [3.0, 0.5], [0, 0], 3.0 + 3.0 + 0.5),  # waited for at once
        ([1.0, 2.0], [3.0, 0.5], [1, 0], 3.0 + 4.5 - 2.0),  # ... or beside the second one's gradients
    ],
)
def test_the_length_of_a_pipeline(launches, lasting, ahead, expected):
    assert blocks._pipelined(launches, lasting, ahead, 3.0) == pytest.approx(expected)
