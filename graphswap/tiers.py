"""The far tiers: how a swapped value leaves the device and comes back, as stock TensorFlow ops.

* host: on a GPU a tensor in pinned memory, copied on a stream of its own while the device computes; on a CPU a string
  tensor per piece. Strings live outside the device allocator.
* disk: a file per piece in a private directory, removed at exit, or by the next process after a crash.

Variables that live in a far tier are string variables there, one per piece (`fetch`, `store`).

On its way to a string or a file a value above 16 MiB travels in pieces of about 4 MiB: glibc then serves the strings
from memory it already has, and neither protobuf's 2 GiB limit nor a second full copy gets in the way. The bits do not
change.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import fcntl
import itertools
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from graphswap import ir

_PREFIX = "graphswap-"


class SwapSpaceError(OSError):
    """The swap directory is full or can't be written."""


@dataclasses.dataclass(frozen=True)
class FarCopy:
    """A value in a far tier.

    Attributes:
        pieces: String tensors: the bytes (host) or the names of the files that hold them (disk). Or the one tensor in
            pinned memory.
        operations: Whoever waits for these may rely on the copy.
        is_file: Whether the pieces are names of files.
        is_pinned: Whether the piece is in pinned memory. Only a swap back may read it: TensorFlow takes it for one in
            the GPU's memory.
    """

    pieces: list[Any]
    operations: list[Any]
    is_file: bool = False
    is_pinned: bool = False


class Tiers:
    """Builds the ops of swaps; owns the swap directory, which is made when first needed.

    Args:
        directory: Where the disk tier makes its private directory; None for the system's temporary one.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None):
        self._parent = default_directory() if directory is None else pathlib.Path(directory)
        self._files: pathlib.Path | None = None
        self._numbers = itertools.count()

    def swap_out(self, tensor: tf.Tensor, tier: str) -> FarCopy:
        """Adds the ops that copy `tensor` (static shape) to the tier."""
        if tier == "host" and tf.config.list_logical_devices("GPU"):
            pinned = _copy(tensor, "_CopyFromGpuToHost")
            return FarCopy([pinned], [pinned.op], is_pinned=True)
        strings = _strings(tensor)
        if tier == "host":
            return FarCopy(strings, [string.op for string in strings])
        names, writes = [], []
        for string in strings:
            path = self.directory() / str(next(self._numbers))
            write = tf.raw_ops.WriteFile(filename=str(path), contents=string)
            with tf.control_dependencies([write]):
                # The name hangs on the data: a constant one would let Grappler read the file too early.
                names.append(tf.strings.join([tf.strings.substr(string, 0, 0), str(path)]))
            writes.append(write)
        return FarCopy(names, [name.op for name in names], is_file=True)

    def swap_in(self, copy: FarCopy, dtype: str, shape: tuple[int | None, ...] | None) -> tf.Tensor:
        """Adds the ops that bring the copy back to the device, under the current control dependencies."""
        if copy.is_pinned:
            return _copy(copy.pieces[0], "_CopyFromHostToGpu")
        element = tf.dtypes.as_dtype(dtype)
        if len(copy.pieces) == 1:
            tensor = _parse(copy.pieces[0], element, copy.is_file)
            tensor.set_shape(shape)
            return tensor
        count = len(copy.pieces)
        width = math.prod(d or 0 for d in shape or ()) // count
        target = tf.raw_ops.Empty(shape=(count, width), dtype=element, init=False)
        for index, piece in enumerate(copy.pieces):
            # One after the other: beside the target only one piece is on the device.
            with tf.control_dependencies([target]):
                part = _parse(piece, element, copy.is_file)
            target = tf.raw_ops.InplaceUpdate(x=target, i=[index], v=part)
        return tf.reshape(target, shape)

    def fetch(self, handles: Sequence[Any], dtype: str, shape: tuple[int | None, ...] | None, tier: str) -> tf.Tensor:
        """Adds the ops that bring a variable's value from a far tier to the device.

        Args:
            handles: Of the string variables that hold its pieces, or the names of their files.
            dtype: Of the value.
            shape: Of the value.
            tier: "host" or "disk".
        """
        pieces = [tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.string) for handle in handles]
        return self.swap_in(FarCopy(pieces, [], is_file=tier == "disk"), dtype, shape)

    def store(self, tensor: tf.Tensor, handles: Sequence[Any], tier: str) -> list[Any]:
        """Adds the ops that give a variable in a far tier a new value. Whoever waits for these may rely on it.

        Args:
            tensor: The value, of a static shape.
            handles: As for `fetch`.
            tier: "host" or "disk".
        """
        strings = _strings(tensor)
        if tier == "disk":
            raise NotImplementedError
        return [
            tf.raw_ops.AssignVariableOp(resource=handle, value=string)
            for handle, string in zip(handles, strings, strict=True)
        ]

    def used_directory(self) -> pathlib.Path | None:
        """The private directory, if anything was swapped to disk."""
        return self._files

    def directory(self) -> pathlib.Path:
        """The private directory of this process, made on the first call.

        Raises:
            SwapSpaceError: If it can't be made.
        """
        if self._files is None:
            remove_stale(self._parent)
            try:
                path = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))
            except OSError as error:
                raise SwapSpaceError(
                    f"swapping to '{self._parent}' failed: {error.strerror}. "
                    "Name a directory that takes files in graphswap.Options(swap_to=...)."
                ) from error
            lock = open(path / "lock", "w")  # noqa: SIM115 (held until exit: it tells the living from the dead)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            atexit.register(shutil.rmtree, path, ignore_errors=True)
            self._files, self._lock = path, lock
        return self._files


def default_directory() -> pathlib.Path:
    """Where private directories are made unless the user names another place."""
    return pathlib.Path(tempfile.gettempdir())


def remove_stale(parent: pathlib.Path) -> None:
    """Removes swap directories in `parent` whose process is gone."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), open(path / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


def _copy(tensor: tf.Tensor, op: str) -> tf.Tensor:
    """Adds one of TensorFlow's own swaps between a GPU's memory and pinned memory."""
    # TensorFlow refuses the name that it would make itself, as it would begin with an underscore.
    copied = tensor.graph.create_op(op, [tensor], [tensor.dtype], name="copy").outputs[0]
    copied.set_shape(tensor.shape)
    return copied


def _strings(tensor: tf.Tensor) -> list[tf.Tensor]:
    """The tensor's pieces as strings, which lie outside of the device."""
    count = ir.swap_pieces(ir.Value(tensor.dtype.name, tuple(tensor.shape.as_list())))
    parts = [tensor] if count == 1 else _split(tensor, count)
    return [tf.io.serialize_tensor(part) for part in parts]


def _split(tensor: tf.Tensor, count: int) -> list[tf.Tensor]:
    """The rows of the tensor seen as a matrix of `count` rows; no copies where rows are whole 64 bytes."""
    matrix = tf.reshape(tensor, (count, -1))
    return [tf.slice(matrix, (index, 0), (1, -1)) for index in range(count)]


def _parse(piece: tf.Tensor, dtype: tf.DType, is_file: bool) -> tf.Tensor:
    # The identity carries the control dependencies: a parse without inputs of its own could be moved.
    string = tf.identity(piece)
    return tf.io.parse_tensor(tf.io.read_file(string) if is_file else string, dtype)
