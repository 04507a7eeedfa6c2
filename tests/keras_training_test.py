"""What shares of a batch come to, computed and counted in this process; `parameter_server_test` has the cluster."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from graphswap import keras_training
from graphswap.options import Options

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(16, 4)).astype("float32"), RANDOM.normal(size=(16, 1)).astype("float32")


class Penalty(layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(keras.ops.square(x)))
        return x


def compiled(*others):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), *others, layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    return model


def trained(model, options, sizes):
    """Counts shares of these sizes in one update. Returns what came of them."""
    training = keras_training.Training(model, options)
    ends = np.cumsum([0, *sizes])
    updates = []
    for start, end in zip(ends, ends[1:], strict=False):
        buffers = [tf.Variable(tf.zeros(weight.shape)) for weight in model.trainable_variables]
        training._buffers.append(buffers)
        updates.append(training._compute((tf.constant(X[start:end]), tf.constant(Y[start:end])), buffers))
    logs = training._updated(tf.constant([size / sum(sizes) for size in sizes]), updates, training._buffers)
    return {name: float(value) for name, value in logs.items()}


def test_shares_come_to_what_the_batch_does_with_losses_of_layers():
    ours, alone = compiled(layers.Dense(8), Penalty()), compiled(layers.Dense(8), Penalty())
    ours.set_weights(alone.get_weights())
    logs = trained(ours, None, [7, 9])
    expected = alone.train_on_batch(X, Y, return_dict=True)
    for received, weight in zip(ours.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(received, weight, rtol=1e-6, atol=1e-7)  # sums over shares round otherwise
    assert logs == pytest.approx(expected, rel=1e-6)


def test_new_statistics_are_averaged():
    model = compiled(layers.BatchNormalization(momentum=0.5))
    trained(model, None, [4, 12])
    moving_mean = model.layers[0].moving_mean.numpy()
    np.testing.assert_allclose(moving_mean, 0.5 * X.mean(0), rtol=1e-5, atol=1e-7)  # a mean of means rounds otherwise


def test_asynchronously_new_statistics_are_added():
    model = compiled(layers.BatchNormalization(momentum=0.5))
    training = keras_training.Training(model, Options("1GiB", asynchronous=True))
    buffers = [[tf.Variable(tf.zeros(weight.shape)) for weight in model.trainable_variables] for _ in range(2)]
    halves = [(tf.constant(X[:8]), tf.constant(Y[:8])), (tf.constant(X[8:]), tf.constant(Y[8:]))]
    updates = [training._compute(half, own) for half, own in zip(halves, buffers, strict=True)]  # of the same weights
    for update, own in zip(updates, buffers, strict=True):
        training._updated(tf.constant([1.0]), [update], [own])
    expected = 0.5 * X[:8].mean(0) + 0.5 * X[8:].mean(0)
    np.testing.assert_allclose(model.layers[0].moving_mean.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert int(model.optimizer.iterations) == 2


def test_a_step_that_assigns_weights_is_refused():
    model = compiled(layers.SpectralNormalization(layers.Dense(4, name="inner")))
    with pytest.raises(ValueError, match=r"received one that assigns .*inner/kernel\. Under ParameterServerStrategy"):
        trained(model, None, [16])


def test_a_step_that_calls_the_optimizer_twice_is_refused():
    model = compiled()
    step = model.train_step
    model.train_step = lambda batch: (step(batch), step(batch))
    with pytest.raises(ValueError, match="calls the optimizer once, received one that does so 2 times"):
        trained(model, None, [16])


def test_what_is_not_there_stays_so():
    optional = tf.experimental.Optional.empty(tf.TensorSpec(()))
    assert [keras_training._tensor(leaf) for leaf in (None, optional)] == [None, None]


def test_without_a_step_nothing_is_asked_of_a_cluster():
    assert keras_training.Training(compiled(), None).finish() == {}
