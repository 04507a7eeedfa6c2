"""The files that variables on disk live in, and the manifest that says which of them are the state of a completed step.

What a manifest names is not written to any more. The next one is written beside it and takes its name; only then may
files that it does not name be written over or removed. So a process may be killed at any moment, and what is left is
the state of the last completed step. (A power cut may lose what the system had not yet written; the checksums tell.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import json
import os
import pathlib
import re
import uuid
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import xxhash

FORMAT = 2
_MANIFEST = "manifest.json"
_LOCK = "lock"
_FILE = re.compile(r"\d+-\d+")
"""Number, time."""
_ours: set[str] = set()
"""Manifests that this process has written or read."""


class StateError(ValueError):
    """A directory holds no state that can be used here."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A variable in a manifest.

    Attributes:
        dtype: Of its value.
        shape: Of its value.
        file: Name of the file of its bytes; for small variables one that holds all of them.
        position: Of a small variable: which of the values in that file is its own.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    position: int | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the state of a completed step consists of.

    Attributes:
        steps: How many steps were completed.
        variables: By their names.
        checksums: Of the files, by their names.
        version: Of graphswap.
        identity: No other manifest has it.
    """

    steps: int
    variables: Mapping[str, Entry]
    checksums: Mapping[str, int]
    version: str
    identity: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def to_json(self) -> str:
        fields = {
            "format": FORMAT,
            "steps": self.steps,
            "graphswap": self.version,
            "identity": self.identity,
            "variables": {name: dataclasses.asdict(entry) for name, entry in self.variables.items()},
            "checksums": dict(self.checksums),
        }
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: If it is something else.
        """
        try:
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                raise ValueError(f"format {fields['format']}, of graphswap {fields['graphswap']}")
            variables = {name: _entry(entry) for name, entry in fields["variables"].items()}
            sums = {name: int(fields["checksums"][name]) for name in {entry.file for entry in variables.values()}}
            return cls(int(fields["steps"]), variables, sums, str(fields["graphswap"]), str(fields["identity"]))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"something else ({type(error).__name__}: {error})") from error


def _entry(fields: dict[str, Any]) -> Entry:
    file = str(fields["file"])
    if not _FILE.fullmatch(file):
        raise ValueError(f"a file with another name: {file[:200]}")
    return Entry(str(fields["dtype"]), tuple(map(int, fields["shape"])), file, fields["position"])


class StateDirectory:
    """A directory that this process keeps the state of a training in. Others are kept out until it ends.

    Args:
        path: The directory; made if it does not exist, in one that does.

    Raises:
        StateError: If it is in use, holds a state that this process has neither written nor read, or other files.
        OSError: If it can't be made or written.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        path.mkdir(mode=0o700, exist_ok=True)
        others = {file.name for file in path.iterdir()}
        if others and not others & {_LOCK, _MANIFEST}:
            raise StateError(
                f"expected an empty directory or one of graphswap's, received '{path}', which holds '{min(others)}'. "
                "Move that away, or name another directory in graphswap.Options(swap_to=...)."
            )
        self._lock = open(path / _LOCK, "a+")  # noqa: SIM115 (held until exit: it tells the living from the dead)
        if not _locked(self._lock):
            gc.collect()  # a training that was compiled anew may have left it locked
            if not _locked(self._lock):
                raise StateError(
                    f"expected a directory that no other training keeps its state in, received '{path}', which process "
                    f"{_owner(path)} does. Name another one in graphswap.Options(swap_to=...)."
                )
        self._variables: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.manifest = read(path) if (path / _MANIFEST).exists() else None
        if self.manifest is not None and self.manifest.identity not in _ours:
            raise StateError(
                f"expected a directory without the state of another training, received '{path}', which holds that of "
                f"step {self.manifest.steps}. Go on from it with graphswap.restore(model, '{path.parent}') before "
                f"training, or remove '{path}' to begin anew."
            )
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def claim(self, variables: Iterable[Any]) -> None:
        """Notes whose state is kept here.

        Raises:
            StateError: If others' is, of which none is among these.
        """
        variables = {id(variable): variable for variable in variables}
        if set(self._variables.keys()).isdisjoint(variables):
            gc.collect()  # of a training that has ended its variables may be left
            if self._variables:
                raise StateError(
                    f"expected one training that keeps its state in '{self.path}', received a second one. "
                    "Give each a directory of its own in graphswap.Options(swap_to=...)."
                )
        self._variables.update(variables)

    def commit(self, manifest: Manifest) -> None:
        """Makes this the state of the last completed step. Its files must be complete.

        Raises:
            OSError: If it can't be written. The last state stays.
        """
        new = self.path / f"{_MANIFEST}.new"
        try:
            new.write_text(manifest.to_json())
            os.replace(new, self.path / _MANIFEST)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(new)) from error  # a full disk does not say where
        self.manifest = manifest
        _ours.add(manifest.identity)


def clean(path: pathlib.Path, kept: Collection[str]) -> None:
    """Removes files of values that nobody needs.

    Args:
        path: The directory.
        kept: Names of files that stay.
    """
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(path):
            if _FILE.fullmatch(entry.name) and entry.name not in kept:
                os.unlink(entry.path)


def files_bytes(path: pathlib.Path) -> int:
    """Bytes of all files of values in a directory; 0 if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return sum(entry.stat().st_size for entry in os.scandir(path) if _FILE.fullmatch(entry.name))
    return 0


def read(path: pathlib.Path) -> Manifest:
    """The manifest in a directory.

    Raises:
        StateError: If there is none, or none that this version reads.
    """
    file = path / _MANIFEST
    try:
        return Manifest.from_json(file.read_text())
    except OSError as error:
        raise StateError(
            f"expected the state of a training in '{path}', received {error.strerror or error}: '{file}'. "
            "Name the directory that was given as graphswap.Options(swap_to=...)."
        ) from error
    except ValueError as error:
        raise StateError(
            f"expected a manifest of format {FORMAT} in '{file}', received {error}. "
            "Read it with the version of graphswap that wrote it, or name another directory."
        ) from error


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[Manifest]:
    """The manifest in a directory. Meanwhile no other process changes what it names.

    Raises:
        StateError: If there is none that this version reads, or another process is at work there.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):  # in a copy
            lock = stack.enter_context(open(path / _LOCK))
            if not _locked(lock) and _owner(path) != str(os.getpid()):
                raise StateError(
                    f"expected the state of a training that has ended, received '{path}', in which process "
                    f"{_owner(path)} keeps its own. End it first, or name a copy of the directory."
                )
        yield read(path)


def trust(manifest: Manifest) -> None:
    """Lets this process replace a state, as it has read it."""
    _ours.add(manifest.identity)


def checksum(contents: Any) -> int:
    """Of bytes: 64 bits of XXH3, which takes no longer than to read them."""
    return xxhash.xxh3_64_intdigest(contents)


def _owner(path: pathlib.Path) -> str:
    return (path / _LOCK).read_text() or "(unknown)"


def _locked(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
