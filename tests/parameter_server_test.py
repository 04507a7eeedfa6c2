"""Trains models with parameter servers, plainly and with graphswap, and compares losses, variables and budgets."""

import json
import os
import signal
import time

import cluster
import emulated
import keras
import numpy as np
import tensorflow as tf
import trainings
from keras import layers

import graphswap
from graphswap import distribute, server

MIB = 1 << 20
DEVICE = 48 * MIB
X = np.random.default_rng(0).normal(size=(24, 12, 12, 3)).astype("float32")
TOKENS = np.random.default_rng(1).integers(0, 64, (24, 32))
Y = np.random.default_rng(2).integers(0, 4, 24)


def residual_network():
    """Like a ResNet, with a normalisation that does not depend on how a batch is shared."""
    x = image = keras.Input((12, 12, 3))
    for filters in (16, 32):
        shortcut = layers.Conv2D(filters, 1, strides=2)(x)
        x = layers.ReLU()(layers.GroupNormalization(8)(layers.Conv2D(filters, 3, 2, padding="same")(x)))
        x = layers.GroupNormalization(8)(layers.Conv2D(filters, 3, padding="same")(x))
        x = layers.ReLU()(x + shortcut)
    return keras.Model(image, layers.Dense(4)(layers.GlobalAveragePooling2D()(x))), X


def gpt():
    tokens = keras.Input((32,), dtype="int32")
    x = layers.Embedding(64, 128)(tokens) + layers.Embedding(32, 128)(keras.ops.arange(32))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 32)(y, y, use_causal_mask=True)
        x = x + layers.Dense(128)(layers.Dense(512, "gelu")(layers.LayerNormalization()(x)))
    return keras.Model(tokens, layers.Dense(4)(layers.GlobalAveragePooling1D()(x))), TOKENS


def perceptron():
    model = keras.Sequential([keras.Input((64,)), *(layers.Dense(512, "relu") for _ in range(12)), layers.Dense(4)])
    return model, np.random.default_rng(0).normal(size=(24, 64)).astype("float32")


MODELS = {"residual_network": residual_network, "gpt": gpt, "perceptron": perceptron}
BUDGETS = {"residual_network": 24 * MIB, "gpt": 5 * MIB, "perceptron": 7 * MIB}
"""Below what the plain step takes on a worker: 20, 9 and 12 MiB."""


def descent():
    return keras.optimizers.SGD(0.01, momentum=0.9)


def scaled_descent():
    return keras.optimizers.LossScaleOptimizer(descent(), 1024.0)


OPTIMIZERS = {"residual_network": descent, "gpt": descent, "perceptron": scaled_descent}


def distribution():
    if not distribute.in_cluster():
        return tf.distribute.get_strategy()
    graphswap.serve()
    return tf.distribute.ParameterServerStrategy(tf.distribute.cluster_resolver.TFConfigClusterResolver())


def compiled(name, budget, asynchronous=False, optimizer=keras.optimizers.Adam, scope=None):
    keras.utils.set_random_seed(3)
    options = {"planning_seconds": 0.5, "asynchronous": asynchronous}
    option = {} if budget is None else {"graphswap": graphswap.Options(budget, **options)}
    with (scope or distribution()).scope():
        model, x = MODELS[name]()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer(), loss, metrics=["accuracy"], **option)
    return model, x


# --- run by processes -------------------------------------------------------------------------------------------


def fit(names, is_planned):
    """Fits with a smaller last batch and validation; each model plainly, and then with graphswap if it is planned."""
    results = []
    scope = distribution()
    for name, plans in [(name, plans) for name in names for plans in (False, True)[: 1 + is_planned]]:
        budget = BUDGETS[name] if plans else None
        log = []
        with trainings.reproducible():
            model, x = compiled(name, budget, optimizer=OPTIMIZERS[name], scope=scope)
            history = model.fit(
                *(x, Y),
                batch_size=16,
                validation_data=(x[:12], Y[:12]),
                callbacks=[trainings.Recorder(log)],
                shuffle=False,
                verbose=0,
            ).history
        results.append(
            {
                "log": [{key: float(value) for key, value in entry.items()} for entry in log],
                "history": history,
                "weights": [np.asarray(value).ravel().tolist() for value in model.get_weights()],
                "predicted": model.predict(x[:6], verbose=0).tolist() if name == names[-1] else [],
            }
        )
        if is_planned and budget is None:
            workers = [f"/job:worker/task:{index}" for index in range(2)]
            results[-1]["peak"] = max(facts.peak_bytes or 0 for facts in server.look(workers))
            server.look(workers, forgets=True)
        if budget is not None:
            owned = (*model.variables, *model.optimizer.variables)
            step = graphswap.report(model).step
            results[-1]["bytes"] = sum(int(np.prod(v.shape)) * 4 for v in owned)
            results[-1]["peak"] = step.measured_peak_bytes
            results[-1]["ahead"] = len(step.plan.prefetches)
    return results


def asynchronous(updates):
    model, x = compiled("gpt", 40 * MIB, asynchronous=True, optimizer=descent)
    model.fit(x[np.arange(updates) % 24], Y[np.arange(updates) % 24], batch_size=1, epochs=1, verbose=0)
    metric = model.metrics[0]
    return {
        "iterations": int(model.optimizer.iterations.numpy()),
        "counted": float(metric.count.numpy()),
        "peak": graphswap.report(model).step.measured_peak_bytes,
    }


def lose_a_worker(steps):
    """Trains while a worker is ended; tells on which examples, and what the same training gives in one process."""
    model, x = compiled("perceptron", 16 * MIB, optimizer=descent)
    trained = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            trained.append(batch)
            print("batch", batch, flush=True)
            time.sleep(0.1)

    data = tf.data.Dataset.from_tensor_slices((x, Y)).repeat().batch(8).take(steps)
    model.fit(data, epochs=1, verbose=0, callbacks=[Watch()])
    keras.utils.set_random_seed(3)
    alone, _ = perceptron()
    alone.compile(descent(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    alone.fit(data, epochs=1, verbose=0)
    return {
        "trained": trained,
        "iterations": int(model.optimizer.iterations.numpy()),
        "weights": [float(np.sum(np.abs(value))) for value in model.get_weights()],
        "expected": [float(np.sum(np.abs(value))) for value in alone.get_weights()],
    }


def refused(what):
    """Does something that is refused. Returns the error."""
    if what == "version" and json.loads(os.environ["TF_CONFIG"])["task"] == {"type": "worker", "index": 1}:
        distribute.version = lambda: "0.0"
    server.STARTING_SECONDS = 20.0
    try:
        model, x = compiled("perceptron", 16 * MIB)
        model.fit(x, Y, verbose=0)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# --- tests ------------------------------------------------------------------------------------------------------

WORKERS = {"worker 0": DEVICE, "worker 1": DEVICE}


def chief_of(ended):
    chief = ended["chief 0"]
    assert chief.status == 0, "".join(f"{task}: {one.errors[-2000:]}\n" for task, one in ended.items())
    return chief.result


def test_two_workers_train_as_one_process_does_within_their_budgets():
    names = ["residual_network", "gpt", "perceptron"]
    results = chief_of(cluster.run_with_servers(2, WORKERS, __file__, "fit", names, True))
    (alone,) = cluster.call(1, None, __file__, "fit", names, False)
    for index, name in enumerate(names):
        plain, ours = results[2 * index : 2 * index + 2]
        for key in ("log", "history", "weights", "predicted"):
            assert plain[key] == ours[key], f"{name}: {key}"  # to the last bit
        assert ours["peak"] <= BUDGETS[name], name
        assert ours["ahead"] or name == "residual_network", name  # whose weights are small, and stay
        assert name == "residual_network" or plain["peak"] > BUDGETS[name], name  # it is all workspace of kernels
        one = alone[index]
        # Two sums over half a batch, and their mean, round otherwise than one over the batch.
        for received, expected in zip(ours["weights"], one["weights"], strict=True):
            np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6, err_msg=name)
        if name == "perceptron":  # whose weights and optimizer state are more than the budget
            assert ours["peak"] <= 0.3 * ours["bytes"]
        for key, values in one["history"].items():
            np.testing.assert_allclose(ours["history"][key], values, rtol=1e-5, err_msg=name)


def test_no_update_of_asynchronous_workers_is_lost():
    workers = {f"worker {index}": DEVICE for index in range(4)}
    result = chief_of(cluster.run_with_servers(4, workers, __file__, "asynchronous", 100))
    assert result["iterations"] == 100
    assert result["counted"] == 100.0
    assert result["peak"] <= 40 * MIB


def test_training_goes_on_without_a_worker_that_is_killed():
    ended = cluster.run_with_servers(2, WORKERS, __file__, "lose_a_worker", 20, killed=("worker 1", 1.0))
    assert ended["worker 1"].status == -signal.SIGKILL
    result = chief_of(ended)
    assert result["trained"] == list(range(20))
    assert result["iterations"] == 20  # each batch counts once, also those whose share was done twice
    # Sums over half a batch round otherwise, 20 steps long.
    np.testing.assert_allclose(result["weights"], result["expected"], rtol=1e-4)


def test_processes_that_differ_are_refused_on_all():
    ended = cluster.run_with_servers(2, WORKERS, __file__, "refused", "version")
    message = "graphswap: expected the same version of graphswap in every worker, received "
    assert ended["chief 0"].result.startswith(f"WorkerError: {message}")
    for task in ("worker 0", "worker 1", "ps 0"):
        assert ended[task].result.startswith(f"WorkerError: {message}"), task


if __name__ == "__main__":
    emulated.main(globals())
