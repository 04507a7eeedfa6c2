import os
import pathlib
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphswap import emulate
from graphswap.allocator import Allocator, OutOfMemory, rounded

MIB = 1 << 20


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 256), (256, 256), (257, 512)])
def test_rounded(nbytes, expected):
    assert rounded(nbytes) == expected


def test_counts_what_is_in_use_and_the_peak():
    allocator = Allocator(4096)
    first = allocator.allocate(1)
    second = allocator.allocate(300)
    assert (allocator.size(first), allocator.size(second)) == (256, 512)
    assert second == first + 256
    allocator.free(first)
    assert (allocator.in_use_bytes, allocator.peak_bytes) == (512, 768)


def test_an_empty_tensor_takes_a_chunk():
    allocator = Allocator(4096)
    allocator.allocate(0)
    assert allocator.in_use_bytes == 256


@pytest.mark.parametrize(("hole", "wanted", "size"), [(768, 512, 768), (1024, 512, 512), (512, 512, 512)])
def test_a_chunk_is_split_from_twice_the_request_on(hole, wanted, size):
    allocator = Allocator(4096)
    address = allocator.allocate(hole)
    allocator.allocate(1)
    allocator.free(address)
    assert allocator.size(allocator.allocate(wanted)) == size


@pytest.mark.parametrize(("wanted_mib", "size_mib"), [(272, 272), (273, 400)])
def test_a_chunk_is_split_if_it_is_128_mib_larger(wanted_mib, size_mib):
    allocator = Allocator(400 * MIB)
    assert allocator.size(allocator.allocate(wanted_mib * MIB)) == size_mib * MIB


def holes(*sizes):
    """An allocator with free chunks of the given sizes, at the returned, rising addresses, and no others."""
    allocator = Allocator(64 * 1024)
    addresses = []
    for size in sizes:
        addresses.append(allocator.allocate(size))
        allocator.allocate(256)
    allocator.allocate(64 * 1024 - allocator.in_use_bytes)
    for address in addresses:
        allocator.free(address)
    return allocator, addresses


def test_the_smallest_chunk_that_fits_is_taken():
    allocator, addresses = holes(2048, 512, 1024)
    assert allocator.allocate(600) == addresses[2]
    assert allocator.allocate(600) == addresses[0]
    assert allocator.allocate(500) == addresses[1]


def test_of_equal_chunks_the_lowest_address_is_taken():
    allocator, addresses = holes(512, 512, 512)
    assert [allocator.allocate(512) for _ in addresses] == addresses


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_free_neighbours_merge(order):
    allocator = Allocator(768)
    addresses = [allocator.allocate(256) for _ in range(3)]
    for index in order:
        allocator.free(addresses[index])
    assert allocator.allocate(768) == addresses[0]


def test_free_chunks_that_are_apart_do_not_merge():
    allocator, _ = holes(512, 512)
    with pytest.raises(OutOfMemory) as error:
        allocator.allocate(1024)
    assert str(error.value) == "no room for 1024 bytes beside 64512 bytes in use"
    assert (error.value.nbytes, error.value.in_use_bytes) == (1024, 64512)


@pytest.mark.parametrize("reserved", [True, False])
def test_the_limit_is_kept_and_can_be_reached(reserved):
    allocator = Allocator(1023, reserved)
    allocator.allocate(768)
    with pytest.raises(OutOfMemory):
        allocator.allocate(1)
    assert allocator.in_use_bytes == 768


def test_no_limit():
    allocator = Allocator()
    allocator.allocate(1 << 45)
    assert allocator.in_use_bytes == 1 << 45


def test_a_refused_request_changes_nothing():
    allocator = Allocator(1024)
    allocator.allocate(512)
    with pytest.raises(OutOfMemory):
        allocator.allocate(1024)
    allocator.allocate(512)
    assert allocator.in_use_bytes == allocator.peak_bytes == 1024


def test_regions_double_and_are_never_merged():
    allocator = Allocator(100 * MIB, reserved=False)
    first = allocator.allocate(2 * MIB)  # a region of 2 MiB, the next one will have 4
    second = allocator.allocate(3 * MIB)  # a region of 4 MiB, not split
    assert (allocator.size(first), allocator.size(second)) == (2 * MIB, 4 * MIB)
    third = allocator.allocate(9 * MIB)  # 8 MiB would be next: doubled until it fits
    assert allocator.size(third) == 16 * MIB
    for address in (first, second, third):
        allocator.free(address)
    fourth = allocator.allocate(17 * MIB)  # 22 MiB are free, but in three regions; a region of 32 MiB
    assert allocator.size(fourth) == 32 * MIB
    with pytest.raises(OutOfMemory):
        allocator.allocate(47 * MIB)  # 100 - 2 - 4 - 16 - 32 = 46 MiB are left
    assert allocator.size(allocator.allocate(46 * MIB)) == 46 * MIB


def test_of_equal_chunks_the_newest_region_is_taken():
    allocator = Allocator(100 * MIB, reserved=False)
    first, second = allocator.allocate(2 * MIB), allocator.allocate(4 * MIB)
    assert second < first
    third = allocator.allocate(2 * MIB)
    rest = [allocator.allocate(2 * MIB) for _ in range(3)]  # fills the region of 8 MiB
    allocator.free(first)
    allocator.free(third)
    assert rest[0] > third
    assert allocator.allocate(2 * MIB) == third


@given(st.lists(st.integers(0, 5000) | st.tuples(st.integers(0, 100)), max_size=80))
def test_chunks_never_overlap_and_merge_again(actions):
    limit = 16 * 1024
    allocator = Allocator(limit)
    start = allocator.allocate(limit)
    allocator.free(start)
    used = []
    for action in actions:
        chunks = sorted((address, allocator.size(address)) for address in used)
        ends = [start, *(address + size for address, size in chunks)]
        gaps = [
            begin - end for begin, end in zip([*(address for address, _ in chunks), start + limit], ends, strict=True)
        ]
        assert min(gaps) >= 0
        assert allocator.in_use_bytes == limit - sum(gaps)
        if isinstance(action, tuple):
            if used:
                allocator.free(used.pop(action[0] % len(used)))
            continue
        try:
            used.append(allocator.allocate(action))
        except OutOfMemory:
            assert max(gaps) < max(rounded(action), 256)
        else:
            assert max(gaps) >= allocator.size(used[-1]) >= max(rounded(action), 256)
    for address in used:
        allocator.free(address)
    assert allocator.in_use_bytes == 0
    assert allocator.allocate(limit) == start


@pytest.mark.parametrize("reserved", [True, False], ids=["reserved", "growing"])
def test_tensorflow_agrees_to_the_byte(reserved):
    root = pathlib.Path(__file__).parent.parent
    variables = {**os.environ, **emulate.environment(100 * MIB), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, __file__, *["reserved"] * reserved], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def compare_with_tensorflow(reserved: bool) -> None:
    """Puts random tensors into TensorFlow's allocator and into the model, and compares after each one."""
    import tensorflow as tf

    if reserved:
        emulate.reserve()
    model = Allocator(100 * MIB, reserved)
    rng = random.Random(0)
    few_sizes = [1, 256, 1000, 4096, 65536, MIB, 3 * MIB]
    tensors = []
    for step in range(3000):
        if tensors and rng.random() < 0.48:
            model.free(tensors.pop(rng.randrange(len(tensors)))[1])
        else:
            nbytes = rng.choice(few_sizes) if rng.random() < 0.5 else int(2 ** rng.uniform(0, 24))
            shape = model.allocate(4)  # the argument `shape` is on the device, too
            try:
                address = model.allocate(nbytes)
            except OutOfMemory:  # TensorFlow would wait for 10 seconds
                model.free(shape)
                continue
            tensors.append((tf.raw_ops.Empty(shape=[nbytes], dtype=tf.uint8), address))
            model.free(shape)
        info = tf.config.experimental.get_memory_info("CPU:0")
        assert info == {"current": model.in_use_bytes, "peak": model.peak_bytes}, f"step {step}: {info}, {vars(model)}"


if __name__ == "__main__":
    compare_with_tensorflow("reserved" in sys.argv)
