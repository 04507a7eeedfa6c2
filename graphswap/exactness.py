"""Whether numpy computes what TensorFlow's kernels for CPUs compute, to the last bit, on this machine."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import tensorflow as tf

from graphswap import elementwise, far_memory

_DRAWN = 4096
_LENGTHS = (1, 3, 7, None)
"""Kernels compute what is left over of whole vectors by other instructions."""


@functools.cache
def is_numpy_exact() -> bool:
    """Whether that is so of all functions of `elementwise`, and a function of numpy's gets far memory as it is.

    Tried on pairs of all kinds of numbers: of any magnitude, subnormal, infinite and none.
    """
    return all(_is_exact(np.dtype(dtype)) for dtype in elementwise.DTYPES)


def _is_exact(dtype: np.dtype) -> bool:
    rows, bits = _numbers(dtype), np.dtype(f"u{dtype.itemsize}")
    addresses: list[tuple[int, ...]] = []

    def compute(function: np.ufunc, *arrays: np.ndarray) -> np.ndarray:
        addresses.append(tuple(array.ctypes.data for array in arrays if array.ndim))
        result = far_memory.host(max(array.nbytes for array in arrays)).view(dtype)
        with np.errstate(all="ignore"):
            return function(*arrays, out=result)

    @tf.function(autograph=False)
    def both(given: list[tuple[tf.Tensor, tf.Tensor]]) -> list[tuple[tf.Tensor, tf.Tensor]]:
        made = []
        for operands, (op, function) in itertools.product(given, elementwise.FUNCTIONS.items()):
            read, kernel = operands[: function.nin], getattr(tf.raw_ops, op)
            if op == "AddN" and read[0].shape != read[1].shape:
                continue
            tensor = kernel(inputs=read) if op == "AddN" else kernel(**dict(zip("xy", read, strict=False)))
            made.append((tensor, tf.numpy_function(functools.partial(compute, function), read, tensor.dtype)))
        return made

    with tf.init_scope(), tf.device("CPU:0"):
        given = []
        for length in _LENGTHS:
            short = [row[:length] for row in rows]
            one, other = (far_memory.tensor(row.view(np.uint8), tf.dtypes.as_dtype(dtype), row.shape) for row in short)
            scalar = tf.constant(rows[1][-1])
            given += [(one, other), (one, scalar), (scalar, one)]
        made = both(given)
    shared = {row.ctypes.data for row in rows}
    is_shared = all(shared.issuperset(one) for one in addresses)
    found = [[np.array(tensor).reshape(-1).view(bits) for tensor in pair] for pair in made]
    return is_shared and all(np.array_equal(kernel, own) for kernel, own in found)


def _numbers(dtype: np.dtype) -> list[np.ndarray]:
    """Two rows of numbers, in far memory."""
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(dtype).tiny / 4, 1.0, -1.0], dtype)
    bits = np.dtype(f"u{dtype.itemsize}")
    drawn = np.random.default_rng(0).integers(0, np.iinfo(bits).max, (2, _DRAWN), bits).view(dtype)
    rows = []
    for row in np.concatenate([np.stack(np.meshgrid(special, special)).reshape(2, -1), drawn], axis=1):
        rows.append(far_memory.host(row.nbytes).view(dtype))
        rows[-1][:] = row
    return rows
