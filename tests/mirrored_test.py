"""Trains on two logical devices of one process, plainly and with graphswap, and compares bits, budgets and errors."""

import emulated
import keras
import numpy as np
import pytest
import tensorflow as tf
import trainings
from keras import layers

import graphswap
from graphswap import host_variable, profiler
from graphswap.tools import architectures

MIB = 1 << 20
AMPLE = 1024 * MIB
DEVICE = {"residual": 130 * MIB, "gpt": 24 * MIB}  # two logical devices share one allocator
BUDGET = {"residual": 64 * MIB, "gpt": 11 * MIB}  # of each replica
REPLICAS = 2
STEPS = 3
BATCH = {"residual": 64, "gpt": 16}
WORDS = 64
X = np.random.default_rng(0).normal(size=(3001, 32)).astype("float32")


def residual():
    """Convolutions with skips; the statistics are those of all replicas' examples."""
    image = keras.Input((32, 32, 3))
    x = layers.Conv2D(16, 3, padding="same")(image)
    for _ in range(6):
        y = x
        for _ in range(2):
            y = layers.ReLU()(layers.BatchNormalization(synchronized=True)(y))
            y = layers.Conv2D(16, 3, padding="same", use_bias=False)(y)
        x = layers.Add()([x, y])
    return keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def gpt():
    """A small transformer whose tables of words and places are looked up, so that some gradients are sparse."""
    tokens = keras.Input((WORDS,), dtype="int32")
    x = layers.Embedding(100, 64)(tokens) + layers.Embedding(WORDS, 64)(np.arange(WORDS)[None])
    for _ in range(3):
        x = architectures.transformer_block(x, 4, is_causal=True)
    return keras.Model(tokens, layers.Dense(100)(layers.LayerNormalization()(x)))


def batches(kind):
    """All batches of a training, in one."""
    rng = np.random.default_rng(0)
    count = STEPS * BATCH[kind]
    if kind == "gpt":
        words = rng.integers(0, 100, (count, WORDS + 1), "int32")
        return words[:, :-1], words[:, 1:]
    return rng.normal(size=(count, 32, 32, 3)).astype("float32"), rng.integers(0, 10, count)


# --- run in processes of their own ------------------------------------------------------------------------------


def divided():
    """Makes several devices of the CPU, before TensorFlow begins. Returns their names."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * REPLICAS)
    return [f"CPU:{index}" for index in range(REPLICAS)]


def trained(kind, distribution, has_budget):
    """Trains for a few steps."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(3)
    tf.config.experimental.reset_memory_stats("CPU:0")
    budget = graphswap.Options(BUDGET[kind], swap_to="host", planning_seconds=1.0)
    log = []
    with distribution.scope():
        model = {"residual": residual, "gpt": gpt}[kind]()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        option = {"graphswap": budget} if has_budget else {}
        model.compile(keras.optimizers.SGD(0.003), loss, metrics=["accuracy"], **option)
    x, y = batches(kind)
    model.fit(x, y, batch_size=BATCH[kind], callbacks=[trainings.Recorder(log)], shuffle=False, verbose=0)
    result = {
        "logs": [{name: float(value) for name, value in one.items()} for one in log],
        "weights": [np.asarray(v.numpy()).astype("float64").ravel().tolist() for v in model.trainable_variables],
        "bits": [np.asarray(v.numpy()).tobytes().hex() for v in (*model.variables, *model.optimizer.variables)],
        "peak": profiler.memory_in_use("peak"),
    }
    if has_budget:
        step = graphswap.report(model).steps[0]
        result |= {"evicted": len(step.plan.swaps) + len(step.plan.recomputes), "blocks": len(step.plan.exchanges)}
        result |= {"notes": step.notes, "reported": step.measured_peak_bytes, "report": str(step)}
    return result


def train(kind, has_budget, is_alone=False):
    """Trains a model mirrored, and if asked for by one device, too."""
    distribution = tf.distribute.MirroredStrategy(divided())
    with trainings.reproducible():
        mirrored = trained(kind, distribution, has_budget)
        return mirrored, trained(kind, tf.distribute.get_strategy(), False) if is_alone else None


def perceptron(distribution, option, is_scaled=False):
    with distribution.scope():
        inner = [layers.Dense(64, "relu"), layers.LayerNormalization()]
        model = keras.Sequential([keras.Input((32,)), *inner, layers.Dense(64, "relu"), layers.Dense(32)])
        adam = keras.optimizers.Adam()
        model.compile(keras.optimizers.LossScaleOptimizer(adam) if is_scaled else adam, "mse", **option)
    return model


def ways():
    """Trains under other distributions and by `graphswap.function`; asserts that all bits are those of plain steps."""
    names = divided()
    distributions = {
        "collectives": tf.distribute.MirroredStrategy(names),
        "one device": tf.distribute.MirroredStrategy(names, tf.distribute.ReductionToOneDevice()),
        "central": tf.distribute.experimental.CentralStorageStrategy(names, "CPU:0"),
    }
    notes = {}
    with trainings.reproducible(), trainings.analytic_costs():
        runs = {name: (distribution, False) for name, distribution in distributions.items()}
        # CentralStorageStrategy is no strategy that Keras can scale losses with.
        runs |= {f"{name}, scaled": (distributions[name], True) for name in ("collectives", "one device")}
        for name, (distribution, is_scaled) in runs.items():

            def fit(log, distribution=distribution, is_scaled=is_scaled, **option):
                model = perceptron(distribution, option, is_scaled)  # the last batch has 301 and 300 examples
                model.fit(X, X, batch_size=1200, epochs=2, callbacks=[trainings.Recorder(log)], verbose=0)
                return [model]

            (step,) = trainings.assert_equal_to_plain(fit)
            notes[name] = step.notes
        assert function(distributions["collectives"], "min") == function(distributions["collectives"], None)
    return notes


def function(distribution, budget):
    """Losses of a step that calls `distribution.run`."""
    with distribution.scope():
        weight = tf.Variable(tf.eye(32))

    def of_replica(x):
        with tf.GradientTape() as tape:
            loss = trainings.loss_of_chain(x, weight)
        context = tf.distribute.get_replica_context()
        gradient = context.all_reduce("SUM", tape.gradient(loss, weight))
        context.merge_call(
            lambda d, g: d.extended.update(weight, lambda v, g: v.assign_sub(1e-4 * g), (g,)), (gradient,)
        )
        return loss

    def step(x):
        return distribution.reduce("SUM", distribution.run(of_replica, args=(x,)), axis=None)

    strategy = trainings.EvictAll()
    planned = budget and graphswap.function(step, memory_budget=budget, strategy=strategy, swap_to="host")
    data = tf.data.Dataset.from_tensor_slices(X[:2400]).batch(1200)
    losses = [float((planned or tf.function(step))(x)) for x in distribution.experimental_distribute_dataset(data)]
    if budget:
        plan = graphswap.report(planned).step.plan
        assert plan.swaps and plan.recomputes
    return losses


class Branching(layers.Layer):
    """Does something else in one replica."""

    def call(self, x):
        context = tf.distribute.get_replica_context()
        is_second = context is not None and tf.get_static_value(context.replica_id_in_sync_group) == 1
        return tf.tanh(x) if is_second else tf.nn.relu(x)


def refusals():
    """What errors say of what is not supported."""
    distribution = tf.distribute.MirroredStrategy(divided())

    def error_of(attempt):
        with pytest.raises((ValueError, tf.errors.OpError)) as caught:
            attempt()
        return f"{type(caught.value).__name__}: {caught.value}"

    def branching():
        with distribution.scope():
            model = keras.Sequential([keras.Input((32,)), layers.Dense(32), Branching()])
            model.compile("sgd", "mse", graphswap="1GiB")
        model.fit(X[:64], X[:64], verbose=0)

    def hosted():
        with host_variable.host_variables():
            weight = tf.Variable(tf.zeros((256, 256)))

        def step(x):
            def of_replica(x):
                return tf.reduce_sum(x @ weight)

            return distribution.reduce("SUM", distribution.run(of_replica, args=(x,)), axis=None)

        planned = graphswap.function(step, memory_budget="1GiB")
        planned(tf.zeros((4, 256)))

    def compiled(**option):
        def attempt():
            with distribution.scope():
                model = keras.Sequential([keras.Input((32,)), layers.Dense(32)])
                model.compile("sgd", "mse", **option)

        return attempt

    return {
        "branch": error_of(branching),
        "host": error_of(hosted),
        "XLA": error_of(compiled(graphswap="1GiB", jit_compile=True)),
        "XLA option": error_of(compiled(graphswap=graphswap.Options("1GiB", jit_compile=True))),
    }


# --- tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUDGET)
def test_bits_and_budgets_where_plain_fails(kind):
    # A process for each: to end a dataset that several devices read takes TensorFlow up to a minute.
    plain, alone = emulated.call(AMPLE, __file__, "train", kind, False, True)
    ours, _ = emulated.call(DEVICE[kind], __file__, "train", kind, True)
    assert ours["logs"] == plain["logs"]
    assert ours["bits"] == plain["bits"]
    assert ours["evicted"] and ours["blocks"]
    # One allocator counts both replicas.
    assert ours["peak"] <= REPLICAS * BUDGET[kind] < DEVICE[kind] < plain["peak"]
    assert ours["reported"] == -(-ours["peak"] // REPLICAS)
    assert ours["notes"][-1] == (
        "the plan is that of each of 2 replicas, on CPU:0, CPU:1; they share one allocator, of whose peak this is "
        "one replica's share"
    )
    # Two sums over half of the examples and their sum round otherwise than one over all.
    for mine, theirs in zip(ours["weights"], alone["weights"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    for mine, theirs in zip(ours["logs"], alone["logs"], strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-6)


def test_other_ways_to_sum_and_shares_of_unequal_size():
    notes = emulated.call(AMPLE, __file__, "ways")
    assert any("gradients are exchanged in" in note for note in notes["collectives"])
    assert not any("gradients are exchanged in" in note for note in notes["one device"])


def test_what_several_devices_can_not_do_is_refused():
    errors = emulated.call(AMPLE, __file__, "refusals")
    assert errors["branch"].startswith(
        "UnsupportedGraphError: expected replicas that run the same nodes, on CPU:0, CPU:1, received node 'replica_1/"
    )
    assert errors["host"].startswith(
        "ValueError: graphswap: expected all variables on the device in a step of several devices, received 'Variable'"
    )
    assert errors["XLA"] == errors["XLA option"]
    assert errors["XLA"].startswith("ValueError: graphswap: expected jit_compile=False with several workers or devices")


if __name__ == "__main__":
    emulated.main(globals())
