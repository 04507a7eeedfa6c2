"""A saved step is rewritten without its model's code, and trains with TensorFlow alone: same bits, less memory."""

import pytest
import saved_steps
import tensorflow as tf

from graphswap import loaded_step, offline, saved_model
from graphswap.cost_model import MEMORY_VARIABLE
from graphswap.saved_model import SavedModelError


@pytest.mark.parametrize("name", saved_steps.SHARES)
def test_a_rewritten_step_trains_with_tensorflow_alone(name, tmp_path):
    done = saved_steps.through(name, tmp_path)
    plain, rewritten, trained = done["plain"], done["rewritten"], done["trained"]
    assert not rewritten["has_keras"]
    assert (trained["losses"], trained["variables"]) == (plain["losses"], plain["variables"])
    assert trained["peak_bytes"] <= done["budget"]
    one, other = done["exported"]
    assert one["nodes"] == other["nodes"] and max(one["difference"], other["difference"]) <= 1e-6
    if saved_steps.SHARES[name] < 1:
        assert rewritten["decisions"]
    assert rewritten["parts_bytes"] == rewritten["peak_bytes"]
    # The parts are those of one step, to the byte. TensorFlow runs the plain step in an order that wanders, and its
    # peak with it: steps of the U-Net took 256 to 295 MiB. The highest of eight is compared with that of eight others.
    assert rewritten["peak_bytes"] == pytest.approx(plain["peak_bytes"], rel=0.08)
    saved, output = tmp_path / name, tmp_path / "rewritten"
    same = [path.relative_to(saved) for path in (saved / "variables").iterdir()]
    assert same
    assert all((output / path).read_bytes() == (saved / path).read_bytes() for path in same)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small step as a SavedModel."""
    module = tf.Module()
    module.weight = tf.Variable(tf.ones((8, 8)))

    @tf.function(input_signature=[tf.TensorSpec((None, 8), tf.float32)])
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(x @ module.weight))
        module.weight.assign_sub(0.1 * tape.gradient(loss, module.weight))
        return {"loss": loss}

    @tf.function(input_signature=[tf.TensorSpec((None, 8), tf.float32, name="rows")])
    def forward(x):
        return x @ module.weight

    @tf.function
    def often(x):
        return x + module.weight[0, 0]

    module.step, module.forward, module.often = step, forward, often
    for value in (tf.ones(()), tf.ones((2,))):
        often(value)
    directory = tmp_path_factory.mktemp("saved") / "model"
    tf.saved_model.save(module, str(directory), signatures={"serving_default": forward})
    return directory


def test_functions_and_signatures_are_found(saved):
    step = saved_model.load(saved, "step")
    assert step.update() == "AssignSubVariableOp"
    assert [spec.shape.as_list() for spec in step.arguments] == [[None, 8]]
    assert saved_model.load(saved, "forward").update() is None
    signature = saved_model.load(saved, "serving_default")
    assert signature.update() is None
    assert [spec.name for spec in signature.arguments] == ["rows"]


def test_a_copy_is_what_was_saved_but_for_the_function(saved, tmp_path):
    function = saved_model.load(saved, "step")
    step = offline.from_saved_model(function, batch_size=4)
    assert [node.name for node in step.graph.nodes if node.op == "MatMul"] == ["matmul", "gradient_tape/matmul/MatMul"]
    planner = offline.Planner(step, offline.Options("auto", swap_to="host"))
    saved_model.write(function, planner.fitted()[1], tmp_path / "copy")
    rows = tf.reshape(tf.range(32.0), (4, 8)) / 32
    losses = []
    for directory in (saved, tmp_path / "copy"):
        loaded = tf.saved_model.load(str(directory))
        losses.append([float(loaded.step(rows)["loss"]) for _ in range(3)])
        assert loaded.signatures["serving_default"](rows=rows)["output_0"].shape == (4, 8)
    assert losses[0] == losses[1]
    with pytest.raises(tf.errors.InvalidArgumentError, match="EnsureShape"):  # before anything is updated
        loaded.step(tf.ones((5, 8)))
    assert float(loaded.step(rows)["loss"]) < losses[1][-1]
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in saved.iterdir()}


def refusal(call, *arguments):
    with pytest.raises(SavedModelError) as error:
        call(*arguments)
    return str(error.value)


def test_what_is_no_saved_model_is_refused(saved, tmp_path):
    assert refusal(saved_model.load, tmp_path, "step") == (
        f"expected a directory with saved_model.pb, received '{tmp_path}'. "
        "Save the model with tf.saved_model.save, and name that directory."
    )
    frozen = tmp_path / "frozen.pb"
    frozen.write_bytes(b"")
    assert refusal(saved_model.load, frozen, "step") == (
        f"expected a directory with a SavedModel, received the file '{frozen}'. A frozen graph has no variables that a "
        "step could train: save the model with tf.saved_model.save."
    )
    assert refusal(saved_model.load, tmp_path, "step").startswith(
        f"expected a directory with saved_model.pb, received '{tmp_path}'. "
        "There is frozen.pb, which may be a frozen graph"
    )
    (tmp_path / "saved_model.pb").write_bytes(b"not a message")
    assert "which is damaged" in refusal(saved_model.load, tmp_path, "step")
    (tmp_path / "saved_model.pb").write_bytes(b"")
    assert "expected a SavedModel of TensorFlow 2" in refusal(saved_model.load, tmp_path, "step")
    (tmp_path / "saved_model.pb").write_bytes((saved / "saved_model.pb").read_bytes())
    assert "expected a SavedModel that TensorFlow can load" in refusal(saved_model.load, tmp_path, "step")


def test_a_function_that_is_not_there_or_there_twice_is_refused(saved):
    assert refusal(saved_model.load, saved, "stop") == (
        f"expected a function of '{saved}', received 'stop'. It has forward, often, serving_default, step. "
        "Name one of these, or save the function as an attribute: a tf.function with an input_signature."
    )
    assert refusal(saved_model.load, saved, "often") == (
        f"expected a function with one input signature, received 'often' of '{saved}', which was traced 2 times. "
        "Save it with tf.function(input_signature=...)."
    )


def test_open_sizes_are_refused(saved):
    assert refusal(offline.from_saved_model, saved_model.load(saved, "step")) == (
        "expected arguments of known sizes, received (None, 8) for 'x'. Give --batch_size=N."
    )


def test_a_plan_that_takes_more_than_it_says_is_tightened(saved, monkeypatch):
    step = offline.from_saved_model(saved_model.load(saved, "step"), batch_size=4)
    planner = offline.Planner(step, offline.Options("1MiB", swap_to="host"))
    asked, peaks = [], [3 << 20, 2 << 20, 1 << 19]
    plan = offline.Planner.plan
    monkeypatch.setattr(offline.Planner, "plan", lambda self: asked.append(self.options.memory_budget) or plan(self))
    monkeypatch.setattr(offline.Planner, "_measured_peak", lambda self, function: peaks.pop(0))
    assert planner.fitted()[2] == 1 << 19
    assert len(asked) == 3
    assert asked[0] > asked[1] > asked[2]


def test_a_copy_that_fails_in_its_own_process_is_not_written(saved, monkeypatch):
    step = offline.from_saved_model(saved_model.load(saved, "step"), batch_size=4)
    planner = offline.Planner(step, offline.Options("1MiB", swap_to="host"))
    planned = planner.plan()
    monkeypatch.setenv(MEMORY_VARIABLE, str(1 << 20))
    monkeypatch.setattr(offline.Planner, "plan", lambda self: planned)

    def fail(directory, function, shapes, steps):
        assert (function, shapes) == ("step", [[4, 8]])
        raise loaded_step.LoadedStepError("no such op")

    monkeypatch.setattr(loaded_step, "peak", fail)
    assert refusal(planner.fitted) == (
        f"expected a copy of '{saved}' that runs in a process of its own, received one that failed: no such op. "
        "Nothing was written."
    )
    monkeypatch.setattr(loaded_step, "peak", lambda *_: None)  # out of memory
    assert refusal(planner.fitted) == (
        "expected a plan whose steps keep 1.0MiB, received plans whose steps took 1.0MiB and more, as the layout of "
        "memory wanders. Raise the budget."
    )


def test_steps_that_stay_above_the_budget_are_refused(saved, monkeypatch):
    step = offline.from_saved_model(saved_model.load(saved, "step"), batch_size=4)
    planner = offline.Planner(step, offline.Options("1MiB", swap_to="host"))
    monkeypatch.setattr(offline.Planner, "_measured_peak", lambda self, function: 5 << 20)
    assert refusal(planner.fitted) == (
        "expected a plan whose steps keep 1.0MiB, received plans whose steps took 5.0MiB and more, as the layout of "
        "memory wanders. Raise the budget."
    )
