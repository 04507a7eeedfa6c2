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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import tensorflow as tf

from graphswap import graphdef, ir, placement, profiler, tiers
from graphswap.cost_model import MEMORY_VARIABLE
from graphswap.variables import SMALL_BYTES

_TIERS = tiers.Tiers()
"""Of variables that no step has moved."""
_FRONT_BYTES = 1 << 20
"""Room for what stays on the device of a thousand variables that leave it: handles, and headers of strings."""

_DO_NOT_CONVERT = tf.autograph.experimental.do_not_convert
"""For methods that a user's functions call: AutoGraph leaves only TensorFlow's own alone."""


class _Veiled:
    """A handle that eager ops don't know for one: they would read the buffer behind it, not ask the variable."""

    def __init__(self, handle: tf.Tensor):
        self._hidden = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hidden, name)


class HostVariable(graphdef.ResourceVariable):
    """A variable that can live in a far tier. Made by `adopt` out of one that exists."""

    _tier = "device"
    _tiers = _TIERS
    _pieces: list[tf.Variable]

    @property
    def handle(self) -> Any:
        return self.__dict__["_handle"]

    @property
    def _handle(self) -> Any:
        return self.handle if self._tier == "device" else _Veiled(self.handle)

    @_handle.setter
    def _handle(self, handle: Any) -> None:
        self.__dict__["_handle"] = handle

    @property
    def tier(self) -> str:
        """Where the value is: "device", "host" or "disk"."""
        return self._tier

    @property
    def store_handles(self) -> list[tf.Tensor]:
        """Resources of the string variables that hold the pieces of the value while it is in a far tier."""
        return [piece.handle for piece in self._pieces]

    def pieces(self) -> list[tf.Tensor]:
        """What the string variables hold: the bytes of the value's pieces, or the names of their files."""
        return [tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.string) for handle in self.store_handles]

    def restore(self, pieces: Sequence[tf.Tensor]) -> None:
        """Gives the variable the value that `pieces` were read of, in the tier that it was in then."""
        for handle, piece in zip(self.store_handles, pieces, strict=True):
            tf.raw_ops.AssignVariableOp(resource=handle, value=piece)

    def files(self) -> list[str]:
        """The files that hold the value, if it is on disk."""
        return [os.fsdecode(piece.numpy()) for piece in self.pieces()] if self._tier == "disk" else []

    def move(self, tier: str, far_tiers: tiers.Tiers | None = None) -> None:
        """Brings the value to a tier.

        Args:
            tier: "device", "host" or "disk".
            far_tiers: Where new files of the value will lie; None for where they do now, at first a private directory.

        Raises:
            SwapSpaceError: If files can't be written or read. The value is where it was.
        """
        if far_tiers is not None:
            self._tiers = far_tiers
        if tier == "disk":
            tiers.use(self)
        if tier == self._tier:
            return
        with tf.init_scope(), self._tiers.explaining():
            files = self.files()
            if tier == "device":
                tf.raw_ops.AssignVariableOp(resource=self.handle, value=self.read_value())
                for piece in self._pieces:
                    piece.assign("")
            elif self._tier == "host":
                self.restore(self._tiers.write(self.pieces()))
            elif self._tier == "disk":
                self.restore([tf.io.read_file(name) for name in self.pieces()])
            else:
                self._tiers.store(self.read_value(), self.store_handles, tier)
                empty = placement.outside_device(tf.zeros((0,), self.dtype).numpy())
                tf.raw_ops.AssignVariableOp(resource=self.handle, value=empty)
            self._tier = tier
        self._tiers.discard(files)

    def _is_plain(self) -> bool:
        return self._tier == "device" or (not tf.executing_eagerly() and graphdef.traces_variables())

    def _read_variable_op(self, no_copy: bool = False) -> tf.Tensor:
        if self._is_plain():
            return super()._read_variable_op(no_copy)
        graphdef.watch(self)
        with self._tiers.explaining():
            value = self._tiers.fetch(self.store_handles, self.dtype.name, tuple(self.shape), self._tier)

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
        tensor = tf.convert_to_tensor(value, dtype=self.dtype)
        if not self.shape.is_compatible_with(tensor.shape):
            raise ValueError(
                f"{self.name}: expected a value of shape {self.shape}, received one of {tensor.shape}. "
                "Assign one of the variable's shape."
            )
        tensor = tf.ensure_shape(tensor, self.shape)
        files = self.files() if tf.executing_eagerly() else []
        with self._tiers.explaining():
            self._tiers.store(tensor, self.store_handles, self._tier)
        self._tiers.discard(files)
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
    """Whether the variable is an ordinary one of TensorFlow's: no part of a distributed or sharded one."""
    return type(variable) in (graphdef.ResourceVariable, HostVariable)


def adopt(variable: Any) -> HostVariable:
    """Makes a variable one that can live in a far tier; it stays the same object.

    Raises:
        TypeError: If it is no ordinary variable of TensorFlow's.
    """
    if not can_adopt(variable):
        raise TypeError(
            f"expected a tf.Variable, received {variable!r}. Variables of tf.distribute stay where it puts them."
        )
    if not isinstance(variable, HostVariable):
        value = ir.Value(variable.dtype.name, tuple(variable.shape))
        with tf.init_scope(), tf.device("CPU:0"):
            pieces = [tf.Variable("", dtype=tf.string, trainable=False) for _ in range(ir.swap_pieces(value))]
        variable.__class__ = HostVariable
        variable._pieces = pieces
    return variable


def value_bytes(variable: tf.Variable) -> int:
    """Bytes of a variable's value, wherever it is."""
    return ir.Value(variable.dtype.name, tuple(variable.shape)).nbytes


def value_tier(variable: tf.Variable) -> str:
    """Where a variable's value is: "device", "host" or "disk"."""
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

    front = _leave_front()
    with tf.variable_creator_scope(make):
        yield
    del front


def _leave_front() -> Any:
    """Makes room for what stays: behind a value that leaves it would cut the device's free memory in two."""
    limit, in_use = os.environ.get(MEMORY_VARIABLE), profiler.memory_in_use()
    if limit is None or in_use is None or int(limit) - in_use < 4 * _FRONT_BYTES:
        return ()
    return placement.leave_holes(1, _FRONT_BYTES, profiler.device_name(), _FRONT_BYTES)
