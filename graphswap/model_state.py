"""The state of a training in a directory: written after each completed step, read back into a model.

What lies on disk anyway is only named. What lies elsewhere is written beside it, large variables only if their bytes
have changed.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from graphswap import far_memory, ir, profiler, state_directory, tiers
from graphswap.host_variable import HostVariable, host_variables
from graphswap.state_directory import Entry, Manifest, StateDirectory, StateError
from graphswap.variables import SMALL_BYTES

_NUMBER = re.compile(r"_\d+(?=[_/:]|$)")


def named_variables(target: Any) -> dict[str, tf.Variable]:
    """The variables of a Keras model and its optimizer by their paths, or tf.Variables by their names.

    Those of metrics are left out. The numbers that Keras gives to names hang on what else was made in the process, so
    they are left out, too; of equal names all but the first say which they are: "dense/kernel", "dense/kernel#2" ...

    Args:
        target: A Keras model or tf.Variables.
    """
    if hasattr(target, "layers"):
        variables = [*target.variables, *(target.optimizer.variables if target.optimizer is not None else ())]
        pairs = [(variable.path, variable.value) for variable in variables]
    else:
        pairs = [(variable.name, variable) for variable in target]
    counts: dict[str, int] = {}
    found: dict[str, tf.Variable] = {}
    for path, variable in pairs:
        name = _NUMBER.sub("", path)
        counts[name] = counts.get(name, 0) + 1
        found[name if counts[name] == 1 else f"{name}#{counts[name]}"] = variable
    return found


def commit(variables: Mapping[str, tf.Variable], far_tiers: tiers.Tiers) -> None:
    """Makes the variables' values the state of a completed step.

    Args:
        variables: By their names.
        far_tiers: Which keep a directory of state.

    Raises:
        SwapSpaceError: If it can't be written. The last state stays.
        StateError: If another training keeps its state there.
    """
    with far_tiers.explaining():
        directory = far_tiers.state_directory()
        directory.claim(variables.values())
        entries: dict[str, Entry] = {}
        sums: dict[str, int] = {}
        small: list[tuple[str, tf.Variable]] = []
        for name, variable in variables.items():
            file = _file(variable, directory.path)
            if file is None and ir.Value(variable.dtype.name, tuple(variable.shape)).nbytes <= SMALL_BYTES:
                small.append((name, variable))
                continue
            contents = _contents(variable)
            checksum = state_directory.checksum(contents)
            file = file or _known(directory, name, checksum) or far_tiers.write(contents)
            sums[file], entries[name] = checksum, _entry(variable, file)
        if small:
            values = tf.stack([tf.io.serialize_tensor(variable.read_value()) for _, variable in small])
            contents = tf.io.serialize_tensor(values).numpy()
            file = far_tiers.write(contents)
            sums[file] = state_directory.checksum(contents)
            for position, (name, variable) in enumerate(small):
                entries[name] = _entry(variable, file, position)
        steps = 1 + (directory.manifest.steps if directory.manifest is not None else 0)
        directory.commit(Manifest(steps, entries, sums, sys.modules["graphswap"].__version__))


def restore(model: Any, directory: str | os.PathLike[str]) -> int:
    """Gives a model, and its optimizer, the state of the last completed step of an earlier training.

    That training was one with `graphswap.Options(swap_to=directory)` and variables outside of the device. If anything
    is not as expected, nothing is changed.

    Args:
        model: A Keras model that is built and compiled; or the tf.Variables of a step of `graphswap.function`, in the
            order in which the step uses them first.
        directory: As given to `Options`.

    Returns:
        How many steps were completed.

    Raises:
        StateError: If there is no such state, a file of it is damaged, or it is that of another model.
    """
    variables = _built_variables(model)
    path = tiers.state_path(directory)
    with state_directory.reading(path) as manifest:
        _check_names(variables, manifest, path)
        for name, variable in variables.items():
            entry = manifest.variables[name]
            if (entry.dtype, entry.shape) != (variable.dtype.name, tuple(variable.shape)):
                raise StateError(
                    f"'{name}': expected a value of {ir.Value(variable.dtype.name, tuple(variable.shape))}, received "
                    f"one of {ir.Value(entry.dtype, entry.shape)} in '{path}'. Nothing was restored: make the model as "
                    "it was in that training."
                )
        for file, checksum in sorted(manifest.checksums.items()):
            _check_file(path / file, checksum)
        for name, variable in variables.items():
            _assign(variable, manifest.variables[name], path)
    state_directory.trust(manifest)
    return manifest.steps


def _built_variables(model: Any) -> dict[str, tf.Variable]:
    if hasattr(model, "layers"):
        optimizer = getattr(model, "optimizer", None)
        if not model.built or optimizer is None:
            raise StateError(
                f"expected a model that is built and compiled, received '{model.name}', which is not. "
                "Compile it, and build it with model.build(input_shape) or one call."
            )
        if not optimizer.built:
            is_planned = getattr(model, "_graphswap_session", None) is not None
            may_not_fit = is_planned and profiler.memory_in_use() is not None
            with host_variables() if may_not_fit else contextlib.nullcontext():
                optimizer.build(model.trainable_variables)
    return named_variables(model)


def _check_names(variables: Mapping[str, tf.Variable], manifest: Manifest, path: pathlib.Path) -> None:
    missing, unknown = variables.keys() - manifest.variables.keys(), manifest.variables.keys() - variables.keys()
    if missing or unknown:
        raise StateError(
            f"expected the state of {len(variables)} variables, received that of {len(manifest.variables)} in '{path}'"
            f"{_listed('not in it', missing)}{_listed('only in it', unknown)}. Nothing was restored: make the model as "
            "it was in that training."
        )


def _listed(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"; {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else ""


def _check_file(file: pathlib.Path, expected: int) -> None:
    try:
        received = state_directory.checksum(np.fromfile(file, np.uint8))
    except OSError as error:
        raise StateError(
            f"expected a file of values '{file}', received {error.strerror or error}. Nothing was restored: "
            "the state is damaged; use a copy of the directory."
        ) from error
    if received != expected:
        raise StateError(
            f"expected bytes of checksum {expected} in '{file}', received {received}. Nothing was restored: "
            "the state is damaged; use a copy of the directory."
        )


def _entry(variable: tf.Variable, file: str, position: int | None = None) -> Entry:
    return Entry(variable.dtype.name, tuple(variable.shape), file, position)


def _file(variable: tf.Variable, directory: pathlib.Path) -> str | None:
    """Name of the file in the directory that is the memory of the variable's value, if one is."""
    file = variable.file() if isinstance(variable, HostVariable) else None
    return file.name if file is not None and file.parent == directory and file.exists() else None


def _known(directory: StateDirectory, name: str, checksum: int) -> str | None:
    """Name of the file that holds these bytes of a variable in the last state, if one does."""
    last = directory.manifest
    entry = last.variables.get(name) if last is not None else None
    if last is None or entry is None or entry.position is not None or last.checksums[entry.file] != checksum:
        return None
    return entry.file if (directory.path / entry.file).exists() else None


def _contents(variable: tf.Variable) -> np.ndarray:
    if isinstance(variable, HostVariable) and variable.tier != "device":
        return variable.view()
    return np.ascontiguousarray(far_memory.array(variable.read_value())).reshape(-1).view(np.uint8)


def _assign(variable: tf.Variable, entry: Entry, path: pathlib.Path) -> None:
    file = path / entry.file
    if entry.position is None:
        value = np.fromfile(file, np.uint8).view(variable.dtype.as_numpy_dtype).reshape(entry.shape)
    else:
        strings = tf.io.parse_tensor(tf.io.read_file(str(file)), tf.string)
        value = tf.io.parse_tensor(strings[entry.position], variable.dtype)
    variable.assign(value)
