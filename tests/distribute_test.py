import dataclasses
import json

import exchange_test
import keras
import numpy as np
import pytest
import replicas_test
import tensorflow as tf
import tiny_graphs
import trainings
from keras import layers

import graphswap
from graphswap import distribute, parser, pipeline, profiler, rewrites
from graphswap.cost_model import CostModel

X = np.random.default_rng(0).normal(size=(1200, 32)).astype("float32")
FACTS = {"version": "1", "budget": "2.0MiB"}


def model_of(option):
    inner = [layers.Dense(64, "relu"), layers.Dropout(0.5)]
    model = keras.Sequential([keras.Input((32,)), *inner, layers.Dense(64, "relu"), layers.Dense(32)])
    model.compile("adam", "mse", **option)
    return model


# --- workers ----------------------------------------------------------------------------------------------------


def test_equal_facts_have_no_difference():
    assert distribute.first_difference({"worker 0": FACTS, "worker 1": dict(FACTS)}) == ""


def test_the_first_difference_is_told():
    other = {**FACTS, "budget": "3.0MiB"}
    assert distribute.first_difference({"worker 0": FACTS, "worker 1": FACTS, "worker 2": other}) == (
        "graphswap: expected the same budget in every worker, received 2.0MiB in worker 0 and 3.0MiB in worker 2. "
        "Run the same script with the same graphswap everywhere."
    )


def test_to_read_something_else_than_the_others_is_an_error(monkeypatch):
    workers = distribute.Workers(2)
    others = np.array([7, 0], np.int32)
    monkeypatch.setattr(distribute.Workers, "_gathered", lambda self, array: np.concatenate([array, others]))
    with pytest.raises(
        distribute.WorkerError, match="expected all 2 workers to read 'adam/m' together, which they div"
    ):
        workers._joined("adam/m", np.array([1.0], np.float32))


def test_an_optimizer_is_divided_among_workers_only():
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
        with pytest.raises(ValueError, match="expected shard_optimizer=False under MirroredStrategy, received True"):
            model.compile("sgd", "mse", graphswap=graphswap.Options("min", shard_optimizer=True))
    with pytest.raises(ValueError, match=r"graphswap.function: expected shard_optimizer=False, received True"):
        graphswap.function(lambda x: x, memory_budget="min", shard_optimizer=True)


def test_a_worker_alone_divides_nothing():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(256), layers.Dense(128)])
    model.compile("adam", "mse", graphswap=graphswap.Options("min", shard_optimizer=True, planning_seconds=1.0))
    model.train_on_batch(np.ones((2, 4)), np.ones((2, 128)))
    step = graphswap.report(model).step
    assert not step.plan.shards and not any("divided" in note for note in step.notes)


def test_what_all_workers_have_is_joined(monkeypatch):
    workers = distribute.Workers(3)
    monkeypatch.setattr(distribute.Workers, "_gathered", lambda self, array: np.concatenate([array] * 3))
    part = np.arange(3, dtype=np.float16)
    np.testing.assert_array_equal(workers._joined("adam/m", part), np.concatenate([part] * 3))


def test_a_worker_alone_works_alone():
    assert list(distribute.Workers().together("add", lambda: "2").values()) == ["2"]
    with pytest.raises(KeyError):
        distribute.Workers().together("fail", lambda: {}["x"])
    assert distribute.Workers().agree(lambda: FACTS)


def test_who_does_not_answer_is_an_error(monkeypatch):
    monkeypatch.setattr(distribute, "PATIENCE_SECONDS", 1.0)

    def unanswered(self, array):
        raise tf.errors.DeadlineExceededError(None, None, "Collective has timed out.\nmore")

    monkeypatch.setattr(distribute.Workers, "_gathered", unanswered)
    with pytest.raises(distribute.WorkerError) as caught:
        distribute.Workers(3).together("plan the step", str)
    assert str(caught.value) == (
        "graphswap: expected all 3 workers to plan the step within 1 s, received no answer of some (Collective has "
        "timed out.). Give every process the same graphswap option, and look at the others' output for what ended them."
    )


def test_the_network_is_measured_by_two_sizes_of_sums(monkeypatch):
    latency, speed = 1e-4, 1e9
    waits = iter((0.2, 0.0, 1e-3, 1e-3, 2e-3, 0.0, 1e-3, 1e-3))  # the first sum makes the workers known to each other
    keys = {}

    def seconds(self, nbytes, key):
        assert keys.setdefault(nbytes, key) == key  # a new one would have to be made known, too
        return 2 * (self.count - 1) * (latency + nbytes / self.count / speed) + next(waits)

    monkeypatch.setattr(distribute.Workers, "_sum_seconds", seconds)
    link = distribute.Workers(4).network()
    assert link.out_bytes_per_second == link.in_bytes_per_second == pytest.approx(speed, rel=1e-6)
    assert link.latency_seconds == pytest.approx(latency, rel=0.02)  # a small sum has bytes, too
    assert link.overlaps


def test_workers_with_another_trace_of_other_gradients_are_told():
    session = pipeline.Session(graphswap.Options("1MiB"))
    session._workers = distribute.Workers(2)
    session._exchanged = exchange_test.TWO.exchanges, exchange_test.STEP
    alike = session._exchange(exchange_test.STEP, None, CostModel(), 1)
    assert alike == rewrites.exchange(exchange_test.STEP, exchange_test.TWO)
    other = parser.parse(
        str(exchange_test.STEP).replace("Reshape(%grad_c) : (float32[64])", "Reshape(%grad_c) : (float32[8])")
    )
    with pytest.raises(
        distribute.WorkerError, match="expected the same gradients in all traces of a step, received oth"
    ):
        session._exchange(other, None, CostModel(), 1)


# --- distributions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distribution",
    [lambda: tf.distribute.OneDeviceStrategy("CPU:0"), lambda: tf.distribute.MirroredStrategy(["CPU:0"])],
)
def test_one_device_in_a_distribution(distribution):
    def train(log, **option):
        with distribution().scope():
            model = model_of(option)
        model.fit(X, X, batch_size=500, epochs=2, callbacks=[trainings.Recorder(log)], verbose=0)
        return [model]

    with trainings.reproducible(), trainings.analytic_costs():
        trainings.assert_equal_to_plain(train, wanted=("swaps",))


def test_a_function_under_a_distribution():
    distribution = tf.distribute.OneDeviceStrategy("CPU:0")
    with distribution.scope():
        weight = tf.Variable(tf.eye(32))

    def of_replica(x):
        with tf.GradientTape() as tape:
            loss = trainings.loss_of_chain(x, weight)
        weight.assign_sub(0.01 * tape.gradient(loss, weight))
        return loss

    def step(x):
        return distribution.reduce("SUM", distribution.run(of_replica, args=(x,)), axis=None)

    planned = graphswap.function(step, memory_budget="min", strategy=trainings.EvictAll(("swap",)), swap_to="host")
    losses = [float(planned(x)) for x in distribution.experimental_distribute_dataset(dataset())]
    weight.assign(tf.eye(32))
    assert losses == [float(tf.function(step)(x)) for x in dataset()]
    assert graphswap.report(planned).step.plan.swaps


def dataset():
    return tf.data.Dataset.from_tensor_slices(X).batch(600)


class Fake:
    """A distribution over devices that are not here."""

    def __init__(self, *devices):
        self.worker_devices = devices

    @property
    def extended(self):
        return self


class FakeMirrored(Fake, tf.distribute.MirroredStrategy):
    """One whose replicas may be on several devices of a process."""


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (
            Fake("/device:CPU:0", "/device:CPU:1"),
            "graphswap: expected one device in each process, received Fake with /device:CPU:0, /device:CPU:1. Start a "
            "process for each device under MultiWorkerMirroredStrategy, with CUDA_VISIBLE_DEVICES naming its GPU, or "
            "compile without graphswap.",
        ),
        (
            Fake("/device:CPU:1"),
            "graphswap: expected a distribution on this process's first device, CPU:0, received Fake on /device:CPU:1. "
            "Name CPU:0, or show the process only the device that it is to use.",
        ),
        (
            FakeMirrored("/device:CPU:0", "/device:CPU:7"),
            "graphswap: expected devices of this process, CPU:0, received FakeMirrored on /device:CPU:7. Name devices "
            "that are there; tf.config.set_logical_device_configuration divides one into several.",
        ),
    ],
)
def test_other_devices_are_refused(distribution, message):
    with pytest.raises(ValueError) as caught:
        distribute.check(distribution)
    assert str(caught.value) == message


def test_a_tf_config_without_a_cluster_is_refused(monkeypatch):
    distribution = tf.distribute.MultiWorkerMirroredStrategy()
    distribute.check(distribution)
    config = json.dumps({"task": {"type": "worker", "index": 0}})
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError) as caught:
        distribute.check(distribution)
    assert str(caught.value) == (
        f"TF_CONFIG: expected a field 'cluster' with the hosts of each job, received {config}. TensorFlow would train "
        "with this process alone. Add it, or unset TF_CONFIG."
    )


@pytest.mark.parametrize(("device", "is_refused"), [("/device:CPU:0", False), ("/device:CPU:1", True), ("", False)])
def test_a_step_over_two_devices_is_refused(device, is_refused):
    graph = parser.parse(tiny_graphs.CHAIN)
    nodes = [dataclasses.replace(node, device=device if node.name == "b2" else "") for node in graph.nodes]
    graph = graph.replace(nodes=tuple(nodes))
    if not is_refused:
        assert distribute.parts(graph) is None
        return
    with pytest.raises(graphswap.UnsupportedGraphError) as caught:
        distribute.parts(graph)
    assert str(caught.value) == (
        "expected a step on this process's first device, CPU:0, received node 'b2' (MatMul) on '/device:CPU:1'. Show "
        "the process only the device that it is to use, or set graphswap.Options(on_unsupported='run_unchanged')."
    )


def test_a_step_whose_devices_run_different_nodes_is_refused():
    graph = parser.parse(replicas_test.SUMMED_ON_ONE.replace("%g1 = MatMul", "%g1 = Mul"))
    with pytest.raises(graphswap.UnsupportedGraphError) as caught:
        distribute.parts(graph)
    assert str(caught.value) == (
        "expected replicas that run the same nodes, on CPU:0, CPU:1, received node 'g1' (Mul), to which no node of "
        "CPU:0 is alike. Let a replica's part not hang on which replica it is, or set "
        "graphswap.Options(on_unsupported='run_unchanged')."
    )


def test_replicas_on_unlike_devices_are_refused(monkeypatch):
    there = [tf.config.LogicalDevice(f"/device:{name}", name[:3]) for name in ("CPU:0", "GPU:0", "GPU:1")]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: there)
    with pytest.raises(ValueError) as caught:
        distribute.check(FakeMirrored("/device:GPU:0", "/device:CPU:0"))
    assert str(caught.value) == (
        "graphswap: expected replicas on devices of one kind, as all carry out one plan, received FakeMirrored with "
        "/device:GPU:0 (GPU), /device:CPU:0 (CPU). Name devices of one kind, or compile without graphswap."
    )


def test_a_large_exchange_is_told():
    exchange = """
    graph exchange(%g) -> (%sum) {{
      %g = Placeholder() : (float32[{0}])
      %sum = CollectiveReduceV2!(%g) : (float32[{0}])
    }}
    """
    assert distribute.advice(parser.parse(exchange.format(1000))) == ()
    (note,) = distribute.advice(parser.parse(exchange.format(16 << 20)))
    assert note.startswith("one exchange between the workers takes 64.0MiB at once, and twice that in memory; ")


def test_a_measured_step_exchanges_nothing():
    graph = parser.parse("""
    graph step(%g) -> (%sum, %twice) after(%sum) {
      %g = Placeholder() : (float32[8])
      %sum = CollectiveReduceV2!(%g) : (float32[8])
      %twice = AddV2(%sum, %sum) after(%sum) : (float32[8])
    }
    """)
    own = profiler.without_side_effects(graph)
    assert [node.op for node in own.nodes] == ["Placeholder", "AddV2"]
    assert own.by_name["twice"].inputs == ("g", "g")
    assert own.outputs == ("g", "twice")
