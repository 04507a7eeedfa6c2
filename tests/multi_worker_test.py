"""Trains one model with several workers, plainly and with graphswap, and compares bits, budgets and errors."""

import cluster
import emulated
import keras
import numpy as np
import pytest
import tensorflow as tf
import trainings
from keras import layers

import graphswap
from graphswap import distribute, profiler

MIB = 1 << 20
AMPLE = 512 * MIB
BUDGET = 16 * MIB
DEVICE = 19 * MIB  # a step that runs out of memory is not repeated here
SMALL_BUDGET, SMALL_DEVICE = 18 * MIB, 20 * MIB
BATCH, LAST_BATCH = 8192, 6144
EXAMPLES = BATCH + LAST_BATCH
X = np.random.default_rng(0).normal(size=(EXAMPLES, 4)).astype("float32")
Y = np.random.default_rng(1).integers(0, 4, EXAMPLES)


def perceptron(has_noise):
    """A model that is all activations; with noise it has Dropout, and statistics of all workers' examples."""
    x = image = keras.Input((4,))
    for _ in range(3):
        x = layers.Dense(128)(x)
        x = layers.BatchNormalization(synchronized=True)(x) if has_noise else layers.LayerNormalization()(x)
        x = layers.ReLU()(x)
        x = layers.Dropout(0.1)(x) if has_noise else x
    return keras.Model(image, layers.Dense(4)(x))


def distribution():
    if distribute.in_cluster():
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.get_strategy()


def compiled(budget, has_noise):
    keras.utils.set_random_seed(3)
    option = {} if budget is None else {"graphswap": graphswap.Options(budget, swap_to="host", planning_seconds=1.0)}
    with distribution().scope():
        model = perceptron(has_noise)
        optimizer = keras.optimizers.Adam(1e-2) if has_noise else keras.optimizers.SGD(0.01)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"], **option)
    return model


# --- run by workers ---------------------------------------------------------------------------------------------


def steps(budget):
    """Trains on four batches, two of them smaller ones."""
    with trainings.reproducible():
        model = compiled(budget, has_noise=True)
        logs = [model.train_on_batch(*parts(size), return_dict=True) for size in (BATCH, LAST_BATCH, BATCH, LAST_BATCH)]
    weights = [variable.numpy() for variable in (*model.variables, *model.optimizer.variables)]
    result = {
        "logs": [{name: float(value) for name, value in one.items()} for one in logs],
        "weights": [np.asarray(value).tobytes().hex() for value in weights],
        "peak": profiler.memory_in_use("peak"),
    }
    if budget is not None:
        report = graphswap.report(model)
        result["decisions"] = [len(step.plan.swaps) + len(step.plan.recomputes) for step in report.steps]
        result["notes"] = report.steps[0].notes
    return result


def parts(size):
    """This worker's part of a batch of all workers."""
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    count, index = resolver.cluster_spec().num_tasks("worker"), resolver.task_id
    part = slice(index * size // count, (index + 1) * size // count)
    return X[:size][part], Y[:size][part]


def blocks(budget):
    """Trains a model that is all weights, and records the last step."""
    keras.utils.set_random_seed(3)
    option = {} if budget is None else {"graphswap": graphswap.Options(budget, swap_to="host", planning_seconds=1.0)}
    with trainings.reproducible():
        with distribution().scope():
            model = keras.Sequential(
                [keras.Input((4,)), *(layers.Dense(512, "tanh") for _ in range(9)), layers.Dense(4)]
            )
            model.compile(keras.optimizers.SGD(0.01), "mse", **option)
        x, _ = parts(64)
        logs = [model.train_on_batch(x, x) for _ in range(2)]
        peak = profiler.memory_in_use("peak")
        with profiler.recording() as events:
            logs.append(model.train_on_batch(x, x))
    distribute.Workers(2).together("end", str)  # a worker whose leader has ended is ended by TensorFlow
    result = {"logs": [float(value) for value in logs], "peak": peak}
    result["weights"] = [np.asarray(variable.numpy()).tobytes().hex() for variable in model.variables]
    backward = [(start, start + length) for start, length, name, _ in events if name.startswith("gradient_tape/")]
    sums = [start for start, _, name, _ in events if name.startswith("sgd/") and name.endswith(":CollectiveReduceV2")]
    begun, ended = min(backward)[0], max(end for _, end in backward)
    result["starts"] = [(start - begun) / (ended - begun) for start in sums]
    return result


def divided(budget, is_sharded):
    """Trains a model that is all weights, with an optimizer that has two slots for each."""
    keras.utils.set_random_seed(3)
    option = graphswap.Options(budget, swap_to="host", planning_seconds=1.0, shard_optimizer=is_sharded)
    with trainings.reproducible():
        with distribution().scope():
            model = keras.Sequential(
                [keras.Input((4,)), *(layers.Dense(256, "tanh") for _ in range(7)), layers.Dense(4)]
            )
            model.compile(keras.optimizers.Adam(0.01, global_clipnorm=1.0), "mse", graphswap=option)
        x, _ = parts(64)
        logs = [float(model.train_on_batch(x, x)) for _ in range(3)]
    result = {"logs": logs, "peak": profiler.memory_in_use("peak"), "held": profiler.memory_in_use()}
    variables = (*model.variables, *model.optimizer.variables)
    result["weights"] = [np.asarray(variable.numpy()).tobytes().hex() for variable in variables]  # all together
    result["report"] = str(graphswap.report(model).steps[0])
    distribute.Workers(2).together("end", str)
    return result


def scaled(budget, is_sharded, differs):
    """Trains a model that is all weights with loss scaling; where workers differ, one has infinite gradients."""
    keras.utils.set_random_seed(3)
    option = {}
    if budget is not None:
        option["graphswap"] = graphswap.Options(budget, planning_seconds=1.0, shard_optimizer=is_sharded)
    with trainings.reproducible():
        strategy = distribution()
        with strategy.scope():
            model = keras.Sequential(
                [keras.Input((4,)), *(layers.Dense(256, "tanh") for _ in range(7)), layers.Dense(4)]
            )
            optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), 1024.0)
            model.compile(optimizer, "mse", **option)
        x, _ = parts(64)
        if differs and strategy.cluster_resolver.task_id:
            x[0, 0] = np.inf
        logs = [float(model.train_on_batch(x, x)) for _ in range(3)]
    variables = (*model.variables, *model.optimizer.inner_optimizer.variables)
    result = {"logs": [str(value) for value in logs], "held": profiler.memory_in_use()}
    result["weights"] = [np.asarray(variable.numpy()).tobytes().hex() for variable in variables]
    result["scale"] = float(model.optimizer.dynamic_scale.numpy())
    result["updates"] = int(model.optimizer.inner_optimizer.iterations.numpy())
    if budget is not None:
        step = graphswap.report(model).steps[0]
        result["peak"], result["report"] = step.measured_peak_bytes, str(step)
    distribute.Workers(2).together("end", str)
    return result


def fit(budget):
    """Fits on arrays with a smaller last batch, and with validation."""
    log = []
    model = compiled(budget, has_noise=False)
    history = model.fit(
        X,
        Y,
        batch_size=BATCH,
        epochs=2,
        validation_data=(X[:1000], Y[:1000]),
        callbacks=[trainings.Recorder(log)],
        shuffle=False,
        verbose=0,
    )
    return {
        "log": [{name: float(value) for name, value in entry.items()} for entry in log],
        "history": history.history,
        "weights": [float(value) for variable in model.variables for value in np.ravel(variable.numpy())],
        "evaluated": model.evaluate(X, Y, batch_size=BATCH, verbose=0),
        "predicted": np.shape(model.predict(X, batch_size=BATCH, verbose=0)),
        "plans": [] if budget is None else [not step.plan.is_empty for step in graphswap.report(model).steps],
    }


def disagree(what):
    """Takes a step on workers that differ in something. Returns the error."""
    distribution = tf.distribute.MultiWorkerMirroredStrategy()
    index = distribution.cluster_resolver.task_id
    budget = {"budget": (1 + index) * MIB, "infeasible": 1000}.get(what, MIB)
    activation = "tanh" if what == "step" and index else "relu"
    if what == "version":
        distribute.version = lambda: f"0.{index}"
    if what == "silence":
        distribute.PATIENCE_SECONDS = 5.0
    with distribution.scope():
        model = keras.Sequential([keras.Input((4,)), *(layers.Dense(8, activation) for _ in range(3)), layers.Dense(4)])
        asked = graphswap.Options(budget, shard_optimizer=what == "shards" and index == 0)
        option = {} if what == "silence" and index else {"graphswap": asked}
        model.compile("sgd", "mse", **option)
    try:
        model.train_on_batch(X[:8], X[:8])
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# --- tests ------------------------------------------------------------------------------------------------------


def test_bits_and_budgets_where_plain_fails():
    plain = cluster.call(2, AMPLE, __file__, "steps", None)
    ours = cluster.call(2, DEVICE, __file__, "steps", BUDGET)
    for index in range(2):
        assert ours[index]["logs"] == plain[index]["logs"]
        assert ours[index]["weights"] == plain[index]["weights"]
        assert all(ours[index]["decisions"])
        assert ours[index]["peak"] <= BUDGET < DEVICE < plain[index]["peak"]
    assert "the plan is the leader's" in ours[1]["notes"]
    assert ours[0]["decisions"][0] == ours[1]["decisions"][0]


def test_blocks_of_gradients_where_their_sum_at_once_has_no_room():
    plain = cluster.call(2, AMPLE, __file__, "blocks", None)
    ours = cluster.call(2, SMALL_DEVICE, __file__, "blocks", SMALL_BUDGET)
    for index in range(2):
        assert ours[index]["logs"] == plain[index]["logs"]
        assert ours[index]["weights"] == plain[index]["weights"]
        assert ours[index]["peak"] <= SMALL_BUDGET < SMALL_DEVICE < plain[index]["peak"]
        assert len(ours[index]["starts"]) > len(plain[index]["starts"]) == 1
        assert ours[index]["starts"][0] < 0.5 < plain[index]["starts"][0]  # of the backward pass


def test_each_worker_keeps_half_of_the_optimizers_state():
    whole = cluster.call(2, SMALL_DEVICE, __file__, "divided", SMALL_BUDGET, False)
    halves = cluster.call(2, 9 * MIB, __file__, "divided", 8 * MIB, True)
    slots = 2 * 6 * 256 * 256 * 4
    for index in range(2):
        assert halves[index]["logs"] == whole[index]["logs"]
        assert halves[index]["weights"] == whole[index]["weights"]
        assert halves[index]["peak"] <= 8 * MIB
        # What lies between other buffers may be given more than it asks for.
        assert slots / 2 - 2 * 256 * 256 * 4 < whole[index]["held"] - halves[index]["held"] <= slots / 2
        expected = "12 variables divided among the workers: 1.5MiB kept here, 1.5MiB gathered per step"
        assert expected in halves[index]["report"] and "divided" not in whole[index]["report"]


def test_losses_are_scaled():
    budget = 15 * MIB // 2
    plain = cluster.call(2, AMPLE, __file__, "scaled", None, False, False)
    for is_sharded in (False, True):
        ours = cluster.call(2, 12 * MIB, __file__, "scaled", budget, is_sharded, False)
        for one, other in zip(ours, plain, strict=True):
            assert (one["logs"], one["weights"]) == (other["logs"], other["weights"])
            assert one["updates"] == other["updates"] == 3
            assert one["peak"] <= budget
            assert ("variables divided among the workers" in one["report"]) == is_sharded
            # A variable keeps no more than its own memory; what lies between others may be given more.
            assert one["held"] <= other["held"] * (0.8 if is_sharded else 1.1)


def test_workers_agree_that_a_gradient_is_not_finite():
    """Plain Keras sums gradients only on those workers whose own are finite, and waits for the others for ever."""
    for one in cluster.call(2, AMPLE, __file__, "scaled", 64 * MIB, False, True):
        assert (one["updates"], one["scale"]) == (0, 128.0)


def test_fit_on_two_workers_is_that_of_one_process():
    ours = cluster.call(2, None, __file__, "fit", "min")
    (alone,) = cluster.call(1, None, __file__, "fit", None)
    for one in ours:
        assert one["plans"] and all(one["plans"])
        assert one["predicted"] == alone["predicted"]
        # Two sums over 4096 examples and their sum round otherwise than one over 8192.
        np.testing.assert_allclose(one["weights"], alone["weights"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(one["evaluated"], alone["evaluated"], rtol=1e-6)
        for name, values in alone["history"].items():
            np.testing.assert_allclose(one["history"][name], values, rtol=1e-6)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("budget", "expected the same options in every worker, received Options(memory_budget=1048576"),
        ("shards", "expected the same options in every worker, received Options(memory_budget=1048576"),
        (
            "version",
            "expected the same version of graphswap in every worker, received 0.0 in worker 0 and 0.1 in worker",
        ),
        ("step", "expected the same step in every worker, received "),
    ],
)
def test_workers_that_differ_are_refused_on_all(what, message):
    first, second = cluster.call(2, None, __file__, "disagree", what)
    assert first == second
    assert first.startswith(f"WorkerError: graphswap: {message}")
    assert first.endswith("Run the same script with the same graphswap everywhere.")


def test_a_failure_of_one_is_told_to_all():
    leader, follower = cluster.call(2, None, __file__, "disagree", "infeasible")
    assert leader.startswith("InfeasibleBudgetError: memory_budget=0.1MiB is below the smallest reachable peak")
    assert follower.startswith(
        "WorkerError: graphswap: expected every worker to plan the step, received a failure of worker 0: "
        "InfeasibleBudgetError: memory_budget=0.1MiB is below the smallest reachable peak"
    )


def test_a_worker_without_the_option_is_no_hang():
    asking, _ = cluster.run(2, None, __file__, "disagree", "silence")
    assert asking.result.startswith("WorkerError: graphswap: expected all 2 workers to trace the step within 5 s")


if __name__ == "__main__":
    emulated.main(globals())
