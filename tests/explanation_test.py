"""Where the memory of a step goes, on steps small enough to work out by hand."""

import json
import random
import types
from typing import Any

import pictures
import pytest
import testing

from graphswap import explanation, parser
from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile
from graphswap.plan import Declined, Plan, Recompute, Swap
from graphswap.simulator import simulate

KIB, MIB = 1 << 10, 1 << 20

# A layer with dropout and a normalisation; every value but a few takes a MiB. The peak is where the gradient of the
# top layer has its workspace.
STEP = parser.parse("""
graph step(%x, %w) -> (%loss) after(%update) {
  %x = Placeholder() : (float32[512,512])
  %w = Placeholder() {"held_bytes": [1048576]} : (resource[])
  %half = Const() : (float32[256,512])
  %model/dense/read = ReadVariableOp!(%w) : (float32[512,512])
  %model/dense/MatMul = MatMul(%x, %model/dense/read) : (float32[512,512])
  %model/dropout/mask = RandomUniform!() : (float32[512,512])
  %model/dropout/Mul = Mul(%model/dense/MatMul, %model/dropout/mask) : (float32[512,512])
  %model/norm/mean = Mean(%model/dropout/Mul) : (float32[512])
  %model/norm/Sub = Sub(%model/dropout/Mul, %model/norm/mean) : (float32[512,512])
  %model/top/MatMul = MatMul(%half, %model/norm/Sub) : (float32[256,512])
  %loss = L2Loss(%model/top/MatMul) : (float32[])
  %gradient_tape/model/top/MatMul = MatMul(%half, %model/top/MatMul) {"workspace_bytes": 3145728} : (float32[512,512])
  %gradient_tape/model/norm/Mul = Mul(%gradient_tape/model/top/MatMul, %model/norm/mean) : (float32[512,512])
  %gradient_tape/model/dropout/Mul = Mul(%gradient_tape/model/norm/Mul, %model/dropout/mask) : (float32[512,512])
  %gradient_tape/model/tanh = TanhGrad(%model/dropout/Mul, %gradient_tape/model/dropout/Mul) : (float32[512,512])
  %gradient_tape/model/dense/MatMul = MatMul(%x, %gradient_tape/model/tanh) : (float32[512,512])
  %update = AssignSubVariableOp!(%w, %gradient_tape/model/dense/MatMul) after(%model/dense/read) : ()
}
""")
# A node takes 1 ms; a copy of a MiB takes 1.1 ms each way, and nothing runs beside it.
LINK = Link(MIB * 1e3, MIB * 1e3, 1e-4)
COSTS = CostModel(
    DeviceSpec(launch_seconds=1e-3, links={"host": LINK, "disk": LINK}), Profile("", {}, {}), resident_bytes=512 * KIB
)


@pytest.fixture(scope="module")
def explained():
    return explanation.explain(STEP, COSTS)


def by_value(explained):
    return {(one.live.kind, one.live.value): one for one in explained.candidates}


def test_the_parts_add_up_to_the_peak(explained):
    peak = explained.timeline.peak_bytes
    assert peak == simulate(STEP, Plan(), COSTS).peak_bytes
    assert peak == sum(one.live.nbytes for one in explained.candidates)
    assert peak == sum(explained.by_kind.values()) == sum(explained.by_layer.values())
    assert explained.timeline.peak_step.name == "gradient_tape/model/top/MatMul"


def test_the_kinds(explained):
    assert list(explained.by_kind.items()) == [
        ("activation", 3 * MIB + 512 * KIB + 2 * KIB + 256),
        ("workspace", 3 * MIB),
        ("variable", MIB),
        ("argument", MIB),
        ("other", 512 * KIB),
        ("constant", 512 * KIB),
    ]


def test_a_gradient_counts_as_its_layers(explained):
    layers = explained.by_layer
    assert layers["model/top"] == 3 * MIB + MIB + 512 * KIB
    assert layers["model/dropout"] == 2 * MIB
    assert layers["model/norm"] == 2 * KIB


@pytest.mark.parametrize(
    ("value", "layer"),
    [
        ("model/dense/MatMul", "model/dense"),
        ("model/dense/MatMul:1", "model/dense"),
        ("gradient_tape/model/dense/MatMul/ReadVariableOp", "model/dense"),
        ("StatefulPartitionedCall/gradient_tape/model/dense/MatMul_1", "model/dense"),
        ("loss", "loss"),
        ("", ""),
    ],
)
def test_the_layer_of_a_value(value, layer):
    assert explanation.layer(value) == layer


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("variable", "w", "a variable stays on the device"),
        ("argument", "x", "an argument of the step stays on the device"),
        ("constant", "half", "a constant stays on the device"),
        ("workspace", "gradient_tape/model/top/MatMul", "a kernel needs it while it runs"),
        ("activation", "gradient_tape/model/top/MatMul", "it is never idle: its uses follow one another"),
        ("activation", "model/norm/mean", "it is small: moving it would cost more than it frees"),
        ("activation", "loss", "it outlives the step or becomes a variable"),
    ],
)
def test_why_a_value_stays(kind, value, reason, explained):
    one = by_value(explained)[kind, value]
    assert (one.reason, one.swap_seconds, one.recompute_seconds) == (reason, None, None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            "model/dropout/mask",
            "idle for 6.0 ms between 'model/dropout/Mul' and 'gradient_tape/model/dropout/Mul': a swap adds 2.2 ms; "
            "it can't be recomputed: RandomUniform must not run twice",
        ),
        (
            "model/dropout/Mul",
            "idle for 5.0 ms between 'model/norm/Sub' and 'gradient_tape/model/tanh': a swap adds 2.2 ms; "
            "it can't be recomputed, as what it is made of can't be repeated",
        ),
    ],
)
def test_what_can_only_be_swapped(value, reason, explained):
    one = by_value(explained)["activation", value]
    assert one.reason == reason
    assert one.swap_seconds == pytest.approx(2.2e-3)
    assert one.recompute_seconds is None


def test_what_can_be_swapped_or_recomputed():
    found = by_value(explanation.explain(testing.chain(4), pictures.COSTS))
    assert {value: one.reason for (kind, value), one in found.items() if kind == "activation"} == {
        # f1 is read by f2, the fourth node, and then by b1, the tenth: five nodes run in between.
        "f1": "idle for 5.0 ms between 'f2' and 'b1': a swap adds 0.0 ms, recomputing it 1.0 ms",
        "f2": "idle for 3.0 ms between 'f3' and 'b2': a swap adds 0.0 ms, recomputing it 1.0 ms",
        "f3": "it is never idle: its uses follow one another",
        "f4": "it is never idle: its uses follow one another",
        "b4": "it is never idle: its uses follow one another",
    }
    assert found["activation", "f1"].swap_seconds == 0.0
    assert found["activation", "f1"].recompute_seconds == pytest.approx(1e-3)


def test_the_largest_come_first(explained):
    sizes = [one.live.nbytes for one in explained.candidates]
    assert sizes == sorted(sizes, reverse=True)


def test_no_plan_has_a_peak_below_the_least(explained):
    # Beside the widest node, the same that has the peak, the mask and the dropout's output may be gone: 2 MiB. The loss
    # may be made later.
    assert explained.least_bytes == explained.timeline.peak_bytes - 2 * MIB - 256


def test_fields_are_plain_values(explained):
    fields = json.loads(json.dumps(explained.fields()))
    assert {name: fields[name] for name in ("name", "nodes", "peak_node")} == {
        "name": "step",
        "nodes": 17,
        "peak_node": "gradient_tape/model/top/MatMul",
    }
    assert fields["peak_bytes"] == sum(one["nbytes"] for one in fields["at_peak"])
    assert fields["seconds"] == pytest.approx(0.017)
    assert fields["by_kind"] == dict(explained.by_kind)
    assert set(fields["at_peak"][0]) == {
        "value",
        "kind",
        "nbytes",
        "layer",
        "swap_seconds",
        "recompute_seconds",
        "reason",
    }


def test_the_text():
    lines = str(explanation.explain(testing.chain(4), pictures.COSTS)).splitlines()
    assert lines[:6] == [
        "chain: 10 nodes, 0.010 s",
        "  peak    7.0MiB predicted, while 'b4' runs at 0.006 s",
        "  least   no plan has a peak below 5.0MiB",
        "",
        "  bytes in use over the step as predicted, 7.0MiB at most",
        "  |▂▂▂▂▂▂▂▂▂▂▂▂▂▂▃▃▃▃▃▃▃▅▅▅▅▅▅▅▆▆▆▆▆▆▆▇▇▇▇▇▇▇▇██████████████▇▇▇▇▇▇▇▆▆▆▆▆▆▆▆|",
    ]
    text = "\n".join(lines)
    for part in (
        "  at the peak by kind\n      5.0MiB   71.4 %  activation\n      2.0MiB   28.6 %  argument\n",
        "  the largest at the peak, and what can be done\n",
        "      1.0MiB  w\n              an argument of the step stays on the device\n",
        "      1.0MiB  f3\n              it is never idle: its uses follow one another",
    ):
        assert part in text


def test_what_was_recorded_comes_before_what_is_predicted():
    # The simulated peak is 7 MiB; TensorFlow's own order had another one, and half a MiB that no node asked for.
    recorded: Any = types.SimpleNamespace(
        live=(
            ("f1", MIB, False),
            ("f2", MIB, False),
            ("f2", MIB // 2, True),
            ("unknown", MIB, False),
            ("f3/body/_7/f3/Mul", MIB // 4, False),
        ),
        peak_bytes=6 * MIB,
    )
    explained = explanation.explain(testing.chain(4), pictures.COSTS, recorded)
    assert explained.is_measured and explained.peak_bytes == sum(explained.by_kind.values()) == 6 * MIB
    assert explained.by_kind == {
        "activation": 2 * MIB,
        "argument": 2 * MIB,
        "other": MIB + MIB // 4,
        "workspace": MIB // 2,
        "inner": MIB // 4,
    }
    assert explained.fields()["predicted_peak_bytes"] == 7 * MIB
    assert "\n  peak    6.0MiB measured; 7.0MiB predicted, while 'b4' runs at 0.006 s\n" in str(explained)


def test_the_text_stays_short():
    graph = testing.random_graph(random.Random(1), layers=200, batch=4096)
    assert len(str(explanation.explain(graph, CostModel())).splitlines()) < 70


def test_what_is_declined_is_what_the_plan_leaves_at_the_peak():
    graph = testing.chain(4)
    never_idle = "1.0MiB: it is never idle: its uses follow one another"
    swap = Swap("f1", "f2", freed_before="f3", in_after="b3", in_before="b1")
    plan = Plan(decisions=(swap, Recompute(("f2",), before="b2")))
    assert explanation.declined(graph, plan, pictures.COSTS) == tuple(
        Declined(name, never_idle) for name in ("f3", "f4", "b4")
    )
    found = explanation.declined(graph, Plan(), pictures.COSTS)
    assert [one.value for one in found] == ["f1", "f2", "f3", "f4", "b4"]
    reason = "idle for 5.0 ms between 'f2' and 'b1': a swap adds 0.0 ms, recomputing it 1.0 ms"
    assert found[0].reason == f"1.0MiB: {reason}"


def test_only_activations_are_declined():
    found = explanation.declined(STEP, Plan(), COSTS)
    assert "w" not in {one.value for one in found} and "x" not in {one.value for one in found}
    assert found[-1] == Declined("loss", "256B: it outlives the step or becomes a variable")


def test_a_large_step():
    graph = testing.random_graph(random.Random(0), layers=6400, batch=4096)
    assert len(graph.nodes) > 20_000
    explained = explanation.explain(graph, CostModel())
    assert sum(one.live.nbytes for one in explained.candidates) == explained.timeline.peak_bytes
    assert len(explanation.declined(graph, Plan(), CostModel())) == 500
