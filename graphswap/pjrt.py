"""Runs a step that was exported as StableHLO on any device that JAX has a PJRT client of, and compiles it for others.

Private JAX used here (0.10): `jax._src.interpreters.mlir.make_ir_context`, `jax._src.lib._jax.DeviceList` and
`jax._src.lib.mlir.dialects.hlo`. No other module uses any. JAX is imported when it is first needed.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from graphswap import artefact
from graphswap.artefact import Artefact, ArtefactError
from graphswap.options import format_bytes

OLDEST, NEWEST = (0, 10, 2), (0, 11)
"""Of JAX: what it is tried with, and the first one that it is not."""

_HOST = "pinned_host"
_OPTIONS = {
    # XLA repeats nodes by itself where it takes memory to be short; what is to be repeated is planned already.
    "xla_disable_hlo_passes": "rematerialization",
}
_OPTIONS_OF_A_GPU = {
    **_OPTIONS,
    # XLA's scheduler takes a copy for work on a second stream, and has one under way at a time, so that the next one
    # starts where the last one is awaited, with no kernel beside it. Here barriers say what may be under way.
    "xla_gpu_experimental_parallel_async_compute_limit": "64",
}
_OPTIONS_OF_A_CPU = {
    # There barriers are dropped before nodes that compute the same are merged, which undoes every repetition.
    "xla_disable_hlo_passes": "rematerialization,cse_barrier_expander",
}
TOOLKIT = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
"""Where XLA finds ptxas and libdevice to compile for a GPU."""
TARGET_OPTIONS = {
    "xla_gpu_autotune_level": "0",  # for want of a device to try kernels on
    "xla_gpu_cuda_data_dir": str(TOOLKIT),
}
"""XLA's debug options for a GPU that is not here."""


class DeviceError(ValueError):
    """A device that is not here, or that can't do what the step asks for."""


# --- running ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a compiled step, as its compiler counts them.

    Attributes:
        arguments: Inputs and state on the device.
        outputs: Results on the device that are not written over arguments.
        temp: What else it takes on the device.
        host_temp: What it takes of the host's memory.
    """

    arguments: int
    outputs: int
    temp: int
    host_temp: int

    @property
    def device(self) -> int:
        """All on the device."""
        return self.arguments + self.outputs + self.temp

    def __str__(self) -> str:
        return (
            f"device      {format_bytes(self.device)}: {format_bytes(self.arguments)} inputs and state, "
            f"{format_bytes(self.outputs)} results, {format_bytes(self.temp)} temporary\n"
            f"host        {format_bytes(self.host_temp)}"
        )


class Step:
    """A training step that is compiled for a device. Made by `load`.

    Attributes:
        manifest: Names, shapes and types of inputs, state and results, and the plan.
        memory: What it takes.
    """

    def __init__(self, step: Artefact, device: str):
        jax = _jax()
        self.manifest = step.manifest
        self._device = local_device(device)
        _check_swaps(self._device, step.manifest)
        options = {"cpu": _OPTIONS_OF_A_CPU, "gpu": _OPTIONS_OF_A_GPU}.get(self._device.platform, _OPTIONS)
        self._executable: Any = _compile(step, self._device, self._device.client.compile_and_load, options)
        self.memory = _memory(self._executable)
        self._jax = jax
        self._state = self._put(step.state)

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """Runs the step once and keeps the new state.

        Args:
            *arguments: Arrays of the shapes and types of `manifest.inputs`.

        Returns:
            The results, flat, as `jax.Array`; they may still be on their way.

        Raises:
            ValueError: If an argument is not what was exported. The state stays.
        """
        given = self._put(artefact.matching(self.manifest.inputs, arguments, "argument"))
        results = self._executable.execute_sharded([*given, *self._state]).disassemble_into_single_device_arrays()
        for index, entry in enumerate(self.manifest.state):
            if entry.result is not None:
                self._state[index] = results[entry.result][0]
        return tuple(shards[0] for shards in results[: len(self.manifest.results)])

    @property
    def state(self) -> Mapping[str, np.ndarray]:
        """The state as it is now, copied to the host, by the names of the variables."""
        return {entry.name: np.asarray(value) for entry, value in zip(self.manifest.state, self._state, strict=True)}

    def assign(self, values: Mapping[str, Any]) -> None:
        """Replaces parts of the state.

        Args:
            values: Arrays by name, as `state` has them.

        Raises:
            ValueError: If there is no such part, or if a value is not like it. The state stays.
        """
        places = {entry.name: index for index, entry in enumerate(self.manifest.state)}
        unknown = sorted(set(values) - set(places))
        if unknown:
            raise ValueError(f"expected names of the state, received '{unknown[0]}'. It has {', '.join(places)}.")
        entries = [self.manifest.state[places[name]] for name in values]
        arrays = self._put(artefact.matching(entries, list(values.values()), "state"))
        for name, array in zip(values, arrays, strict=True):
            self._state[places[name]] = array

    def restore(self, *owners: Any) -> None:
        """Gives variables the state, bit for bit, so that they go on from here or are saved.

        Args:
            *owners: Who has the variables: a Keras model, its optimizer included if it is compiled, an optimizer, a
                `tf.Module`. Variables are told apart by their paths, or names.

        Raises:
            ValueError: If a variable is missing there, or is not like its state. None is changed then.
        """
        variables = _variables(owners)
        entries = [entry for entry in self.manifest.state if entry.is_variable]
        for entry in entries:
            found = variables.get(entry.name, [])
            if len(found) != 1:
                raise ValueError(
                    f"expected one variable '{entry.name}' to restore, received {len(found) or 'none'} among "
                    f"{', '.join(sorted(variables)) or 'no variables'}. Give all that the step trains, the optimizer "
                    "included, built in a process of its own or after keras.backend.clear_session(), as names count up."
                )
            received = artefact.Array(entry.name, _dtype_name(found[0]), tuple(found[0].shape))
            if str(received) != str(entry):
                raise ValueError(f"variable '{entry.name}': expected {entry}, received {received}.")
        state = self.state
        for entry in entries:
            variables[entry.name][0].assign(state[entry.name])

    def _put(self, values: Sequence[np.ndarray]) -> list[Any]:
        with self._jax.enable_x64(True):  # else 64-bit integers, such as an optimizer's count, would be cut
            return self._jax.device_put(list(values), self._device)


def load(directory: str | os.PathLike[str], device: str = "cpu") -> Step:
    """Compiles an exported step for a device, with its state there.

    Args:
        directory: What `graphswap export --format=stablehlo` wrote.
        device: "cpu", "gpu" or "tpu".

    Raises:
        ArtefactError: If there is no such step, or one of another version.
        DeviceError: If there is no such device, or if the plan swaps and it knows no memory of the host.
        ImportError: If JAX is missing, or of a version that this was not tried with.
    """
    return Step(artefact.read(directory), device)


def local_device(name: str) -> Any:
    """The first JAX device of a kind.

    Args:
        name: "cpu", "gpu" or "tpu".

    Raises:
        DeviceError: If there is none.
        ImportError: If JAX is missing, or of a version that this was not tried with.
    """
    jax = _jax()
    try:
        return jax.local_devices(backend=name)[0]
    except RuntimeError as error:
        raise DeviceError(
            f"device: expected one that JAX finds here, received '{name}', of which it says: {_line(error)}. "
            "Install JAX for it, or name another one: cpu, gpu, tpu."
        ) from error


def peak_bytes(device: Any) -> int:
    """The most that the allocator of a JAX device has counted in this process; 0 if it counts nothing."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def _variables(owners: Sequence[Any]) -> Mapping[str, list[Any]]:
    found: dict[str, list[Any]] = collections.defaultdict(list)
    for owner in owners:
        optimizer = getattr(owner, "optimizer", None)
        for variable in (*owner.variables, *getattr(optimizer, "variables", ())):
            found[getattr(variable, "path", "") or variable.name.partition(":")[0]].append(variable)
    return found


def _dtype_name(variable: Any) -> str:
    return str(getattr(variable.dtype, "name", variable.dtype))


def _check_swaps(device: Any, manifest: artefact.Manifest) -> None:
    kinds = [memory.kind for memory in device.addressable_memories()]
    if any(manifest.swapped) and _HOST not in kinds:
        raise DeviceError(
            f"'{manifest.name}': expected a device with memory of kind {_HOST}, as its plan swaps, received "
            f"'{device.device_kind}', which has {', '.join(kinds)}. Export it with a plan that repeats nodes only."
        )


# --- compiling for a device that is not here ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Copy:
    """An asynchronous copy between the device and the host.

    Attributes:
        name: In the schedule.
        is_out: Whether it leaves the device.
        nbytes: How much it moves.
        beside: Kernels that run meanwhile.
    """

    name: str
    is_out: bool
    nbytes: int
    beside: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step that was compiled for a device that is not here.

    Attributes:
        memory: What it takes.
        copies: Copies between device and host, in the order in which they start.
        planned: Copies out and back that the plan asks for.
        schedule: The module in the order in which it would run, as HLO text.
    """

    memory: Memory
    copies: tuple[Copy, ...]
    planned: tuple[int, int]
    schedule: str

    def __str__(self) -> str:
        out = sum(copy.is_out for copy in self.copies)
        back, beside = len(self.copies) - out, sum(copy.beside > 0 for copy in self.copies)
        return (
            f"{self.memory}\n"
            f"copies      {out} of {self.planned[0]} planned out, {back} of {self.planned[1]} back are asynchronous; "
            f"{beside} run beside kernels"
        )


def compile_for(step: Artefact, target: str, options: Mapping[str, str] = MappingProxyType({})) -> Compiled:
    """Compiles a step for a GPU that is not here, with as much memory as the step's plan has.

    XLA starts copies from the host as early as the memory allows that it knows of.

    Args:
        step: The step.
        target: XLA's description of the GPU, a GpuTargetConfigProto as text.
        options: More of XLA's debug options by name.

    Raises:
        DeviceError: If the text is no such description, if the compiler for it is missing, or if it refuses the step.
        ArtefactError: If JAX can't read the step.
        ImportError: If JAX is missing, or of a version that this was not tried with.
    """
    budget = (step.manifest.plan or {}).get("memory_budget")
    device = target_device(with_memory(target, budget) if budget else target)
    try:
        executable = _compile(step, device, device.client.compile, {**TARGET_OPTIONS, **_OPTIONS_OF_A_GPU, **options})
    except _jax().errors.JaxRuntimeError as error:
        raise DeviceError(f"'{step.manifest.name}': XLA can't compile it for this target: {_line(error)}.") from error
    return inspected(executable, step.manifest.swapped)


def with_memory(target: str, nbytes: int) -> str:
    """XLA's description of a GPU with no more memory than so many bytes."""
    return re.sub(r"\b(?<=device_memory_size: )\d+", lambda size: str(min(int(size[0]), nbytes)), target)


def inspected(executable: Any, planned: tuple[int, int] = (0, 0)) -> Compiled:
    """What a compiler made of a step: of JAX's `Compiled`, or of what is inside it."""
    executable = getattr(executable, "runtime_executable", lambda: executable)()
    schedule = executable.hlo_modules()[0].to_string()
    return Compiled(_memory(executable), _copies(schedule), planned, schedule)


def target_device(target: str) -> Any:
    """The JAX device of a GPU that is not here, to compile for.

    Args:
        target: XLA's description of the GPU, a GpuTargetConfigProto as text.

    Raises:
        DeviceError: If the text is no such description, or if the compiler for it is missing.
        ImportError: If JAX is missing, or of a version that this was not tried with.
    """
    _jax()
    from jax.experimental import topologies

    missing = [name for name in _NEEDED if not re.search(rf"\b{name}\b", target)]
    if missing:
        raise DeviceError(
            f"target: expected the text of XLA's GpuTargetConfigProto, received one without {missing[0]}. "
            "Where the GPU is, it is jaxlib.xla_client.get_topology_for_devices(jax.devices()).target_config."
        )
    try:
        known = _NEWER.sub("", target)
        return topologies.get_topology_desc(platform="cuda", target_config=known, topology="1x1x1").devices[0]
    except (RuntimeError, NotImplementedError) as error:
        raise DeviceError(
            f"target: expected the text of XLA's GpuTargetConfigProto, and JAX's compiler for GPUs, which says: "
            f"{_line(error)}. Run `pip install graphswap[target]`, set JAX_PLATFORMS=cpu where there is no GPU, or "
            "write the text anew with this version of JAX."
        ) from error


_NEEDED = ("gpu_device_info", "device_memory_size", "cuda_compute_capability")


def _compile(step: Artefact, device: Any, compile_: Any, options: Mapping[str, str]) -> Any:
    from jax._src import lib
    from jax._src.interpreters import mlir
    from jax.extend import backend
    from jax.extend.mlir import deserialize_portable_artifact

    devices = lib._jax.DeviceList((device,))  # pyright: ignore[reportPrivateImportUsage]
    chosen = backend.get_compile_options(num_replicas=1, num_partitions=1, env_options_overrides=dict(options))
    with mlir.make_ir_context():
        try:
            module = deserialize_portable_artifact(step.module)
        except (RuntimeError, ValueError) as error:
            wrote = step.manifest.versions.get("jax", "of unknown version")
            raise ArtefactError(
                f"'{step.manifest.name}': expected StableHLO that jax {check_version()} reads, received what jax "
                f"{wrote} wrote, of which it says: {_line(error)}. Export the step again."
            ) from error
        return compile_(module, devices, chosen)


def _memory(executable: Any) -> Memory:
    found = executable.get_compiled_memory_stats()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temp=found.temp_size_in_bytes,
        host_temp=found.host_temp_size_in_bytes,
    )


_NEWER = re.compile(r"^\s*collective_memory_granularity:.*$", re.MULTILINE)
"""What newer versions of XLA write, this one refuses, and one device does not need."""
_START = re.compile(r"%(\S+) = \((\w+)\[([\d,]*)\](\S*), \w+\[[\d,]*\](\S*), .* copy-start\(")
_DONE = re.compile(r" copy-done\(%?([^\s)]+)")
_KERNEL = re.compile(r" (fusion|custom-call|dot|convolution|reduce|scatter|sort|while|conditional)\(")
_IN_HOST = "S(5)"
"""How XLA marks the host's memory in a layout."""


def _copies(schedule: str) -> tuple[Copy, ...]:
    """The asynchronous copies between device and host in a scheduled module."""
    started: dict[str, Copy] = {}
    kernels = 0
    for line in schedule[schedule.index("\nENTRY ") :].splitlines():
        start, done = _START.search(line), _DONE.search(line)
        if start and (_IN_HOST in start[4]) != (_IN_HOST in start[5]):
            nbytes = _ITEM_BYTES.get(start[2], 4) * math.prod(int(size) for size in start[3].split(",") if size)
            started[start[1]] = Copy(start[1], _IN_HOST in start[4], nbytes, kernels)
        elif done and done[1] in started:
            copy = started[done[1]]
            started[done[1]] = dataclasses.replace(copy, beside=kernels - copy.beside)
        elif _KERNEL.search(line):
            kernels += 1
    return tuple(started.values())


_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "u64": 8, "f64": 8}
"""Bytes per element of XLA's types, where they are not 4."""


# --- conversion ---------------------------------------------------------------------------------------------------


def portable(hlo: bytes, aliases: Mapping[int, int]) -> bytes:
    """Turns a serialized HloModuleProto into portable StableHLO bytecode.

    Args:
        hlo: The module.
        aliases: Parameters that are donated, and the result that each becomes.

    Raises:
        ImportError: If JAX is missing, or of a version that this was not tried with.
    """
    _jax()
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir.dialects import hlo as stablehlo
    from jax.extend import mlir as public

    ir: Any = importlib.import_module("jax.extend.mlir.ir")

    def clean(operation: Any) -> Any:
        if operation.name == "mhlo.copy":
            operation.results[0].replace_all_uses_with(operation.operands[0])
            copies.append(operation)
        elif operation.name == "stablehlo.custom_call":
            for name in set(operation.attributes) & _LAYOUTS:
                del operation.attributes[name]
        return ir.WalkResult.ADVANCE

    copies: list[Any] = []
    with mlir.make_ir_context():
        module = ir.Module.parse(public.hlo_to_stablehlo(hlo))
        module.operation.walk(clean)
        for copy in copies:
            copy.erase()
        for name in [name for name in module.operation.attributes if name.startswith("mhlo.")]:
            del module.operation.attributes[name]
        main = next(o for o in module.body.operations if o.operation.attributes["sym_name"].value == "main")
        number = ir.IntegerType.get_signless(32)
        main.arg_attrs = ir.ArrayAttr.get(
            [
                ir.DictAttr.get({"tf.aliasing_output": ir.IntegerAttr.get(number, aliases[i])} if i in aliases else {})
                for i in range(len(main.type.inputs))
            ]
        )
        oldest = stablehlo.get_version_from_compatibility_requirement(
            stablehlo.StablehloCompatibilityRequirement.WEEK_12
        )
        return public.serialize_portable_artifact(module, oldest)


_LAYOUTS = {"operand_layouts", "result_layouts", "result_tilings", "xla_shape"}
"""Attributes that TensorFlow's bridge puts on custom calls, and that not all compilers take."""


# --- JAX ----------------------------------------------------------------------------------------------------------


def check_version() -> str:
    """The version of JAX that is installed.

    Raises:
        ImportError: If there is none, or one that this was not tried with.
    """
    return _jax().__version__


def _jax() -> Any:
    """JAX, if it is one of the versions that this was tried with."""
    tried = f"jax>={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, NEWEST))}"
    try:
        jax = importlib.import_module("jax")
    except ModuleNotFoundError as error:
        if error.name != "jax":
            raise
        raise ImportError(f"graphswap.pjrt needs {tried}, which is not installed. {_ADVICE}") from error
    version = tuple(int(number) for number in re.findall(r"\d+", jax.__version__)[:3])
    if not OLDEST <= version < NEWEST:
        raise ImportError(f"graphswap.pjrt needs {tried}, received jax {jax.__version__}. {_ADVICE}")
    return jax


_ADVICE = "Run `pip install graphswap[pjrt]`."


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
