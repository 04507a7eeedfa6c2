"""Steps that were exported train with JAX as they do with TensorFlow, and what they learn comes back."""

import dataclasses
import importlib.util
import pathlib
import re
import subprocess
import sys
import types
from typing import Any

import pytest

if not importlib.util.find_spec("jax"):
    pytest.skip("needs graphswap[pjrt]", allow_module_level=True)

import jax
import keras
import numpy as np
import small_gpu
import tensorflow as tf
import trainings

from graphswap import artefact, devices, graphdef, offline, pjrt, simulator, stablehlo_export
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.tools import architectures, models, targets

STEPS = 20
TOLERANCE = 1e-6
"""Of the loss. XLA sums in another order than TensorFlow's kernels, and has other formulas for functions such as rsqrt,
so that each float32 may differ in its last places, 6e-8 of it. Twenty steps at these rates amplify that to a few times
as much; at five times the rate the ReLUs and BatchNormalizations of the CNN do so to 4e-6. No plan has a part in it:
with and without one PJRT gives the same bits."""


@dataclasses.dataclass
class Trained:
    """A model, its step as it was exported, and what training it with TensorFlow and with PJRT came to."""

    model: Any
    optimizer: Any
    folder: pathlib.Path
    plan: Plan
    losses: list[float]
    pjrt_losses: list[float]
    step: pjrt.Step
    function: Any
    last_batch: Any


def gpt():
    training = models.gpt(blocks=1, width=64, heads=4, length=32, batch=8)
    return training.model, training.optimizer, training.loss, training.batches


def cnn():
    """Bottlenecks in three stages, with BatchNormalization, as in a ResNet-50."""
    model = architectures.preactivation_resnet((1, 1, 1), size=16, classes=10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, keras.optimizers.SGD(2e-5, momentum=0.9), loss, images()


def images():
    random = np.random.default_rng(0)
    while True:
        labels = random.integers(0, 10, 16).astype("int32")
        yield random.normal(labels[:, None, None, None] / 10, 1, (16, 16, 16, 3)).astype("float32"), labels


def trace(model, optimizer, loss, batch):
    optimizer.build(model.trainable_variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        return value

    specs = [tf.TensorSpec(array.shape, array.dtype) for array in batch]
    return offline.trace("step", lambda *batch: graphdef.call_inline(step, batch, {}), specs, model), tf.function(step)


@pytest.fixture(scope="module", params=[gpt, cnn], ids=["gpt", "cnn"])
def trained(request, tmp_path_factory):
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model, optimizer, loss, data = request.param()
    *batches, last = (next(data) for _ in range(STEPS + 1))
    traced, function = trace(model, optimizer, loss, last)
    plan = trainings.EvictAll().plan(traced.graph, CostModel(), 1)
    folder = tmp_path_factory.mktemp("pjrt") / "step"
    artefact.write(stablehlo_export.export(traced.func_graph, traced.graph, plan), folder)
    step = pjrt.load(folder)
    losses = [float(function(*batch)) for batch in batches]
    pjrt_losses = [float(step(*batch)[0]) for batch in batches]
    return Trained(model, optimizer, folder, plan, losses, pjrt_losses, step, function, last)


def digest(variables):
    return [(variable.path, np.asarray(variable).tobytes()) for variable in variables]


def test_losses_are_tensorflow_s(trained):
    assert trained.plan.swaps and trained.plan.recomputes
    swaps = trained.step.manifest.swapped
    assert swaps[0] == len({swap.value for swap in trained.plan.swaps}) and swaps[1] == len(trained.plan.swaps)
    assert len(set(trained.losses)) == STEPS
    np.testing.assert_allclose(trained.pjrt_losses, trained.losses, rtol=TOLERANCE)


def test_the_state_goes_back_into_keras_bit_for_bit_and_into_checkpoints(trained, tmp_path):
    model, optimizer, step = trained.model, trained.optimizer, trained.step
    step.restore(model, optimizer)
    owned = [*model.variables, *optimizer.variables]
    state = step.state
    assert digest(owned) == [(variable.path, state[variable.path].tobytes()) for variable in owned]
    assert optimizer.iterations.numpy() == STEPS
    prefix = tf.train.Checkpoint(model=model, optimizer=optimizer).write(str(tmp_path / "checkpoint"))
    kept = digest(owned)
    loss = float(trained.function(*trained.last_batch))
    assert digest(owned) != kept
    tf.train.Checkpoint(model=model, optimizer=optimizer).read(prefix).assert_consumed()
    assert digest(owned) == kept
    np.testing.assert_allclose(float(step(*trained.last_batch)[0]), loss, rtol=TOLERANCE)
    step.assign({name: state[name] for name in state})
    assert all(np.array_equal(value, state[name]) for name, value in step.state.items())


def test_a_compiled_model_brings_its_optimizer(trained):
    model = trained.model
    model.compile(trained.optimizer)
    trained.step.restore(model)
    assert digest([model.optimizer.iterations]) == [
        (model.optimizer.iterations.path, trained.step.state[model.optimizer.iterations.path].tobytes())
    ]


def test_the_state_is_donated(trained):
    memory = trained.step.memory
    assert memory.outputs < 1 << 12 < memory.arguments
    donated = trained.step._state[0]
    trained.step(*trained.last_batch)
    assert donated.is_deleted()


def test_what_does_not_fit_is_refused_and_changes_nothing(trained):
    step, (x, y) = trained.step, trained.last_batch
    before = step.state
    kind = artefact.Array("", x.dtype.name, x.shape)
    with pytest.raises(ValueError) as error:
        step(x)
    assert str(error.value) == "expected 2 arguments, received 1: one for each of the manifest's."
    with pytest.raises(ValueError) as error:
        step(x[:1], y)
    received = artefact.Array("", x.dtype.name, (1, *x.shape[1:]))
    name = step.manifest.inputs[0].name
    message = f"argument '{name}': expected {kind}, received {received}. Sizes are fixed at export."
    assert str(error.value) == message
    with pytest.raises(ValueError, match="expected names of the state, received 'nonsense'. It has "):
        step.assign({"nonsense": x})
    with pytest.raises(
        ValueError, match="state 'sgd/learning_rate|adam/learning_rate': expected float32\\[\\], received"
    ):
        step.assign({next(n for n in before if n.endswith("learning_rate")): x})
    kept = digest(trained.model.variables)
    with pytest.raises(ValueError) as error:
        step.restore(trained.model.layers[-1])
    assert "to restore, received none among " in str(error.value)
    first = next(entry for entry in step.manifest.state if entry.is_variable)
    odd = [*trained.model.variables, *trained.optimizer.variables]
    odd = [tf.Variable(0, name=first.name) if variable.path == first.name else variable for variable in odd]
    with pytest.raises(ValueError) as error:
        step.restore(types.SimpleNamespace(variables=odd))
    assert str(error.value) == f"variable '{first.name}': expected {first}, received int32[]."
    assert digest(trained.model.variables) == kept
    assert all(np.array_equal(value, before[name]) for name, value in step.state.items())


def test_loading_and_running_need_no_tensorflow(tmp_path):
    step = chain(1, rows=2)
    artefact.write(stablehlo_export.export(step.func_graph, step.graph), tmp_path / "step")
    script = (
        "import sys, numpy as np; from graphswap import pjrt; step = pjrt.load(sys.argv[1]);"
        "step(*(np.zeros(entry.shape, entry.dtype) for entry in step.manifest.inputs));"
        "print(sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "step")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_plan_changes_no_bit():
    step = chain(5, rows=256)
    plan = trainings.EvictAll().plan(step.graph, CostModel(), 1)
    assert plan.swaps and plan.recomputes
    random = np.random.default_rng(0)
    batches = [random.normal(size=(2, 256, 256)).astype("float32") for _ in range(5)]
    runs = []
    for one in (Plan(), plan):
        run = pjrt.Step(stablehlo_export.export(step.func_graph, step.graph, one), "cpu")
        losses = [float(run(*batch)[0]) for batch in batches]
        runs.append((losses, {name: value.tobytes() for name, value in run.state.items()}))
    assert runs[0] == runs[1]


def test_importing_graphswap_imports_no_jax():
    script = "import graphswap, graphswap.pjrt, sys; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.4.31", "0.10.1", "0.11.0", "1.0"])
def test_other_versions_of_jax_are_refused(version, monkeypatch):
    monkeypatch.setattr(jax, "__version__", version)
    with pytest.raises(ImportError) as error:
        pjrt.check_version()
    assert str(error.value) == (
        f"graphswap.pjrt needs jax>=0.10.2,<0.11, received jax {version}. Run `pip install graphswap[pjrt]`."
    )


def test_a_missing_jax_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError) as error:
        pjrt.check_version()
    assert str(error.value) == (
        "graphswap.pjrt needs jax>=0.10.2,<0.11, which is not installed. Run `pip install graphswap[pjrt]`."
    )


def test_the_range_is_that_of_the_package():
    text = (pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert 'pjrt = ["jax>=0.10.2,<0.11", "jaxlib>=0.10.2,<0.11", ' in text
    assert (pjrt.OLDEST, pjrt.NEWEST) == ((0, 10, 2), (0, 11))


def test_a_device_that_is_not_here_is_refused(trained):
    with pytest.raises(pjrt.DeviceError) as error:
        pjrt.load(trained.folder, "gpu")
    assert str(error.value).startswith("device: expected one that JAX finds here, received 'gpu', of which it says: ")


def test_a_device_without_the_host_s_memory_can_not_swap(trained):
    memories = [types.SimpleNamespace(kind="device")]
    device = types.SimpleNamespace(addressable_memories=lambda: memories, device_kind="toy")
    with pytest.raises(pjrt.DeviceError) as error:
        pjrt._check_swaps(device, trained.step.manifest)
    assert str(error.value) == (
        "'step': expected a device with memory of kind pinned_host, as its plan swaps, received 'toy', "
        "which has device. Export it with a plan that repeats nodes only."
    )


def test_a_module_that_jax_can_not_read_is_refused(trained, tmp_path):
    step = dataclasses.replace(artefact.read(trained.folder), module=b"ML\xefR from elsewhere")
    artefact.write(step, tmp_path / "odd")
    with pytest.raises(artefact.ArtefactError) as error:
        pjrt.load(tmp_path / "odd")
    here = jax.__version__
    assert str(error.value).startswith(
        f"'step': expected StableHLO that jax {here} reads, received what jax {here} wrote, of which it says: "
    )


# --- devices that are not here ------------------------------------------------------------------------------------


def chain(layers, rows=2048):
    """Dense layers whose activations take 2 MiB each, their weights a quarter of one."""
    model = keras.Sequential([keras.Input((256,)), *(keras.layers.Dense(256, "tanh") for _ in range(layers))])
    optimizer = keras.optimizers.SGD(0.1)
    loss = keras.losses.MeanSquaredError()
    batch = np.zeros((rows, 256), "float32")
    return trace(model, optimizer, loss, (batch, batch))[0]


@pytest.fixture(scope="module")
def compiled():
    """By way: the plan, and what a compiler makes of it."""
    step = chain(10, rows=8192)
    peak = simulator.simulate(step.graph, Plan(), CostModel()).peak_bytes
    plans = {
        way: targets.Way(way, 1.0).plan(step.graph, CostModel(devices.DEVICES["h200"]), int(share * peak))
        for way, share in (("swap", 0.6), ("recompute", 0.85))
    }
    return {
        way: (plan, pjrt.compile_for(stablehlo_export.export(step.func_graph, step.graph, plan), small_gpu.TARGET))
        for way, plan in {"plain": Plan(), **plans}.items()
    }


@small_gpu.needs_compiler
def test_planned_swaps_are_asynchronous_copies_beside_kernels(compiled):
    plain, (plan, swapped) = compiled["plain"][1], compiled["swap"]
    assert plain.copies == () and plain.memory.host_temp == 0
    assert len(plan.swaps) > 3 and swapped.planned == (len({swap.value for swap in plan.swaps}), len(plan.swaps))
    outs = sum(copy.is_out for copy in swapped.copies)
    assert (outs, len(swapped.copies) - outs) == swapped.planned
    assert all(copy.nbytes == 4 * 8192 * 256 for copy in swapped.copies)
    assert sum(copy.beside > 0 for copy in swapped.copies) > outs
    assert swapped.memory.host_temp >= outs * 4 * 8192 * 256
    assert swapped.memory.temp < plain.memory.temp - 4 * 8192 * 256


@small_gpu.needs_compiler
def test_repeated_nodes_are_not_merged(compiled):
    plain, (plan, repeated) = compiled["plain"][1], compiled["recompute"]
    assert sum(len(decision.nodes) for decision in plan.recomputes) > 1 and "/recompute" not in plain.schedule
    assert len(set(re.findall(r'op_name="([^"]*Tanh/recompute)', repeated.schedule))) > 1
    assert repeated.memory.temp < plain.memory.temp - 4 * 8192 * 256


def test_xla_is_told_of_no_more_memory_than_the_plan_has(monkeypatch):
    seen = []

    def target_device(text):
        seen.append(text)
        raise pjrt.DeviceError("seen")

    monkeypatch.setattr(pjrt, "target_device", target_device)
    for plan in (None, {"memory_budget": None}, {"memory_budget": 4096}, {"memory_budget": 1 << 60}):
        step: Any = types.SimpleNamespace(manifest=types.SimpleNamespace(plan=plan))
        with pytest.raises(pjrt.DeviceError, match="seen"):
            pjrt.compile_for(step, small_gpu.TARGET)
    limited = re.sub(r"device_memory_size: \d+", "device_memory_size: 4096", small_gpu.TARGET)
    assert limited != small_gpu.TARGET
    assert seen == [small_gpu.TARGET, small_gpu.TARGET, limited, small_gpu.TARGET]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "received one without gpu_device_info. Where the GPU is, it is jaxlib.xla_client.get_topology_for_devices(",
        ),
        (
            small_gpu.TARGET.replace("device_memory_size", "memory"),
            "received one without device_memory_size. Where the GPU is",
        ),
        (small_gpu.TARGET.replace("{", "["), "and JAX's compiler for GPUs, which says: "),
    ],
)
def test_a_target_that_is_none_is_refused(text, message):
    with pytest.raises(pjrt.DeviceError) as error:
        pjrt.target_device(text)
    assert str(error.value).startswith("target: expected the text of XLA's GpuTargetConfigProto")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
