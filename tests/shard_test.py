"""Variables divided among workers: parts, what is gathered, and in which order workers meet."""

import pytest
from shards_test import STEP

from graphswap import ir, parser, rewrites, shards
from graphswap.collectives import packed
from graphswap.cost_model import CostModel, DeviceSpec, Link
from graphswap.plan import Exchange, Plan, PlanError, Shard
from graphswap.rewrites.shard import shard
from graphswap.simulator import simulate

BOTH = Plan(decisions=(Shard("m"), Shard("v")))


def test_parts_are_updated_and_the_change_is_gathered():
    graph = ir.verify(shard(STEP, BOTH))
    assert graph.shards == {"m": "m/shard", "v": "v/shard"}
    length = shards.part_length(ir.Value("float32", (128, 200)), 3)
    assert [graph.value(name).shape for name in ("old_m", "square", "change")] == [(length,)] * 3
    assert graph.by_name["set_m"].inputs == ("m/shard", "add_m")
    gather = graph.by_name["change/gather"]
    assert (gather.op, gather.outputs[0].shape, gather.stateful) == (ir.ALL_GATHER, (128, 200), True)
    assert graph.by_name["set_w"].inputs == ("w", "change/gather")
    cut = [node for node in graph.nodes if node.op == ir.SHARD]
    assert [node.inputs for node in cut] == [("summed",)]  # once, though two nodes read it
    assert dict(cut[0].attrs) == {"length": 25600, "workers": 3}


def test_a_result_of_the_step_is_gathered():
    graph = ir.verify(shard(STEP.replace(outputs=("loss", "root")), BOTH))
    assert graph.outputs == ("loss", "root/gather")


def test_the_parts_hold_the_bytes_that_the_variables_held():
    graph = shard(STEP, BOTH)
    held = {name: dict(graph.by_name[name].attrs).get("held_bytes") for name in ("m", "w", "m/shard")}
    assert held == {"m": None, "w": (102400,), "m/shard": (34304,)}


def test_handles_come_before_what_is_captured_with_each_call():
    assert shard(STEP, BOTH).inputs == ("x", "w", "m", "v", "b", "m/shard", "v/shard", "key", "token")


def test_collectives_keep_one_order():
    graph = shard(STEP, BOTH)
    assert graph.by_name["change/gather"].control_inputs == ("sum",)
    assert graph.by_name["mean"].control_inputs == ("change/gather",)
    exchanged = ir.verify(rewrites.exchange(graph, Plan(decisions=(Exchange(("flat",), 0),))))
    waits = exchanged.by_name["change/gather"].control_inputs
    assert [exchanged.by_name[name].op for name in waits] == [ir.AWAIT]
    assert [one.name for one in packed(graph)] == ["sum"]


def test_keys_hang_on_no_name():
    other = parser.parse(str(STEP).replace("%change", "%by_how_much"))
    keys = [
        dict(node.attrs)["instance_key"]
        for graph in (STEP, other)
        for node in shard(graph, BOTH).nodes
        if node.op == ir.ALL_GATHER
    ]
    assert keys[0] == keys[1] and 1 << 29 <= int(str(keys[0])) < 1 << 30


def test_less_is_on_the_device():
    device = DeviceSpec(network=Link(1e9, 1e9, 1e-5))
    whole, divided = (simulate(graph, Plan(), CostModel(device)) for graph in (STEP, shard(STEP, BOTH)))
    assert divided.peak_bytes < whole.peak_bytes
    assert divided.seconds > whole.seconds  # what is gathered is on the network


def test_gathering_passes_parts_around_once():
    device = DeviceSpec(network=Link(1e6, 1e6, 0.5))
    graph = shard(STEP, BOTH)
    seconds = CostModel(device).network_seconds(graph, graph.by_name["change/gather"])
    assert seconds == pytest.approx(2 * (0.5 + 102400 / 3 / 1e6))


def test_a_plan_without_shards_returns_the_same_object():
    assert shard(STEP, Plan()) is STEP


def test_a_variable_that_can_not_be_divided_is_refused():
    with pytest.raises(PlanError, match=r"does not fit graph 'step': expected a variable of more than 64 KiB that is"):
        shard(STEP, Plan(decisions=(Shard("w"),)))


def test_a_plan_names_the_variables_that_the_graph_has_divided():
    graph = shard(STEP, BOTH)
    assert BOTH.check(graph) is BOTH
    assert Plan.from_json(BOTH.to_json()) == BOTH
    assert "shard      m" in str(BOTH)
    with pytest.raises(PlanError, match=r"it has the variable whole, which `rewrites.shard` would have divided"):
        BOTH.check(STEP)


def test_simulating_the_rewritten_step_is_simulating_the_plan():
    graph = shard(STEP, BOTH)
    plan = Plan(tuple(graph.position))
    assert simulate(rewrites.rewrite(graph, plan), Plan(), CostModel()) == simulate(graph, plan, CostModel())
