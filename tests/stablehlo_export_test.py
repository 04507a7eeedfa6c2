"""What can't become a step for PJRT is refused in one line, and what can is what TensorFlow computes."""

import importlib.util

import pytest

if not importlib.util.find_spec("jax"):
    pytest.skip("needs graphswap[pjrt]", allow_module_level=True)

import numpy as np
import tensorflow as tf

from graphswap import artefact, graphdef, offline, pjrt, stablehlo_export
from graphswap.plan import Plan, PlanError, Swap


@pytest.fixture
def weights():
    return tf.Variable(np.arange(4, dtype="float32"), name="weights")


def exported(function, *specs, plan=None):
    traced = offline.trace("step", function, specs)
    return stablehlo_export.export(traced.func_graph, traced.graph, plan(traced.graph) if plan else Plan())


def refusal(function, *specs, **plan):
    with pytest.raises((graphdef.UnsupportedGraphError, PlanError)) as error:
        exported(function, *specs, **plan)
    assert "\n" not in str(error.value)
    return str(error.value)


def loaded(step, tmp_path):
    artefact.write(step, tmp_path / "step")
    return pjrt.load(tmp_path / "step")


FOUR = tf.TensorSpec((4,), tf.float32, name="x")


def test_the_manifest_says_what_is_what(weights, tmp_path):
    table, count = tf.constant([1.0, 2.0, 3.0, 4.0]), tf.Variable(0, dtype=tf.int64, name="count")
    rate = tf.Variable(0.5, name="rate")

    def step(x):
        weights.assign_sub(rate * x * table)
        count.assign_add(1)
        return {"sum": tf.reduce_sum(x), "first": x[0]}

    made = exported(step, FOUR)
    manifest = made.manifest
    assert [(entry.name, str(entry)) for entry in manifest.inputs] == [("x", "float32[4]")]
    assert {entry.name: (str(entry), entry.result, entry.is_variable) for entry in manifest.state} == {
        "rate": ("float32[]", None, True),
        "capture_1": ("float32[4]", None, False),
        "weights": ("float32[4]", 2, True),
        "count": ("int64[]", 3, True),
    }
    assert [str(entry) for entry in manifest.results] == ["float32[]", "float32[]"]
    assert manifest.plan is None and manifest.swapped == (0, 0)
    assert set(manifest.versions) == {"jax"}
    run = loaded(made, tmp_path)
    first, total = run(np.full(4, 2.0, "float32"))
    assert (float(first), float(total)) == (2.0, 8.0)
    assert list(run.state["weights"]) == [-1.0, -1.0, -1.0, -1.0]
    assert (run.state["count"], run.state["count"].dtype) == (1, "int64")
    run.restore(tf.Module(), _Owner(weights, count, rate))
    assert list(weights.numpy()) == [-1.0, -1.0, -1.0, -1.0] and count.numpy() == 1


class _Owner:
    def __init__(self, *variables):
        self.variables = variables


def test_an_op_without_a_kernel(weights):
    def step(x):
        image, kernel = tf.reshape(x, (1, 2, 2, 1)), tf.zeros((1, 1, 1))
        weights.assign_add(tf.reshape(tf.nn.erosion2d(image, kernel, [1] * 4, "SAME", "NHWC", [1] * 4), (4,)))

    assert refusal(step, FOUR) == (
        "'step': expected ops that XLA has kernels for, received 'Dilation2D' at node 'erosion2d'. "
        "Leave it out of the step, or do its work before the step, such as in the dataset."
    )


def test_strings(weights):
    spec = tf.TensorSpec((4,), tf.string, name="words")
    advice = "which no PJRT device holds. Turn them into numbers before the step, such as in the dataset."
    assert refusal(lambda words: tf.strings.length(words), spec) == (
        f"'step': expected arrays of numbers, received strings at node 'words' (Placeholder), {advice}"
    )

    def step(x):
        tf.print(x)
        return weights.assign_add(x)

    assert refusal(step, FOUR) == (
        f"'step': expected arrays of numbers, received strings at node 'StringFormat' (StringFormat), {advice}"
    )


def test_sizes_that_hang_on_values(weights):
    def step(x):
        values, _ = tf.unique(x)
        return weights.assign_add(tf.ones(4) * tf.reduce_sum(values))

    assert refusal(step, FOUR) == (
        "'step': expected sizes that do not hang on values, received one that does at node 'Unique' "
        "(set-dimension-size). Pad it to a fixed size."
    )


def test_open_sizes():
    spec = tf.TensorSpec((None,), tf.float32, name="x")
    assert "expected known shapes in " in refusal(lambda x: tf.reduce_sum(x), spec)


def test_a_loop_whose_trips_nobody_can_count_runs_and_keeps_its_state(weights, tmp_path):
    def step(x):
        def body(y):
            weights.assign_add(y)
            return (y + 1.0,)

        return tf.while_loop(lambda y: tf.reduce_sum(y) < 20.0, body, (x,))[0]

    run = loaded(exported(step, FOUR), tmp_path)
    (result,) = run(np.zeros(4, "float32"))
    expected = tf.function(step)(np.zeros(4, "float32"))
    assert np.array_equal(result, expected)
    assert np.array_equal(run.state["weights"], weights)


def test_the_gradient_of_such_a_loop(weights):
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            (y,) = tf.while_loop(lambda y: tf.reduce_sum(y) < 20.0, lambda y: (y * weights + 1.0,), (x,))
            loss = tf.reduce_sum(y**2)
        return weights.assign_sub(tape.gradient(loss, x))

    message = refusal(step, FOUR)
    assert message.startswith("'step': expected loops whose trips XLA can count, received one at node '")
    assert message.endswith(
        "' that piles up a list of unknown length. Give tf.while_loop maximum_iterations=..., or use "
        "keras.layers.RNN(unroll=True)."
    )


def test_captures_that_are_no_arrays(weights):
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(tf.constant([1, 2]), tf.constant([3, 4])), default_value=0
    )
    spec = tf.TensorSpec((4,), tf.int32, name="x")
    assert refusal(lambda x: table.lookup(x), spec).endswith(
        "': expected variables and arrays among what it captures, received number 0, a resource. "
        "Leave tables, datasets and strings out of the step."
    )


def test_a_plan_that_swaps_to_disk(weights):
    def step(x):
        return weights.assign_add(tf.tanh(x) * x)

    def plan(graph):
        tanh = next(node.name for node in graph.nodes if node.op == "Tanh")
        after, before = list(graph.position)[graph.position[tanh] :][:2]
        return Plan(decisions=(Swap(tanh, after, before, after, before, tier="disk"),))

    assert refusal(step, FOUR, plan=plan) == (
        "'step': expected a plan that swaps to the host, received one that swaps 'Tanh' to disk, "
        "which PJRT does not know. Plan again with swap_to='host'."
    )


def test_a_plan_for_another_step(weights):
    message = refusal(lambda x: weights.assign_add(x), FOUR, plan=lambda graph: Plan(fingerprint="another"))
    assert message.startswith("this plan was made for the graph with fingerprint another, but graph 'step' has ")
