"""Where plain Keras runs out of memory, graphswap trains and keeps the budget, by the allocator's own count."""

import emulated
import numpy as np
import pytest

from graphswap.options import parse_bytes

STEPS = 6
BUDGETS = {"cnn": "36MiB", "gpt": "24MiB"}


def cnn():
    from keras import Input, Model, layers

    x = inputs = Input((32, 32, 3))
    for _ in range(12):
        x = layers.Conv2D(16, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    random = np.random.default_rng(0)
    images, labels = random.normal(size=(16, 32, 32, 3)).astype("float32"), random.integers(0, 10, 16)
    return Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x))), images, labels


def gpt(blocks=4, width=64, length=64, vocabulary=200):
    from keras import Input, Model, layers

    x = inputs = Input((length,), dtype="int32")
    x = layers.Embedding(vocabulary, width)(x)
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, width // 4, dropout=0.1)(y, y, use_causal_mask=True)
        y = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(width)(y)
    text = np.random.default_rng(0).integers(0, vocabulary, (16, length + 1))
    return Model(inputs, layers.Dense(vocabulary)(x)), text[:, :-1], text[:, 1:]


def train(model_name, budget):
    """Trains a few steps; the losses and what the device's allocator counted, or the error."""
    import keras
    import tensorflow as tf
    import trainings

    import graphswap

    tf.config.optimizer.set_experimental_options(trainings.PINS)
    keras.utils.set_random_seed(0)
    model, x, y = {"cnn": cnn, "gpt": gpt}[model_name]()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, **({"graphswap": budget} if budget else {}))
    try:
        losses = [float(model.train_on_batch(x, y)) for _ in range(STEPS)]
    except tf.errors.ResourceExhaustedError as error:
        return {"error": str(error), "text": str(graphswap.report(model)) if budget else ""}
    peak = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    if not budget:
        return {"losses": losses, "peak": peak}
    step = graphswap.report(model).step
    return {"losses": losses, "peak": peak, "predicted": step.predicted_peak_bytes, "text": str(step)}


@pytest.mark.parametrize("model", BUDGETS)
def test_graphswap_trains_where_plain_keras_runs_out_of_memory(model):
    budget = BUDGETS[model]
    memory_bytes = parse_bytes(budget)
    assert "OOM" in emulated.call(memory_bytes, __file__, "train", model, None)["error"]
    plain = emulated.call(1 << 30, __file__, "train", model, None)
    ours = emulated.call(memory_bytes, __file__, "train", model, budget)
    print(f"{model}: plain peak {plain['peak'] / 2**20:.1f}MiB; with graphswap {ours['text']}")
    assert ours["peak"] <= memory_bytes < plain["peak"]
    assert ours["predicted"] == pytest.approx(ours["peak"], rel=0.05)
    assert ours["losses"] == plain["losses"]


if __name__ == "__main__":
    emulated.main(globals())
