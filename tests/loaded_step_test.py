"""A saved step runs in a process of its own, which tells what it took."""

import pytest
import tensorflow as tf

from graphswap import emulate, loaded_step
from graphswap.loaded_step import LoadedStepError

MIB = 1 << 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    module = tf.Module()
    module.weight = tf.Variable(tf.ones((512, 512)))

    @tf.function(input_signature=[tf.TensorSpec((None, 512), tf.float32)])
    def step(x):
        module.weight.assign_sub(0.1 * tf.tensordot(x, x, [[0], [0]]))
        return tf.reduce_sum(x)

    @tf.function(input_signature=[tf.TensorSpec((None, 512), tf.float32)])
    def failing(x):
        with tf.control_dependencies([tf.debugging.assert_equal(tf.reduce_sum(x), 1.0, "zeros are refused")]):
            return tf.identity(x)

    module.step, module.failing = step, failing
    directory = tmp_path_factory.mktemp("saved") / "model"
    tf.saved_model.save(module, str(directory))
    return directory


def test_a_peak_is_counted_in_another_process(saved, monkeypatch):
    for name, value in emulate.environment(64 * MIB).items():
        monkeypatch.setenv(name, value)
    peak = loaded_step.peak(saved, "step", [(256, 512)], 2)
    assert peak is not None
    # The weight and its update, 1 MiB each, and rows of 0.5 MiB.
    assert 2.5 * MIB <= peak <= 8 * MIB
    with pytest.raises(LoadedStepError, match="zeros are refused"):
        loaded_step.peak(saved, "failing", [(4, 512)], 1)


def test_a_device_that_is_too_small(saved, monkeypatch):
    for name, value in emulate.environment(4 * MIB).items():
        monkeypatch.setenv(name, value)
    assert loaded_step.peak(saved, "step", [(4096, 512)], 1) is None
