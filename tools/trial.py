"""One training run on an emulated accelerator or a GPU, in a process of its own.

The script that is run, plain or inside a memory budget:

    graphswap run --memory=300MiB -- tools/trial.py --model=resnet50 --graphswap=300MiB
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags

from graphswap import emulate, ir
from graphswap.options import Options, format_bytes

AMPLE_BYTES = 4 << 30
"""Memory of a device on which every model of `models` trains plainly."""
_STEP = "step "
_ERROR_LINES = 4
_ERROR_WIDTH = 160
_TELLING = (
    "tensorflow.python.framework.errors_impl.",
    "OOM when ",
    "jax.errors.JaxRuntimeError: ",
    "torch.OutOfMemoryError: ",
    "ImportError: ",
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What to run.

    Attributes:
        model: A name of `models.MODELS`.
        memory_bytes: Memory of the device, in whole MiB.
        graphswap: The memory budget of the compile option; empty for plain Keras.
        steps: How many steps to train.
        memory_optimizer: Whether plain Keras runs with TensorFlow's memory optimiser, as it does by default. Where
            that takes memory to be short it sums gradients in the order of their arrival, so that runs differ.
        strategy: As in `Options`.
        planning_seconds: As in `Options`.
        on_gpu: Whether the device is the first GPU rather than an emulated one.
        jit_compile: Whether XLA compiles the step.
        by_hand: Whether the model's blocks are recomputed by `tf.recompute_grad`.
        host_variables: Whether the model is made in host memory.
        swap_to: As in `Options`.
        host_memory: Likewise.
    """

    model: str
    memory_bytes: int
    graphswap: str = ""
    steps: int = 20
    memory_optimizer: bool = True
    strategy: str = str(Options.strategy)
    planning_seconds: float = Options.planning_seconds
    on_gpu: bool = False
    jit_compile: bool = False
    by_hand: bool = False
    host_variables: bool = False
    swap_to: str = str(Options.swap_to)
    host_memory: str = str(Options.host_memory)


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        error: The telling lines of the error that ended the run; empty if it went well.
        losses: Of each step's batch.
        seconds: Length of each step; the first includes tracing and planning.
        peak_bytes: The most that the device's allocator has counted.
        variables: Digest of all variables after the last step: weights, statistics, seeds, optimizer state.
        report: The fields of the last `StepReport`, with the plan's numbers; empty for plain Keras.
        steady_peak_bytes: The most after the first step, which may include a run under another plan to measure costs.
        cpu_seconds: What each step took of all cores together.
        rss_bytes: The most memory that the process had, files in the system's cache not counted.
        product_bytes: Of the weights that take part in products: a step needs them both ways.
        updated_bytes: Of what each step updates, embeddings left out: weights and optimizer state.
    """

    error: str = ""
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    variables: str = ""
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    steady_peak_bytes: int = 0
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    rss_bytes: int = 0
    product_bytes: int = 0
    updated_bytes: int = 0

    @property
    def steady_seconds(self) -> list[float]:
        """Length of each step but the first."""
        return self.seconds[1:] or self.seconds

    def equals(self, other: Result) -> bool:
        """Whether both runs computed the same bits."""
        return (self.losses, self.variables) == (other.losses, other.variables)


class Process:
    """A trial in a new process, which waits before every step until it is its turn. A context manager.

    Args:
        trial: What to run.
        say: Gets the lines of the run's progress.
        environment: Further variables for the process.
    """

    def __init__(self, trial: Trial, say: Callable[[str], None], environment: Mapping[str, str] | None = None):
        self._say = say
        self._folder = tempfile.TemporaryDirectory()
        self._result, self._errors = (pathlib.Path(self._folder.name) / name for name in ("result.json", "errors"))
        command = [sys.executable, *([] if trial.on_gpu else ["-m", "graphswap.emulate"]), __file__]
        command += [f"--model={trial.model}", *([f"--gpu_memory={trial.memory_bytes}"] if trial.on_gpu else [])]
        command += [f"--graphswap={trial.graphswap}", f"--steps={trial.steps}", f"--result={self._result}"]
        command += [f"--strategy={trial.strategy}", f"--planning_seconds={trial.planning_seconds}", "--in_turns"]
        command += [f"--swap_to={trial.swap_to}", f"--host_memory={trial.host_memory}"]
        command += [] if trial.memory_optimizer else ["--nomemory_optimizer"]
        command += [f"--{name}" for name in ("jit_compile", "by_hand", "host_variables") if getattr(trial, name)]
        emulated = {} if trial.on_gpu else emulate.environment(trial.memory_bytes)
        variables = {**os.environ, **emulated, **(environment or {})}
        with self._errors.open("w") as stderr:
            pipe = subprocess.PIPE
            self._child = subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe, stderr=stderr, text=True)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()
        self._folder.cleanup()

    def step(self) -> bool:
        """Lets it run one step, the first with all that comes before it. False if it ends instead."""
        assert self._child.stdin is not None and self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has failed, and `result` will tell
            print(file=self._child.stdin, flush=True)
        for line in self._child.stdout:
            self._say(line.rstrip())
            if line.startswith(_STEP):
                return True
        return False

    def result(self) -> Result:
        """Lets it run to its end, and returns what came of it."""
        while self.step():
            pass
        if self._child.wait() == 0:
            return Result(**json.loads(self._result.read_text()))
        error = telling_lines(self._errors.read_text())
        return Result(error=error or f"ended with exit status {self._child.returncode}")


def run(trial: Trial, say: Callable[[str], None], environment: Mapping[str, str] | None = None) -> Result:
    """Runs a trial in a new process and waits for its end. Arguments are those of `Process`."""
    with Process(trial, say, environment) as process:
        return process.result()


def in_turns(
    trials: Mapping[str, Trial], say: Callable[[str, str], None], environment: Mapping[str, str] | None = None
) -> dict[str, Result]:
    """Runs trials that take turns, step by step.

    Args:
        trials: By name.
        say: Gets a trial's name and the lines of its progress.
        environment: Further variables for the processes.
    """
    results = {}
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, what in trials.items():
            process = Process(what, functools.partial(say, name), environment)
            processes[name] = stack.enter_context(process)
            process.step()  # one after the other also traces, measures and plans
        for _ in range(max(what.steps for what in trials.values()) - 1):
            for process in processes.values():
                process.step()
        for name, process in processes.items():
            results[name] = process.result()
            if results[name].error:
                say(name, results[name].error.splitlines()[-1])
    return results


def telling_lines(errors: str) -> str:
    """What a user needs of a hundred lines: the exception, and of TensorFlow's what ran out of memory where."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(_TELLING)]
    telling += [f"  {line}" for line in lines if line.startswith("[[{{node ")]
    return "\n".join(line[:_ERROR_WIDTH] for line in (telling or lines)[-_ERROR_LINES:])


def train(
    model: str,
    option: Options | None,
    steps: int,
    memory_optimizer: bool = True,
    in_turns: bool = False,
    jit_compile: bool = False,
    by_hand: bool = False,
    host_variables: bool = False,
) -> Result:
    """Trains a model of `models` in this process, on a device that counts its bytes, and tells each step.

    Args:
        model: A name of `models.MODELS`.
        option: The compile option; None for plain Keras.
        steps: How many steps to train.
        memory_optimizer: As in `Trial`.
        in_turns: Whether to wait for a line of input before each step.
        jit_compile: As in `Trial`.
        by_hand: Likewise.
        host_variables: Likewise.
    """
    import keras
    import tensorflow as tf

    import graphswap
    from graphswap import graphdef, profiler
    from graphswap.tools import models

    # Otherwise TensorFlow rearranges arithmetic by what stands nearby, and the last bits change with the graph.
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    keras.utils.set_random_seed(0)
    known = {**models.MODELS, **models.GPU_MODELS, **models.JIT_MODELS, **models.LARGE_MODELS}
    with graphswap.host_variables() if host_variables else contextlib.nullcontext():
        training = known[model]()
    training = models.recomputed_by_hand(training) if by_hand else training
    # Left alone, Keras would have XLA compile the plain step on a GPU; its kernels are others.
    compile_options = {"jit_compile": jit_compile, **({"graphswap": option} if option else {})}
    training.model.compile(training.optimizer, training.loss, **compile_options)
    device = profiler.device_name()
    losses, seconds, cpu_seconds, peaks = [], [], [], []
    print("tracing, measuring and planning the step" if option else "tracing the step", flush=True)
    for step, (inputs, targets) in zip(range(1, steps + 1), training.batches, strict=False):
        if in_turns and not sys.stdin.readline():
            sys.exit("nobody waits for the next step any more")
        training.model.reset_metrics()  # so that the loss is this batch's own
        start, cpu_start = time.perf_counter(), time.process_time()
        with contextlib.nullcontext() if memory_optimizer else graphdef.without_memory_optimizer():
            losses.append(float(training.model.train_on_batch(inputs, targets)))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        peaks.append(tf.config.experimental.get_memory_info(device)["peak"])
        if step == 1:
            tf.config.experimental.reset_memory_stats(device)
        print(f"{_STEP}{step}/{steps}: loss {losses[-1]:.4f}, {seconds[-1]:.2f} s", flush=True)
    print(f"peak {format_bytes(max(peaks))}", flush=True)
    report = _fields(graphswap.report(training.model)) if option else {}
    for number, one in enumerate(report.get("rounds", ()), start=1):
        print(f"round {number}: {one}", flush=True)
    for note in report.get("notes", ()):
        print(f"note: {note}", flush=True)
    rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    variables = [*training.model.variables, *training.optimizer.variables]
    updated = [v for v in (*training.model.trainable_variables, *training.optimizer.variables) if not _is_table(v)]
    products = [v for v in training.model.trainable_variables if len(v.shape) > 1 and not _is_table(v)]
    sizes = rss_bytes, sum(map(_nbytes, products)), sum(map(_nbytes, updated))
    return Result("", losses, seconds, max(peaks), _digest(variables), report, peaks[-1], cpu_seconds, *sizes)


def _is_table(variable: Any) -> bool:
    """Whether it is an embedding, or state that belongs to one: of a table a step may need a few rows only."""
    return "embedding" in variable.path


def _nbytes(variable: Any) -> int:
    return math.prod(variable.shape) * ir.ITEM_BYTES[str(variable.dtype)]


def _use_gpu(memory_bytes: int) -> None:
    """Gives TensorFlow so much of the first GPU's memory, and makes its kernels repeatable."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        sys.exit(
            "--gpu_memory: expected a GPU, TensorFlow finds none. Install graphswap[gpu] on a machine that has one."
        )
    gpu = gpus[0]
    tf.config.set_visible_devices([gpu], "GPU")
    limit = tf.config.LogicalDeviceConfiguration(memory_limit=memory_bytes >> 20)
    tf.config.set_logical_device_configuration(gpu, [limit])
    tf.config.experimental.enable_op_determinism()


def _fields(report: Any) -> dict[str, Any]:
    """The step that ran last, in numbers; the rounds in words; the notes are those of all steps."""
    step = report.steps[-1]
    certificate, budget = step.plan.certificate, step.plan.memory_budget
    bound_seconds = None
    if certificate is not None and budget is not None:
        bound_seconds = certificate.seconds(budget) * step.time_scale  # as the prediction is
    names = [field.name for field in dataclasses.fields(step) if field.name not in ("plan", "file")]
    fields = {name: getattr(step, name) for name in names}
    return {
        **fields,
        "rounds": [str(one) for one in step.rounds],
        "notes": [note for planned in report.steps for note in planned.notes],
        "plans": len(report.steps),
        "strategy": step.plan.strategy,
        "bound_seconds": bound_seconds,
        "swaps": len(step.plan.swaps),
        "places": len(step.plan.places),
        "text": str(step),
        "far_bytes": step.far_bytes,
        "moved_bytes": step.moved_bytes,
        "repeated_nodes": sum(len(decision.nodes) for decision in step.plan.recomputes),
    }


def _digest(variables: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for variable in variables:
        digest.update(variable.numpy().tobytes())
    return digest.hexdigest()


def _main(argv: Sequence[str]) -> None:
    values = flags.FlagValues()
    model = flags.DEFINE_string("model", "mlp", "A name of models.MODELS.", flag_values=values)
    graphswap = flags.DEFINE_string("graphswap", "", "The memory budget; empty for plain Keras.", flag_values=values)
    strategy = flags.DEFINE_string("strategy", str(Options.strategy), "As in Options.", flag_values=values)
    planning_seconds = flags.DEFINE_float(
        "planning_seconds", Options.planning_seconds, "As in Options.", flag_values=values
    )
    steps = flags.DEFINE_integer("steps", 20, "How many steps to train.", flag_values=values)
    memory_optimizer = flags.DEFINE_bool(
        "memory_optimizer", True, "Whether TensorFlow's memory optimiser is on.", flag_values=values
    )
    in_turns = flags.DEFINE_bool(
        "in_turns", False, "Whether to wait for a line of input before each step.", flag_values=values
    )
    gpu_memory = flags.DEFINE_integer(
        "gpu_memory", 0, "Bytes of the first GPU's memory to use; 0 for an emulated device.", flag_values=values
    )
    jit_compile = flags.DEFINE_bool("jit_compile", False, "Whether XLA compiles the step.", flag_values=values)
    by_hand = flags.DEFINE_bool("by_hand", False, "Whether blocks are in tf.recompute_grad.", flag_values=values)
    host_variables = flags.DEFINE_bool(
        "host_variables", False, "Whether the model is made in host memory.", flag_values=values
    )
    swap_to = flags.DEFINE_string("swap_to", str(Options.swap_to), "As in Options.", flag_values=values)
    host_memory = flags.DEFINE_string("host_memory", str(Options.host_memory), "As in Options.", flag_values=values)
    path = flags.DEFINE_string("result", None, "File to write the result to, as JSON.", flag_values=values)
    if values(argv)[1:]:
        raise app.UsageError(f"expected flags, received {values(argv)[1:]}.")
    option = None
    if graphswap.value:
        option = Options(
            graphswap.value,
            strategy=strategy.value,
            swap_to=swap_to.value,
            planning_seconds=planning_seconds.value,
            host_memory=host_memory.value,
        )
    if gpu_memory.value:
        _use_gpu(gpu_memory.value)
    ways = memory_optimizer.value, in_turns.value, jit_compile.value, by_hand.value, host_variables.value
    result = train(model.value, option, steps.value, *ways)
    if path.value is not None:
        pathlib.Path(path.value).write_text(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    _main(sys.argv)
