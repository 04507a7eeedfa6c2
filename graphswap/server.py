"""A process's part in a cluster with parameter servers: what TF_CONFIG must say, and what the others learn of it.

Processes tell each other about themselves in a file of TensorFlow's in-memory file system: the chief reads and writes
it by ops that run in the other process. So there is no further port, and nothing to install.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import tensorflow as tf

from graphswap import allocator, distribute, placement, plan_file, profiler
from graphswap.cost_model import MEMORY_VARIABLE, DeviceSpec
from graphswap.distribute import WorkerError

STARTING_SECONDS = 120.0
"""How long the chief waits for the others to answer."""

_FACTS = "ram://graphswap/facts"
_ORDERS = "ram://graphswap/orders"
_POLL_SECONDS = 0.05
_CHIEF_POLLS = 20
"""After so many polls a process looks whether the chief still answers."""
_MISSED = 3
"""So often it may not, once it has."""
_FENCES: list[Any] = []
"""Behind the holes for small buffers, for as long as the process lives."""
_JOBS = ("chief", "worker", "ps")
_NUMBERS = itertools.count(1)
"""Of the chief's orders to look."""
_LOOKING_SECONDS = 30.0
"""How long the chief waits for a process to carry such an order out."""
_LOST = (tf.errors.InvalidArgumentError, tf.errors.UnavailableError)
"""What TensorFlow raises of a process that is not there any more."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a process says of itself.

    Attributes:
        versions: Name to what must be the same in all processes.
        memory_bytes: That TensorFlow may allocate there.
        device: Of a worker, as measured there.
        in_use_bytes: Device bytes when it was last told to look.
        peak_bytes: The most so far at that time; None if the device counts no bytes.
        order: Number of the order to look that it has carried out last.
    """

    versions: Mapping[str, str]
    memory_bytes: int
    device: DeviceSpec | None = None
    in_use_bytes: int = 0
    peak_bytes: int | None = None
    order: int = 0

    def to_json(self) -> str:
        device = None if self.device is None else plan_file.device_fields(self.device)
        return json.dumps({**vars(self), "device": device})

    @classmethod
    def from_json(cls, text: str) -> Facts:
        fields = json.loads(text)
        device = None if fields["device"] is None else plan_file.device_from_fields(fields["device"])
        return cls(**{**fields, "device": device})


@dataclasses.dataclass(frozen=True)
class Task:
    """This process's place in the cluster that TF_CONFIG names.

    Attributes:
        cluster: Job to the addresses of its tasks.
        job: Its job.
        index: Its number in the job.
    """

    cluster: Mapping[str, Sequence[str]]
    job: str
    index: int

    @classmethod
    def from_environment(cls) -> Task:
        """Raises a ValueError if TF_CONFIG says something else than a cluster with parameter servers needs."""
        text = os.environ.get("TF_CONFIG", "")
        try:
            config = json.loads(text or "{}")
        except ValueError as error:
            raise ValueError(f"TF_CONFIG: expected JSON, received {text!r} ({error}).") from error
        example = (
            'Set it to {"cluster": {"chief": ["host0:2222"], "worker": ["host1:2222"], "ps": ["host2:2222"]}, "task": '
            '{"type": "worker", "index": 0}}, with the task of each process.'
        )
        cluster, task = config.get("cluster"), config.get("task")
        if not isinstance(cluster, dict) or not isinstance(task, dict):
            missing = "cluster" if not isinstance(cluster, dict) else "task"
            raise ValueError(f"TF_CONFIG: expected a field '{missing}', received {text or 'no TF_CONFIG'}. {example}")
        for job in _JOBS:
            if not cluster.get(job):
                raise ValueError(f"TF_CONFIG: expected addresses of the job '{job}', received {cluster}. {example}")
        job, index = task.get("type"), task.get("index")
        if job not in _JOBS:
            raise ValueError(f"TF_CONFIG: expected a task of a type in {_JOBS}, received {task}. {example}")
        if not isinstance(index, int) or not 0 <= index < len(cluster[job]):
            raise ValueError(
                f"TF_CONFIG: expected a task with an index below {len(cluster[job])}, the number of tasks of the job "
                f"'{job}', received {task}. {example}"
            )
        return cls(cluster, job, index)

    @property
    def address(self) -> str:
        return self.cluster[self.job][self.index]

    def others(self) -> Mapping[str, str]:
        """Names of the tasks that serve, with their addresses."""
        jobs = ("worker", "ps")
        return {f"{job} {index}": address for job in jobs for index, address in enumerate(self.cluster[job])}

    def __str__(self) -> str:
        return f"{self.job} {self.index}"


def serve() -> None:
    """Takes this process's part in a cluster with parameter servers, as TF_CONFIG says.

    Call it before TensorFlow is used. In a worker or a parameter server it does not return: the process ends with the
    chief. In the chief it returns once all others answer.

    Raises:
        ValueError: If TF_CONFIG lacks something, or another process uses the port that it names.
        WorkerError: In the chief, if the others don't answer within 120 s; in the others, what the chief tells them.
        SystemExit: In a worker or a parameter server, when the chief has ended.
    """
    task = Task.from_environment()
    _expect_free(task)
    if task.job == "chief":
        _wait_for(task.others())
        return
    _serve(task)


def _expect_free(task: Task) -> None:
    port = int(task.address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as TensorFlow does: else a port just left is taken
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"TF_CONFIG: expected a free port for {task}, received {task.address}: {error.strerror}. End the "
                "process that uses it, or name another port in every process's TF_CONFIG."
            ) from error


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), 2.0):
            return True
    except OSError:
        return False


def _wait_for(tasks: Mapping[str, str]) -> None:
    missing = dict(tasks)
    deadline = time.monotonic() + STARTING_SECONDS
    while missing:
        missing = {name: address for name, address in missing.items() if not _answers(address)}
        if missing and time.monotonic() > deadline:
            raise WorkerError(
                f"graphswap: expected all tasks of TF_CONFIG to answer within {STARTING_SECONDS:.0f} s, received no "
                f"answer of {', '.join(f'{name} ({address})' for name, address in missing.items())}. Start the same "
                "script, which calls graphswap.serve(), in each of them, and look at their output."
            )
        time.sleep(10 * _POLL_SECONDS if missing else 0.0)


def _serve(task: Task) -> NoReturn:
    facts = _own_facts(task)
    _append(_FACTS, facts.to_json())  # before its port answers
    server = tf.distribute.Server(tf.train.ClusterSpec(dict(task.cluster)), task.job, task.index, protocol="grpc")
    assert server.target
    deadline = time.monotonic() + distribute.PATIENCE_SECONDS
    done = 0  # of the chief's orders
    missed, polls = -1, itertools.count()  # not before the chief has answered
    while missed < _MISSED:
        time.sleep(_POLL_SECONDS)
        for order in map(json.loads, _lines(_ORDERS)[done:]):
            if "error" in order:
                raise WorkerError(order["error"])
            if facts.peak_bytes is not None and order["forgets"]:
                tf.config.experimental.reset_memory_stats(profiler.device_name())
            done += 1
            in_use_bytes = (profiler.memory_in_use() or 0) - len(_FENCES) * allocator.ALIGNMENT_BYTES
            peak_bytes = profiler.memory_in_use("peak")
            facts = dataclasses.replace(facts, in_use_bytes=in_use_bytes, peak_bytes=peak_bytes, order=order["number"])
            _append(_FACTS, facts.to_json())
        if next(polls) % _CHIEF_POLLS:
            continue
        if _answers(task.cluster["chief"][0]):
            missed = 0
        elif missed >= 0:
            missed += 1
        elif time.monotonic() > deadline:
            raise WorkerError(
                f"graphswap: expected the chief ({task.cluster['chief'][0]}) to answer {task} within "
                f"{distribute.PATIENCE_SECONDS:.0f} s, received no answer. Start the same script there, and look at "
                "its output."
            )
    print(f"graphswap: the chief has ended, and {task} with it.", file=sys.stderr, flush=True)
    sys.exit(0)


def _own_facts(task: Task) -> Facts:
    """Measures this process's device, if a step is to run there."""
    emulated = os.environ.get(MEMORY_VARIABLE)
    counts = profiler.memory_in_use() is not None
    device = None
    if task.job == "worker":
        device = profiler.device_spec(int(emulated) if emulated else None, can_swap=counts)
    in_use_bytes = profiler.memory_in_use() or 0
    if device is not None and counts:
        _FENCES.extend(placement.leave_holes([allocator.HOLE_BYTES] * device.holes, profiler.device_name()))
    if counts:
        tf.config.experimental.reset_memory_stats(profiler.device_name())
    return Facts(
        versions(),
        int(emulated) if emulated else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        device,
        in_use_bytes,
        profiler.memory_in_use("peak"),
    )


def versions() -> dict[str, str]:
    """What must be the same in all processes."""
    return {
        "version of graphswap": distribute.version(),
        "version of TensorFlow": tf.__version__,
        "TF_ENABLE_ONEDNN_OPTS": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1"),
    }


def read_facts(device: str) -> Facts:
    """What the process of a device of another task says of itself.

    Args:
        device: "/job:worker/task:0".

    Raises:
        WorkerError: If it does not run `serve`.
    """
    try:
        with tf.device(device):
            text = tf.io.read_file(_FACTS).numpy().decode()
    except tf.errors.NotFoundError as error:
        raise WorkerError(
            f"graphswap: expected a process that called graphswap.serve() at {device}, received one that did not. "
            "Call it in every process, in the place of tf.distribute.Server."
        ) from error
    return Facts.from_json(_whole_lines(text)[-1])


def tell(devices: Sequence[str], error: Exception) -> None:
    """Has `serve` raise a WorkerError in other processes.

    Args:
        devices: Theirs, as in `read_facts`.
        error: Why.
    """
    _order(devices, {"error": str(error)})


def look(devices: Sequence[str], forgets: bool = False) -> list[Facts]:
    """Has other processes look at their devices, between two steps. Returns what those say that are still there.

    Args:
        devices: Theirs, as in `read_facts`.
        forgets: Whether they are to forget their peaks so far.
    """
    number = next(_NUMBERS)
    looked = (_looked(device, number) for device in _order(devices, {"forgets": forgets, "number": number}))
    return [facts for facts in looked if facts is not None]


def _looked(device: str, number: int) -> Facts | None:
    """What a process says once it has carried out that order; None if it is lost meanwhile."""
    deadline = time.monotonic() + _LOOKING_SECONDS
    with contextlib.suppress(*_LOST):
        while (facts := read_facts(device)).order < number:
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_SECONDS)
        return facts
    return None


def _order(devices: Sequence[str], order: Mapping[str, Any]) -> list[str]:
    """Gives processes an order. Returns the devices of those that have it: the others were lost."""
    reached = []
    for device in devices:
        with contextlib.suppress(*_LOST), tf.device(device):
            tf.io.write_file(_ORDERS, json.dumps(order) + "\n")  # which appends, in memory
            reached.append(device)
    return reached


def _append(path: str, line: str) -> None:
    with tf.io.gfile.GFile(path, "a") as file:
        file.write(line + "\n")


def _lines(path: str) -> list[str]:
    return _whole_lines(tf.io.gfile.GFile(path).read()) if tf.io.gfile.exists(path) else []


def _whole_lines(text: str) -> list[str]:
    return text[: text.rfind("\n") + 1].splitlines()
