"""A cluster on this machine, to try out a script that runs on a real one: `graphswap launch`.

Every process gets the TF_CONFIG that it would get there. The first one that fails ends all others.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from absl import app, flags

from graphswap import emulate, options
from graphswap.tools import commands

_PATIENCE_SECONDS = 5.0
"""How long a process may take to end once it was asked to."""
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Task:
    """One process of the cluster.

    Attributes:
        job: "chief", "worker" or "ps".
        index: Its number in the job.
    """

    job: str
    index: int

    def __str__(self) -> str:
        return f"{self.job} {self.index}"


def launch(script: Sequence[str], workers: int, ps: int = 0, memory_bytes: int | None = None) -> int:
    """Runs a script once for each task of a cluster on this machine, and waits for their end.

    Without parameter servers worker 0 is the chief, as in TensorFlow; with them there is a process more, the chief, and
    the cluster ends with it. Call from the main thread.

    Args:
        script: The script's file and its arguments.
        workers: How many workers.
        ps: How many parameter servers.
        memory_bytes: Memory of each worker's emulated accelerator, in whole MiB; None for none.

    Returns:
        0 if all went well, else the exit status of the first process that failed, as a shell counts it.

    Raises:
        ValueError: If there is no such script or less than 1 MiB of memory.
    """
    emulate.check_script(script)
    started: dict[Task, subprocess.Popen[str]] = {}
    outputs: list[threading.Thread] = []
    with _asked_to_end() as asked:
        try:
            for task, config in cluster_configs(workers, ps).items():
                started[task] = _started(script, config, memory_bytes, is_limited=task.job == "worker")
            for task, process in started.items():
                outputs += [_forward(task, process.stdout, sys.stdout), _forward(task, process.stderr, sys.stderr)]
            status = _wait(started, asked)
        finally:
            _end(list(started.values()))
            for thread in outputs:
                thread.join(_PATIENCE_SECONDS)
    return status


def cluster_configs(workers: int, ps: int = 0) -> Mapping[Task, str]:
    """TF_CONFIG of each task of a cluster on free ports of this machine."""
    counts = {"chief": int(ps > 0), "worker": workers, "ps": ps}
    tasks = [Task(job, index) for job, count in counts.items() for index in range(count)]
    ports = dict(zip(tasks, _free_ports(len(tasks)), strict=True))
    cluster = {
        job: [f"localhost:{ports[Task(job, index)]}" for index in range(count)]
        for job, count in counts.items()
        if count
    }
    return {task: json.dumps({"cluster": cluster, "task": {"type": task.job, "index": task.index}}) for task in tasks}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


def _started(script: Sequence[str], config: str, memory_bytes: int | None, is_limited: bool) -> subprocess.Popen[str]:
    """A process in a group of its own, so that what it starts ends with it."""
    variables = {**os.environ, "TF_CONFIG": config, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *script]
    if memory_bytes is not None and not is_limited:
        variables |= emulate.companion_environment()
    elif memory_bytes is not None:
        variables |= emulate.environment(memory_bytes)
        command[1:1] = ["-m", "graphswap.emulate"]
    return subprocess.Popen(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """Lets the kernel end this process if the launcher is killed, which then can't do it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _forward(task: Task, source: IO[str] | None, target: IO[str]) -> threading.Thread:
    """Writes each line of a process's output behind the name of its task."""
    assert source is not None

    def forward() -> None:
        for line in source:
            target.write(f"[{task}] {line.rstrip()}\n")  # in one piece, unlike print
            target.flush()

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def _asked_to_end() -> Iterator[list[int]]:
    """The signals that ask this process to end, as they arrive."""
    asked: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(started: Mapping[Task, subprocess.Popen[str]], asked: Sequence[int]) -> int:
    """Waits until all who work have ended, one has failed, or the user wants to end. Returns the exit status."""
    is_led = any(task.job == "chief" for task in started)
    working = [task for task in started if task.job == "chief" or (task.job == "worker" and not is_led)]
    while not asked:
        ended = {task: status for task, process in started.items() if (status := process.poll()) is not None}
        for task, status in ended.items():
            if status:
                what = f"ended with exit status {status}" if status > 0 else f"was ended by {_name(-status)}"
                _say(f"{task} {what}; the others are ended.")
                return status if status > 0 else 128 - status
        if all(task in ended for task in working):
            return 0
        time.sleep(_POLL_SECONDS)
    _say(f"received {_name(asked[0])}; all processes are ended.")
    return 128 + asked[0]


def _end(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Ends all processes and what they have started: first asked, then killed."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for process in processes:
        _signal(process, signal.SIGTERM)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[Any], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _name(number: int) -> str:
    return signal.Signals(number).name


def _say(message: str) -> None:
    print(f"graphswap launch: {message}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Runs the command on its arguments, the name of the program first."""
    values = flags.FlagValues()
    values.set_gnu_getopt(False)  # flags after the script are the script's
    workers = flags.DEFINE_integer("workers", None, "How many workers.", lower_bound=1, flag_values=values)
    ps = flags.DEFINE_integer("ps", 0, "How many parameter servers.", lower_bound=0, flag_values=values)
    memory = flags.DEFINE_string(
        "memory", None, "Memory of each worker's device, which is then an emulated one.", flag_values=values
    )
    script = commands.parsed(values, argv)
    if workers.value is None:
        raise app.UsageError("expected --workers=NUMBER, received no --workers.")
    try:
        memory_bytes = None if memory.value is None else options.parse_bytes(memory.value)
        return launch(script, workers.value, ps.value, memory_bytes)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
