"""Measures the far tiers of variables: gigabytes per second out and in, beside memcpy and dd on the same machine.

    python -m graphswap.tools.tier_speed --rounds=9 --out=tier_speed.json

Everything takes turns in one process on an emulated accelerator, so that all meet the same noise; medians are compared.
Files stay in the system's page cache, those of dd as well.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from graphswap import emulate, far_memory, state_directory, tiers
from graphswap.cost_model import MEMORY_VARIABLE
from graphswap.host_variable import HostVariable, adopt
from graphswap.tools.benchmark import machine, markdown_table

_MIB = 1 << 20
_VALUE_BYTES = 64 * _MIB
REFERENCES: Mapping[str, str] = {
    "host out": "memcpy",
    "host in": "memcpy",
    "disk out": "dd write",
    "disk in": "dd read",
    "disk out, checksum": "dd write",
}
"""What each way is held against."""


def ways(directory: pathlib.Path, count: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by its name: each moves `count` values of 64 MiB, as planned steps store and fetch them.

    Args:
        directory: Where files are made.
        count: Of values.
    """
    import tensorflow as tf

    far = tiers.Tiers(directory)
    shape = (_VALUE_BYTES // 4096, 1024)
    values = [tf.random.stateless_uniform(shape, (0, seed)) for seed in range(count)]
    source = np.ones(count * _VALUE_BYTES, np.uint8)
    target = np.ones_like(source)
    found: dict[str, Callable[[], Any]] = {"memcpy": lambda: np.copyto(target, source)}

    def dd(source: str, target: str) -> None:
        command = ["dd", f"if={source}", f"of={target}", "bs=4M", f"count={count * _VALUE_BYTES // (4 * _MIB)}"]
        subprocess.run([*command, "status=none"], check=True)

    def dd_write() -> None:
        (directory / "dd").unlink(missing_ok=True)
        dd("/dev/zero", str(directory / "dd"))

    found["dd write"] = dd_write
    found["dd read"] = lambda: dd(str(directory / "dd"), "/dev/null")
    variables: list[HostVariable] = []
    for tier in ("host", "disk"):
        variables = [adopt(tf.Variable(tf.zeros(shape))) for _ in values]
        for variable in variables:
            variable.move(tier, far)
            variable.reserve(is_updated=True)

        @tf.function(autograph=False)
        def out(variables=tuple(variables)):
            done: list = []
            for value, variable in zip(values, variables, strict=True):
                with tf.control_dependencies(done):
                    done = far_memory.store(tf.identity(value), *variable.store_handles)

        @tf.function(autograph=False)
        def back(variables=tuple(variables)):
            ends: list = []
            for variable in variables:
                with tf.control_dependencies(ends[-1:]):
                    ends.append(far_memory.fetch(variable.store_handles[0], "float32", shape)[-1, -1])
            return ends

        found[f"{tier} out"], found[f"{tier} in"] = out, back

    def out_with_checksums(store: Callable[[], Any] = found["disk out"]) -> None:
        store()
        for variable in variables:
            state_directory.checksum(variable.view())

    found["disk out, checksum"] = out_with_checksums
    return found


def measure(directory: pathlib.Path, count: int, rounds: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds of each way, in turns; a first round, in which memory is touched for the first time, is left out."""
    timed = ways(directory, count)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            seconds[name] += [time.perf_counter() - start] if number else []
        say(f"round {number} of {rounds}")
    return seconds


def table(nbytes: int, seconds: Mapping[str, Sequence[float]]) -> str:
    """Gigabytes per second, and the share of what each way is held against."""
    rates = {name: nbytes / 1e9 / statistics.median(found) for name, found in seconds.items()}
    rows = []
    for name, found in seconds.items():
        ends = [nbytes / 1e9 / second for second in (max(found), min(found))]
        reference = REFERENCES.get(name, "")
        share = f"{rates[name] / rates[reference]:.0%} of {reference}" if reference else ""
        rows.append([name, f"{rates[name]:.2f}", f"{ends[0]:.2f} to {ends[1]:.2f}", share])
    return markdown_table(["way", "GB/s", "range", "share"], rows)


def main(argv: Sequence[str]) -> None:
    """Measures, prints a table and writes all numbers to a file."""
    values = flags.FlagValues()
    count = flags.DEFINE_integer("values", 4, "Of 64 MiB each.", lower_bound=1, flag_values=values)
    rounds = flags.DEFINE_integer("rounds", 9, "Of all ways in turn.", lower_bound=1, flag_values=values)
    place = flags.DEFINE_string(
        "directory", None, "Where files are made; the temporary one if none.", flag_values=values
    )
    out = flags.DEFINE_string("out", None, "File for all numbers, as JSON.", flag_values=values)
    try:
        if values(argv)[1:]:
            raise app.UsageError(f"expected flags, received {', '.join(values(argv)[1:])}.")
        if place.value is not None and not os.path.isdir(place.value):
            raise app.UsageError(f"--directory: expected one that exists, received '{place.value}'.")
    except (flags.Error, app.UsageError) as error:
        sys.exit(f"tier_speed: {error}")
    if MEMORY_VARIABLE not in os.environ:
        memory_bytes = (3 * count.value + 4) * _VALUE_BYTES
        sys.exit(emulate.run_script(memory_bytes, [__file__, *argv[1:]]))
    described = machine()
    print(", ".join(f"{name} {value}" for name, value in described.items()), flush=True)
    with tempfile.TemporaryDirectory(dir=place.value) as directory:
        seconds = measure(pathlib.Path(directory), count.value, rounds.value, functools.partial(print, flush=True))
    nbytes = count.value * _VALUE_BYTES
    print(f"\n{table(nbytes, seconds)}")
    if out.value is not None:
        command = ["python", "-m", "graphswap.tools.tier_speed", *argv[1:]]
        contents = {"machine": described, "command": command, "bytes": nbytes, "seconds": seconds}
        pathlib.Path(out.value).write_text(json.dumps(contents, indent=1))


if __name__ == "__main__":
    main(sys.argv)
