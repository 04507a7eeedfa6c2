"""A worker's part of a value: cut, padded, gathered, and refused where not all workers meet."""

import numpy as np
import pytest
import tensorflow as tf

from graphswap import host_variable
from graphswap.host_variable import adopt, value_tier
from graphswap.sharded_value import Sharding

WHOLE = np.arange(20.0, dtype=np.float32).reshape(5, 4)


class Workers:
    """What three workers would gather; here one after the other."""

    def __init__(self, count=3):
        self.parts = {}
        self.shardings = [Sharding(count, rank, self._gather) for rank in range(count)]

    def _gather(self, name, part):
        del name, part
        return np.concatenate([self.parts[rank] for rank in sorted(self.parts)])


def variables(workers: Workers, value: np.ndarray = WHOLE):
    """The same variable on each of the workers."""
    made = [adopt(tf.Variable(value)) for _ in workers.shardings]
    for rank, (variable, sharding) in enumerate(zip(made, workers.shardings, strict=True)):
        workers.parts[rank] = sharding.part(value)
        variable.shard(sharding)
    return made


def held(variable):
    (handle,) = variable.store_handles
    return tf.raw_ops.ReadVariableOp(resource=handle, dtype=variable.dtype).numpy()


def test_every_worker_keeps_an_equal_part_the_last_one_padded():
    first, second, third = map(held, variables(Workers()))
    assert [part.shape for part in (first, second, third)] == [(7,)] * 3
    assert np.concatenate([first, second, third]).tolist() == [*WHOLE.ravel().tolist(), 0.0]


def test_more_workers_than_elements():
    parts = [held(variable) for variable in variables(Workers(6), np.array([1, 2, 3, 4], np.float32))]
    assert [part.tolist() for part in parts] == [[1], [2], [3], [4], [0], [0]]


def test_nothing_stays_on_the_device_but_the_part():
    variable = variables(Workers())[0]
    assert tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=tf.float32).shape == (0,)
    assert value_tier(variable) == "workers" and variable.shape == (5, 4)
    assert variable.sharded is not None and variable.sharded.nbytes == 28


def test_reading_gathers():
    variable = variables(Workers())[1]
    np.testing.assert_array_equal(variable.numpy(), WHOLE)
    np.testing.assert_array_equal(tf.convert_to_tensor(variable), WHOLE)


def test_an_assigned_value_is_cut():
    workers = Workers()
    made = variables(workers)
    for rank, variable in enumerate(made):
        variable.assign(WHOLE * 2)
        workers.parts[rank] = held(variable)
    np.testing.assert_array_equal(made[0].numpy(), 2 * WHOLE)
    assert workers.parts[1].tolist() == (2 * WHOLE).ravel()[7:14].tolist()
    with pytest.raises(ValueError, match=r"expected a value of shape \(5, 4\), received one of \(4,\)"):
        made[0].assign([1.0, 2.0, 3.0, 4.0])


def test_a_value_comes_back_whole():
    variable = variables(Workers())[2]
    variable.move("device")
    assert value_tier(variable) == "device" and variable.sharded is None
    np.testing.assert_array_equal(tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=tf.float32), WHOLE)


def test_one_worker_reads_alone_what_all_have_gathered():
    def gather(name, part):
        calls.append(name)
        return np.concatenate([part] * 2)

    calls = []
    variable = adopt(tf.Variable(WHOLE))
    variable.shard(Sharding(2, 0, gather))
    with host_variable.read_alone([variable, tf.Variable(1.0)]):
        assert len(calls) == 1
        variable.numpy()
        variable.numpy()
        assert len(calls) == 1
    variable.numpy()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("use", "what"), [(lambda v: v + 1.0, "read"), (lambda v: v.assign(WHOLE), "assigned")], ids=["read", "assign"]
)
def test_other_functions_are_refused(use, what):
    variable = variables(Workers())[0]
    with pytest.raises(
        RuntimeError, match=rf"divided among 3 workers to be {what} by a planned step or outside of fun"
    ):
        tf.function(lambda: use(variable), autograph=False)()


def test_variables_are_divided_as_they_are_made():
    sharding = Sharding(2, 1, lambda _, part: np.concatenate([part, part]))
    large = np.arange(20_000, dtype=np.float32)
    with host_variable.sharded_variables(sharding, {(20_000,), (1,)}):
        variable, small, other = tf.Variable(large), tf.Variable([1.0]), tf.Variable(large.reshape(100, 200))
    assert [value_tier(one) for one in (variable, small, other)] == ["workers", "device", "device"]
    np.testing.assert_array_equal(held(variable), large[10_000:])
