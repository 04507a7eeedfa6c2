"""The emulated accelerator: a CPU device with a hard memory limit, for any script, on any machine.

TensorFlow's CPU device can use the allocator of its GPU device. It then has a limit, raises
ResourceExhaustedError beyond it and counts its bytes; numpy arrays, strings, files and other processes
lie outside it and play the host.

`python -m graphswap.emulate SCRIPT ARGS...` is the child process of `run_script`.
"""

from __future__ import annotations

import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from graphswap.cost_model import MEMORY_VARIABLE
from graphswap.options import format_bytes

if TYPE_CHECKING:  # the variables of `environment` must be set before TensorFlow is loaded
    import tensorflow as tf

_MIB = 1 << 20
_DEVICE = "CPU:0"
_POLL_SECONDS = 0.05


def environment(memory_bytes: int) -> dict[str, str]:
    """Environment variables of a process whose CPU:0 has `memory_bytes` of memory, in whole MiB.

    They take effect when set before TensorFlow is loaded.

    Raises:
        ValueError: If that is less than 1 MiB.
    """
    mebibytes = memory_bytes // _MIB
    if mebibytes < 1:
        raise ValueError(
            f"memory: expected at least {_MIB} bytes, received {memory_bytes}. The limit is set in whole MiB."
        )
    return {
        "TF_CPU_ALLOCATOR_USE_BFC": "true",
        "TF_CPU_BFC_MEM_LIMIT_IN_MB": str(mebibytes),
        # oneDNN's memory lies outside the allocator, and where it runs out the process aborts.
        "TF_ENABLE_ONEDNN_OPTS": "0",
        # A GPU would take the place of the emulated device.
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
        MEMORY_VARIABLE: str(mebibytes * _MIB),
    }


def companion_environment() -> dict[str, str]:
    """Environment variables of a process that has no limit, but the kernels of emulated ones, and counts its bytes.

    Such as the chief of emulated workers, which measures their steps.
    """
    variables = environment(_MIB)
    del variables["TF_CPU_BFC_MEM_LIMIT_IN_MB"], variables[MEMORY_VARIABLE]
    return variables


def reserve() -> None:
    """Makes the allocator take its whole memory as one region, as TensorFlow does on a GPU.

    Left alone it takes regions that double in size, and no chunk spans two of them.

    Raises:
        RuntimeError: If this process is not emulated, or has allocated device memory before.
    """
    memory_bytes = int(os.environ.get(MEMORY_VARIABLE, "0"))
    if not memory_bytes:
        raise RuntimeError(
            f"expected a process with the variables of graphswap.emulate.environment, received one without "
            f"{MEMORY_VARIABLE}. Start it with `graphswap run --memory=SIZE -- SCRIPT`."
        )
    import tensorflow as tf

    with tf.init_scope(), tf.device(_DEVICE):
        used = tf.config.experimental.get_memory_info(_DEVICE)["peak"]
        if used:
            raise RuntimeError(
                f"expected a device without tensors, received one that has held {format_bytes(used)}. "
                "Call reserve() before the first tensor is made."
            )
        tf.raw_ops.Empty(shape=_outside_device([memory_bytes // _MIB, _MIB]), dtype=tf.uint8)
        tf.config.experimental.reset_memory_stats(_DEVICE)


def _outside_device(shape: Sequence[int]) -> tf.Tensor:
    """The shape in numpy's memory: on the device it would take a first, small region for itself."""
    import tensorflow as tf

    alignment = 64  # TensorFlow aborts on tensors that are not aligned
    memory = np.empty(2 * alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    aligned = memory[start : start + alignment].view(np.int32)[: len(shape)]
    aligned[:] = shape
    return tf.experimental.dlpack.from_dlpack(aligned.__dlpack__())


def run_script(memory_bytes: int, argv: Sequence[str]) -> int:
    """Runs a Python script on an emulated accelerator, in a new process, and waits for its end.

    Input, output and Ctrl-C are the script's; SIGTERM is passed on to it. Call from the main thread.

    Args:
        memory_bytes: Memory of the device, in whole MiB.
        argv: The script's file and its arguments.

    Returns:
        The exit status as a shell counts it: 128 + the signal for a process that a signal ended.

    Raises:
        ValueError: If there is no such script or less than 1 MiB of memory.
    """
    check_script(argv)
    variables = {**os.environ, **environment(memory_bytes)}
    with subprocess.Popen([sys.executable, "-m", "graphswap.emulate", *argv], env=variables) as child:
        # The terminal sends Ctrl-C to the child as well. A handler is not inherited, unlike SIG_IGN.
        handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: child.terminate()}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            # Not `wait()`: a signal that comes just before it blocks would be handled only after the child's end.
            while (status := child.poll()) is None:
                time.sleep(_POLL_SECONDS)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def check_script(argv: Sequence[str]) -> None:
    """Raises a ValueError if the first of a script's file and its arguments is no file."""
    if not argv or not pathlib.Path(argv[0]).is_file():
        received = f"'{argv[0]}', which is no file" if argv else "nothing"
        raise ValueError(f"script: expected a Python file to run, received {received}. Name it after `--`.")


def _main(argv: Sequence[str]) -> None:
    from graphswap import profiler

    # Not at once: it would initialise TensorFlow, and the script may still want to configure it.
    profiler.on_context_initialized(reserve)
    sys.argv[:] = argv
    sys.path[0] = str(pathlib.Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    _main(sys.argv[1:])
