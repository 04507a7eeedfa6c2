"""The far tiers: how a swapped value leaves the device and comes back, as stock TensorFlow ops.

* host: on a GPU a tensor in pinned memory, copied on a stream of its own while the device computes; on a CPU a string
  tensor per piece. Strings live outside the device allocator.
* disk: a file per piece in a private directory, removed at exit, or by the next process after a crash.

Variables that live in a far tier have memory there (`memory`), which on disk is a file's. If the user names a
directory, such files lie in a `state_directory` there, which stays.

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
import time
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from graphswap import far_memory, ir, state_directory

_PREFIX = "graphswap-"
_STATE = "state"
_NUMBERS = itertools.count()
_STATES: weakref.WeakValueDictionary[str, state_directory.StateDirectory] = weakref.WeakValueDictionary()
"""All that this process keeps: steps of one training may be compiled anew, with tiers of their own."""
_USERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""What may have memory on disk."""
_AHEAD = 2
"""How many pieces of a value are read from files before they are needed."""


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

    Attributes:
        keeps_state: Whether variables on disk stay there as the state of a training.

    Args:
        directory: Where the disk tier makes its private directory and keeps variables; None for the system's temporary
            one, where nothing is kept.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None):
        self._parent = default_directory() if directory is None else pathlib.Path(directory)
        self.keeps_state = directory is not None
        self._files: pathlib.Path | None = None
        self._state: state_directory.StateDirectory | None = None

    def swap_out(self, tensor: tf.Tensor, tier: str) -> FarCopy:
        """Adds the ops that copy `tensor` (static shape) to the tier."""
        if tier == "host" and tf.config.list_logical_devices("GPU"):
            pinned = _copy(tensor, "_CopyFromGpuToHost")
            return FarCopy([pinned], [pinned.op], is_pinned=True)
        contents = strings(tensor)
        if tier == "host":
            return FarCopy(contents, [string.op for string in contents])
        names, writes = [], []
        for string in contents:
            path = self.directory() / str(next(_NUMBERS))
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
            tensor = tf.io.parse_tensor(_string(copy.pieces[0], copy.is_file), element)
            tensor.set_shape(shape)
            return tensor
        count = len(copy.pieces)
        width = math.prod(d or 0 for d in shape or ()) // count
        target = tf.raw_ops.Empty(shape=(count, width), dtype=element, init=False)
        targets = [target]
        for index, piece in enumerate(copy.pieces):
            # Files are read a little ahead, into the host's memory.
            with tf.control_dependencies([targets[max(0, index - _AHEAD)]]):
                string = _string(piece, copy.is_file)
            # One after the other: beside the target only one piece is on the device.
            with tf.control_dependencies([target]):
                part = tf.io.parse_tensor(tf.identity(string), element)
            target = tf.raw_ops.InplaceUpdate(x=target, i=[index], v=part)
            targets.append(target)
        return tf.reshape(target, shape)

    def memory(self, tier: str, nbytes: int) -> tuple[np.ndarray, pathlib.Path | None]:
        """New far memory for a variable's value, and the file that it is of on the disk.

        Args:
            tier: "host" or "disk".
            nbytes: Of the value.

        Raises:
            SwapSpaceError: If there is no room for it.
            StateError: If the user named a directory, and the state in it is that of another training.
        """
        if tier == "host":
            return far_memory.host(nbytes), None
        with self.explaining():
            path = self._new_file()
            return far_memory.file(path, nbytes), path

    def write(self, contents: Any) -> str:
        """Writes bytes to a new file in `variables_directory`, and returns its name.

        Raises:
            OSError: If it can't be written. Then there is no file.
        """
        path = self._new_file()
        try:
            path.write_bytes(contents)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say where
        return path.name

    def _new_file(self) -> pathlib.Path:
        """Where another variable's value can lie. No two files ever have the same name."""
        return self.variables_directory() / f"{next(_NUMBERS)}-{time.time_ns()}"

    def variables_directory(self) -> pathlib.Path:
        """Where the files of variables lie, made on the first call.

        Raises:
            SwapSpaceError: If it can't be made.
            StateError: If the user named a directory, and the state in it is that of another training.
        """
        if self.keeps_state:
            return self.state_directory().path
        path = self.directory() / _STATE
        path.mkdir(exist_ok=True)
        return path

    def state_directory(self) -> state_directory.StateDirectory:
        """The directory of state in the one that the user named, made on the first call.

        Raises:
            SwapSpaceError: If it can't be made.
            StateError: If the state in it is that of another training.
        """
        if self._state is None:
            path = state_path(self._parent)
            try:
                self._state = _STATES.get(str(path)) or state_directory.StateDirectory(path)
                _STATES[str(path)] = self._state
            except OSError as error:
                raise self._space_error(self._parent, error.strerror or str(error)) from error
        return self._state

    def clean(self) -> None:
        """Removes files of variables that are neither a variable's memory now nor part of the last state."""
        path = self._used_for_variables()
        if path is not None:
            used = {file.name for user in list(_USERS.values()) for file in user.files()}
            state_directory.clean(path, used.union(self._committed()))

    def discard(self, file: pathlib.Path) -> None:
        """Removes a file of these tiers that was a variable's memory, unless it is part of the last state."""
        if file.parent == self._used_for_variables() and file.name not in self._committed():
            file.unlink(missing_ok=True)

    def files_bytes(self) -> int:
        """Bytes of all files of variables, kept or not."""
        path = self._used_for_variables()
        return 0 if path is None else state_directory.files_bytes(path)

    def expect_room(self, nbytes: int) -> None:
        """Checks that files of variables may take so many bytes in all.

        Raises:
            SwapSpaceError: If there is less room, or the directory can't be made.
            StateError: If the user named a directory, and the state in it is that of another training.
        """
        with self.explaining():
            path = self.variables_directory()
            has = shutil.disk_usage(path).free + state_directory.files_bytes(path)
        if nbytes > has:
            raise self._space_error(path, f"expected room for {nbytes / 2**30:.1f}GiB, received {has / 2**30:.1f}GiB")

    def _used_for_variables(self) -> pathlib.Path | None:
        """`variables_directory`, if it has been used."""
        if self.keeps_state:
            return None if self._state is None else self._state.path
        return None if self._files is None else self._files / _STATE

    def _committed(self) -> Collection[str]:
        """Names of the files that are part of the last state."""
        manifest = self._state.manifest if self._state is not None else None
        return manifest.checksums.keys() if manifest is not None else ()

    def explained(self, error: Exception) -> SwapSpaceError | None:
        """What an error means for a user, if it is about a directory of these tiers."""
        state = self._state.path if self._state is not None else None
        for path in filter(None, (self._files, state)):
            for line in str(error).splitlines():
                if str(path) in line:
                    return self._space_error(path, line.strip())
        return None

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Raises a SwapSpaceError for what went wrong in a directory of these tiers.

        Raises:
            SwapSpaceError: If a file can't be written or read.
        """
        try:
            yield
        except (tf.errors.OpError, OSError) as error:
            explained = self.explained(error)
            if explained is None:
                raise
            raise explained from error

    def _space_error(self, path: pathlib.Path, why: str) -> SwapSpaceError:
        return SwapSpaceError(
            f"swapping to '{path}' failed: {why}. "
            "Free space there, or name another directory in graphswap.Options(swap_to=...)."
        )

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


def use(user: Any) -> None:
    """Notes that something may have memory on disk. It is to have a method `files`, which names its files."""
    _USERS[id(user)] = user


def is_committed(file: pathlib.Path) -> bool:
    """Whether a file is part of the last state that this process has written to its directory."""
    state = _STATES.get(str(file.parent))
    return state is not None and state.manifest is not None and file.name in state.manifest.checksums


def state_path(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Where variables lie in a directory that the user named."""
    return pathlib.Path(directory) / _STATE


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


def strings(tensor: tf.Tensor) -> list[tf.Tensor]:
    """The tensor's pieces as strings, which lie outside of the device."""
    count = ir.swap_pieces(ir.Value(tensor.dtype.name, tuple(tensor.shape.as_list())))
    parts = [tensor] if count == 1 else _split(tensor, count)
    return [tf.io.serialize_tensor(part) for part in parts]


def _split(tensor: tf.Tensor, count: int) -> list[tf.Tensor]:
    """The rows of the tensor seen as a matrix of `count` rows; no copies where rows are whole 64 bytes."""
    matrix = tf.reshape(tensor, (count, -1))
    return [tf.slice(matrix, (index, 0), (1, -1)) for index in range(count)]


def _string(piece: tf.Tensor, is_file: bool) -> tf.Tensor:
    # The identity carries the control dependencies: a parse without inputs of its own could be moved.
    string = tf.identity(piece)
    return tf.io.read_file(string) if is_file else string
