"""Values go to the far tiers and come back unchanged; swap files never outlive their process for long."""

import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from graphswap import ir, tiers

DTYPES = "float16 bfloat16 float32 float64 bool int8 uint8 int16 int32 uint32 int64 complex64".split()


def there_and_back(value, tier, directory=None):
    far = tiers.Tiers(directory)

    @tf.function(autograph=False)
    def copy(x):
        away = far.swap_out(x, tier)
        with tf.control_dependencies(away.operations):
            return far.swap_in(away, x.dtype.name, tuple(x.shape))

    return copy(value)


def bits(value):
    """The bytes of a tensor, comparable also where they mean NaN."""
    return np.ascontiguousarray(value.numpy()).view(np.uint8)


def random_bits(dtype, shape):
    """A tensor of random bytes, NaNs and all."""
    dtype = tf.as_dtype(dtype)
    rng = np.random.default_rng(0)
    if dtype == tf.bool:
        return tf.constant(rng.integers(0, 2, shape).astype(bool))
    text = rng.bytes(math.prod(shape) * dtype.size)
    return tf.constant(np.frombuffer(text, dtype.as_numpy_dtype).reshape(shape))


def test_a_gpus_swaps_are_copies_to_pinned_memory(monkeypatch):
    """No GPU is at hand here, so the ops themselves can't be made."""
    copied = []
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["a GPU"] if kind == "GPU" else [])
    monkeypatch.setattr(tiers, "_copy", lambda tensor, op: copied.append(op) or tf.identity(tensor))
    there_and_back(tf.ones((5, 1 << 20)), "host")
    assert copied == ["_CopyFromGpuToHost", "_CopyFromHostToGpu"]
    copied.clear()
    there_and_back(tf.ones((5,)), "disk")
    assert not copied


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_comes_back_unchanged(dtype, tier, tmp_path):
    value = random_bits(dtype, (3, 5, 7))
    back = there_and_back(value, tier, tmp_path)
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(bits(back), bits(value))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (4, 0, 3), (1, 1, 1, 1, 1), (65537,), (3, 1, 1 << 16)])
def test_every_shape_comes_back_unchanged(shape):
    value = random_bits("float32", shape)
    np.testing.assert_array_equal(bits(there_and_back(value, "host")), bits(value))


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize(
    ("dtype", "shape"), [("float32", (9, 1 << 19)), ("float16", (3, 11, 13, 1 << 15)), ("bool", (5, 7, 1 << 19))]
)
def test_large_values_travel_in_pieces(dtype, shape, tier, tmp_path):
    value = random_bits(dtype, shape)
    assert ir.swap_pieces(ir.Value(dtype, shape)) > 1
    back = there_and_back(value, tier, tmp_path)
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(bits(back), bits(value))


def test_values_above_2_gib_come_back_unchanged():
    numbers = tf.range((1 << 29) + (1 << 24))  # 2.06 GiB
    back = there_and_back(numbers, "host")
    assert tf.reduce_all(back == numbers)


@pytest.mark.parametrize(
    ("elements", "count"), [(1, 1), (0, 1), (1 << 22, 1), ((1 << 22) + 1024, 5), (9 << 20, 9), (1 << 31, 2048)]
)
def test_pieces_are_equal_and_at_most_4_mib(elements, count):
    found = ir.swap_pieces(ir.Value("float32", (elements,)))
    assert count <= found <= 2 * count
    assert elements % found == 0
    assert found == 1 or elements * 4 // found <= 4 << 20


def test_a_value_without_equal_pieces_travels_whole():
    prime = (4194319,)  # of float32: just above 16 MiB
    assert ir.swap_pieces(ir.Value("float32", prime)) == 1
    value = random_bits("float32", prime)
    np.testing.assert_array_equal(bits(there_and_back(value, "host")), bits(value))


# --- the swap directory -----------------------------------------------------------------------------------------

SWAP = """
import sys, time
import tensorflow as tf
from graphswap import tiers

far = tiers.Tiers(sys.argv[1])

@tf.function(autograph=False)
def out(x):
    return far.swap_out(x, "disk").pieces

out(tf.ones((1 << 20,)))
print("swapped", flush=True)
if len(sys.argv) > 2:
    time.sleep(60)
"""


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", SWAP, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "swapped\n"
    return child


def swap_directories(parent):
    return [path for path in parent.iterdir() if any(path.iterdir())]


def test_files_are_private_and_removed_at_exit(tmp_path):
    with start(tmp_path, "stay") as child:
        (directory,) = swap_directories(tmp_path)
        assert directory.stat().st_mode & 0o077 == 0
        assert any(file.stat().st_size > 1 << 22 for file in directory.iterdir())
        child.send_signal(signal.SIGINT)
    assert not list(tmp_path.iterdir())


def test_files_of_a_killed_process_are_removed_by_the_next(tmp_path):
    with start(tmp_path, "stay") as killed:
        (left,) = swap_directories(tmp_path)
        killed.kill()
    assert left.exists()
    tiers.remove_stale(tmp_path)
    assert not left.exists()


def test_files_of_a_living_process_are_kept(tmp_path):
    with start(tmp_path, "stay") as living:
        (kept,) = swap_directories(tmp_path)
        there_and_back(tf.ones((8, 8)), "disk", tmp_path)
        tiers.remove_stale(tmp_path)
        assert kept.exists()
        living.kill()


def test_other_directories_are_kept(tmp_path):
    (tmp_path / "graphswap-notes").mkdir()
    (tmp_path / "graphswap-file").write_text("")
    tiers.remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"graphswap-notes", "graphswap-file"}


def test_no_directory_is_made_without_a_swap_to_disk(tmp_path):
    there_and_back(tf.ones((8, 8)), "host", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_takes_no_files_is_named():
    with pytest.raises(tiers.SwapSpaceError, match="swapping to '/proc' failed: .*Name a directory"):
        tiers.Tiers("/proc").directory()
    with pytest.raises(tiers.SwapSpaceError, match="/nowhere"):
        tiers.Tiers("/nowhere").directory()
