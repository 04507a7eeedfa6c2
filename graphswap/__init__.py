"""Trains TensorFlow and Keras models inside a memory budget, by rewriting the graph of the training step.

`import graphswap` registers the compile option: `model.compile(..., graphswap="2GiB")`. Names are loaded
on first use, so that the planner can be used without TensorFlow.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
import types
from typing import TYPE_CHECKING, Any

from graphswap import _keras_import

if TYPE_CHECKING:
    from graphswap.callback import ReportCallback
    from graphswap.graphdef import UnsupportedGraphError
    from graphswap.host_variable import host_variables
    from graphswap.keras_compile import disable, enable
    from graphswap.model_data import HostMemoryError
    from graphswap.model_state import restore
    from graphswap.options import Options
    from graphswap.pipeline import function
    from graphswap.plan import Plan
    from graphswap.report import report
    from graphswap.server import serve
    from graphswap.strategies.base import InfeasibleBudgetError

__version__ = "0.1.0"

__all__ = [
    "HostMemoryError",
    "InfeasibleBudgetError",
    "Options",
    "Plan",
    "ReportCallback",
    "UnsupportedGraphError",
    "disable",
    "enable",
    "function",
    "host_variables",
    "report",
    "restore",
    "serve",
]

_HOMES = {
    "HostMemoryError": "model_data",
    "InfeasibleBudgetError": "strategies.base",
    "Options": "options",
    "Plan": "plan",
    "ReportCallback": "callback",
    "UnsupportedGraphError": "graphdef",
    "disable": "keras_compile",
    "enable": "keras_compile",
    "function": "pipeline",
    "host_variables": "host_variable",
    "report": "report",
    "restore": "model_state",
    "serve": "server",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graphswap' has no attribute {name!r}")
    try:
        home = importlib.import_module(f"graphswap.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("tensorflow", "keras"):
            raise
        raise ImportError(
            f"graphswap.{name} needs {error.name}, which is not installed. "
            "Run `pip install graphswap[cpu]` or, for GPUs, `pip install graphswap[gpu]`."
        ) from error
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps `graphswap.report` the function, although the submodule that holds it has the same name."""

    @property
    def report(self):
        return __getattr__("report")

    @report.setter
    def report(self, submodule: types.ModuleType):
        """Ignores that the import system binds the submodule."""


sys.modules[__name__].__class__ = _Package

# In a checkout the sibling folders are part of this package, as setup.py maps them when installed.
_here = pathlib.Path(__file__).parent
if not (_here / "rewrites").exists() and (_here.parent / "setup.py").exists():
    __path__.append(str(_here.parent))

_keras_import.register()
