"""Runs functions of a test file on an emulated accelerator, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from graphswap import emulate

_RESULT = "result: "


def call(memory_bytes: int, file: str, function: str, *arguments: Any, **variables: str) -> Any:
    """Calls a function of a file that ends with `emulated.main(globals())`.

    Args:
        memory_bytes: Of the device.
        file: The file.
        function: The function's name.
        *arguments: For the function; like its result, what JSON can express.
        **variables: Of the process's environment.

    Returns:
        What the function returns.
    """
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, **emulate.environment(memory_bytes), **variables}
    command = [sys.executable, "-m", "graphswap.emulate", file, function, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(_RESULT))
    return json.loads(line.removeprefix(_RESULT))


def main(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Calls the function that `call` named, and prints what it returns."""
    name, arguments = sys.argv[1:]
    print(_RESULT + json.dumps(functions[name](*json.loads(arguments))))
