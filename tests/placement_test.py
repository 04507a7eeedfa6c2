import emulated
import numpy as np
import pytest
import tensorflow as tf

from graphswap import placement
from graphswap.placement import Variable, Variables

DEVICE = "CPU:0"


def variables(*values, **options):
    made = [tf.Variable(value) for value in values]
    return made, Variables([Variable(v.handle, v.dtype, **options) for v in made])


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "bfloat16", "complex64"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_variables_get_their_values_back(dtype, shape):
    (variable,), kept = variables(tf.cast(tf.ones(shape), dtype))
    assert not kept.restore()
    kept.keep()
    variable.assign(tf.cast(tf.zeros(shape), dtype))
    assert kept.restore()
    np.testing.assert_array_equal(variable.numpy(), np.ones(shape))
    assert not kept.restore()


@pytest.mark.parametrize("arrange", [Variables.pack, Variables.settle])
@pytest.mark.parametrize("is_kept", [True, False])
def test_arranging_changes_no_value(arrange, is_kept):
    made, all_of_them = variables(tf.range(8), tf.ones((300, 300)), is_assigned=True)
    if is_kept:
        all_of_them.keep()
    arrange(all_of_them)
    np.testing.assert_array_equal(made[0].numpy(), range(8))
    np.testing.assert_array_equal(made[1].numpy(), np.ones((300, 300)))
    assert len(all_of_them) == 2


def test_what_was_forgotten_is_not_restored():
    _, kept = variables(tf.ones(2))
    kept.keep()
    kept.forget()
    assert not kept.restore()


def test_uninitialised_variables_are_noticed():
    created = []

    @tf.function(autograph=False)
    def function(x):
        if not created:
            created.append(tf.Variable(x))
        with tf.init_scope():
            seen.append(placement.are_initialized([Variable(created[0].handle, created[0].dtype)]))
        return x + created[0]

    seen = []
    function(tf.ones(2))
    assert seen[0] is False
    assert placement.are_initialized([Variable(created[0].handle, created[0].dtype)])


def test_what_is_no_array_is_left_alone():
    for value in (3, None, "text", tf.constant(1.0)):
        assert placement.outside_device(value) is value
        assert placement.on_device(value, DEVICE) is value
    assert placement.result_outside_device("text") == "text"
    text = tf.constant("text")
    assert placement.result_outside_device(text) is text
    large = tf.zeros(1 << 20)
    assert placement.result_outside_device(large) is large


# --- on an emulated device --------------------------------------------------------------------------------------


def in_use():
    return tf.config.experimental.get_memory_info(DEVICE)["current"]


def count_bytes():
    """What the device's allocator counts for things inside and outside of it."""
    array = np.arange(1 << 18, dtype=np.float32)
    found = {}
    before = in_use()
    outside = placement.outside_device(array)
    found["outside"] = in_use() - before
    inside = placement.on_device(array, DEVICE)
    found["inside"] = in_use() - before
    found["equal"] = bool(np.array_equal(outside.numpy(), inside.numpy()))
    del inside
    before = in_use()
    fence = placement.fence(40 << 20, DEVICE)
    found["fence"] = in_use() - before
    large = tf.raw_ops.Empty(shape=[30 << 20], dtype=tf.uint8)  # of what is free, more than half
    found["most handed out"] = (in_use() - before) >> 20
    del large, fence
    fences = placement.leave_holes([1 << 20] * 3, DEVICE)
    found["fences"] = in_use() - before
    result = tf.reduce_sum(outside)
    with_result = in_use()
    result = placement.result_outside_device(result)
    found["result"] = in_use() - with_result
    found["sum"] = float(result)
    del fences
    return found


def test_what_lies_outside_of_the_device_is_not_counted():
    found = emulated.call(64 << 20, __file__, "count_bytes")
    assert found == {
        "outside": 0,
        "inside": 1 << 20,
        "equal": True,
        "fence": 256,
        "most handed out": 40,
        "fences": 3 * 256,
        "result": -256,
        "sum": pytest.approx(2**35, rel=1e-3),
    }


def assign_from_outside(least_bytes):
    """Which variables are where `pack` put them: once others have assigned them, and once they are settled."""
    made, all_of_them = variables(tf.ones(8), tf.ones((300, 300)))
    all_of_them.pack()
    homes = [placement._address(tf.raw_ops.ReadVariableOp(resource=v.handle, dtype=v.dtype)) for v in made]

    def at_home():
        values = [tf.raw_ops.ReadVariableOp(resource=v.handle, dtype=v.dtype) for v in made]
        return [placement._address(value) == home for value, home in zip(values, homes, strict=True)]

    for variable in made:
        variable.assign(tf.fill(variable.shape, 2.0))
    assigned = at_home()
    all_of_them.settle(least_bytes)
    return assigned, at_home(), [float(tf.reduce_max(variable)) for variable in made]


@pytest.mark.parametrize(("least_bytes", "settled"), [(0, [True, True]), (1 << 14, [False, True])])
def test_what_others_assigned_goes_back_to_its_place_if_it_is_large_enough(least_bytes, settled):
    found = emulated.call(64 << 20, __file__, "assign_from_outside", least_bytes)
    assert found == [[False, False], settled, [2.0, 2.0]]


def test_values_are_put_back_if_what_is_called_between_fails():
    made, all_of_them = variables(tf.ones(8), tf.zeros((3, 3)))

    def fail():
        assert [variable.read_value().shape for variable in made] == [(0,), (0,)]
        raise MemoryError

    with pytest.raises(MemoryError):
        all_of_them.pack(fail)
    assert [float(tf.reduce_sum(variable)) for variable in made] == [8.0, 0.0]


def steps():
    """Peak and start of each of six equal steps that assign a variable in the middle of their activations."""
    import graphswap

    weights = [tf.Variable(tf.random.stateless_normal((256, 256), (0, i))) for i in range(8)]
    averages = [tf.Variable(tf.zeros((1, 256))) for _ in weights]

    def step(x):
        with tf.GradientTape() as tape:
            for weight, average in zip(weights, averages, strict=True):
                x = tf.nn.relu(tf.matmul(x, weight))
                average.assign(0.9 * average + 0.1 * tf.reduce_mean(x, 0, keepdims=True))
            loss = tf.nn.l2_loss(x) / 1e5
        for weight, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
            weight.assign_sub(0.01 * gradient)
        return loss

    function = graphswap.function(step, memory_budget="20MiB")
    x = np.random.default_rng(0).normal(size=(1024, 256)).astype("float32")
    peaks, losses = [], []
    for _ in range(6):
        tf.config.experimental.reset_memory_stats(DEVICE)
        losses.append(function(x))
        peaks.append(tf.config.experimental.get_memory_info(DEVICE)["peak"])
    report = graphswap.report(function).step
    return {
        "notes": report.notes,
        "plain": report.plain_peak_bytes,
        "peaks": peaks[2:],
        "predicted": report.predicted_peak_bytes,
        "decisions": len(report.plan.decisions),
    }


def test_every_step_reaches_the_same_peak_and_it_is_the_predicted_one():
    found = emulated.call(20 << 20, __file__, "steps")
    assert found["decisions"]
    assert len(set(found["peaks"])) == 1
    assert found["predicted"] == pytest.approx(found["peaks"][0], rel=0.05)


if __name__ == "__main__":
    emulated.main(globals())
