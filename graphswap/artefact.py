"""A training step on disk for any compiler of StableHLO: its module, its state, and a manifest.

A directory of three files. `step.mlirbc` is portable StableHLO: a function from inputs and state to results, the new
values of the state among them. `state.npz` holds the state that it starts from. `manifest.json` describes both. Reading
one needs neither TensorFlow nor JAX.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphswap import new_directory

FORMAT = "graphswap step 1"

_MANIFEST, _MODULE, _STATE = "manifest.json", "step.mlirbc", "state.npz"


class ArtefactError(ValueError):
    """A directory that holds no such step, a damaged one, or one of another version."""


@dataclasses.dataclass(frozen=True)
class Array:
    """An input, a result, or a part of the state.

    Attributes:
        name: Of the argument or variable; of a result its number.
        dtype: numpy's or ml_dtypes' name of the element type.
        shape: Dimensions.
        result: Of a part of the state the number of the result that is its new value; None if the step only reads it.
        is_variable: Whether it is a variable's value. What else is state is constant.
        memory_kind: Where it lies between steps, as PJRT calls it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    result: int | None = None
    is_variable: bool = False
    memory_kind: str = "device"

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is in the files.

    Attributes:
        name: Of the step.
        inputs: What each step gets, the module's first parameters.
        state: What is kept from step to step, its other parameters. Those with a `result` are donated.
        results: What each step returns, the module's first results.
        fingerprint: `ir.Graph.fingerprint` of the step before it was planned.
        plan: As `Plan.to_json` has it; None if there is none.
        swapped: Copies to and from the host that the module asks for.
        versions: Of what wrote it, by name.
    """

    name: str
    inputs: tuple[Array, ...]
    state: tuple[Array, ...]
    results: tuple[Array, ...]
    fingerprint: str
    plan: Mapping[str, Any] | None
    swapped: tuple[int, int]
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return (
            f"step '{self.name}' with {len(self.inputs)} inputs, {len(self.state)} arrays of state and "
            f"{len(self.results)} results; {self.swapped[0]} copies to the host and {self.swapped[1]} back"
        )


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A step as it lies on disk.

    Attributes:
        manifest: What is in it.
        module: Portable StableHLO bytecode.
        state: Values in the manifest's order.
    """

    manifest: Manifest
    module: bytes
    state: tuple[np.ndarray, ...]


def dtype(name: str) -> np.dtype:
    """The element type of a name; those that numpy lacks come from ml_dtypes."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes  # TensorFlow and JAX bring it

        return np.dtype(getattr(ml_dtypes, name))


def write(artefact: Artefact, output: str | os.PathLike[str]) -> None:
    """Writes a directory whole or not at all.

    Args:
        artefact: What to write.
        output: A directory that does not exist yet.

    Raises:
        ArtefactError: If it exists or can't be written.
    """
    state = io.BytesIO()
    arrays: Any = {str(index): _as_bytes(value) for index, value in enumerate(artefact.state)}
    np.savez(state, **arrays)
    files = {_MODULE: artefact.module, _STATE: state.getvalue()}
    fields = {
        "format": FORMAT,
        **dataclasses.asdict(artefact.manifest),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files[_MANIFEST] = json.dumps(fields, indent=1).encode()
    with new_directory.made(pathlib.Path(output), ArtefactError) as directory:
        for name, content in files.items():
            (directory / name).write_bytes(content)


def check_output(target: pathlib.Path) -> None:
    """Raises ArtefactError if a directory can't be made there."""
    new_directory.check(target, ArtefactError)


def read(directory: str | os.PathLike[str]) -> Artefact:
    """Reads what `write` wrote.

    Raises:
        ArtefactError: If there is no such step, if a file is missing or not what was written, or if another version of
            graphswap wrote it in another format.
    """
    path = pathlib.Path(directory)
    fields = _fields(path)
    try:
        sums = fields["sha256"]
        manifest = _manifest(fields)
        contents = {name: (path / name).read_bytes() for name in (_MODULE, _STATE)}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != sums[name]:
                raise _damaged(path, f"'{name}' is not what was written")
        with np.load(io.BytesIO(contents[_STATE]), allow_pickle=False) as arrays:
            state = tuple(_as_array(arrays[str(index)], entry) for index, entry in enumerate(manifest.state))
    except OSError as error:
        raise _damaged(path, f"'{pathlib.Path(error.filename).name}' can't be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise _damaged(path, f"{type(error).__name__} {error}") from error
    return Artefact(manifest, contents[_MODULE], state)


def _fields(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        fields = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtefactError(
            f"expected a directory as written by `graphswap export --format=stablehlo`, received '{path}', "
            f"whose {_MANIFEST} can't be read: {error.strerror}. Export the step first."
        ) from error
    except ValueError as error:
        raise _damaged(path, f"{_MANIFEST} is no JSON: {error}") from error
    if not isinstance(fields, Mapping) or "format" not in fields:
        raise _damaged(path, f"{_MANIFEST} has no format")
    if fields["format"] != FORMAT:
        raise ArtefactError(
            f"expected a step in the format '{FORMAT}', received '{path}' in the format '{fields['format']}'. "
            "Export the step again with this version of graphswap."
        )
    return fields


def _manifest(fields: Mapping[str, Any]) -> Manifest:
    arrays = {
        name: tuple(Array(**{**entry, "shape": tuple(entry["shape"])}) for entry in fields[name])
        for name in ("inputs", "state", "results")
    }
    others = {name: fields[name] for name in ("name", "fingerprint", "plan", "versions")}
    return Manifest(**arrays, **others, swapped=tuple(fields["swapped"]))


def _as_bytes(value: np.ndarray) -> np.ndarray:
    """The same bits in a type that numpy can save."""
    return value if value.dtype.kind in "biufc" else value.view(f"u{value.dtype.itemsize}")


def _as_array(value: np.ndarray, entry: Array) -> np.ndarray:
    return value.view(dtype(entry.dtype)).reshape(entry.shape)


def matching(expected: Sequence[Array], values: Sequence[Any], what: str) -> list[np.ndarray]:
    """The values as arrays.

    Args:
        expected: What they have to be.
        values: Arrays, tensors or numbers.
        what: Calls them in messages.

    Raises:
        ValueError: If number, shape or element type differ.
    """
    if len(values) != len(expected):
        raise ValueError(f"expected {len(expected)} {what}s, received {len(values)}: one for each of the manifest's.")
    found = []
    for entry, value in zip(expected, values, strict=True):
        array = np.asarray(value)
        received = Array("", array.dtype.name, array.shape)
        if (received.dtype, received.shape) != (entry.dtype, entry.shape):
            raise ValueError(
                f"{what} '{entry.name}': expected {entry}, received {received}. Sizes are fixed at export."
            )
        found.append(array)
    return found


def _damaged(path: pathlib.Path, reason: str) -> ArtefactError:
    return ArtefactError(
        f"expected a step as written by `graphswap export --format=stablehlo`, received '{path}', which is damaged: "
        f"{reason}. Export the step again."
    )
