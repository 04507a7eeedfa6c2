"""What is exported: the forward function as it was before graphswap rewrote it, or nothing at all."""

import contextlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import trainings

from graphswap import graphdef, ir, offline, onnx_export, rewrites, saved_model, tiers
from graphswap.cost_model import CostModel

if not all(map(importlib.util.find_spec, ("tf2onnx", "onnx", "onnxruntime"))):
    pytest.skip("needs graphswap[onnx]", allow_module_level=True)

import keras
import onnx
import onnxruntime
import tf2onnx.tfonnx
from keras import layers

# Activations of more than 64 KiB: smaller ones stay where they are.
IMAGES = tf.TensorSpec((4, 32, 32, 3), tf.float32, name="images")
TOKENS = tf.TensorSpec((8, 32), tf.int32, name="tokens")


def cnn():
    """Residual blocks: what a block adds to lies idle while the block runs."""
    x = inputs = keras.Input(IMAGES.shape[1:])
    x = layers.Conv2D(8, 3, padding="same")(x)
    for _ in range(2):
        y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(x)))
        x = x + layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(y))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def gpt():
    inputs = keras.Input(TOKENS.shape[1:], dtype="int32")
    x = layers.Embedding(11, 96)(inputs)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, 8)(y, y, use_causal_mask=True)
        x = x + layers.Dense(96)(layers.Dense(128, "gelu")(layers.LayerNormalization()(x)))
    return keras.Model(inputs, layers.Dense(11)(x))


@contextlib.contextmanager
def rewritten(tier: str):
    """Swaps and repeats whatever can be in the functions that mark themselves while they are traced."""
    plans = []

    def rewrite(func_graph, mark):
        graph = graphdef.import_function(func_graph)
        plan = trainings.EvictAll().plan(graph, CostModel(far_tier=tier), 1)
        plans.append(plan)
        graphdef.export_function(func_graph, rewrites.rewrite(graph, plan), tiers.Tiers())

    graphdef.off_traced()
    graphdef.on_traced(rewrite)
    try:
        yield plans
    finally:
        graphdef.off_traced()


class Module(tf.Module):
    """A model as it is saved: `forward`, `step`, and `swapped`, the forward function rewritten."""

    forward: Any
    swapped: Any
    step: Any
    variables_held: Any


def saved(model: keras.Model, spec: Any, folder: pathlib.Path, tier: str = "host") -> str:
    """Saves a model with its functions, and returns the folder."""
    module, optimizer = Module(), keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    module.variables_held = [*model.variables, *optimizer.variables]
    for weight in model.weights:  # else BatchNormalization would have nothing to do
        weight.assign_add(np.random.default_rng(1).uniform(0.0, 0.1, weight.shape))

    def forward(x):
        return {"scores": model(x, training=False)}

    def swapped(x):
        graphdef.mark_current_graph("rewrite")
        return forward(x)

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables))
        return loss

    opened = tf.TensorSpec((None, *spec.shape[1:]), spec.dtype, name=spec.name)
    module.forward = tf.function(forward, input_signature=[spec], autograph=False)
    module.step = tf.function(step, input_signature=[spec], autograph=False)
    module.swapped = tf.function(swapped, input_signature=[spec], autograph=False)
    served = tf.function(forward, input_signature=[opened], autograph=False)
    with rewritten(tier) as plans:  # saving may trace once more
        tf.saved_model.save(module, str(folder), signatures={"serving_default": served})
    assert plans and all(plan.swaps and plan.recomputes for plan in plans)
    return str(folder)


def saved_function(folder: pathlib.Path, function: Callable[..., Any], *specs: Any) -> str:
    module = Module()
    module.forward = tf.function(function, input_signature=specs, autograph=False)
    tf.saved_model.save(module, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def cnn_folder(tmp_path_factory):
    return saved(cnn(), IMAGES, tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="module")
def gpt_folder(tmp_path_factory):
    return saved(gpt(), TOKENS, tmp_path_factory.mktemp("gpt"))


def run(path, **feed):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)


def ops_in(folder, name):
    traced = getattr(tf.saved_model.load(folder), name).concrete_functions[0]
    return {operation.type for operation in traced.graph.get_operations()}


# --- what is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "feed"),
    [
        ("cnn_folder", {"images": np.random.default_rng(5).standard_normal(IMAGES.shape).astype("float32")}),
        ("gpt_folder", {"tokens": np.random.default_rng(5).integers(0, 11, TOKENS.shape).astype("int32")}),
    ],
)
def test_a_rewritten_function_gives_the_graph_of_the_plain_one(folder, feed, request, tmp_path):
    folder = request.getfixturevalue(folder)
    assert {"SerializeTensor", "ParseTensor"} <= ops_in(folder, "swapped")
    plain = onnx_export.export(folder, tmp_path / "plain.onnx", "forward")
    ours = onnx_export.export(folder, tmp_path / "ours.onnx", "swapped")
    assert ours.nodes == plain.nodes == len(onnx.load(ours.path).graph.node)
    assert max(ours.largest_difference, plain.largest_difference) < onnx_export.TOLERANCE
    (expected,), (received,) = run(plain.path, **feed), run(ours.path, **feed)
    np.testing.assert_allclose(received, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    loaded: Any = tf.saved_model.load(folder)
    truth = loaded.forward(*map(tf.constant, feed.values()))["scores"]
    np.testing.assert_allclose(received, truth, rtol=1e-5, atol=1e-5 * np.abs(truth).max())


def test_what_was_written_is_described(cnn_folder, tmp_path):
    exported = onnx_export.export(cnn_folder, tmp_path / "model.onnx")
    assert (exported.inputs, exported.outputs) == (("images",), ("scores",))
    assert str(exported).startswith(f"{tmp_path / 'model.onnx'}: {exported.nodes} nodes, from images to scores; ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_signature_keeps_its_open_batch(cnn_folder, tmp_path):
    path = onnx_export.export(cnn_folder, tmp_path / "model.onnx").path
    for batch in (1, 5):
        assert run(path, images=np.zeros((batch, 32, 32, 3), "float32"))[0].shape == (batch, 3)


def test_a_function_that_was_planned_in_its_file_is_dissolved(cnn_folder, tmp_path):
    function = saved_model.load(cnn_folder, "forward")
    step = offline.from_saved_model(function)
    plan = trainings.EvictAll().plan(step.graph, CostModel(), 1)
    planned = graphdef.build_function(step.func_graph, rewrites.rewrite(step.graph, plan), tiers.Tiers())
    saved_model.write(function, planned, tmp_path / "planned")
    plain = onnx_export.export(cnn_folder, tmp_path / "plain.onnx", "forward")
    assert onnx_export.export(tmp_path / "planned", tmp_path / "ours.onnx", "forward").nodes == plain.nodes


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_swaps_in_pieces_and_files_leave_nothing_behind(tier, tmp_path, monkeypatch):
    monkeypatch.setattr(ir, "swap_pieces", lambda value: 4)
    monkeypatch.setattr(tiers, "default_directory", lambda: tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    folder = saved(cnn(), IMAGES, tmp_path / "model", tier)
    assert {"InplaceUpdate"} | ({"WriteFile"} if tier == "disk" else set()) <= ops_in(folder, "swapped")
    plain = onnx_export.export(folder, tmp_path / "plain.onnx", "forward")
    ours = onnx_export.export(folder, tmp_path / "ours.onnx", "swapped")
    assert ours.nodes == plain.nodes
    written = [path.name for path in (tmp_path / "disk").rglob("*") if path.is_file()]
    assert written in ([], ["lock"])  # the export ran no swap: the files could be those of a training


def test_swaps_of_a_gpu_are_copies():
    for op in ("_CopyFromGpuToHost", "_CopyFromHostToGpu"):  # which only TensorFlow for GPUs can build
        assert onnx_export._passed_on(types.SimpleNamespace(type=op, inputs=["x:0"])) == "x:0"


def test_what_draws_random_numbers_is_not_merged():
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, (2,), "x")
        y = tf.exp(x) * tf.exp(x) + tf.random.uniform((2,)) - tf.random.uniform((2,))
    ops = [node.op for node in onnx_export.lowered(graph, {"y": y}).node]
    assert (ops.count("Exp"), ops.count("RandomUniform")) == (1, 2)


def test_loops_keep_their_lists(tmp_path):
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(5, 4)(inputs)
    x = layers.Bidirectional(layers.GRU(4))(layers.LSTM(4, return_sequences=True)(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    model.export(tmp_path / "model", verbose=False)
    path = onnx_export.export(tmp_path / "model", tmp_path / "model.onnx").path
    tokens = np.array([[0, 1, 2, 3, 4, 0]] * 3, "int32")
    feed = {onnx.load(path).graph.input[0].name: tokens}
    np.testing.assert_allclose(run(path, **feed)[0], model(tokens), rtol=1e-5, atol=1e-6)


def test_results_without_names_are_numbered(tmp_path):
    spec = tf.TensorSpec((None, 3), tf.float32, name="x")
    folder = saved_function(tmp_path / "model", lambda x, y: (x + y, x, [y > 0]), spec, spec)
    exported = onnx_export.export(folder, tmp_path / "model.onnx", "forward")
    assert exported.outputs == ("output_0", "output_1", "output_2")
    assert exported.largest_difference == 0.0


def test_arguments_that_are_no_tensors_are_fixed(tmp_path):
    def forward(x, training=False, scale=None):
        return x * (3.0 if training else 2.0)

    folder = saved_function(tmp_path / "model", forward, tf.TensorSpec((None,), tf.float32, name="x"))
    path = onnx_export.export(folder, tmp_path / "model.onnx", "forward").path
    np.testing.assert_array_equal(run(path, x=np.ones(3, "float32"))[0], [2.0, 2.0, 2.0])


def test_arguments_to_try_the_file_on_can_be_given(tmp_path):
    table = tf.range(10.0)
    spec = tf.TensorSpec((None,), tf.int32, name="indices")
    folder = saved_function(tmp_path / "model", lambda indices: tf.gather(table, indices + 6), spec)
    exported = onnx_export.export(folder, tmp_path / "model.onnx", "forward", arguments=[np.array([3, 2, 1], "int32")])
    assert exported.largest_difference == 0.0
    with pytest.raises(ValueError, match=r"arguments: expected 1 \(indices\), received 2. Give one for each."):
        onnx_export.export(folder, tmp_path / "other.onnx", "forward", arguments=[1, 2])


# --- what is refused --------------------------------------------------------------------------------------------


def refusal(folder, path, *names, **options):
    """The one line that says why nothing was written."""
    before = sorted(path.parent.glob("*")) if path.parent.exists() else []
    with pytest.raises((ValueError, OSError, ImportError)) as caught:
        onnx_export.export(folder, path, *names, **options)
    assert before == (sorted(path.parent.glob("*")) if path.parent.exists() else [])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_training_step_is_refused(cnn_folder, tmp_path):
    assert refusal(cnn_folder, tmp_path / "step.onnx", "step") == (
        "'step': expected a forward function, received one that changes variables (AssignVariableOp). ONNX has no "
        "variables to update, and tf2onnx would write an empty graph without a word. "
        "Export forward or serving_default or swapped."
    )


def test_updates_in_a_called_function_are_seen(tmp_path):
    count = tf.Variable(0.0)

    @tf.function
    def counted(x):
        return x + count.assign_add(1.0)

    module = Module()
    module.variables_held = [count]
    module.forward = tf.function(lambda x: counted(x) * 2.0, input_signature=[tf.TensorSpec((2,))], autograph=False)
    tf.saved_model.save(module, str(tmp_path / "model"))
    text = refusal(str(tmp_path / "model"), tmp_path / "model.onnx", "forward")
    assert "changes variables (AssignAddVariableOp)" in text
    assert text.endswith("Save the forward function as well, and export that.")


def test_an_unknown_function_is_refused(cnn_folder, tmp_path):
    text = refusal(cnn_folder, tmp_path / "model.onnx", "froward")
    assert "received 'froward'. It has forward, serving_default, step, swapped. Name one of these" in text


def test_a_function_with_many_traces_is_refused(tmp_path):
    module = Module()
    module.forward = tf.function(lambda x: x * 2.0, autograph=False)
    for size in (2, 3):
        module.forward(tf.zeros(size))
    tf.saved_model.save(module, str(tmp_path / "model"))
    text = refusal(tmp_path / "model", tmp_path / "model.onnx", "forward")
    assert text.startswith("expected a function with one input signature, received 'forward'")


def test_a_function_without_results_is_refused(tmp_path):
    folder = saved_function(tmp_path / "model", lambda x: None, tf.TensorSpec((2,), tf.float32, name="x"))
    assert refusal(folder, tmp_path / "model.onnx", "forward") == (
        "'forward': expected a function with results, received one without. Let it return tensors."
    )


def test_a_missing_model_is_refused(tmp_path):
    text = refusal(tmp_path, tmp_path / "model.onnx")
    assert text.startswith(f"expected a directory with saved_model.pb, received '{tmp_path}'. Save the model with")


def test_a_file_is_not_overwritten(cnn_folder, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    assert refusal(cnn_folder, path) == (
        f"output: expected a new file, received '{path}', which exists. Remove it, or name another."
    )
    assert path.read_text() == "mine"


def test_a_missing_folder_is_refused(cnn_folder, tmp_path):
    path = tmp_path / "missing" / "model.onnx"
    assert refusal(cnn_folder, path) == (
        f"output: expected a file in a folder that exists, received '{path}'. Make '{path.parent}' first."
    )


def test_a_newer_opset_is_refused(cnn_folder, tmp_path):
    assert refusal(cnn_folder, tmp_path / "model.onnx", opset=19) == (
        "opset: expected at most 18, received 19. tf2onnx knows no newer one."
    )


@pytest.mark.parametrize("package", ["tf2onnx", "onnx", "onnxruntime"])
def test_a_missing_package_is_named(package, cnn_folder, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    assert refusal(cnn_folder, tmp_path / "model.onnx") == (
        f"exporting to ONNX needs {package}, which is not installed. Run `pip install graphswap[onnx]`."
    )


def test_ops_that_onnx_lacks_are_named(tmp_path):
    def forward(x):
        return tf.math.lgamma(x) + tf.math.bessel_i0(x) + tf.exp(x)

    folder = saved_function(tmp_path / "model", forward, tf.TensorSpec((2,), tf.float32))
    assert refusal(folder, tmp_path / "model.onnx", "forward") == (
        "'forward': expected ops that ONNX has, received BesselI0, Lgamma. Nothing was written. "
        "Leave these ops out of the function that is exported."
    )


def test_a_graph_that_computes_something_else_is_refused(tmp_path):
    folder = saved_function(
        tmp_path / "model", lambda x: x + tf.random.uniform((2,)), tf.TensorSpec((2,), tf.float32, name="x")
    )
    text = refusal(folder, tmp_path / "model.onnx", "forward")
    assert text.startswith(
        "'forward': expected onnxruntime's results to differ from TensorFlow's by at most 1e-05 of the largest value, "
    )
    assert text.endswith(
        "Nothing was written. A function that draws random numbers can't be exported; if it draws none, try other "
        "arguments=... or another opset=..."
    )


def test_arguments_that_do_not_suit_the_function_are_refused(tmp_path):
    spec = tf.TensorSpec((None,), tf.int32, name="indices")
    table = tf.range(10.0)
    folder = saved_function(tmp_path / "model", lambda indices: tf.gather(table, indices + 20), spec)
    text = refusal(folder, tmp_path / "model.onnx", "forward")
    assert text.startswith(
        "'forward': expected arguments that TensorFlow can run it on, received some that it can't: indices[0] = "
    )
    assert text.endswith("Give others as arguments=...")


def test_arguments_that_can_not_be_drawn_are_refused(tmp_path):
    spec = tf.TensorSpec((2,), tf.string, name="texts")
    folder = saved_function(tmp_path / "model", tf.strings.length, spec)
    assert refusal(folder, tmp_path / "model.onnx", "forward") == (
        "'forward': expected arguments of known rank that are floats, integers or booleans, received 'texts': string "
        "(2,). Give arguments=... to try the file on."
    )


@pytest.mark.parametrize(
    ("who", "module", "name"),
    [
        ("tf2onnx", tf2onnx.tfonnx, "process_tf_graph"),
        ("onnx.checker", onnx.checker, "check_model"),
        ("onnxruntime", onnxruntime, "InferenceSession"),
    ],
)
def test_what_a_tool_refuses_is_not_written(who, module, name, cnn_folder, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise onnx.checker.ValidationError("no kernel for this.\nand more")

    monkeypatch.setattr(module, name, refuse)
    assert refusal(cnn_folder, tmp_path / "model.onnx") == (
        f"'serving_default': expected a function that {who} takes, received one of which it says: no kernel for this. "
        "Nothing was written. Try another opset=..., or export a part of the model."
    )


def test_variables_that_no_file_holds_are_refused(cnn_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_MOST_BYTES", 1000)
    text = refusal(cnn_folder, tmp_path / "model.onnx")
    assert text.startswith("'serving_default': expected variables of at most 1000 bytes, received ")


def test_a_full_disk_leaves_no_part_of_the_file(cnn_folder, tmp_path, monkeypatch):
    def write_half(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", write_half)
    assert "No space left on device" in refusal(cnn_folder, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("received", "expected", "difference"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0, 1e-7], [0.0, 0.0], 1e-7),
        ([np.inf, np.nan, 3.0], [np.inf, np.nan, 3.0], 0.0),
        ([np.inf, 3.0], [np.inf, 4.0], 0.25),
        ([np.nan, 3.0], [2.0, 3.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
        ([], [], 0.0),
        ([True, False], [True, True], 1.0),
    ],
)
def test_differences_are_shares_of_the_largest_value(received, expected, difference):
    assert onnx_export._difference(received, expected) == difference
