"""A variable's value of which every worker keeps a part, in the device's memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from graphswap import far_memory, graphdef, ir, placement


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How values are divided among workers.

    Attributes:
        workers: How many there are.
        rank: Which of the equal parts is this worker's, from 0.
        gather: Joins the workers' flat arrays, in the order of their ranks. All workers have to call it together, with
            the same name for what is joined.
    """

    workers: int = 1
    rank: int = 0
    gather: Callable[[str, np.ndarray], np.ndarray] = lambda name, part: part

    def part(self, value: np.ndarray) -> np.ndarray:
        """A copy of this worker's part of a value, flat, padded with zeros."""
        length = -(-value.size // self.workers)
        part = np.zeros(length, value.dtype)
        own = value.reshape(-1)[self.rank * length :][:length]
        part[: len(own)] = own
        return part


class ShardedValue:
    """This worker's part of a value, held by a resource as a flat tensor; the last parts are padded with zeros.

    It stands in the place of a `far_value.FarValue` where a variable is divided. To read the value, all workers have to
    read it together.

    Attributes:
        nbytes: Of this worker's part.

    Args:
        name: Of the variable, the same on all workers.
        dtype: Of the value.
        shape: Of the value.
        sharding: Among whom it is divided.
    """

    def __init__(self, name: str, dtype: tf.DType, shape: tuple[int, ...], sharding: Sharding):
        self._name = name
        self._dtype = dtype
        self._shape = shape
        self._sharding = sharding
        self._length = -(-math.prod(shape) // sharding.workers)
        self._whole: np.ndarray | None = None
        self.nbytes = ir.Value(dtype.name, (self._length,)).nbytes
        with tf.init_scope():
            nothing = far_memory.tensor(far_memory.host(0), dtype, (0,))
            # Not `tf.Variable`, which makes others in the scope of a distribution.
            self._resource = graphdef.ResourceVariable(nothing, trainable=False, shape=tf.TensorShape(None))

    @property
    def handles(self) -> list[tf.Tensor]:
        """The resource."""
        return [self._resource.handle]

    def assign(self, value: np.ndarray | tf.Tensor) -> None:
        """Keeps this worker's part of `value`. Nothing is exchanged.

        Raises:
            RuntimeError: In a function that graphswap does not plan.
        """
        self._expect_eager("assigned")
        self.give(self._sharding.part(np.asarray(value)))

    def give(self, part: np.ndarray) -> None:
        """Keeps a part that `Sharding.part` has made."""
        on_device = placement.on_device(part, self._resource.device)
        tf.raw_ops.AssignVariableOp(resource=self._resource.handle, value=on_device)

    def fetch(self) -> tf.Tensor:
        """The whole value.

        Raises:
            RuntimeError: In a function that graphswap does not plan.
        """
        self._expect_eager("read")
        return tf.convert_to_tensor(self._gathered() if self._whole is None else self._whole)

    def keep_whole(self) -> None:
        """Lets this worker read the value alone until `drop_whole`. All workers have to call it together."""
        self._whole = self._gathered()

    def drop_whole(self) -> None:
        """Lets go of what `keep_whole` has kept."""
        self._whole = None

    def _gathered(self) -> np.ndarray:
        part = tf.raw_ops.ReadVariableOp(resource=self._resource.handle, dtype=self._dtype)
        whole = self._sharding.gather(self._name, np.array(far_memory.array(part)))
        return whole.reshape(-1)[: math.prod(self._shape)].reshape(self._shape)

    def _expect_eager(self, what: str) -> None:
        if not tf.executing_eagerly():
            raise RuntimeError(
                f"graphswap: expected a variable that is divided among {self._sharding.workers} workers to be {what} "
                "by a planned step or outside of functions, where all workers do so together; received one that is "
                f"{what} in another tf.function. Leave shard_optimizer out, or do without the variable there."
            )
