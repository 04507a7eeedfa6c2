"""Memory outside of the device, of the host or of a file, that TensorFlow's ops read and write as a tensor's buffer.

Tensors share it through DLPack, so the device's allocator does not count it. A file's memory is shared with the file:
what is written there is in it at once, whatever becomes of the process.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import pathlib
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from graphswap.elementwise import Program

_ALIGNMENT = 64  # TensorFlow aborts on tensors that are not aligned
KINDS = "biufc"
"""Kinds of types that numpy passes on through DLPack."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def host(nbytes: int) -> np.ndarray:
    """Bytes of the host's memory, not set to anything."""
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes]


def file(path: pathlib.Path, nbytes: int) -> np.ndarray:
    """Bytes of a new file, not set to anything. The disk's room for all of them is taken at once.

    The file may be removed: its memory stays for as long as it is used.

    Args:
        path: Of the file, which must not exist.
        nbytes: Of the file.

    Raises:
        OSError: If it can't be made, or there is no room for it. Then there is no file.
    """
    if not nbytes:
        path.touch(exist_ok=False)
        return host(0)
    # Python's own mmap would keep a descriptor for each file, of which a process may have a thousand.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        address = _LIBC.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    weakref.finalize(memory, _LIBC.munmap, address, nbytes).atexit = False  # threads of TensorFlow's may still run then
    return np.ctypeslib.as_array(memory)


def tensor(memory: np.ndarray, dtype: tf.DType, shape: Sequence[int]) -> tf.Tensor:
    """A tensor in the memory, which it keeps alive.

    Args:
        memory: Bytes, as from `host` or `file`.
        dtype: Of fixed size.
        shape: Of the tensor.
    """
    numpy_dtype = np.dtype(dtype.as_numpy_dtype)
    is_known = numpy_dtype.kind in KINDS
    values = memory.view(numpy_dtype if is_known else f"u{numpy_dtype.itemsize}").reshape(shape)
    shared = tf.experimental.dlpack.from_dlpack(values.__dlpack__())
    return shared if is_known else tf.bitcast(shared, dtype)


def array(value: tf.Tensor) -> np.ndarray:
    """The tensor's own buffer where numpy can, else a copy."""
    try:
        return np.from_dlpack(value)
    except NO_VIEW:
        return value.numpy()


NO_VIEW = (BufferError, TypeError, ValueError, RuntimeError, tf.errors.OpError)
"""What comes of asking numpy for a buffer that it can't read: on a GPU, or of a type that it does not know."""


def view(value: tf.Tensor) -> np.ndarray:
    """The bytes of a tensor that lies in the CPU's memory: its own buffer, which stays alive and can't be written.

    Args:
        value: Of a type of numbers, out of `variables.FAR_DTYPES`.
    """
    dtype = np.dtype(value.dtype.as_numpy_dtype)
    known = value if dtype.kind in KINDS else tf.bitcast(value, f"uint{8 * dtype.itemsize}")
    return np.from_dlpack(known).reshape(-1).view(np.uint8)


def fetch(handle: tf.Tensor, dtype: str, shape: tuple[int | None, ...] | None) -> tf.Tensor:
    """Adds the ops that copy a far value to the device.

    Args:
        handle: Resource that holds the value, with one dimension of length 1 in front.
        dtype: Of the value.
        shape: Of the value.
    """
    with tf.device("CPU:0"):
        value = tf.raw_ops.DeepCopy(x=tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.dtypes.as_dtype(dtype)))
        return tf.reshape(value, shape)


def read(handle: tf.Tensor, dtype: str, shape: tuple[int | None, ...] | None) -> tf.Tensor:
    """Adds the ops that read a far value where it is; it stays as it is until the next store but one.

    Args:
        handle: As for `fetch`.
        dtype: Likewise.
        shape: Likewise.
    """
    with tf.device("CPU:0"):
        value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.dtypes.as_dtype(dtype))
        return tf.reshape(value, shape)


def store(value: tf.Tensor, handle: tf.Tensor, spare: tf.Tensor) -> list[Any]:
    """Adds the ops that copy a value to spare far memory, which then takes the place of the value of before.

    Nothing may read that any more when it is next stored to: two stores later, it is written over.

    Args:
        value: Of a static shape.
        handle: Resource that holds the value of before, with one dimension of length 1 in front.
        spare: Resource that holds memory for another one.

    Returns:
        Operations. Whoever waits for these may rely on the new value.
    """
    with tf.device("CPU:0"):
        old = tf.raw_ops.ReadVariableOp(resource=handle, dtype=value.dtype)
        memory = tf.raw_ops.ReadVariableOp(resource=spare, dtype=value.dtype)
        # A shape that is known only then: Grappler would make a second constant of a constant value, on the device.
        row = tf.reshape(value, tf.shape(memory))
        new = tf.raw_ops.InplaceUpdate(x=memory, i=[0], v=row)
        with tf.control_dependencies([old, new]):
            taken = tf.raw_ops.AssignVariableOp(resource=handle, value=new)
        with tf.control_dependencies([taken]):
            left = tf.raw_ops.AssignVariableOp(resource=spare, value=old)
    return [taken, left]


def update(
    program: Program,
    values: Sequence[tf.Tensor],
    handles: Sequence[tuple[tf.Tensor, tf.Tensor]],
    stored: Sequence[int] | None,
    result_count: int,
    dtype: str,
    shape: tuple[int | None, ...],
) -> tuple[list[tf.Tensor], list[Any]]:
    """Adds the ops that run a program on far values, and give some of them the new values that it computes.

    As by `store`, the values of before stay.

    Args:
        program: Given are the values, then the far ones.
        values: Tensors of the far values' type, of their shape or scalars, or scalars of type bool.
        handles: Of each far value, the two resources that `store` takes.
        stored: Which of the far values get the program's last results; None: these go nowhere.
        result_count: How many of the program's first results are wanted as tensors.
        dtype: Of all values.
        shape: Of the far values.

    Returns:
        Results; and operations. Whoever waits for these may rely on the new values.
    """
    kind = tf.dtypes.as_dtype(dtype)
    count = math.prod(size or 0 for size in shape)
    parts = max(1, min(os.cpu_count() or 1, count // _PART_ELEMENTS))
    ends = [count * number // parts for number in range(parts + 1)]
    with tf.device("CPU:0"):
        old = [tf.raw_ops.ReadVariableOp(resource=handle, dtype=kind) for handle, _ in handles]
        memory = [tf.raw_ops.ReadVariableOp(resource=handles[number][1], dtype=kind) for number in stored or ()]
        results = [tf.raw_ops.Empty(shape=shape, dtype=kind, init=False) for _ in range(result_count)]
        arguments = [*values, *old, *results, *memory]
        computed = [
            tf.numpy_function(functools.partial(_run, program, part), arguments, [], name="compute")
            for part in map(slice, ends, ends[1:])
        ]
        operations = computed
        for number, new in zip(stored or (), memory, strict=True):
            with tf.control_dependencies(computed):
                taken = tf.raw_ops.AssignVariableOp(resource=handles[number][0], value=new)
            with tf.control_dependencies([taken]):
                left = tf.raw_ops.AssignVariableOp(resource=handles[number][1], value=old[number])
            operations = [*operations, taken, left]
        with tf.control_dependencies(computed):  # which Grappler leaves to this op
            return [tf.raw_ops.EnsureShape(input=result, shape=shape) for result in results], operations


_PART_ELEMENTS = 1 << 19
"""No thread computes fewer elements, so that it is worth its start."""


def _run(program: Program, part: slice, *arrays: np.ndarray) -> list[np.ndarray]:
    """Runs a program on a part of the elements; the last arrays are memory for its first results."""
    flat = [array.reshape(-1)[part] if array.ndim else array for array in arrays]
    given, memory = flat[: program.given], flat[program.given :]
    program.run(given, [*map(_writable, memory), *[None] * (len(program.results) - len(memory))])
    return []


def _writable(array: np.ndarray) -> np.ndarray:
    """The same memory, which TensorFlow passes on as it is, but not to be written."""
    content = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    return np.ctypeslib.as_array(content).view(array.dtype)
