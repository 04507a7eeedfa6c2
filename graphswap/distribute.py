"""tf.distribute: which replica of a model this process trains, and what the workers of one training tell each other.

Workers plan in step: they hold their graphs, versions and budgets against each other, and all carry out the plan of
one, the leader. They talk through a gathering collective of TensorFlow's own, under a key of its own: whoever does not
answer in time is an error, not a hang.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from graphswap import ir, profiler, replicas
from graphswap.cost_model import Link
from graphswap.graphdef import UnsupportedGraphError
from graphswap.options import format_bytes
from graphswap.sharded_value import Sharding

PATIENCE_SECONDS = 900.0
"""How long a worker waits for the others, which may still be building their model or measuring its step."""

_GROUP_KEY, _SUMS_GROUP_KEY = 0x67730001, 0x67730002
"""TensorFlow counts its own from 1."""
_instance_keys = itertools.count(1)
_LARGE_SUM_BYTES = 32 << 20
_SUMMED_BYTES = (4 << 10, 1 << 20)
"""To measure the network's latency and its speed."""
_SUMS = 4
"""Of each size, under one key as in training; the fastest counts, as the first one has to make the key known."""
_CLOCK_SECONDS = 1e-6
_LOST = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError)
"""What TensorFlow raises of a process that has ended, or can't be reached."""
_LOST_NOTE = (
    "graphswap: expected all processes of the cluster to go on, received no answer of one. Look at its output for what "
    "ended it, and start all of them again: with keras.callbacks.BackupAndRestore `fit` goes on from its last backup."
)


class WorkerError(RuntimeError):
    """Workers that train one model do not agree, or one of them failed. It is raised on all of them."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """The processes that train a model together, one replica each.

    Attributes:
        count: How many there are.
    """

    count: int = 1

    def together(self, what: str, work: Callable[[], str]) -> Mapping[str, str]:
        """Does something on every worker, and tells all of them what came of it.

        Args:
            what: For errors: "plan the step".
            work: Returns a text.

        Returns:
            Name of a worker to its text, the leader first.

        Raises:
            WorkerError: If it failed on another worker, or one did not answer in time. If it failed on this one, its
                own exception.
        """
        failure: Exception | None = None
        result = ""
        try:
            result = work()
        except Exception as error:  # the others must hear of it, whatever it is
            failure = error
            result = f"{type(error).__name__}: {error}"
        if self.count == 1:
            if failure is not None:
                raise failure
            return {own_name(): result}
        answers = sorted(map(json.loads, self._gather(json.dumps([own_name(), failure is not None, result]), what)))
        if failure is not None:
            raise failure
        failed = [f"{name}: {text}" for name, is_failure, text in answers if is_failure]
        if failed:
            raise WorkerError(f"graphswap: expected every worker to {what}, received a failure of {'; '.join(failed)}")
        return {name: text for name, _, text in answers}

    def agree(self, facts: Callable[[], Mapping[str, str]]) -> bool:
        """Raises a WorkerError on every worker unless all have the same facts.

        Args:
            facts: Returns what must be equal everywhere: name to value.

        Returns:
            Whether this worker is the leader, whose plan all carry out.
        """
        answers = self.together("trace the step", lambda: json.dumps(dict(facts())))
        difference = first_difference({name: json.loads(answer) for name, answer in answers.items()})
        if difference:
            raise WorkerError(difference)
        return next(iter(answers)) == own_name()

    def sharding(self) -> Sharding:
        """How values are divided among the workers. All have to call it at the same time.

        Raises:
            WorkerError: If one did not join in time.
        """
        with self._answering("divide variables"), tf.init_scope(), tf.device("CPU:0"):
            mark = int.from_bytes(os.urandom(8)) >> 1
            marks = self._gathered(np.array([mark], np.int64))
        return Sharding(self.count, int(np.flatnonzero(marks == mark)[0]), self._joined)

    def _joined(self, name: str, part: np.ndarray) -> np.ndarray:
        """The flat arrays of all workers, equally long, one behind the other.

        Raises:
            WorkerError: If one did not join in time, or joined for something else.
        """
        mark = np.array([zlib.crc32(name.encode())], np.uint32).view(np.int32)
        words = _words(part.view(np.uint8))
        with self._answering(f"read '{name}' together, which they divide"), tf.init_scope(), tf.device("CPU:0"):
            rows = self._gathered(np.concatenate([mark, words])).reshape(self.count, -1)
        if not (rows[:, 0] == mark).all():
            raise WorkerError(
                f"graphswap: expected all {self.count} workers to read '{name}' together, which they divide, received "
                "others that read something else. Let all of them read the same variables, in the same order."
            )
        return np.ascontiguousarray(rows[:, 1:].view(np.uint8)[:, : part.nbytes]).reshape(-1).view(part.dtype)

    def network(self) -> Link:
        """Measures the way to the next worker of a ring, as `CostModel.network_seconds` takes it to be.

        All workers have to call it at the same time. It takes 4 MiB on the device meanwhile.

        Raises:
            WorkerError: If one did not join in time.
        """
        steps = 2 * (self.count - 1)
        with self._answering("measure the network"):
            keys = [next(_instance_keys) for _ in _SUMMED_BYTES]
            short, long = (
                min(self._sum_seconds(nbytes, key) for _ in range(_SUMS))
                for nbytes, key in zip(_SUMMED_BYTES, keys, strict=True)
            )
        fewer, more = (steps * nbytes / self.count for nbytes in _SUMMED_BYTES)
        speed = (more - fewer) / max(long - short, _CLOCK_SECONDS)
        return Link(speed, speed, short / steps, overlaps=True)

    def _sum_seconds(self, nbytes: int, key: int) -> float:
        with tf.init_scope(), tf.device(profiler.device_name()):
            start = time.perf_counter()
            tf.raw_ops.CollectiveReduceV2(
                input=np.zeros(nbytes // 4, np.float32),
                group_size=self.count,
                group_key=_SUMS_GROUP_KEY,
                instance_key=key,
                merge_op="Add",
                final_op="Id",
                ordering_token=[],
                timeout_seconds=PATIENCE_SECONDS,
            ).numpy()
            return time.perf_counter() - start

    @contextlib.contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        """Turns what TensorFlow raises where a worker does not answer into a WorkerError."""
        try:
            yield
        except tf.errors.OpError as error:
            raise WorkerError(
                f"graphswap: expected all {self.count} workers to {what} within {PATIENCE_SECONDS:.0f} s, received no "
                f"answer of some ({error.message.splitlines()[0]}). Give every process the same graphswap option, and "
                "look at the others' output for what ended them."
            ) from error

    def _gather(self, text: str, what: str) -> list[str]:
        packed = np.frombuffer(zlib.compress(text.encode()), np.uint8)
        words = _words(packed)
        with self._answering(what), tf.init_scope(), tf.device("CPU:0"):
            lengths = self._gathered(np.array([len(packed)], np.int32))
            padded = np.zeros(-(-int(lengths.max()) // 4), np.int32)
            padded[: len(words)] = words
            rows = self._gathered(padded).reshape(self.count, -1).view(np.uint8)
        return [zlib.decompress(row[:length].tobytes()).decode() for row, length in zip(rows, lengths, strict=True)]

    def _gathered(self, array: np.ndarray) -> np.ndarray:
        return tf.raw_ops.CollectiveGatherV2(
            input=array,
            group_size=self.count,
            group_key=_GROUP_KEY,
            instance_key=next(_instance_keys),
            ordering_token=[],
            timeout_seconds=PATIENCE_SECONDS,
        ).numpy()


def _words(octets: np.ndarray) -> np.ndarray:
    """Bytes as 32-bit numbers, which collectives take, with zeros behind them."""
    words = np.zeros(-(-len(octets) // 4), np.int32)
    words.view(np.uint8)[: len(octets)] = octets
    return words


def first_difference(facts: Mapping[str, Mapping[str, str]]) -> str:
    """What to tell users of the first fact that is not the same everywhere; "" if all are.

    Args:
        facts: Name of a worker to its facts.
    """
    leader, expected = next(iter(facts.items()))
    for fact, value in expected.items():
        for name, other in facts.items():
            if other.get(fact) != value:
                return (
                    f"graphswap: expected the same {fact} in every worker, received {value} in {leader} and "
                    f"{other.get(fact, 'none')} in {name}. Run the same script with the same graphswap everywhere."
                )
    return ""


def version() -> str:
    """Of graphswap."""
    return sys.modules["graphswap"].__version__


@contextlib.contextmanager
def noting_lost_processes() -> Iterator[None]:
    """Adds to an error of a lost process what to do about it."""
    try:
        yield
    except _LOST as error:
        if in_cluster() and _LOST_NOTE not in getattr(error, "__notes__", ()):
            error.add_note(_LOST_NOTE)
        raise


def in_cluster() -> bool:
    """Whether TF_CONFIG makes this process a part of a cluster."""
    return bool(json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster"))


def own_name() -> str:
    """This process's name in its cluster: "worker 1"."""
    device = tf.DeviceSpec.from_string(tf.config.list_logical_devices("CPU")[0].name)
    return f"{device.job} {device.task}"


def check(distribution: tf.distribute.Strategy) -> None:
    """Raises a ValueError for a distribution whose steps can't be rewritten, or whose TF_CONFIG names no cluster."""
    kind = type(distribution).__name__
    if isinstance(distribution, tf.distribute.TPUStrategy):
        raise ValueError(
            f"graphswap: expected a distribution whose workers each hold the variables, received {kind}. "
            "Use MultiWorkerMirroredStrategy or ParameterServerStrategy, or compile without graphswap."
        )
    devices = distribution.extended.worker_devices
    if len(devices) != 1 and isinstance(distribution, _ON_SEVERAL_DEVICES):
        _check_alike(kind, devices)
    elif len(devices) != 1:
        raise ValueError(
            f"graphswap: expected one device in each process, received {kind} with {', '.join(devices)}. Start a "
            "process for each device under MultiWorkerMirroredStrategy, with CUDA_VISIBLE_DEVICES naming its GPU, or "
            "compile without graphswap."
        )
    planned = profiler.device_name()
    if not devices[0].endswith(f"device:{planned}"):
        raise ValueError(
            f"graphswap: expected a distribution on this process's first device, {planned}, received {kind} on "
            f"{', '.join(devices)}. Name {planned}, or show the process only the device that it is to use."
        )
    is_multi_worker = isinstance(distribution, tf.distribute.MultiWorkerMirroredStrategy)
    if is_multi_worker and os.environ.get("TF_CONFIG") and not in_cluster():
        raise ValueError(
            f"TF_CONFIG: expected a field 'cluster' with the hosts of each job, received {os.environ['TF_CONFIG']}. "
            "TensorFlow would train with this process alone. Add it, or unset TF_CONFIG."
        )


_ON_SEVERAL_DEVICES = (tf.distribute.MirroredStrategy, tf.distribute.experimental.CentralStorageStrategy)
"""Distributions whose replicas may be on several devices of a process."""


def _check_alike(kind: str, devices: Sequence[str]) -> None:
    """Raises a ValueError unless all devices are there, and of one kind."""
    specs = [tf.DeviceSpec.from_string(device) for device in devices]
    there = {f"{device.device_type}:{device.name.rpartition(':')[2]}" for device in tf.config.list_logical_devices()}
    for device, spec in zip(devices, specs, strict=True):
        if f"{spec.device_type}:{spec.device_index}" not in there:
            raise ValueError(
                f"graphswap: expected devices of this process, {', '.join(sorted(there))}, received {kind} on "
                f"{device}. Name devices that are there; tf.config.set_logical_device_configuration divides one into "
                "several."
            )
    kinds = [f"{spec.device_type} {_model_of(spec)}".strip() for spec in specs]
    if len(set(kinds)) > 1:
        unlike = ", ".join(f"{device} ({what})" for device, what in zip(devices, kinds, strict=True))
        raise ValueError(
            f"graphswap: expected replicas on devices of one kind, as all carry out one plan, received {kind} with "
            f"{unlike}. Name devices of one kind, or compile without graphswap."
        )


def _model_of(device: tf.DeviceSpec) -> str:
    """What kind of GPU it is, and how much of its memory the program has given it; "" of others."""
    gpus, logical = tf.config.list_physical_devices("GPU"), tf.config.list_logical_devices("GPU")
    if device.device_type != "GPU" or len(gpus) != len(logical):  # a GPU that is divided has no numbers to tell by
        return ""
    gpu = gpus[int(device.device_index or 0)]
    limits = [one.memory_limit for one in tf.config.get_logical_device_configuration(gpu) or ()]
    name = str(tf.config.experimental.get_device_details(gpu).get("device_name", ""))
    return f"{name} {limits[0]} MiB" if limits and limits[0] is not None else name


def parts(graph: ir.Graph) -> replicas.Parts | None:
    """The parts of a step that runs on several devices; None if it runs on the one that is planned.

    Raises:
        UnsupportedGraphError: If some of the step runs in another process, or on another device where the devices run
            no replicas.
    """
    planned = tf.DeviceSpec.from_string(f"/device:{profiler.device_name()}")
    for node in graph.nodes:
        device = tf.DeviceSpec.from_string(node.device)
        if device.job not in (None, "localhost"):
            raise UnsupportedGraphError(
                f"expected a step within one process, received node '{node.name}' ({node.op}) on '{node.device}'. "
                "Train with model.fit under ParameterServerStrategy, which gives its workers their parts of a step."
            )
    devices = replicas.used_devices(graph, str(planned.device_type))
    others = [one for one in devices if tf.DeviceSpec.from_string(one).device_index != planned.device_index]
    if not others:
        return None
    if others == [*devices]:
        node = next(node for node in graph.nodes if node.device == others[0])
        raise UnsupportedGraphError(
            f"expected a step on this process's first device, {profiler.device_name()}, received node '{node.name}' "
            f"({node.op}) on '{node.device}'. Show the process only the device that it is to use, or set "
            "graphswap.Options(on_unsupported='run_unchanged')."
        )
    try:
        return replicas.split(graph, devices)
    except replicas.UnlikeReplicas as error:
        raise UnsupportedGraphError(f"{error}, or set graphswap.Options(on_unsupported='run_unchanged').") from None


def advice(graph: ir.Graph) -> tuple[str, ...]:
    """What the user should know of how the step's gradients are exchanged."""
    blocks = [graph.by_name[name].outputs[0].nbytes for name in graph.blocks]
    if blocks:
        return (f"gradients are exchanged in {len(blocks)} blocks of up to {format_bytes(max(blocks))}",)
    sums = [graph.value(node.inputs[0]).nbytes for node in graph.nodes if node.op == ir.ALL_REDUCE]
    most = max(sums, default=0)
    if most < _LARGE_SUM_BYTES:
        return ()
    return (
        f"one exchange between the workers takes {format_bytes(most)} at once, and twice that in memory; "
        "MultiWorkerMirroredStrategy(communication_options=tf.distribute.experimental.CommunicationOptions("
        "bytes_per_pack=4 << 20)) makes blocks of it",
    )


def local_batch(distribution: tf.distribute.Strategy, value: Any) -> Any:
    """Of a batch of all replicas this process's part: where it has one replica, its value."""
    is_divided = isinstance(distribution, _ON_SEVERAL_DEVICES) and len(distribution.extended.worker_devices) > 1
    return value if is_divided else local_value(distribution, value)


def local_value(distribution: tf.distribute.Strategy, value: Any) -> Any:
    """Of a batch of all replicas this process's first one's part, with nested values for nested ones."""
    return tf.nest.map_structure(lambda leaf: distribution.experimental_local_results(leaf)[0], value)
