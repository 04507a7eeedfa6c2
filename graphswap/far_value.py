"""A variable's value outside of the device: its memory, and memory for the next value if planned steps store it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from graphswap import far_memory, graphdef, ir, tiers


class FarValue:
    """Far memory of a variable, held by two resources as tensors with one dimension of length 1 in front.

    A planned step writes into the spare memory and exchanges the two (`far_memory.store`); so the value of before is
    there until the next step. Any other new value gets memory of its own.

    Attributes:
        nbytes: Of the value.
        tier: Where the value is: "host", "disk", or "device" while it is not here.
        tiers: Where its files lie.

    Args:
        dtype: Of the value, out of `variables.FAR_DTYPES`.
        shape: Of the value.
        far_tiers: Where its files lie at first.
    """

    def __init__(self, dtype: tf.DType, shape: tuple[int, ...], far_tiers: tiers.Tiers):
        self.nbytes = ir.Value(dtype.name, shape).nbytes
        self.tier = "device"
        self.tiers = far_tiers
        self._dtype = dtype
        self._shape = (1, *shape)
        self._files: dict[int, tuple[pathlib.Path, tiers.Tiers]] = {}  # and whose they are, by their memory
        with tf.init_scope(), tf.device("CPU:0"):
            nothing = self._nothing()
            # Not `tf.Variable`, which makes others in the scope of a distribution.
            make = graphdef.ResourceVariable
            self._resources = [make(nothing, trainable=False, shape=tf.TensorShape(None)) for _ in range(2)]

    @property
    def handles(self) -> list[tf.Tensor]:
        """Resources: of the value, and of the spare memory."""
        return [resource.handle for resource in self._resources]

    def fetch(self) -> tf.Tensor:
        """Adds the ops that copy the value to the device; in an eager call, does so."""
        return far_memory.fetch(self.handles[0], self._dtype.name, self._shape[1:])

    def contents(self) -> list[tf.Tensor]:
        """What the resources hold."""
        return [tf.raw_ops.ReadVariableOp(resource=handle, dtype=self._dtype) for handle in self.handles]

    def give(self, contents: Sequence[tf.Tensor]) -> None:
        """Lets the resources hold what `contents` has returned."""
        for handle, memory in zip(self.handles, contents, strict=True):
            tf.raw_ops.AssignVariableOp(resource=handle, value=memory)

    def view(self) -> np.ndarray:
        """The value's bytes, where they are."""
        return far_memory.view(self.contents()[0])

    def file(self) -> pathlib.Path | None:
        """The file that the value's memory is of, if it is on disk."""
        return self._file(self.contents()[0])

    def files(self) -> list[pathlib.Path]:
        """All files that have memory of this one."""
        return [file for file, _ in self._files.values()]

    @property
    def has_spare(self) -> bool:
        """Whether there is memory for another value, as planned steps store this one."""
        return self.contents()[1].shape != (0,)

    def assign(self, value: np.ndarray | tf.Tensor) -> None:
        """Adds the ops that make a copy of `value` the value; in an eager call, does so.

        Raises:
            SwapSpaceError: If there is no room for it. The value stays what it was.
        """
        if isinstance(value, tf.Tensor) and not tf.executing_eagerly():
            # TensorFlow takes over the memory of what a function of numpy's returns.
            new = tf.numpy_function(self._kept, [value], self._dtype)
            tf.raw_ops.AssignVariableOp(resource=self.handles[0], value=new)
            return
        array = value if isinstance(value, np.ndarray) else far_memory.array(value)
        tf.raw_ops.AssignVariableOp(resource=self.handles[0], value=self._tensor(self._copied(array)))
        self._forget_files()

    def reserve(self, is_updated: bool = False) -> None:
        """Sees to it that a step may store: spare memory is there if it ever was, and is not part of a saved state.

        Args:
            is_updated: Whether a step stores this one from now on.

        Raises:
            SwapSpaceError: If there is no room for it.
        """
        file = self._file(self.contents()[1])
        if (is_updated and not self.has_spare) or (file is not None and tiers.is_committed(file)):
            tf.raw_ops.AssignVariableOp(resource=self.handles[1], value=self._tensor(self._memory()))

    def move(self, tier: str, far_tiers: tiers.Tiers) -> None:
        """Moves the value and the spare memory to another far tier, or to another directory of the disk.

        Raises:
            SwapSpaceError: If there is no room for them. Then all stays as it was.
        """
        before = self.tier, self.tiers
        self.tier, self.tiers = tier, far_tiers
        try:
            value = self._tensor(self._copied(self.view()))
            spare = self._tensor(self._memory()) if self.has_spare else self._nothing()
        except BaseException:
            self.tier, self.tiers = before
            raise
        self.give([value, spare])
        self._forget_files()

    def clear(self) -> None:
        """Lets go of all memory, as the value is on the device."""
        self.tier = "device"
        self.give([self._nothing()] * 2)
        self._forget_files()

    def _copied(self, value: np.ndarray) -> np.ndarray:
        """New memory of the tier that holds a copy of the value."""
        self._forget_files()
        memory = self._memory()
        np.copyto(memory, np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        return memory

    def _kept(self, value: np.ndarray) -> np.ndarray:
        """The same for a function that TensorFlow runs, as an array of the value's type."""
        if self.tier == "device":
            raise RuntimeError(
                "graphswap: expected a variable outside of the device, as when the function that assigns it was "
                "traced; received one that has moved there since. Trace the function anew."
            )
        return self._copied(value).view(self._dtype.as_numpy_dtype).reshape(self._shape)

    def _memory(self) -> np.ndarray:
        memory, file = self.tiers.memory(self.tier, self.nbytes)
        if file is not None:
            tiers.use(self)
            self._files[memory.ctypes.data] = file, self.tiers
        return memory

    def _tensor(self, memory: np.ndarray) -> tf.Tensor:
        return far_memory.tensor(memory, self._dtype, self._shape)

    def _nothing(self) -> tf.Tensor:
        return far_memory.tensor(far_memory.host(0), self._dtype, (0,))

    def _file(self, memory: tf.Tensor) -> pathlib.Path | None:
        file, _ = self._files.get(_address(memory), (None, None))
        return file

    def _forget_files(self) -> None:
        """Removes files whose memory neither resource holds."""
        held = set(map(_address, self.contents()))
        for address in self._files.keys() - held:
            file, owner = self._files.pop(address)
            owner.discard(file)


def _address(memory: tf.Tensor) -> int:
    return far_memory.view(memory).ctypes.data
