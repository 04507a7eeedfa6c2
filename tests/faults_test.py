"""Workers and servers that are ended while they train, networks that are cut, and what becomes of the training."""

import json
import os
import signal
import time

import cluster
import emulated
import keras
import network
import numpy as np
import pytest
import tensorflow as tf
import trainings
from keras import layers

import graphswap
from graphswap import distribute
from graphswap.tools import launch

MIB = 1 << 20
EPOCHS, BATCHES, BATCH = 4, 4, 512
X = np.random.default_rng(0).normal(size=(BATCH * BATCHES, 4)).astype("float32")
Y = np.random.default_rng(1).integers(0, 4, len(X))
STATED_SECONDS = 60
"""Within which what is left of a cluster ends."""


def distribution():
    if "ps" not in json.loads(os.environ["TF_CONFIG"])["cluster"]:
        return tf.distribute.MultiWorkerMirroredStrategy()
    graphswap.serve()
    return tf.distribute.ParameterServerStrategy(tf.distribute.cluster_resolver.TFConfigClusterResolver())


def fit(directory, killed="", pause=0.0, is_sharded=False):
    """Fits with a backup after each epoch.

    Args:
        directory: For the backup.
        killed: A task that ends itself in the middle of the third epoch.
        pause: Seconds after each batch.
        is_sharded: Whether the workers divide the optimizer's state, which is larger then.
    """
    keras.utils.set_random_seed(3)
    with distribution().scope():
        width = 160 if is_sharded else 64
        hidden = [
            layer for _ in range(4) for layer in (layers.Dense(width), layers.LayerNormalization(), layers.ReLU())
        ]
        model = keras.Sequential([keras.Input((4,)), *hidden, layers.Dense(4)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        option = graphswap.Options(width * MIB // 20, planning_seconds=1.0, shard_optimizer=is_sharded)
        model.compile(keras.optimizers.Adam(1e-2), loss, graphswap=option)
    log, last = [], time.perf_counter()

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            nonlocal last
            print("batch", batch, flush=True)
            time.sleep(pause)
            last = time.perf_counter()
            log.append(float((logs or {})["loss"]))
            if distribute.own_name() == killed and len(log) == 2 * BATCHES + 2:
                os.kill(os.getpid(), signal.SIGKILL)

    error = ""
    try:
        with trainings.reproducible():
            data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
            backup = keras.callbacks.BackupAndRestore(directory, double_checkpoint=True)
            model.fit(data, epochs=EPOCHS, verbose=0, callbacks=[backup, Watch()])
    except (RuntimeError, tf.errors.OpError) as raised:
        error = "\n".join([f"{type(raised).__name__}: {raised}", *getattr(raised, "__notes__", ())])
    seconds = time.perf_counter() - last
    weights = (
        [] if error else [np.asarray(v.numpy()).tobytes().hex() for v in (*model.variables, *model.optimizer.variables)]
    )
    return {"log": log, "error": error, "seconds": seconds, "weights": weights}


def cut(wires, seconds):
    for wire in wires:
        wire.cut()
    time.sleep(seconds)
    for wire in wires:
        wire.mend()


def with_servers(directory, **options):
    ended = cluster.run_with_servers(1, {}, __file__, "fit", str(directory), "", 0.2, **options)
    assert ended["chief 0"].status == 0, ended["chief 0"].errors[-4000:]
    return ended["chief 0"].result, ended["ps 0"].status


# --- tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Of a training with a parameter server."""
    return with_servers(tmp_path_factory.mktemp("undisturbed"))[0]


def check_error(result):
    assert result["error"].startswith(("UnavailableError", "DeadlineExceededError"))
    assert "graphswap: expected all processes of the cluster to go on, received no answer of one." in result["error"]
    assert "with keras.callbacks.BackupAndRestore `fit` goes on from its last backup." in result["error"]
    assert result["seconds"] < STATED_SECONDS


@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "sharded"])
def test_workers_go_on_from_the_last_backup(tmp_path, is_sharded):
    whole = cluster.call(2, None, __file__, "fit", str(tmp_path / "whole"), "", 0.0, is_sharded)
    assert not (tmp_path / "whole").exists()
    left, killed = cluster.run(2, None, __file__, "fit", str(tmp_path / "cut"), "worker 1", 0.0, is_sharded)
    assert killed.status == -signal.SIGKILL
    check_error(left.result)
    resumed = cluster.call(2, None, __file__, "fit", str(tmp_path / "cut"), "", 0.0, is_sharded)
    for one, other in zip(resumed, whole, strict=True):
        assert one["log"] == other["log"][2 * BATCHES :]
        assert one["weights"] == other["weights"]


def test_a_network_between_workers_that_is_cut_is_an_error_on_both(tmp_path):
    configs = [json.loads(config) for config in launch.cluster_configs(2).values()]
    wires = [network.Wire(address) for address in configs[0]["cluster"]["worker"]]
    for index, config in enumerate(configs):
        config["cluster"]["worker"][1 - index] = wires[1 - index].address
    texts = [json.dumps(config) for config in configs]
    arguments = __file__, "fit", str(tmp_path / "cut"), "", 0.5
    for one in cluster.run(2, None, *arguments, configs=texts, meanwhile=lambda: cut(wires, 30)):
        check_error(one.result)


def test_a_training_goes_on_from_the_last_backup_with_a_new_parameter_server(tmp_path, undisturbed):
    left, status = with_servers(tmp_path / "cut", killed=("ps 0", 0.2 * 2.5 * BATCHES))
    assert status == -signal.SIGKILL
    check_error(left)
    resumed, _ = with_servers(tmp_path / "cut")
    epochs, rest = divmod(len(resumed["log"]), BATCHES)
    assert 0 < epochs < EPOCHS and not rest
    assert resumed["log"] == undisturbed["log"][-len(resumed["log"]) :]
    assert resumed["weights"] == undisturbed["weights"]


def test_a_network_between_chief_and_worker_that_is_cut_is_waited_for(tmp_path, undisturbed):
    tasks = {str(task): json.loads(config) for task, config in launch.cluster_configs(1, 1).items()}
    wire = network.Wire(tasks["chief 0"]["cluster"]["worker"][0])
    tasks["chief 0"]["cluster"]["worker"] = [wire.address]
    configs = {task: json.dumps(config) for task, config in tasks.items()}
    result, _ = with_servers(tmp_path / "cut", configs=configs, meanwhile=lambda: cut([wire], 30))
    assert result["log"] == undisturbed["log"]
    assert result["weights"] == undisturbed["weights"]


if __name__ == "__main__":
    emulated.main(globals())
