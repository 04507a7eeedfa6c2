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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from graphswap import ir, profiler, state_directory, tiers
from graphswap.host_variable import HostVariable, host_variables
from graphswap.state_directory import Entry, Manifest, StateError
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
        last = directory.manifest
        entries: dict[str, Entry] = {}
        small: list[tuple[str, tf.Variable]] = []
        for name, variable in variables.items():
            files = variable.files() if isinstance(variable, HostVariable) else []
            if files and all(os.path.dirname(file) == str(directory.path) for file in files):
                entries[name] = _entry(variable, map(os.path.basename, files))
            elif ir.Value(variable.dtype.name, tuple(variable.shape)).nbytes <= SMALL_BYTES:
                small.append((name, variable))
            else:
                known = last.variables.get(name) if last is not None else None
                entries[name] = _entry(variable, _written(_contents(variable), far_tiers, known))
        if small:
            values = tf.stack([tf.io.serialize_tensor(variable.read_value()) for _, variable in small])
            files = _written([tf.io.serialize_tensor(values)], far_tiers, None)
            for position, (name, variable) in enumerate(small):
                entries[name] = _entry(variable, files, position)
        steps = 1 + (last.steps if last is not None else 0)
        directory.commit(Manifest(steps, entries, sys.modules["graphswap"].__version__))


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
        for file in sorted(manifest.files):
            _check_file(path / file)
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


def _check_file(file: pathlib.Path) -> None:
    expected = state_directory.checksum(file.name)
    try:
        received = int(tiers.checksum(tf.io.read_file(str(file))))
    except (tf.errors.OpError, OSError) as error:
        raise StateError(
            f"expected a file of values '{file}', received {str(error).splitlines()[0]}. Nothing was restored: "
            "the state is damaged; use a copy of the directory."
        ) from error
    if received != expected:
        raise StateError(
            f"expected bytes of checksum {expected} in '{file}', received {received}. Nothing was restored: "
            "the state is damaged; use a copy of the directory."
        )


def _entry(variable: tf.Variable, files: Iterable[str], position: int | None = None) -> Entry:
    return Entry(variable.dtype.name, tuple(variable.shape), tuple(files), position)


def _contents(variable: tf.Variable) -> list[tf.Tensor]:
    if isinstance(variable, HostVariable) and variable.tier == "host":
        return variable.pieces()
    return tiers.strings(variable.read_value())


def _written(contents: Sequence[tf.Tensor], far_tiers: tiers.Tiers, known: Entry | None) -> list[str]:
    """Names of files with these contents, new ones unless those known have them."""
    sums = [int(tiers.checksum(string)) for string in contents]
    if known is not None and known.position is None and sums == [*map(state_directory.checksum, known.files)]:
        return list(known.files)
    return [os.path.basename(os.fsdecode(name.numpy())) for name in far_tiers.write(contents)]


def _assign(variable: tf.Variable, entry: Entry, path: pathlib.Path) -> None:
    if entry.position is None:
        names = [tf.constant(str(path / file)) for file in entry.files]
        copy = tiers.FarCopy(names, [], is_file=True)
        value = tiers.Tiers().swap_in(copy, entry.dtype, entry.shape)
    else:
        strings = tf.io.parse_tensor(tf.io.read_file(str(path / entry.files[0])), tf.string)
        value = tf.io.parse_tensor(strings[entry.position], variable.dtype)
    variable.assign(value)
