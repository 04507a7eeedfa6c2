"""Runs functions of a test file on every worker of a cluster, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from graphswap import emulate
from graphswap.tools import launch

_RESULT = "result: "


class Ended(NamedTuple):
    """What came of a worker.

    Attributes:
        status: Its exit status.
        result: What its function returned; None if it failed.
        errors: What it wrote to stderr.
    """

    status: int
    result: Any
    errors: str


def run(
    workers: int,
    memory_bytes: int | None,
    file: str,
    function: str,
    *arguments: Any,
    configs: Sequence[str] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> list[Ended]:
    """Calls a function of a file that ends with `emulated.main(globals())`, on every worker.

    Args:
        workers: How many; 1 for a process without a cluster.
        memory_bytes: Of each worker's emulated accelerator; None for none.
        file: The file.
        function: The function's name.
        *arguments: For the function; like its result, what JSON can express.
        configs: TF_CONFIG of each worker, if not on free ports of this machine.
        meanwhile: Is called once the first worker has printed a line.
    """
    if configs is None:
        configs = list(launch.cluster_configs(workers).values()) if workers > 1 else [""]
    emulated = {} if memory_bytes is None else emulate.environment(memory_bytes)
    with contextlib.ExitStack() as stack:
        started = []
        for config in configs:
            variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TF_CONFIG": config, **emulated}
            command = [sys.executable, *(["-m", "graphswap.emulate"] if emulated else []), file, function]
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            process = subprocess.Popen([*command, json.dumps(arguments)], env=variables, stdout=out, stderr=err)
            stack.callback(process.kill)
            started.append((process, out, err))
        if meanwhile is not None:
            _await_output(*started[0][:2])
            meanwhile()
        return [_ended(*one) for one in started]


def run_with_servers(
    workers: int,
    memory_bytes: Mapping[str, int],
    file: str,
    function: str,
    *arguments: Any,
    killed: tuple[str, float] | None = None,
    configs: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> dict[str, Ended]:
    """The same with a chief and one parameter server, in processes that all call the function.

    Args:
        workers: How many.
        memory_bytes: Of emulated accelerators, by task: "worker 0".
        file: The file.
        function: The function's name. It is to call `graphswap.serve` first.
        *arguments: For the function.
        killed: A task to end by SIGKILL, and so many seconds after the chief has printed a first line.
        configs: TF_CONFIG of tasks that get another one than the cluster's.
        meanwhile: Is called once the chief has printed a first line.

    Returns:
        Task to what came of it. The others are ended when the chief has ended, unless they end by themselves.
    """
    tasks = {str(task): config for task, config in launch.cluster_configs(workers, 1).items()}
    tasks.update(configs or {})
    with contextlib.ExitStack() as stack:
        started = {}
        for task, config in tasks.items():
            limit = memory_bytes.get(task)
            emulated = emulate.companion_environment() if limit is None else emulate.environment(limit)
            variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TF_CONFIG": config, **emulated}
            command = [sys.executable, *([] if limit is None else ["-m", "graphswap.emulate"]), file, function]
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            process = subprocess.Popen([*command, json.dumps(arguments)], env=variables, stdout=out, stderr=err)
            stack.callback(process.kill)
            started[task] = (process, out, err)
        if killed is not None or meanwhile is not None:
            _await_output(*started["chief 0"][:2])
        if meanwhile is not None:
            meanwhile()
        if killed is not None:
            task, seconds = killed
            time.sleep(seconds)
            started[task][0].kill()
        return {task: _ended(*one) for task, one in started.items()}


def call(workers: int, memory_bytes: int | None, file: str, function: str, *arguments: Any) -> list[Any]:
    """The same where nothing is to fail. Returns the results."""
    ended = run(workers, memory_bytes, file, function, *arguments)
    for index, one in enumerate(ended):
        assert one.status == 0, f"worker {index}: {one.errors[-4000:]}"
    return [one.result for one in ended]


def _await_output(process: subprocess.Popen[bytes], out: Any) -> None:
    while not os.fstat(out.fileno()).st_size and process.poll() is None:
        time.sleep(0.1)


def _ended(process: subprocess.Popen[bytes], out: Any, err: Any) -> Ended:
    try:
        status = process.wait(300)
    except subprocess.TimeoutExpired:
        status = -1
    for file in (out, err):
        file.seek(0)
    lines = [line for line in out if line.startswith(_RESULT)]
    return Ended(status, json.loads(lines[0].removeprefix(_RESULT)) if lines else None, err.read())
