import dataclasses
import math

import pytest

from graphswap import parser
from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile, Workspace, flops
from graphswap.devices import DEVICES

DEVICE = DeviceSpec(flops_per_second=1e9, memory_bytes_per_second=1e6, launch_seconds=1e-3)
PROFILE = Profile("f", {"product": 2.0}, {"product": Workspace((256,), (200, 56))}, {"host": Link(1.0, 2.0)})
GRAPH = parser.parse("""
graph g() -> () {
  %a = Placeholder() : (float32[10,20])
  %b = Placeholder() : (float32[20,30])
  %product = MatMul(%a, %b) : (float32[10,30])
  %sum = AddV2(%product, %product) : (float32[10,30])
  %other = Op(%sum) {"workspace_bytes": 768} : (float32[10,30])
  %shape = Reshape(%sum) : (float32[300])
  %nothing = NoOp(%sum) : ()
  %unknown = Op() : (float32[?])
  %again = MatMul(%a, %b) like(%product) : (float32[10,30])
}
""")


def node(name):
    return GRAPH.by_name[name]


UPDATE = parser.parse("""
graph g() -> () {
  %g = Placeholder() : (float32[10,20])
  %rate = Placeholder() : (float32[])
  %w/store = Placeholder() {"store_of": "w", "tier": "host"} : (resource[])
  %w/spare = Placeholder() : (resource[])
  %m/store = Placeholder() {"store_of": "m", "tier": "disk"} : (resource[])
  %m/spare = Placeholder() : (resource[])
  %update = Update!(%g, %rate, %w/store, %w/spare, %m/store, %m/spare) {"dtype": "float32",
    "program": "4; Mul 0 1; AddV2 3 4; Sub 2 4; 6 5", "shape": [10, 20], "stored": [1], "values": 2} : (float32[10,20])
}
""")


def test_an_update_passes_all_values_through_memory_once_and_those_on_disk_over_their_link():
    disk = Link(out_bytes_per_second=1e5, in_bytes_per_second=2e5, latency_seconds=0.25)
    model = CostModel(dataclasses.replace(DEVICE, links={"host": Link(1.0, 1.0), "disk": disk}))
    moved = 800 + 4 + 800 + 3 * 800  # read, made, and of w and m read and of m written
    expected = 1e-3 + moved / 1e6 + 0.25 + 800 / 2e5 + 0.25 + 800 / 1e5
    assert model.seconds(UPDATE, UPDATE.by_name["update"]) == pytest.approx(expected)
    unmeasured = dataclasses.replace(model, profile=Profile("f", {}, {}))
    assert unmeasured.seconds(UPDATE, UPDATE.by_name["update"]) == pytest.approx(expected)


def test_link():
    link = Link(out_bytes_per_second=10.0, in_bytes_per_second=20.0, latency_seconds=0.5)
    assert link.out_seconds(100) == 10.5
    assert link.in_seconds(100) == 5.5


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("product", 1e-3 + 2 * 10 * 20 * 30 / 1e9 + 4 * (200 + 600 + 300) / 1e6),
        ("sum", 1e-3 + 4 * (300 + 300 + 300) / 1e6),
        ("shape", 1e-3),
        ("nothing", 1e-3),
        ("unknown", 1e-3),
        ("again", 1e-3 + 2 * 10 * 20 * 30 / 1e9 + 4 * (200 + 600 + 300) / 1e6),
    ],
)
def test_analytic_seconds(name, seconds):
    assert CostModel(DEVICE).seconds(GRAPH, node(name)) == pytest.approx(seconds)


@pytest.mark.parametrize(("name", "seconds"), [("product", 2.0), ("again", 2.0), ("sum", 1e-3)])
def test_measured_seconds(name, seconds):
    assert CostModel(DEVICE, PROFILE).seconds(GRAPH, node(name)) == seconds


def test_workspace():
    analytic, measured = CostModel(DEVICE), CostModel(DEVICE, PROFILE)
    assert [analytic.workspace(GRAPH, node(name)).nbytes for name in ("product", "other")] == [0, 768]
    assert [measured.workspace(GRAPH, node(name)).nbytes for name in ("product", "again", "other")] == [512, 512, 768]


def test_the_profile_s_link_comes_before_the_device_s():
    model = CostModel(DEVICE, PROFILE)
    assert model.link("host") == PROFILE.links["host"]
    assert model.link("disk") == DEVICE.links["disk"]
    assert CostModel(DEVICE).link("host") == DEVICE.links["host"]


CONVOLUTIONS = parser.parse("""
graph g() -> () {
  %image = Placeholder() : (float32[2,8,8,3])
  %filter = Placeholder() : (float32[5,5,3,16])
  %sizes = Const() : (int32[4])
  %grad = Placeholder() : (float32[2,8,8,16])
  %forward = Conv2D(%image, %filter) : (float32[2,8,8,16])
  %to_image = Conv2DBackpropInput(%sizes, %filter, %grad) : (float32[2,8,8,3])
  %to_filter = Conv2DBackpropFilter(%image, %sizes, %grad) : (float32[5,5,3,16])
  %depthwise = DepthwiseConv2dNative(%image, %filter) : (float32[2,8,8,3])
  %open = Conv2DBackpropInput(%sizes, %filter, %unresolved) : (float32[2,8,8,3])
  %unresolved = Placeholder() : (float32[?,8,8,16])
  %batched = BatchMatMulV2(%x, %y) : (float32[7,10,30])
  %x = Placeholder() : (float32[7,10,20])
  %y = Placeholder() : (float32[7,20,30])
}
""")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("forward", 2 * (2 * 8 * 8 * 16) * (5 * 5 * 3)),
        ("to_image", 2 * (2 * 8 * 8 * 16) * (5 * 5 * 3)),
        ("to_filter", 2 * (2 * 8 * 8 * 16) * (5 * 5 * 3)),
        ("depthwise", 2 * (5 * 5 * 3 * 16) * 9),
        ("batched", 7 * 2 * 10 * 20 * 30),
        ("image", 0),
    ],
)
def test_flops(name, expected):
    assert flops(CONVOLUTIONS, CONVOLUTIONS.by_name[name]) == pytest.approx(expected)


def test_workspace_of_convolution_gradients_is_one_image_or_fills_30_mib():
    pixels, taps, depth = 8 * 8, 5 * 5 * 3, 16
    images = math.ceil((30 << 20) / 4 / (pixels * depth + taps * depth + pixels * taps))
    of_image, of_filter = (
        CostModel(DEVICE).workspace(CONVOLUTIONS, CONVOLUTIONS.by_name[name]) for name in ("to_image", "to_filter")
    )
    assert of_image == Workspace(late=(pixels * taps * 4,))
    assert of_filter == Workspace(late=(images * pixels * taps * 4,))


@pytest.mark.parametrize("name", ["forward", "open"])
def test_no_workspace_without_a_gradient_or_a_shape(name):
    assert CostModel(DEVICE).workspace(CONVOLUTIONS, CONVOLUTIONS.by_name[name]) == Workspace()


def test_workspace_of_a_pooling_gradient_is_the_maximums_and_where_they_were():
    graph = parser.parse("""
    graph g(%x, %y, %dy) -> (%dx) {
      %x = Placeholder() : (float32[1,8,8,4])
      %y = Placeholder() : (float32[1,4,4,4])
      %dy = Placeholder() : (float32[1,4,4,4])
      %dx = MaxPoolGrad(%x, %y, %dy) : (float32[1,8,8,4])
    }
    """)
    assert CostModel(DEVICE).workspace(graph, graph.by_name["dx"]) == Workspace(early=(256, 512))


def test_a_profile_survives_json():
    assert Profile.from_json(PROFILE.to_json()) == PROFILE


@pytest.mark.parametrize("cost", [-1, math.nan, math.inf])
def test_a_profile_refuses_what_is_no_cost(cost):
    for field, value in (("seconds", cost), ("workspace", Workspace(late=(cost,)))):
        with pytest.raises(ValueError) as error:
            dataclasses.replace(PROFILE, **{field: {"n": value}})
        assert str(error.value) == f"expected a finite cost >= 0 for node 'n', received {cost!r}. Measure again."


@pytest.mark.parametrize("speed", [-1.0, math.nan, -math.inf])
@pytest.mark.parametrize("name", ["out_bytes_per_second", "in_bytes_per_second"])
def test_a_link_refuses_what_is_no_speed(name, speed):
    with pytest.raises(ValueError, match=f"Link.{name}: expected a speed >= 0; .* received {speed!r}. Correct it"):
        Link(**{name: speed})


@pytest.mark.parametrize("latency", [-1.0, math.nan, math.inf])
def test_a_link_refuses_what_is_no_latency(latency):
    with pytest.raises(ValueError, match=f"Link.latency_seconds: expected finite seconds >= 0, received {latency!r}"):
        Link(latency_seconds=latency)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("flops_per_second", 0.0, "a rate > 0"),
        ("flops_per_second", math.nan, "a rate > 0"),
        ("memory_bytes_per_second", -1.0, "a rate > 0"),
        ("launch_seconds", math.inf, "finite seconds >= 0"),
        ("launch_seconds", -1e-6, "finite seconds >= 0"),
        ("memory_bytes", 0, "bytes > 0, or None"),
    ],
)
def test_a_device_refuses_what_is_out_of_range(name, value, expected):
    with pytest.raises(ValueError, match=f"DeviceSpec.{name}: expected {expected}, received {value!r}."):
        DeviceSpec(**{name: value})


def test_copies_over_a_link_of_any_speed_take_some_time():
    closed, quick = Link(0.0, 0.0, 1.0), Link(math.inf, math.inf, 1.0)
    assert (closed.is_closed, quick.is_closed, Link(1.0, 0.0).is_closed) == (True, False, True)
    assert closed.out_seconds(5) == closed.in_seconds(5) == math.inf
    assert closed.out_seconds(0) == quick.out_seconds(5) == quick.in_seconds(5) == 1.0


def test_no_workspace_is_assumed_of_other_devices_kernels():
    graph = parser.parse("""
graph g() -> (%d) {
  %x = Placeholder() : (float32[2,4,4,1])
  %y = Placeholder() : (float32[2,2,2,1])
  %d = MaxPoolGrad(%x, %y, %y) : (float32[2,4,4,1])
}
""")
    assert CostModel().workspace(graph, graph.by_name["d"]).nbytes > 0
    assert CostModel(DEVICES["v100"]).workspace(graph, graph.by_name["d"]) == Workspace()


@pytest.mark.parametrize("scale", [0, -1, math.nan, math.inf])
def test_a_profile_refuses_what_is_no_scale(scale):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(PROFILE, time_scale=scale)
    assert str(error.value) == f"expected a finite time_scale > 0, received {scale!r}. Measure again."


def test_a_profile_refuses_to_reserve_less_than_nothing():
    with pytest.raises(ValueError, match="expected reserved_bytes >= 0, received -1"):
        dataclasses.replace(PROFILE, reserved_bytes=-1)
