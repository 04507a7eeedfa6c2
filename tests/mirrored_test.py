"""Trains on two logical devices of one process, plainly and with graphswap, and compares bits, budgets and errors."""

import emulated
import keras
import numpy as np
import tensorflow as tf
import trainings
from keras import layers

import graphswap
from graphswap import profiler
from graphswap.tools import architectures

MIB = 1 << 20
AMPLE = 1024 * MIB
STEPS = 4
BATCH = {"residual": 64, "gpt": 16}


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
    tokens = keras.Input((64,), dtype="int32")
    x = layers.Embedding(100, 64)(tokens) + layers.Embedding(64, 64)(np.arange(64)[None])
    for _ in range(3):
        x = architectures.transformer_block(x, 4, is_causal=True)
    return keras.Model(tokens, layers.Dense(100)(layers.LayerNormalization()(x)))


def batches(kind):
    """All batches of a training, in one."""
    rng = np.random.default_rng(0)
    count = STEPS * BATCH[kind]
    if kind == "gpt":
        words = rng.integers(0, 100, (count, 65), "int32")
        return words[:, :-1], words[:, 1:]
    return rng.normal(size=(count, 32, 32, 3)).astype("float32"), rng.integers(0, 10, count)


# --- run in processes of their own ------------------------------------------------------------------------------


def divide(count):
    """Makes several devices of the CPU, before TensorFlow begins."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)


def train(kind, devices, budget):
    """Trains for a few steps. Without enough memory it returns what TensorFlow says."""
    divide(devices)
    keras.utils.set_random_seed(3)
    option = {} if budget is None else {"graphswap": graphswap.Options(budget, swap_to="host", planning_seconds=1.0)}
    names = [f"CPU:{index}" for index in range(devices)]
    distribution = tf.distribute.MirroredStrategy(names) if devices > 1 else tf.distribute.get_strategy()
    log = []
    with trainings.reproducible():
        with distribution.scope():
            model = {"residual": residual, "gpt": gpt}[kind]()
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.SGD(0.01), loss, metrics=["accuracy"], **option)
        x, y = batches(kind)
        try:
            model.fit(x, y, batch_size=BATCH[kind], callbacks=[trainings.Recorder(log)], shuffle=False, verbose=0)
        except tf.errors.ResourceExhaustedError as error:
            return {"error": error.message[:200]}
    result = {
        "logs": [{name: float(value) for name, value in one.items()} for one in log],
        "weights": [np.asarray(v.numpy()).astype("float64").ravel().tolist() for v in model.trainable_variables],
        "bits": [np.asarray(v.numpy()).tobytes().hex() for v in (*model.variables, *model.optimizer.variables)],
        "peak": profiler.memory_in_use("peak"),
    }
    if budget is not None:
        step = graphswap.report(model).steps[0]
        result |= {"swaps": len(step.plan.swaps), "recomputes": len(step.plan.recomputes), "notes": step.notes}
        result |= {"report": str(step)}
    return result


if __name__ == "__main__":
    emulated.main(globals())
