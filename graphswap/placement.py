"""Where things lie on the device between steps: variables in their places, results and new batches out of the way.

TensorFlow's allocator cuts its chunks by what lies around them, so two equal steps need equal memory only if
they begin with the same layout. An assigned variable moves to wherever its new value was computed; here it is
put back.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from graphswap import far_memory

_SMALL_BYTES = 64 << 10
_PIECES, _CHUNK = 128, 256


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable that a step captures.

    Attributes:
        handle: Resource tensor.
        dtype: Of its value.
        is_assigned: Whether the step assigns it, so that it takes over the buffer of its new value.
    """

    handle: tf.Tensor
    dtype: tf.DType
    is_assigned: bool = False


class Variables:
    """The variables of a step: their values kept aside, and their places in the device's memory.

    Args:
        variables: Initialised ones.
    """

    def __init__(self, variables: Sequence[Variable] = ()):
        self._variables = variables
        self._copies: list[np.ndarray] = []  # memory is taken once: new pages would cost more than the copy
        self._kept: list[np.ndarray] | None = None
        self._homes: list[int | None] = [None] * len(variables)  # addresses
        self._sizes = [0] * len(variables)  # in bytes
        self._readers: dict[int, Callable[[], list[tf.Tensor]]] = {}  # of the largest ones, by how many

    def __len__(self) -> int:
        return len(self._variables)

    def keep(self) -> None:
        """Copies the values to numpy's memory, for `restore`."""
        values = [far_memory.array(value) for value in self._read_all()]
        self._copies = self._copies or [np.empty_like(value) for value in values]
        for copy, value in zip(self._copies, values, strict=True):
            np.copyto(copy, value)
        self._kept = self._copies

    def forget(self) -> None:
        """Drops the copies."""
        self._kept = None

    def restore(self) -> bool:
        """Gives the variables the values that were kept, and packs them; False if none were kept."""
        if self._kept is None:
            return False
        self.pack()
        self._kept = None
        return True

    def pack(self, first: Callable[[], None] | None = None) -> None:
        """Puts all variables together, so that no holes are left between them. What was kept stays kept.

        Args:
            first: Called while none of their values is on the device: what it makes there lies in front of them.
        """
        values = self._kept or [np.array(far_memory.array(value)) for value in self._read_all()]
        _write(self._variables, values, first)
        self._sizes = [value.nbytes for value in values]
        self._homes = [_address(value) for value in self._read_all()]

    def settle(self, least_bytes: int = 0) -> None:
        """Puts the variables that have moved since `pack` back in their places.

        Args:
            least_bytes: Of those that are looked at; to read hundreds takes TensorFlow milliseconds.
        """
        indices = [index for index, nbytes in enumerate(self._sizes) if nbytes >= least_bytes]
        values = self._read(indices)
        moved = [
            (self._variables[index], np.array(far_memory.array(value)))
            for index, value in zip(indices, values, strict=True)
            if (
                self._variables[index].is_assigned
                if self._homes[index] is None
                else _address(value) != self._homes[index]
            )
        ]
        del values  # they hold the buffers
        _write([variable for variable, _ in moved], [copy for _, copy in moved])

    def _read_all(self) -> list[tf.Tensor]:
        return self._read(range(len(self._variables)))

    def _read(self, indices: Sequence[int]) -> list[tf.Tensor]:
        """Tensors in the variables' own buffers, so let them go before the variables are updated.

        One function for all: calling TensorFlow hundreds of times would take longer than copying the values.
        """

        def read() -> list[tf.Tensor]:
            variables = [self._variables[index] for index in indices]
            return [tf.raw_ops.ReadVariableOp(resource=v.handle, dtype=v.dtype) for v in variables]

        if len(indices) not in self._readers:
            with tf.init_scope():
                self._readers[len(indices)] = tf.function(read, autograph=False).get_concrete_function()
        return self._readers[len(indices)]()


def leave_holes(sizes: Sequence[int], device: str, fence_bytes: int = 1) -> list[Any]:
    """Leaves holes of so many free bytes for small buffers, so that they cut no large chunks.

    Many small holes and not a large one, as buffers of middling size would come to lie there, too.

    Args:
        sizes: Of the holes, in bytes.
        device: Where.
        fence_bytes: Of the buffer behind each. A small one lies elsewhere if there are smaller holes already.

    Returns:
        What must be kept for as long as the holes are to stay: the buffers behind them.
    """
    buffers = [on_device(np.zeros(size, np.uint8), device) for hole in sizes for size in (hole, fence_bytes)]
    return buffers[1::2]


def fence(nbytes: int, device: str) -> Any:
    """Divides the device's free memory behind so many bytes.

    In pieces: the allocator would hand out all of the free memory for a request of more than half of it.

    Returns:
        What must be kept for as long as that is to hold.
    """
    piece = nbytes // _PIECES & -_CHUNK
    sizes = *[piece] * _PIECES, nbytes - _PIECES * piece, 1
    return [on_device(np.zeros(size, np.uint8), device) for size in sizes][-1]


def are_initialized(variables: Sequence[Variable]) -> bool:
    """Whether all have values. In the trace that makes them they have none yet."""
    return all(tf.raw_ops.VarIsInitializedOp(resource=variable.handle) for variable in variables)


def outside_device(value: Any) -> Any:
    """A tensor of an array's values in numpy's memory, beyond the count of a CPU device's allocator.

    Arrays of dtypes that numpy does not know are returned unchanged, and so is what is no array.
    """
    if not isinstance(value, np.ndarray) or value.dtype.kind not in far_memory.KINDS:
        return value
    memory = far_memory.host(value.nbytes)
    memory.view(value.dtype).reshape(value.shape)[...] = value
    return far_memory.tensor(memory, tf.dtypes.as_dtype(value.dtype), value.shape)


def result_outside_device(result: Any) -> Any:
    """A small result of a step in numpy's memory: whoever holds it leaves the device's layout as it was."""
    if not isinstance(result, tf.Tensor) or not result.dtype.size or result.dtype == tf.string:
        return result
    if result.shape.num_elements() * result.dtype.size > _SMALL_BYTES:
        return result
    moved = outside_device(np.asarray(result.numpy()))
    return moved if isinstance(moved, tf.Tensor) else result


def on_device(value: Any, device: str) -> Any:
    """An array's values in exactly one new buffer of the device; what is no array is returned unchanged."""
    outside = outside_device(value)
    if not isinstance(value, np.ndarray) or not isinstance(outside, tf.Tensor):
        return value
    with tf.device(device):
        return tf.raw_ops.DeepCopy(x=outside) if "CPU" in device else tf.identity(outside)


def _address(value: tf.Tensor) -> int | None:
    """Where the tensor's buffer is; None if numpy can't tell: on a GPU, or of dtypes that it does not know."""
    try:
        return np.from_dlpack(value).ctypes.data
    except far_memory.NO_VIEW:
        return None


def _write(
    variables: Sequence[Variable], values: Sequence[np.ndarray], between: Callable[[], None] | None = None
) -> None:
    """Frees the buffers of all variables, calls `between`, then gives each a new one, the largest first.

    Ctrl-C waits until all of them have their values again.
    """
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for variable, value in zip(variables, values, strict=True):
            nothing = outside_device(np.zeros((0,), value.dtype))
            tf.raw_ops.AssignVariableOp(resource=variable.handle, value=nothing)
        try:
            if between is not None:
                between()
        finally:
            for index in sorted(range(len(variables)), key=lambda index: -values[index].nbytes):
                handle = variables[index].handle
                tf.raw_ops.AssignVariableOp(resource=handle, value=on_device(values[index], handle.device))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
