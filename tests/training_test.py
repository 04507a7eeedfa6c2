"""Training with graphswap gives the same bits as plain Keras: losses, metrics, and every variable."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import trainings
from keras import layers

import graphswap

BATCH = 8
ROWS = 5 * BATCH
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CASES: dict[str, trainings.Training] = {}


@pytest.fixture(scope="module", autouse=True)
def pins():
    with trainings.reproducible():
        yield


def case(train: trainings.Training) -> trainings.Training:
    CASES[train.__name__] = train
    return train


def images(rows=ROWS, size=16):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, size, size, 3)).astype("float32"), rng.integers(0, 10, rows)


def words(rows=ROWS, length=48):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, (rows, length))
    tokens[:, length * 3 // 4 :] *= rng.integers(0, 2, (rows, 1))  # some rows end early
    return tokens, rng.integers(0, 10, rows)


def block(x, filters=16, dropout=0.1):
    x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    return layers.Dropout(dropout)(x) if dropout else x


def cnn(shape=(16, 16, 3), dropout=0.1):
    x = inputs = keras.Input(shape)
    for _ in range(3):
        x = block(x, dropout=dropout)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def train(log, model, data, optimizer="adam", fitting=None, loss=LOSS, **compile_arguments):
    """Compiles the model and fits it for one pass over the data, without shuffling."""
    compile_arguments = {"metrics": ["accuracy"], **compile_arguments}
    model.compile(optimizer, loss, **compile_arguments)
    fit(log, model, data, **(fitting or {}))
    return [model]


def fit(log, model, data, **arguments):
    x, y = (data, None) if isinstance(data, tf.data.Dataset) else data
    if y is not None:
        arguments = {"batch_size": BATCH, **arguments}
    model.fit(x, y, verbose=0, shuffle=False, callbacks=[trainings.Recorder(log)], **arguments)


# --- kinds of models --------------------------------------------------------------------------------------------


@case
def functional(log, **option):
    return train(log, cnn(), images(), **option)


@case
def sequential(log, **option):
    stack = [layers.Conv2D(16, 3, padding="same", activation="relu") for _ in range(4)]
    model = keras.Sequential([*stack, layers.Flatten(), layers.Dense(10)])
    return train(log, model, images(), "sgd", **option)


class Residual(keras.Model):
    def __init__(self):
        super().__init__()
        self.convolutions = [layers.Conv2D(16, 3, padding="same") for _ in range(4)]
        self.norms = [layers.BatchNormalization() for _ in range(4)]
        self.dropout = layers.Dropout(0.2)
        self.head = layers.Dense(10)

    def call(self, x, training=None):
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = self.dropout(tf.nn.relu(norm(convolution(x), training=training)), training=training)
            x = x + y if index else y
        return self.head(tf.reduce_mean(x, (1, 2)))


@case
def subclass(log, **option):
    return train(log, Residual(), images(), **option)


class OwnStep(Residual):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            loss = self.compute_loss(x, y, predicted)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, predicted)
        return {**self.get_metrics_result(), "norm": tf.linalg.global_norm(gradients)}


@case
def custom_train_step(log, **option):
    return train(log, OwnStep(), images(), **option)


@case
def open_image_size(log, **option):
    return train(log, cnn((None, None, 3)), images(), **option)


@case
def two_models_that_share_layers(log, **option):
    inputs = keras.Input((16, 16, 3))
    features = block(block(inputs))
    models = []
    for units in (10, 12):
        outputs = layers.Dense(units)(layers.GlobalAveragePooling2D()(block(features)))
        models.append(keras.Model(inputs, outputs))
        models[-1].compile("adam", LOSS, metrics=["accuracy"], **option)
    for _ in range(2):
        for model in models:
            fit(log, model, images(3 * BATCH))
    return models


# --- layers -----------------------------------------------------------------------------------------------------


@case
def stacked_lstm(log, **option):
    x = inputs = keras.Input((48,), dtype="int32")
    x = layers.Embedding(50, 64)(x)
    x = layers.LSTM(64, return_sequences=True, dropout=0.1)(x)
    x = layers.LSTM(64)(layers.LayerNormalization()(x))
    return train(log, keras.Model(inputs, layers.Dense(10)(x)), words(), **option)


@case
def masked_gru(log, **option):
    x = inputs = keras.Input((48,), dtype="int32")
    x = layers.Embedding(50, 64, mask_zero=True)(x)
    x = layers.GRU(64, return_sequences=True)(x)
    x = layers.GRU(64)(layers.Dense(64, activation="gelu")(x))
    return train(log, keras.Model(inputs, layers.Dense(10)(x)), words(), **option)


@case
def transformer(log, **option):
    x = inputs = keras.Input((48,), dtype="int32")
    x = layers.Embedding(50, 64)(x)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 16, dropout=0.1)(y, y, use_causal_mask=True)
        y = layers.Dense(128, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dropout(0.1)(layers.Dense(64)(y))
    return train(log, keras.Model(inputs, layers.Dense(10)(x[:, -1])), words(), **option)


@case
def u_net(log, **option):
    inputs = keras.Input((32, 32, 3))
    high = block(inputs, 8, dropout=0)
    low = block(layers.MaxPooling2D(2)(high), 16, dropout=0)
    low = block(layers.Conv2D(16, 3, strides=2, padding="same")(low), 16)
    low = layers.Conv2DTranspose(16, 3, strides=2, padding="same")(low)
    up = layers.Conv2DTranspose(8, 3, strides=2, padding="same", activation="relu")(low)
    outputs = layers.Conv2D(3, 3, padding="same")(layers.Concatenate()([high, up]))
    x, _ = images(size=32)
    return train(log, keras.Model(inputs, outputs), (x, x[:, ::-1]), loss="mse", metrics=["mae"], **option)


@case
def dense_net(log, **option):
    x = inputs = keras.Input((16, 16, 3))
    for _ in range(4):
        y = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.Concatenate()([x, layers.Conv2D(12, 3, padding="same")(y)])
    x = layers.AveragePooling2D(2)(layers.Conv2D(16, 1)(x))
    return train(log, keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x))), images(), **option)


# --- precision, optimizers, losses ------------------------------------------------------------------------------


def with_policy(policy: str, optimizer) -> trainings.Training:
    def mixed(log, **option):
        keras.config.set_dtype_policy(policy)
        try:
            return train(log, cnn((24, 24, 3)), images(size=24), optimizer(), **option)
        finally:
            keras.config.set_dtype_policy("float32")

    return mixed


CASES["mixed_bfloat16"] = with_policy("mixed_bfloat16", keras.optimizers.Adam)
CASES["mixed_float16"] = with_policy(
    "mixed_float16",
    lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(momentum=0.9), dynamic_growth_steps=2),
)


def with_optimizer(**arguments) -> trainings.Training:
    return lambda log, **option: train(log, cnn(), images(), keras.optimizers.AdamW(**arguments), **option)


CASES["gradient_accumulation"] = with_optimizer(gradient_accumulation_steps=2)
CASES["use_ema"] = with_optimizer(use_ema=True, ema_overwrite_frequency=3, clipnorm=0.1)
CASES["global_clipnorm"] = with_optimizer(global_clipnorm=0.1, weight_decay=0.01)


@case
def class_weight_and_validation_data(log, **option):
    x, y = images()
    fitting = {"class_weight": {i: 1 + 0.1 * i for i in range(10)}, "validation_data": (x[:12], y[:12])}
    return train(log, cnn(), (x, y), fitting=fitting, weighted_metrics=["accuracy"], **option)


# --- ways to feed -----------------------------------------------------------------------------------------------


@case
def partial_last_batch(log, **option):
    return train(log, cnn(), images(ROWS - 5), fitting={"epochs": 2}, **option)


@case
def partial_last_batch_of_a_dataset(log, **option):
    return train(log, cnn(), tf.data.Dataset.from_tensor_slices(images(ROWS - 5)).batch(BATCH), **option)


@case
def steps_per_execution(log, **option):
    return train(log, cnn(), images(), fitting={"epochs": 3}, steps_per_execution=3, **option)


@case
def train_on_batch_of_changing_size(log, **option):
    model = cnn()
    model.compile("adam", LOSS, metrics=["accuracy"], **option)
    for rows in (8, 5, 8, 12, 8, 3):
        log.append(model.train_on_batch(*images(rows)))
    return [model]


@case
def evaluate_and_predict_around_fit(log, **option):
    model = cnn()
    x, y = images()
    model.compile("adam", LOSS, metrics=["accuracy"], **option)
    for _ in range(2):
        log.append(model.evaluate(x, y, batch_size=BATCH, verbose=0))
        log.append(model.predict(x, batch_size=BATCH, verbose=0))
        fit(log, model, (x, y))
    log.append(model.evaluate(x, y, batch_size=BATCH, verbose=0))
    return [model]


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_keras(name):
    with trainings.analytic_costs():
        trainings.assert_equal_to_plain(CASES[name])


def test_a_saved_model_keeps_the_option_and_goes_on_equally(tmp_path):
    def save_and_load(log, **option):
        [model] = train(log, cnn(), images(), **option)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        fit(log, loaded, images())
        return [loaded]

    options = {"memory_budget": "min", "strategy": "swap_all", "swap_to": "host"}
    trainings.assert_equal_to_plain(save_and_load, ["swaps"], **options)


# --- strategies and tiers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["swap", "recompute"])
def test_one_way_alone_equals_plain_keras(way):
    with trainings.analytic_costs():
        [step] = trainings.assert_equal_to_plain(functional, [f"{way}s"], strategy=trainings.EvictAll((way,)))
    assert way == "swap" or len(step.plan.recomputes) > 5


@pytest.mark.parametrize("strategy", ["auto", "chen", "greedy", "karma", "swap_all"])
def test_every_strategy_equals_plain_keras(strategy):
    wanted = {"swap_all": ["swaps"], "chen": ["recomputes"]}.get(strategy, ["decisions"])
    trainings.assert_equal_to_plain(functional, wanted, strategy=strategy)


def test_swapping_to_disk_equals_plain_keras(tmp_path):
    trainings.assert_equal_to_plain(functional, swap_to=tmp_path)
    (private,) = tmp_path.iterdir()
    assert any(file.name != "lock" and file.stat().st_size > 1 << 16 for file in private.iterdir())


# --- without Keras ----------------------------------------------------------------------------------------------


def raw_training(is_nested: bool):
    """A step of gradient descent with momentum on a chain of convolutions, and its variables."""
    random = np.random.default_rng(0)
    kernels = [tf.Variable(random.normal(0, 0.2, (3, 3, i, 16)).astype("float32")) for i in (3, 16, 16, 16)]
    momenta = [tf.Variable(tf.zeros_like(kernel)) for kernel in kernels]

    def layer(x, kernel):
        return tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME"))

    layer = tf.function(layer) if is_nested else layer

    def step(x, target):
        with tf.GradientTape() as tape:
            for kernel in kernels:
                x = layer(x, kernel)
            loss = tf.reduce_mean(tf.square(tf.reduce_sum(x, -1) - target))
        for kernel, momentum, gradient in zip(kernels, momenta, tape.gradient(loss, kernels), strict=True):
            momentum.assign(0.9 * momentum + gradient)
            kernel.assign_sub(0.01 * momentum)
        return {"loss": loss}

    return step, [*kernels, *momenta]


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_raw_step_equals_plain_tensorflow(is_nested):
    images = np.random.default_rng(1).normal(size=(5, BATCH, 16, 16, 3)).astype("float32")
    plain_step, plain_variables = raw_training(is_nested)
    step, variables = raw_training(is_nested)
    plain_step = tf.function(plain_step)
    step = graphswap.function(step, memory_budget="min", strategy=trainings.EvictAll(), swap_to="host")
    for x in images:
        assert step(x, target=tf.constant(x[..., 0]))["loss"] == plain_step(x, target=tf.constant(x[..., 0]))["loss"]
    for plain, ours in zip(plain_variables, variables, strict=True):
        np.testing.assert_array_equal(plain, ours)
    plan = graphswap.report(step).step.plan
    assert plan.swaps
    assert plan.recomputes


def test_function_decorates_a_function_or_a_tf_function():
    for prepare in (lambda f: f, tf.function):
        weight = tf.Variable(tf.ones((256, 256)))

        @graphswap.function(memory_budget="1GiB")
        @prepare
        def step(x, scale=1.0):
            """Adds to the weight."""
            weight.assign_add(x * scale)  # noqa: B023
            return x, scale

        x, scale = step(tf.ones((256, 256)), scale=2.0)
        assert step.__doc__ == "Adds to the weight."
        assert (x[0, 0], scale, weight[0, 0]) == (1, 2, 3)
        assert graphswap.report(step).step.status == "needs nothing"
