"""Registers the compile option when Keras is imported, whether before or after graphswap.

Keras and TensorFlow take seconds to import, and the planner does without them; so `import graphswap` must
not import them only to register the option. Instead it watches for two imports. Once `keras` is loaded, the
module of the option is; once that module is loaded, the option is enabled. Two steps, because that module
may also be imported first and itself be what imports Keras: enabling it then has to wait until it is whole.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

_OPTION = "graphswap.keras_compile"


def register() -> None:
    """Enables the compile option now if Keras is loaded, else as soon as it is."""
    sys.meta_path.insert(0, _Watcher())
    if "keras" in sys.modules:
        _load_option(sys.modules["keras"])


def _load_option(keras: types.ModuleType) -> None:
    if keras.config.backend() == "tensorflow":
        importlib.import_module(_OPTION)


def _enable_option(keras_compile: types.ModuleType) -> None:
    keras_compile.enable()


_AFTER_IMPORT = {"keras": _load_option, _OPTION: _enable_option}


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds the watched modules where Python does, and adds to their execution what follows it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _AFTER_IMPORT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_follow(module: types.ModuleType) -> None:
            execute(module)
            _AFTER_IMPORT[fullname](module)

        spec.loader.exec_module = execute_and_follow  # the loader is this spec's own
        return spec
