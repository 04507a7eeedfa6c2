"""Variables whose values live outside of the device: right in any function, whether graphswap rewrites it or not.

A `HostVariable` is the variable that it was, with the same handle, name and users; but while its value lies in a far
tier its buffer on the device is empty, and what reads or writes it goes there. A step that graphswap rewrites is traced
as if the value were on the device; `rewrites.place` then says when it comes and goes.

Known weaknesses: a function that was traced while the value was on the device reads it there; what captures the handle
by itself, such as a fused kernel for updates, does, too. Both meet an empty buffer.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

import numpy as np
import tensorflow as tf

from graphswap import graphdef, ir, placement, profiler, tiers
from graphswap.cost_model import MEMORY_VARIABLE
from graphswap.far_value import FarValue
from graphswap.sharded_value import ShardedValue, Sharding
from graphswap.variables import FAR_DTYPES, SMALL_BYTES

_TIERS = tiers.Tiers()
"""Of variables that no step has moved."""
_FRONT_SHARE = 1 / 16
"""Of a device's free memory: where what stays there of new variables comes to lie."""
_FRONT_HOLES = 128
"""At most, for small values, and for handles, 256 bytes each."""
_FRONT_BYTES = 2 << 20
"""At most, and a quarter of the front: for what else is made meanwhile and stays, such as constants."""

_DO_NOT_CONVERT = tf.autograph.experimental.do_not_convert
"""For methods that a user's functions call: AutoGraph leaves only TensorFlow's own alone."""


class _Veiled:
    """A handle that eager ops don't know for one: they would read the buffer behind it, not ask the variable."""

    def __init__(self, handle: tf.Tensor):
        self._hidden = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hidden, name)


class HostVariable(graphdef.ResourceVariable):
    """A variable that can live in a far tier, or divided among workers. Made by `adopt` out of one that exists."""

    _far: FarValue
    _sharded: ShardedValue | None = None

    @property
    def handle(self) -> Any:
        return self.__dict__["_handle"]

    @property
    def _handle(self) -> Any:
        return self.handle if self.tier == "device" else _Veiled(self.handle)

    @_handle.setter
    def _handle(self, handle: Any) -> None:
        self.__dict__["_handle"] = handle

    @property
    def tier(self) -> str:
        """Where the value is: "device", "host", "disk", or on all "workers"."""
        return self._far.tier if self._sharded is None else "workers"

    @property
    def store_handles(self) -> list[tf.Tensor]:
        """Resources of the far value, and of spare memory for the next one; or of this worker's part."""
        return self._value.handles

    @property
    def _value(self) -> FarValue | ShardedValue:
        return self._far if self._sharded is None else self._sharded

    @property
    def sharded(self) -> ShardedValue | None:
        """This worker's part of the value, if it is divided."""
        return self._sharded

    def shard(self, sharding: Sharding, part: np.ndarray | None = None) -> None:
        """Divides the value among workers. Each does so by itself; no value is exchanged.

        Args:
            sharding: How.
            part: This worker's part; None for that of the value, which is on the device.
        """
        with tf.init_scope():
            if part is None:
                part = sharding.part(self.read_value().numpy())
            value = ShardedValue(self.name, self.dtype, tuple(self.shape), sharding)
            value.give(part)
            self._sharded = value
            self._empty()

    def reserve(self, is_updated: bool = False) -> None:
        """Sees to it that a planned step may store the variable in its far tier.

        Args:
            is_updated: Whether one does from now on.

        Raises:
            SwapSpaceError: If there is no room for the memory that this takes.
        """
        if self.tier != "device":
            self._far.reserve(is_updated)

    def contents(self) -> list[tf.Tensor]:
        """What lies in the far tier, for `restore`. Copies nothing."""
        return self._far.contents()

    def restore(self, contents: Sequence[tf.Tensor]) -> None:
        """Gives the variable the far value of when `contents` was called, if at most one step has stored it since."""
        self._far.give(contents)

    def view(self) -> np.ndarray:
        """The far value's bytes, which the next step but one writes over."""
        return self._far.view()

    def file(self) -> pathlib.Path | None:
        """The file that holds the value, if it is on disk."""
        return self._far.file() if self.tier == "disk" else None

    @property
    def far_bytes(self) -> int:
        """What the variable takes of its far tier."""
        return self._far.nbytes * (1 + self._far.has_spare) if self.tier != "device" else 0

    def move(self, tier: str, far_tiers: tiers.Tiers | None = None) -> None:
        """Brings the value to a tier.

        Args:
            tier: "device", "host" or "disk".
            far_tiers: Where files of the value will lie; None for where they do now, at first a private directory.

        Raises:
            SwapSpaceError: If there is no room. The value is where it was.
        """
        far = self._far
        goal = far_tiers or far.tiers
        with tf.init_scope():
            if tier == "device":
                if self.tier != "device":
                    tf.raw_ops.AssignVariableOp(resource=self.handle, value=self.read_value())
                    self._sharded = None
                    far.clear()
            elif self.tier == "device":
                value, before = self.read_value(), far.tiers
                far.tier, far.tiers = tier, goal
                try:
                    far.assign(value)
                except BaseException:
                    far.tier, far.tiers = "device", before
                    raise
                self._empty()
            elif tier != self.tier or (tier == "disk" and goal is not far.tiers):
                far.move(tier, goal)
            far.tiers = goal

    def _empty(self) -> None:
        """Lets go of the buffer on the device."""
        empty = placement.outside_device(tf.zeros((0,), self.dtype).numpy())
        tf.raw_ops.AssignVariableOp(resource=self.handle, value=empty)

    def _is_plain(self) -> bool:
        return self.tier == "device" or (not tf.executing_eagerly() and graphdef.traces_variables())

    def _read_variable_op(self, no_copy: bool = False) -> tf.Tensor:
        if self._is_plain():
            return super()._read_variable_op(no_copy)
        graphdef.watch(self)
        value = self._value.fetch()

        @tf.custom_gradient
        def fetched(handle: tf.Tensor) -> Any:  # what asks for the variable's gradient asks for its handle's
            del handle
            return tf.identity(value), lambda gradient: gradient

        return cast(tf.Tensor, fetched(self.handle))

    @_DO_NOT_CONVERT
    def sparse_read(self, indices: Any, name: str | None = None) -> tf.Tensor:
        if self._is_plain():
            return super().sparse_read(indices, name)
        return tf.gather(self._read_variable_op(), indices, name=name)

    @_DO_NOT_CONVERT
    def gather_nd(self, indices: Any, name: str | None = None) -> tf.Tensor:
        if self._is_plain():
            return super().gather_nd(indices, name)
        return tf.gather_nd(self._read_variable_op(), indices, name=name)

    @_DO_NOT_CONVERT
    def assign(self, value: Any, use_locking: Any = None, name: str | None = None, read_value: bool = True) -> Any:
        if self._is_plain():
            return super().assign(value, use_locking, name, read_value)
        is_array = isinstance(value, np.ndarray) and value.dtype == self.dtype.as_numpy_dtype
        new = value if is_array else tf.convert_to_tensor(value, dtype=self.dtype)
        if not self.shape.is_compatible_with(new.shape):
            raise ValueError(
                f"{self.name}: expected a value of shape {self.shape}, received one of {tf.TensorShape(new.shape)}. "
                "Assign one of the variable's shape."
            )
        self._value.assign(new if is_array else tf.ensure_shape(new, self.shape))
        return self

    @_DO_NOT_CONVERT
    def assign_add(self, delta: Any, use_locking: Any = None, name: str | None = None, read_value: bool = True) -> Any:
        if self._is_plain():
            return super().assign_add(delta, use_locking, name, read_value)
        return self.assign(self._read_variable_op() + tf.convert_to_tensor(delta, dtype=self.dtype))

    @_DO_NOT_CONVERT
    def assign_sub(self, delta: Any, use_locking: Any = None, name: str | None = None, read_value: bool = True) -> Any:
        if self._is_plain():
            return super().assign_sub(delta, use_locking, name, read_value)
        return self.assign(self._read_variable_op() - tf.convert_to_tensor(delta, dtype=self.dtype))

    def _restore_from_tensors(self, restored_tensors: Any) -> Any:
        if self._is_plain():
            return super()._restore_from_tensors(restored_tensors)
        (value,) = restored_tensors.values()
        return self.assign(value)


def _visiting(name: str) -> Any:
    """A method of a variable that runs on the device, where the value is meanwhile."""
    method = getattr(graphdef.ResourceVariable, name)

    @_DO_NOT_CONVERT
    def visit(self: HostVariable, *args: Any, **kwargs: Any) -> Any:
        if self._is_plain():
            return method(self, *args, **kwargs)
        tf.raw_ops.AssignVariableOp(resource=self.handle, value=self._read_variable_op())
        method(self, *args, **kwargs)
        self.assign(tf.raw_ops.ReadVariableOp(resource=self.handle, dtype=self.dtype))
        tf.raw_ops.AssignVariableOp(resource=self.handle, value=tf.zeros((0,), self.dtype))
        return self

    return visit


for _name in (
    *(f"scatter_{kind}" for kind in ("sub", "add", "max", "min", "mul", "div", "update")),
    *(f"scatter_nd_{kind}" for kind in ("sub", "add", "max", "min", "update")),
    "batch_scatter_update",
):
    setattr(HostVariable, _name, _visiting(_name))


def can_adopt(variable: object) -> bool:
    """Whether it is an ordinary variable of TensorFlow's, of a fixed shape, and of numbers that far memory takes.

    Parts of distributed or sharded variables are none.
    """
    if type(variable) not in (graphdef.ResourceVariable, HostVariable):
        return False
    found = cast(graphdef.ResourceVariable, variable)
    return found.shape.is_fully_defined() and found.dtype.name in FAR_DTYPES


def adopt(variable: Any) -> HostVariable:
    """Makes a variable one that can live in a far tier; it stays the same object.

    Raises:
        TypeError: If it can't; see `can_adopt`.
    """
    if not can_adopt(variable):
        raise TypeError(
            f"expected a tf.Variable of numbers and of a fixed shape, received {variable!r}. Variables of "
            "tf.distribute stay where it puts them, and so do those of strings or of 8-bit floats."
        )
    if not isinstance(variable, HostVariable):
        far = FarValue(variable.dtype, tuple(variable.shape), _TIERS)
        variable.__class__ = HostVariable
        variable._far = far
    return variable


def value_bytes(variable: tf.Variable) -> int:
    """Bytes of a variable's value, wherever it is."""
    return ir.Value(variable.dtype.name, tuple(variable.shape)).nbytes


def value_tier(variable: tf.Variable) -> str:
    """Where a variable's value is: "device", "host", "disk", or on all "workers"."""
    return variable.tier if isinstance(variable, HostVariable) else "device"


@contextlib.contextmanager
def host_variables() -> Iterator[None]:
    """Variables that are made inside live in host memory, so that a model may be larger than the device.

    Each is on the device for as long as it takes to make it. Variables of up to 64 KiB stay there. Where a training
    step has room, `model.compile(..., graphswap=...)` brings them to the device.
    """
    with far_variables(lambda nbytes: "host"):
        yield


@contextlib.contextmanager
def far_variables(tier_of: Callable[[int], str], far_tiers: tiers.Tiers | None = None) -> Iterator[None]:
    """Like `host_variables`, each variable in a tier of its own.

    Args:
        tier_of: Called with the bytes of each variable of more than 64 KiB as it is made; returns its tier.
        far_tiers: Where files of variables on disk lie; None for a private directory.
    """

    def make(next_creator: Any, **kwargs: Any) -> Any:
        variable = next_creator(**kwargs)
        if can_adopt(variable):
            nbytes = value_bytes(variable)
            if nbytes > SMALL_BYTES:
                adopt(variable).move(tier_of(nbytes), far_tiers)
        return variable

    with _leaving_front(), tf.variable_creator_scope(make):
        yield


@contextlib.contextmanager
def sharded_variables(sharding: Sharding, shapes: Collection[tuple[int, ...]]) -> Iterator[None]:
    """Variables of more than 64 KiB that are made inside are divided among workers, as soon as they are made.

    Their parts come to the device at the end: each would lie behind a whole value that leaves.

    Args:
        sharding: How.
        shapes: Of the variables that are divided.
    """
    parts: list[tuple[HostVariable, np.ndarray]] = []

    def make(next_creator: Any, **kwargs: Any) -> Any:
        made = next_creator(**kwargs)
        for variable in getattr(made, "values", (made,)):  # a distribution's has one on each device
            is_large = can_adopt(variable) and value_bytes(variable) > SMALL_BYTES
            if is_large and tuple(variable.shape) in shapes:
                parts.append((adopt(variable), sharding.part(variable.numpy())))
                variable._empty()
        return made

    try:
        with _leaving_front(), tf.variable_creator_scope(make):
            yield
    finally:
        for variable, part in parts:
            variable.shard(sharding, part)


@contextlib.contextmanager
def read_alone(variables: Sequence[Any]) -> Iterator[None]:
    """Lets one worker read inside what is divided among all. All have to call it together.

    Args:
        variables: On this process's devices, in the same order on all workers.
    """
    parts = [one.sharded for one in variables if isinstance(one, HostVariable) and one.sharded is not None]
    try:
        for part in parts:
            part.keep_whole()
        yield
    finally:
        for part in parts:
            part.drop_whole()


@contextlib.contextmanager
def _leaving_front() -> Iterator[None]:
    """Leaves room for what stays of new variables: behind a value that leaves it would cut free memory in two.

    Holes of the size of the largest value that stays, with as much between them, and one larger hole. Larger values,
    which are all that cut out pieces of a size that matters, lie behind.
    """
    limit, in_use = os.environ.get(MEMORY_VARIABLE), profiler.memory_in_use()
    fences = []
    room = 0 if limit is None or in_use is None else int((int(limit) - in_use) * _FRONT_SHARE)
    if room >= 4 * SMALL_BYTES:
        larger = min(_FRONT_BYTES, room // 4)
        count = min(_FRONT_HOLES, (room - larger) // (2 * SMALL_BYTES))
        with tf.init_scope():
            fences += placement.leave_holes([larger, *[SMALL_BYTES] * count], profiler.device_name(), SMALL_BYTES)
    yield
    del fences
