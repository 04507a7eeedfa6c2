"""Far memory is a tensor's buffer that no device counts; a file's outlives its process."""

import functools
import os
import pathlib
import subprocess
import sys

import emulated
import numpy as np
import pytest
import tensorflow as tf

from graphswap import far_memory, variables
from graphswap.elementwise import Program

DTYPES = sorted(variables.FAR_DTYPES)


def address(tensor):
    return far_memory.view(tensor).ctypes.data


def held(memory, dtype, shape):
    """A resource that holds a tensor in the memory."""
    variable = tf.Variable(tf.zeros((0,), dtype), shape=tf.TensorShape(None))
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=far_memory.tensor(memory, variable.dtype, shape))
    return variable


@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_every_type_are_stored_and_fetched_bit_for_bit(dtype, shape, tmp_path):
    size = tf.as_dtype(dtype).size * int(np.prod(shape))
    bits = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, size, np.uint8)
    memory = far_memory.host(size)
    memory[:] = bits
    value = far_memory.tensor(memory, tf.as_dtype(dtype), shape)
    memories = [far_memory.host(size), far_memory.file(tmp_path / "file", size)]
    variable, spare = (held(memory, dtype, (1, *shape)) for memory in memories)
    tf.function(lambda: far_memory.store(value, variable.handle, spare.handle) and None, autograph=False)()
    found = far_memory.fetch(variable.handle, dtype, shape)
    seen = far_memory.read(variable.handle, dtype, shape)
    assert seen.shape == shape
    assert not size or address(seen) == memories[1].ctypes.data
    assert (found.dtype, found.shape) == (tf.as_dtype(dtype), shape)
    np.testing.assert_array_equal(far_memory.view(found), bits)
    np.testing.assert_array_equal(memories[1], bits)
    assert (tmp_path / "file").read_bytes() == bits.tobytes()


def test_a_store_leaves_the_value_of_before_as_spare_memory():
    one, other = far_memory.host(8), far_memory.host(8)
    variable, spare = held(one, "float32", (1, 2)), held(other, "float32", (1, 2))
    store = tf.function(lambda x: far_memory.store(x, variable.handle, spare.handle) and None, autograph=False)
    for number, (value, before) in enumerate([(other, one), (one, other), (other, one)]):
        store(tf.fill((2,), float(number)))
        for resource, memory in ((variable, value), (spare, before)):
            assert address(tf.raw_ops.ReadVariableOp(resource=resource.handle, dtype=tf.float32)) == memory.ctypes.data
        np.testing.assert_array_equal(value.view("float32"), [number] * 2)
        if number:
            np.testing.assert_array_equal(before.view("float32"), [number - 1] * 2)


MOMENTUM = Program.parse("4; Mul 3 1; AddV2 4 0; Sub 2 5; 5 6 5")
"""Given are a gradient, a rate, a weight and its momentum; the first result is a tensor."""


@pytest.mark.parametrize("size", [24, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_new_values_are_computed_where_they_lie(dtype, size):
    shape = (4, size // 4)
    grad, weight, momentum = np.random.default_rng(0).normal(size=(3, *shape)).astype(dtype)
    memories = [far_memory.host(grad.nbytes) for _ in range(4)]
    memories[0].view(dtype)[:], memories[2].view(dtype)[:] = weight.reshape(-1), momentum.reshape(-1)
    held_ones = [held(memory, dtype, (1, *shape)) for memory in memories]
    handles = [(held_ones[0].handle, held_ones[1].handle), (held_ones[2].handle, held_ones[3].handle)]

    def update(stored):
        values = [tf.constant(grad), tf.constant(0.5, dtype)]
        function = functools.partial(far_memory.update, MOMENTUM, values, handles, stored, 1, dtype, shape)
        (result,), _ = tf.function(lambda: (function()[0], ()), autograph=False)()
        return result.numpy()

    new_momentum = momentum * np.dtype(dtype).type(0.5) + grad
    np.testing.assert_array_equal(update(None), new_momentum)
    np.testing.assert_array_equal(memories[0].view(dtype), weight.reshape(-1))  # it went nowhere
    np.testing.assert_array_equal(update((0, 1)), new_momentum)
    found = [tf.raw_ops.ReadVariableOp(resource=one.handle, dtype=dtype) for one in held_ones]
    assert list(map(address, found)) == [memories[index].ctypes.data for index in (1, 0, 3, 2)]
    for tensor, value in zip(found, (weight - new_momentum, weight, new_momentum, momentum), strict=True):
        np.testing.assert_array_equal(tensor[0], value)


def test_what_was_fetched_stays():
    memory = far_memory.host(8)
    memory[:] = 1
    variable = held(memory, "uint8", (1, 8))
    fetched = far_memory.fetch(variable.handle, "uint8", (8,))
    memory[:] = 2
    np.testing.assert_array_equal(far_memory.view(fetched), [1] * 8)


def stored_and_fetched(directory):
    """Bytes of the device at most, while values of 24 MiB lie in far memory and one of 4 MiB goes there and back."""
    memories = [far_memory.host(4 << 20) for _ in range(3)]
    memories += [far_memory.file(pathlib.Path(directory) / str(number), 4 << 20) for number in range(3)]
    resources = [held(memory, "bfloat16", (1, 2 << 20)) for memory in memories]
    value = tf.ones((2 << 20,), tf.bfloat16)
    tf.config.experimental.reset_memory_stats("CPU:0")
    for pair in zip(resources[::2], resources[1::2], strict=True):
        handles = [resource.handle for resource in pair]
        tf.function(lambda handles=handles: far_memory.store(value, *handles) and None, autograph=False)()
        assert bool(tf.reduce_all(far_memory.fetch(handles[0], "bfloat16", (2 << 20,)) == value))
    return tf.config.experimental.get_memory_info("CPU:0")["peak"]


def test_only_what_is_fetched_is_on_the_device(tmp_path):
    peak = emulated.call(32 << 20, __file__, "stored_and_fetched", str(tmp_path))
    assert 8 << 20 <= peak < (8 << 20) + (3 << 20)  # beside the value, what it is compared with and the comparison


def zeros_stored():
    """Bytes of the device at most, while zeros are stored in four far values of 4 MiB."""
    resources = [held(far_memory.host(4 << 20), "float32", (1, 1 << 20)) for _ in range(8)]

    @tf.function(autograph=False)
    def store():
        zeros, done = tf.zeros((1 << 20,)), []
        for value, spare in zip(resources[::2], resources[1::2], strict=True):
            with tf.control_dependencies(done):
                done = far_memory.store(zeros, value.handle, spare.handle)

    store()
    assert not far_memory.fetch(resources[0].handle, "float32", (1 << 20,)).numpy().any()
    return tf.config.experimental.get_memory_info("CPU:0")["peak"]


def test_constants_that_are_stored_are_on_the_device_once():
    assert emulated.call(32 << 20, __file__, "zeros_stored") < 9 << 20


def test_a_files_memory_needs_no_descriptor_and_no_name(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    memories = [far_memory.file(tmp_path / str(number), 4096) for number in range(64)]
    assert len(os.listdir("/proc/self/fd")) == before
    (tmp_path / "5").unlink()
    memories[5][:] = 1
    assert memories[5].sum() == 4096
    mapped = str(tmp_path)
    assert mapped in pathlib.Path("/proc/self/maps").read_text()
    del memories
    assert mapped not in pathlib.Path("/proc/self/maps").read_text()


def test_what_is_written_is_in_the_file_when_the_process_is_killed(tmp_path):
    code = """
import os, pathlib, signal, sys
from graphswap import far_memory
far_memory.file(pathlib.Path(sys.argv[1]), 1 << 20)[:] = 3
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], env=environment, check=False)
    assert done.returncode == -9
    assert (tmp_path / "file").read_bytes() == b"\3" * (1 << 20)


def test_files_that_can_not_be_made_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory: '.*/nowhere/file'"):
        far_memory.file(tmp_path / "nowhere" / "file", 16)
    with pytest.raises(OSError, match=rf"(No space left on device|File too large): '{tmp_path}/file'"):
        far_memory.file(tmp_path / "file", 1 << 60)
    assert not (tmp_path / "file").exists()
    (tmp_path / "file").write_text("of another")
    with pytest.raises(FileExistsError):
        far_memory.file(tmp_path / "file", 16)
    assert (tmp_path / "file").read_text() == "of another"


if __name__ == "__main__":
    emulated.main(globals())
