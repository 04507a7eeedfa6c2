"""Runs the step of a SavedModel as whoever loads it would, in a process of its own, and counts what it takes.

`python -m graphswap.loaded_step DIRECTORY FUNCTION SHAPES STEPS` is the child process of `peak`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence


class LoadedStepError(RuntimeError):
    """The process failed. The message is what it last said."""


def peak(directory: str | os.PathLike[str], function: str, shapes: Sequence[Sequence[int]], steps: int) -> int | None:
    """The most bytes that the device's allocator counts, from the process's start to the end of some steps.

    The allocator's chunks lie elsewhere in each process, and what it can't use between them differs: only a process
    that does nothing else shows what a step takes in one. The device has to count, as an emulated one does.

    Args:
        directory: The SavedModel.
        function: What the step is called in it.
        shapes: Of its arguments, flat. It gets zeros.
        steps: How many.

    Returns:
        Bytes, or None if the device ran out of memory.

    Raises:
        LoadedStepError: If the process failed for any other reason.
    """
    command = [sys.executable, "-m", "graphswap.loaded_step", str(directory), function, json.dumps(shapes), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoadedStepError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _main(directory: str, function: str, shapes: str, steps: str) -> None:
    import tensorflow as tf

    from graphswap import planning, profiler, saved_model

    try:
        loaded = saved_model.load(directory, function)
        dtypes = [spec.dtype for spec in loaded.arguments]
        arguments = [tf.zeros(shape, dtype) for shape, dtype in zip(json.loads(shapes), dtypes, strict=True)]
        for _ in range(int(steps)):
            loaded(*arguments)
        peak = profiler.memory_in_use("peak")
    except Exception as error:
        if not planning.is_out_of_memory(error):
            sys.exit(planning.summary(error).strip())
        peak = None
    print(json.dumps(peak))


if __name__ == "__main__":
    _main(*sys.argv[1:])
