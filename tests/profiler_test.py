"""What is measured: the device, the links, and every node of a step, without a trace in the variables."""

import types

import emulated
import numpy as np
import pytest
import tensorflow as tf
import testing
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from graphswap import graphdef, ir, parser, profiler, tiers
from graphswap.cost_model import CostModel, Link, Profile, Workspace
from graphswap.devices import DEVICES
from graphswap.plan import Plan, Recompute

# --- the device -------------------------------------------------------------------------------------------------


def test_a_plain_cpu_has_no_limit_and_counts_nothing():
    assert profiler.memory_in_use() is None
    spec = profiler.device_spec(None)
    assert spec.memory_bytes is None
    assert not spec.reserves_memory
    assert not spec.links["host"].overlaps


@pytest.mark.parametrize(
    ("kind", "limit", "rates_of", "nbytes"),
    [
        ("NVIDIA GH200 480GB", 2048, "gh200", 2 << 30),
        ("NVIDIA H200", None, "h200", 140 << 30),
        ("NVIDIA RTX 6000", None, "a100", 140 << 30),
    ],
)
def test_a_gpu_has_the_memory_that_it_was_given_and_rates_of_its_kind(kind, limit, rates_of, nbytes, monkeypatch):
    """No GPU is at hand here: TensorFlow's answers are made up."""
    given = [tf.config.LogicalDeviceConfiguration(memory_limit=limit)] if limit else None
    monkeypatch.setattr(profiler, "device_name", lambda: "GPU:0")
    monkeypatch.setattr(profiler, "_measure_pinned_link", lambda: None)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: ["the GPU"])
    monkeypatch.setattr(tf.config, "get_logical_device_configuration", lambda _: given)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: {"device_name": kind})
    seen = [types.SimpleNamespace(name=f"/device:{name}", memory_limit=140 << 30) for name in ("CPU:0", "GPU:0")]
    monkeypatch.setattr(profiler.device_lib, "list_local_devices", lambda: seen)
    spec, sheet = profiler.device_spec(None), DEVICES[rates_of]
    assert (spec.name, spec.memory_bytes) == (kind, nbytes)
    assert spec.flops_per_second == sheet.flops_per_second
    assert spec.links["host"] == sheet.links["host"]  # as nothing was measured


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_links_are_as_fast_as_a_machine_may_be(tier, tmp_path):
    link = profiler.measure_link(tier, str(tmp_path) if tier == "disk" else None)
    assert 1e7 < link.out_bytes_per_second < 1e12
    assert 1e7 < link.in_bytes_per_second < 1e12


def peak_of_measuring_links(memory_bytes, budget):
    """What the device's allocator counts at most while its links are measured."""
    profiler.device_spec(memory_bytes, memory_budget=budget)
    return profiler.memory_in_use("peak")


def test_measuring_links_keeps_a_budget_below_the_devices_memory():
    memory_bytes, budget = 64 << 20, 6 << 20
    assert emulated.call(memory_bytes, __file__, "peak_of_measuring_links", memory_bytes, budget) < budget


# --- without side effects ---------------------------------------------------------------------------------------


def test_updates_are_dropped_and_what_they_read_is_still_computed():
    graph = parser.parse("""
        graph step(%x, %w) -> (%loss) after(%update) {
          %x = Placeholder() : (float32[4])
          %w = Placeholder() : (resource[])
          %read = ReadVariableOp!(%w) {"only_reads": true} : (float32[4])
          %loss = Mul(%x, %read) : (float32[4])
          %update = AssignVariableOp!(%w, %loss) after(%read) : ()
          %later = Neg(%loss) after(%update) : (float32[4])
        }""")
    testing.assert_graph_text(
        profiler.without_side_effects(graph),
        """
        graph step(%x, %w) -> (%loss) after(%w, %loss, %read) {
          %x = Placeholder() : (float32[4])
          %w = Placeholder() : (resource[])
          %read = ReadVariableOp!(%w) {"only_reads": true} : (float32[4])
          %loss = Mul(%x, %read) : (float32[4])
          %later = Neg(%loss) after(%w, %loss, %read) : (float32[4])
        }""",
    )


def test_a_needed_side_effect_can_not_be_left_out():
    graph = parser.parse("""
        graph step(%x) -> (%y) {
          %x = Placeholder() : (float32[4])
          %popped = QueueDequeue!(%x) : (float32[4])
          %y = Neg(%popped) : (float32[4])
        }""")
    with pytest.raises(profiler.CantMeasure, match="'y' needs the value of 'popped', which has side effects"):
        profiler.without_side_effects(graph)


def test_what_is_updated_far_away_is_computed_and_goes_nowhere():
    """Others may read what it computes."""
    graph = parser.parse("""
        graph step(%g, %m/store, %m/spare) -> (%norm) after(%update) {
          %g = Placeholder() : (float32[4])
          %m/store = Placeholder() {"store_of": "m", "tier": "host"} : (resource[])
          %m/spare = Placeholder() : (resource[])
          %update = Update!(%g, %m/store, %m/spare) {"dtype": "float32", "program": "2; AddV2 0 1; 2 2", "shape": [4],
            "stored": [0], "values": 1} : (float32[4])
          %norm = L2Loss(%update) : (float32[])
        }""")
    kept = profiler.without_side_effects(graph)
    assert str(kept) == str(graph).replace("Update!", "Update")


def test_long_chains_of_updates_are_dropped():
    count = 5000
    nodes = [ir.Node("x", "Placeholder", outputs=(ir.Value("float32", (4,)),))]
    for index in range(count):
        before = (f"update_{index - 1}", f"update_{index - 2}") if index > 1 else ()
        nodes.append(ir.Node(f"update_{index}", "AssignVariableOp", ("x",), before, stateful=True))
    graph = ir.Graph("updates", tuple(nodes), ("x",), ("x",), (f"update_{count - 1}",))
    kept = profiler.without_side_effects(graph)
    assert [node.name for node in kept.nodes] == ["x"]
    assert kept.control_outputs == ("x",)


# --- a step -----------------------------------------------------------------------------------------------------


def step_of(weight):
    def step(x):
        y = tf.nn.relu(tf.matmul(x, weight, name="product"))
        spread = tf.sort(y, name="sorted")
        weight.assign_add(tf.matmul(x, spread, transpose_a=True))
        return tf.reduce_sum(y)

    return tf.function(step, autograph=False).get_concrete_function(tf.TensorSpec((512, 256))).graph


def test_every_heavy_node_gets_its_seconds_and_variables_stay():
    weight = tf.Variable(tf.ones((256, 256)))
    func_graph = step_of(weight)
    graph = graphdef.import_function(func_graph)
    x = np.ones((512, 256), np.float32)
    profile = profiler.measure_step(func_graph, graph, [x], tiers.Tiers(), CostModel(), graph.fingerprint)
    np.testing.assert_array_equal(weight, np.ones((256, 256)))
    assert profile.fingerprint == graph.fingerprint
    products = [node.name for node in graph.nodes if node.op == "MatMul"]
    assert all(1e-6 < profile.seconds[name] < 10 for name in products)
    assert all(workspace.nbytes >= 0 for workspace in profile.workspace.values())


def test_a_step_is_dealt_out_whole_to_what_runs_in_it():
    def interval(name, start, end):
        return int(start * 1e12), int(end * 1e12), name

    shares = profiler._shares([interval("a", 1, 3), interval("b", 2, 4), interval("b", 3, 4), interval("c", 6, 7)])
    # One second of "a" is shared with "b", and "c" was waited for.
    assert shares == {"a": 1.5, "b": 1.5, "c": 3.0}
    assert profiler._shares([]) == {}


STEP = """
    graph step(%x) -> (%loss) {
      %x = Placeholder() : (float32[1024])
      %a = Neg(%x) : (float32[1024])
      %out = SwapOut(%a) {"nbytes": 4096, "tier": "host"} : (string[])
      %pair = Neg(%x) {"beside": "a"} : (float32[1024])
      %in = SwapIn(%out) {"nbytes": 4096, "tier": "host"} : (float32[1024])
      %loss = Add(%in, %pair) : (float32[1024])
      %update = Assign!(%loss) : ()
    }"""


def events(*runs):
    return [(int(start * 1e12), int((end - start) * 1e12), name, {}) for name, start, end in runs]


def test_a_steps_costs_add_up_to_its_length():
    graph = parser.parse(STEP)
    recorded = events(
        ("a:Neg", 0, 2),
        ("pair:Neg", 0, 2),
        ("out/SerializeTensor:SerializeTensor", 2, 3),
        ("in/ParseTensor:ParseTensor", 4, 6),
        ("loss:Add", 6, 7),
        ("update:Assign", 7, 8),
        ("somebody_else:Add", 0, 99),
    )
    known = CostModel(profile=Profile("f", {"a": 9.0}, {"a": Workspace((256,))}, {"host": Link(1.0, 1.0, 0.0)}))
    profile = profiler.step_costs(recorded, graph, 4.0, known, "f")
    # Eight seconds were recorded of what takes four.
    assert profile.seconds == {"x": 0.0, "a": 0.5, "pair": 0.5, "loss": 0.5, "update": 0.5}
    assert profile.links["host"] == Link(4096 / 0.5, 4096 / 1.5, 0.0)
    assert profile.links["disk"] == known.device.links["disk"]  # nothing went there
    assert profile.workspace == {"a": Workspace((256,))}


def recorded_on_gpu():
    """A profile of the host, which asks for memory and launches, and of a GPU's compute and copy streams."""
    space = xplane_pb2.XSpace()
    for plane_name, rows in (
        (
            "/host:CPU",
            [
                ("a:Neg", 0, 1, {}),
                ("MemoryAllocation", 0, 0, {"allocator_name": "GPU_0_bfc", "addr": 1, "requested_bytes": 512}),
                ("MemoryAllocation", 0, 0, {"allocator_name": "gpu_host_bfc", "addr": 2, "requested_bytes": 512}),
            ],
        ),
        (
            "/device:GPU:0",
            [
                ("kernel", 10, 20, {"tf_op": "a:Neg"}),
                ("kernel", 15, 25, {"tf_op": "pair:Neg"}),
                ("Memset", 26, 27, {}),
                ("kernel", 100, 130, {"tf_op": "loss:Add"}),
            ],
        ),
        ("/host:metadata", [("nothing", 0, 9, {})]),
    ):
        plane = space.planes.add(name=plane_name)
        line = plane.lines.add()
        for name, start, end, stats in rows:
            number = len(plane.event_metadata) + 1
            plane.event_metadata[number].name = name
            event = line.events.add(metadata_id=number, offset_ps=start * 10**6, duration_ps=(end - start) * 10**6)
            for key, value in stats.items():
                number = len(plane.stat_metadata) + 1
                plane.stat_metadata[number].name = key
                stat = event.stats.add(metadata_id=number)
                if isinstance(value, str):
                    stat.str_value = value
                else:
                    stat.uint64_value = value
    return profiler._events(space)


def test_a_gpus_nodes_cost_what_their_kernels_take_and_little_waiting():
    spent = profiler._spent_on_gpu(recorded_on_gpu(), parser.parse(STEP))
    # "pair" began while "a" ran; "loss" came 75 us later, of which at most 20 are the host's.
    assert spent == pytest.approx({"a": 10e-6, "pair": 5e-6, "loss": 50e-6}, rel=1e-12)  # sums of floats


def test_on_a_gpu_only_its_own_memory_counts(monkeypatch):
    recorded = recorded_on_gpu()
    assert [buffer.nbytes for buffer in profiler.allocations(recorded)] == [512, 512]
    monkeypatch.setattr(profiler, "device_name", lambda: "GPU:0")
    assert [buffer.nbytes for buffer in profiler.allocations(recorded)] == [512]


def test_a_gpus_workspace_is_known_from_its_allocator_alone(monkeypatch):
    """Its ops are no events; what a node asks for next after its outputs, another one's first buffer ends."""
    monkeypatch.setattr(profiler, "device_name", lambda: "GPU:0")

    def allocation(start, address, nbytes, op, kind):
        facts = {"allocator_name": "GPU_0_bfc", "addr": address, "requested_bytes": nbytes}
        return (start, 0, "MemoryAllocation", {**facts, "tf_op": op, "region_type": kind})

    def deallocation(start, address):
        return (start, 0, "MemoryDeallocation", {"allocator_name": "GPU_0_bfc", "addr": address})

    recorded = [
        allocation(0, 1, 4096, "_EagerConst", "dynamic"),
        allocation(1, 2, 1024, "a", "temp"),
        allocation(2, 3, 512, "a", "output"),
        allocation(3, 4, 256, "a", "temp"),
        deallocation(4, 4),
        deallocation(5, 2),
        allocation(6, 5, 2048, "pair", "temp"),  # becomes its output
        allocation(7, 6, 256, "not/of/the/graph", "temp"),
        deallocation(8, 6),
        allocation(9, 7, 256, "loss", "temp"),
        deallocation(10, 7),
        deallocation(11, 5),
    ]
    workspace = profiler._node_workspace(recorded, parser.parse(STEP))
    assert workspace == {"a": Workspace((1024,), (256,)), "pair": Workspace(), "loss": Workspace(late=(256,))}


def test_the_architecture_of_a_gpu(monkeypatch):
    assert profiler.gpu_architecture() is None
    monkeypatch.setattr(profiler, "device_name", lambda: "GPU:0")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: ["the GPU"])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: {"compute_capability": (9, 0)})
    assert profiler.gpu_architecture() == "9.0"


def test_a_step_of_which_nothing_was_recorded_has_no_costs():
    with pytest.raises(profiler.CantMeasure, match="recorded none of the step's ops"):
        profiler.step_costs(events(("other:Add", 0, 1)), parser.parse(STEP), 1.0, CostModel(), "f")


def test_workspace_is_what_a_node_gives_back_at_its_end():
    def buffer(nbytes, start, end, is_temporary=True):
        return profiler.Buffer("node", nbytes, is_temporary, start, end)

    first, second, third = buffer(256, 1, 9), buffer(512, 2, 4), buffer(1024, 6, 9)
    output = buffer(4096, 5, 100, is_temporary=False)
    # The second is gone when the third comes; the output lies between them.
    assert profiler._workspace([first, second, output, third], end=10) == Workspace((256,), (1024,))
    # What outlives the node is its output, whatever it was asked for as.
    assert profiler._workspace([first, buffer(4096, 0, 100)], end=10) == Workspace(late=(256,))
    assert profiler._workspace([output], end=10) == Workspace()


def test_small_devices_have_few_holes():
    assert [profiler._holes(mebibytes << 20) for mebibytes in (16, 32, 48, 1024)] == [0, 0, 16, 128]


def test_a_busy_profiler_is_no_error_of_the_step(tmp_path):
    func_graph = step_of(tf.Variable(tf.ones((256, 256))))
    graph = graphdef.import_function(func_graph)
    tf.profiler.experimental.start(str(tmp_path))
    try:
        with pytest.raises(profiler.CantMeasure, match="profiler is busy"):
            profiler.measure_step(func_graph, graph, [np.ones((512, 256), np.float32)], tiers.Tiers(), CostModel(), "")
    finally:
        tf.profiler.experimental.stop()


# --- the cache --------------------------------------------------------------------------------------------------


def test_profiles_are_kept_per_graph_and_device(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile = Profile("abc", {"conv": 0.5}, {"conv": Workspace(late=(1024,))}, {"host": Link(1e9, 2e9, 1e-5)})
    assert profiler.cached_profile("abc", "CPU:0/2") is None
    profiler.store_profile(profile, "CPU:0/2")
    assert profiler.cached_profile("abc", "CPU:0/2") == profile
    refined = Profile("abc", {"conv": 0.25}, {}, time_scale=1.5, reserved_bytes=4096)
    assert profiler.cached_profile("abc", "CPU:0/2", "300MiB") is None
    profiler.store_profile(refined, "CPU:0/2", "300MiB")
    assert profiler.cached_profile("abc", "CPU:0/2", "300MiB") == refined
    assert profiler.cached_profile("abc", "CPU:0/2", "220MiB") is None
    assert profiler.cached_profile("abc", "CPU:0/2") == profile
    assert profiler.cached_profile("abc", "GPU:0/2") is None
    assert profiler.cached_profile("abd", "CPU:0/2") is None


def test_plans_are_kept_per_question(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = Plan(decisions=(Recompute(("a",), "b"),), memory_budget=1024, fingerprint="abc")
    profiler.store_plan(plan, "CPU:0/2", "1024")
    assert profiler.cached_plan("abc", "CPU:0/2", "1024") == plan
    assert profiler.cached_plan("abc", "CPU:0/2", "2048") is None
    assert profiler.cached_profile("abc", "CPU:0/2", "1024") is None
    next(tmp_path.rglob("plans/*")).write_text("no plan")
    assert profiler.cached_plan("abc", "CPU:0/2", "1024") is None


def test_a_cache_that_can_not_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "graphswap").write_text("a file where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profiler.store_profile(Profile("abc", {}, {}), "CPU:0/2")
    assert profiler.cached_profile("abc", "CPU:0/2") is None


if __name__ == "__main__":
    emulated.main(globals())
