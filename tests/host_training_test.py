"""Steps whose variables live outside of the device: inside the budget, bit for bit what the plain step computes."""

import re

import emulated
import numpy as np

STEPS = 5
OPTIMIZERS = "SGD RMSprop Adam AdamW Adadelta Adagrad Adamax Adafactor Nadam Ftrl Lion Lamb Muon".split()
TOO_LARGE = 3e38
"""To scale a loss with: gradients are not finite in the first step, which then updates nothing but lowers the scale."""


def dense(layers=4, width=512, batch=32):
    from keras import Input, Sequential
    from keras import layers as kl

    random = np.random.default_rng(0)
    x, y = (random.normal(size=(batch, width)).astype("float32") for _ in range(2))
    return Sequential([Input((width,)), *(kl.Dense(width, "tanh") for _ in range(layers))]), x, y, "mse"


def embedded(vocabulary=2000, width=128):
    """A table of which rows are read, and which is the last layer's weight, too."""
    import keras
    from keras import layers as kl

    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = kl.Embedding(vocabulary, width)
            self.hidden = [kl.Dense(width, "tanh") for _ in range(3)]

        def call(self, tokens):
            x = self.table(tokens)
            for layer in self.hidden:
                x = layer(x)
            return keras.ops.matmul(x, keras.ops.transpose(self.table.embeddings))

    tokens = np.random.default_rng(0).integers(0, vocabulary, (8, 17))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Tied(), tokens[:, :-1], tokens[:, 1:], loss


def convolutional(blocks=6, width=128, size=16, batch=16):
    """Kernels that can leave the device between activations of many sizes, and small variables that stay."""
    from keras import Input, Model
    from keras import layers as kl

    random = np.random.default_rng(0)
    x = inputs = Input((size, size, 3))
    for block in range(blocks):
        x = kl.Conv2D(width, 3, padding="same", strides=1 + block % 2)(x)
        x = kl.Activation("relu")(kl.BatchNormalization()(x))
    outputs = kl.Dense(10)(kl.GlobalAveragePooling2D()(x))
    images, targets = random.normal(size=(batch, size, size, 3)), random.normal(size=(batch, 10))
    return Model(inputs, outputs), images.astype("float32"), targets.astype("float32"), "mse"


MODELS = {"dense": dense, "embedded": embedded, "convolutional": convolutional}


def train(
    budget,
    optimizer="Adam",
    model_name="dense",
    policy="float32",
    options=None,
    folds_constants=False,
    loss_scale=None,
    **settings,
):
    """Losses and digests of the variables; with a budget, all variables are made outside of the device."""
    import contextlib
    import gc
    import zlib

    import keras
    import tensorflow as tf
    import trainings

    import graphswap
    from graphswap import ir

    tf.config.optimizer.set_experimental_options({**trainings.PINS, "constant_folding": folds_constants})
    keras.utils.clear_session()
    gc.collect()
    if isinstance(budget, int):  # beside what earlier models have left
        budget += tf.config.experimental.get_memory_info("CPU:0")["current"]
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_global_policy(policy)
    with graphswap.host_variables() if budget else contextlib.nullcontext():
        model, x, y, loss = MODELS[model_name]()
    option = {"graphswap": graphswap.Options(budget, planning_seconds=2.0, **(options or {}))} if budget else {}
    chosen = getattr(keras.optimizers, optimizer)(**settings)
    if loss_scale is not None:
        chosen = keras.optimizers.LossScaleOptimizer(chosen, initial_scale=loss_scale, dynamic_growth_steps=3)
        y = 600 * y
    model.compile(chosen, loss, jit_compile=False, **option)
    losses = [float(model.train_on_batch(x, y)) for _ in range(STEPS)]
    peak = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    values = [np.array(variable.numpy()) for variable in (*model.variables, *model.optimizer.variables)]
    result = {"losses": losses, "variables": [zlib.crc32(value.tobytes()) for value in values], "peak": peak}
    result["finite"] = all(np.isfinite(value.astype("float32")).all() for value in values)
    if budget:
        report = graphswap.report(model)
        result |= {"text": str(report), "placed": max(len(step.plan.places) for step in report.steps)}
        result["predicted"] = [step.predicted_peak_bytes for step in report.steps]
        graphs = [step.file.graph for step in report.steps if step.file is not None]
        stores = [(graph, name) for graph in graphs for name in graph.stores.values()]
        result["updated_there"] = sum(graph.by_name[name].op == ir.UPDATE for graph, name in stores)
        result["stored"] = len(stores) - result["updated_there"]
    return result


RUNS = [
    *((name, (6 if name in ("SGD", "Lion") else 9) << 20, {"optimizer": name}) for name in OPTIMIZERS),
    ("clipping", 9 << 20, {"global_clipnorm": 0.1}),
    ("averages", 9 << 20, {"use_ema": True, "ema_overwrite_frequency": 2}),
    ("accumulation", 15 << 20, {"gradient_accumulation_steps": 3}),
    ("mixed precision", 9 << 20, {"policy": "mixed_bfloat16"}),
    ("loss scaling", 9 << 20, {"loss_scale": TOO_LARGE}),
    ("scaled accumulation", 15 << 20, {"gradient_accumulation_steps": 2, "loss_scale": TOO_LARGE}),
    ("table", 5 << 20, {"model_name": "embedded"}),
    (
        "constants",
        10 << 20,
        {"optimizer": "RMSprop", "centered": True, "momentum": 0.9, "loss_scale_factor": 3.0, "folds_constants": True},
    ),
]


def train_beside_compute(budget):
    """The same with an accelerator that is not the host, whose copies run beside compute; all variables leave it."""
    import dataclasses
    from unittest import mock

    from graphswap import model_data, profiler
    from graphswap.plan import Place
    from graphswap.variables import worth_moving

    def choose(graph, cost_model, memory_budget, strategy, movable, fixed=(), *_, **__):
        there = {place.variable for place in fixed}
        return (*fixed, *(Place(name) for name in worth_moving(graph, movable) if name not in there))

    measured = profiler.device_spec

    def spec(*arguments, **settings):
        device = measured(*arguments, **settings)
        links = {tier: dataclasses.replace(link, overlaps=True) for tier, link in device.links.items()}
        return dataclasses.replace(device, links=links, computes_there=False, runs_pairs=False)

    with mock.patch.object(profiler, "device_spec", spec), mock.patch.object(model_data, "choose", choose):
        return train(budget)


def accumulate(budget):
    return train(budget, gradient_accumulation_steps=3)


def train_all(has_budget):
    return [train(budget if has_budget else None, **settings) for _, budget, settings in RUNS]


def test_a_model_larger_than_the_device_trains(tmp_path):
    device_bytes = 10 << 20
    ours = emulated.call(device_bytes, __file__, "train", "auto")
    plain = emulated.call(1 << 30, __file__, "train", None)
    assert plain["peak"] > 16 << 20 > device_bytes >= ours["peak"]
    assert "variables (" in ours["text"]
    assert (ours["losses"], ours["variables"]) == (plain["losses"], plain["variables"])
    options = {"swap_to": str(tmp_path), "host_memory": "4MiB"}
    mixed = emulated.call(device_bytes, __file__, "train", "auto", "Adam", "dense", "float32", options)
    assert device_bytes >= mixed["peak"]
    assert re.search(r"variables \(\S+ on host, \S+ on disk; ", mixed["text"]), mixed["text"]
    taken = re.search(r"host memory: (\S+) planned, (\S+) measured; disk: (\S+) planned, (\S+) measured", mixed["text"])
    assert taken, mixed["text"]
    assert (taken[1], taken[3]) == (taken[2], taken[4])
    assert (mixed["losses"], mixed["variables"]) == (plain["losses"], plain["variables"])


def test_the_first_plan_holds_and_its_peak_is_true():
    """Small variables stay among activations of many sizes: where they lie must not cut the device's free memory."""
    device_bytes = 24 << 20
    ours = emulated.call(device_bytes, __file__, "train", "auto", "Adam", "convolutional")
    plain = emulated.call(1 << 30, __file__, "train", None, "Adam", "convolutional")
    assert ours["placed"], ours["text"]
    assert "planned again" not in ours["text"]
    (predicted,) = ours["predicted"]
    assert 0.97 * predicted <= ours["peak"] <= device_bytes < plain["peak"]
    assert (ours["losses"], ours["variables"]) == (plain["losses"], plain["variables"])


def test_gradients_are_accumulated_where_zeros_have_no_room_to_be_constants():
    """TensorFlow would fold the zeros of all sums of gradients, and crash where they find no room twice."""
    device_bytes = 16 << 20
    ours = emulated.call(device_bytes, __file__, "accumulate", "auto")
    plain = emulated.call(1 << 30, __file__, "accumulate", None)
    assert ours["peak"] <= device_bytes < plain["peak"]
    assert (ours["losses"], ours["variables"]) == (plain["losses"], plain["variables"])


def test_a_model_larger_than_the_device_trains_with_loss_scaling():
    device_bytes = 12 << 20
    scaled = ("Adam", "dense", "float32", {}, False, TOO_LARGE)
    ours = emulated.call(device_bytes, __file__, "train", "auto", *scaled)
    plain = emulated.call(1 << 30, __file__, "train", None, *scaled)
    assert ours["peak"] <= device_bytes < 16 << 20 < plain["peak"]
    assert ours["updated_there"] and not ours["stored"]
    assert len(set(plain["losses"])) > 2  # some steps update, others do not
    assert plain["losses"][0] == plain["losses"][1]
    assert (ours["losses"], ours["variables"]) == (plain["losses"], plain["variables"])


def test_copies_of_variables_run_beside_compute():
    device_bytes = 12 << 20
    ours = emulated.call(device_bytes, __file__, "train_beside_compute", "auto")
    plain = emulated.call(1 << 30, __file__, "train", None)
    assert plain["peak"] > 16 << 20 > device_bytes >= ours["peak"]
    assert ours["stored"] and not ours["updated_there"]
    assert re.search(r"nodes repeated \(\S+ s\), \d+ copies of variables beside compute", ours["text"]), ours["text"]
    assert (ours["losses"], ours["variables"]) == (plain["losses"], plain["variables"])


def test_optimizers_and_their_settings_compute_the_same_bits():
    ours, plain = (emulated.call(1 << 30, __file__, "train_all", has_budget) for has_budget in (True, False))
    for (name, _, _), one, other in zip(RUNS, ours, plain, strict=True):
        assert one["placed"], name
        assert one["updated_there"] or name == "Adafactor", name  # which computes with rows and columns
        assert other["finite"], name
        assert one["losses"] == other["losses"], name
        assert one["variables"] == other["variables"], name


if __name__ == "__main__":
    emulated.main(globals())
