"""What a killed training leaves is the state of a completed step, and only that is restored."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import emulated
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import graphswap
from graphswap import far_memory, model_state, state_directory, tiers
from graphswap.host_variable import adopt
from graphswap.state_directory import StateError
from graphswap.tiers import SwapSpaceError

SIZE = 160  # its square of floats is large enough to leave the device
X = np.random.default_rng(0).normal(size=(32, SIZE)).astype("float32")


def make_variables():
    """Two large variables and two small ones."""
    rng = np.random.default_rng(0)
    large = [tf.Variable(rng.normal(size=(SIZE, SIZE)).astype("float32"), name=f"large{i}") for i in range(2)]
    return [*large, tf.Variable(3, dtype=tf.int64, name="count"), tf.Variable([1.0, float("nan")], name="small")]


def values(variables):
    return [variable.numpy().tobytes() for variable in variables]


def committed(directory, tier="disk"):
    """The variables after they were committed, the first of them in a tier."""
    variables, far = make_variables(), tiers.Tiers(directory)
    adopt(variables[0]).move(tier, far)
    model_state.commit(model_state.named_variables(variables), far)
    return variables, far


def last(far):
    manifest = far.state_directory().manifest
    assert manifest is not None
    return manifest


def make_model(width=SIZE, directory=None, optimizer="adam"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((SIZE,)), layers.Dense(width, "relu"), layers.Dropout(0.2), layers.Dense(SIZE)]
    )
    options = directory and graphswap.Options("600KB", swap_to=directory, planning_seconds=0.5)
    model.compile(optimizer, "mse", **({"graphswap": options} if options else {}))
    return model


# --- killed -----------------------------------------------------------------------------------------------------


def test_fifty_kills_each_leave_the_state_of_a_completed_step(tmp_path):
    script = pathlib.Path(__file__).with_name("killed_trainings.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    directory = tmp_path / "far"
    directory.mkdir()
    command = [sys.executable, script, directory, "50", "3000"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    lives = json.loads(done.stdout)
    assert len(lives) == 50
    # After a kill there is the last step that was reported, or the one after it, whose report was under way.
    assert [found for reported, found in lives if found - reported not in (0, 1)] == []
    assert lives[-1][1] >= 50
    # No life has left more than the files of two states; what the last private directory held is gone.
    assert len(list((directory / "state").iterdir())) < 20
    assert len(list(directory.glob("graphswap-*"))) <= 1


# --- committed and restored -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_all_variables_come_back_from_any_tier(tier, tmp_path):
    variables, far = committed(tmp_path, tier)
    expected = values(variables)
    others = [tf.Variable(tf.zeros_like(variable), name=variable.name[:-2]) for variable in variables]
    assert graphswap.restore(others, tmp_path) == 1
    assert values(others) == expected
    variables[2].assign_add(1)
    model_state.commit(model_state.named_variables(variables), far)
    assert graphswap.restore(others, tmp_path) == 2
    assert values(others) == values(variables)


@pytest.mark.parametrize("dtype", ["bfloat16", "bool", "int64"])
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_values_of_every_type_come_back_to_any_tier(dtype, tier, tmp_path):
    numbers = tf.random.stateless_uniform((5, 1 << 16), (0, 0), -9, 9, tf.int32)
    variable, far = tf.Variable(tf.cast(numbers, dtype), name="v"), tiers.Tiers(tmp_path)
    adopt(variable).move(tier, far)
    model_state.commit({"v:0": variable}, far)
    for goal in ("device", "host", "disk"):
        other = adopt(tf.Variable(tf.zeros_like(variable), name="v"))
        other.move(goal)
        graphswap.restore([other], tmp_path)
        assert values([other]) == values([variable])
        assert other.tier == goal


def test_what_is_stored_beside_a_state_leaves_it_as_it_is(tmp_path):
    """In a function that is not planned, several times, and by planned steps whose state can't be written."""
    variables, far = committed(tmp_path)
    expected = values(variables)
    tf.function(lambda: [variables[0].assign_add(tf.ones((SIZE, SIZE))) for _ in range(3)] and None)()
    others = [tf.Variable(tf.zeros_like(variable), name=variable.name[:-2]) for variable in variables]
    graphswap.restore(others, tmp_path)
    assert values(others) == expected
    first = adopt(variables[0])
    model_state.commit(model_state.named_variables(variables), far)
    expected = values(variables)
    stored = tf.function(lambda value: far_memory.store(value, *first.store_handles)[0] and None, autograph=False)
    for number in range(3):
        first.reserve(is_updated=True)
        stored(tf.fill((SIZE, SIZE), float(number)))
        assert first.numpy()[0, 0] == number
        far.clean()
        graphswap.restore(others, tmp_path)
        assert values(others) == expected
    model_state.commit(model_state.named_variables(variables), far)
    graphswap.restore(others, tmp_path)
    assert values(others) == values(variables)


def test_a_file_that_was_removed_is_written_again(tmp_path):
    variables, far = committed(tmp_path)
    (tmp_path / "state" / variables[0].file().name).unlink()
    model_state.commit(model_state.named_variables(variables), far)
    others = make_variables()
    others[0].assign(tf.zeros((SIZE, SIZE)))
    assert graphswap.restore(others, tmp_path) == 2
    assert values(others) == values(variables)


def test_what_has_not_changed_is_not_written_again(tmp_path):
    variables, far = committed(tmp_path)
    named = model_state.named_variables(variables)
    first = last(far)
    variables[0].assign_add(tf.ones_like(variables[0]))
    model_state.commit(named, far)
    second = last(far)
    assert second.variables["large1:0"] == first.variables["large1:0"]
    assert second.variables["large0:0"] != first.variables["large0:0"]


def test_files_of_the_last_state_stay_until_the_next(tmp_path):
    variables, far = committed(tmp_path)
    expected, files = values(variables), last(far).checksums.keys()
    variables[0].assign(tf.zeros_like(variables[0]))
    far.clean()
    present = {file.name for file in (tmp_path / "state").iterdir()}
    assert present >= files
    assert variables[0].file().name in present
    graphswap.restore(variables, tmp_path)
    assert values(variables) == expected
    model_state.commit(model_state.named_variables(variables), far)
    far.clean()
    present = {file.name for file in (tmp_path / "state").iterdir()}
    assert present == last(far).checksums.keys() | {"lock", "manifest.json"}


def test_variables_of_equal_names_are_numbered():
    first, second = tf.Variable(1.0, name="v"), tf.Variable(2.0, name="v")
    assert list(model_state.named_variables([first, second])) == ["v:0", "v:0#2"]


def train(directory, epochs, resumes):
    """Trains in a process of its own. Returns the steps that were done before, and the bits of all variables."""
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(512, "relu"), layers.Dense(512, "relu"), layers.Dropout(0.2)]
    model = keras.Sequential([keras.Input((512,)), *hidden, layers.Dense(512)])
    options = graphswap.Options("5MiB", swap_to=directory, host_memory="4MiB") if directory else None
    model.compile("adam", "mse", **({"graphswap": options} if options else {}))
    x = np.random.default_rng(0).normal(size=(16, 512)).astype("float32")
    steps = graphswap.restore(model, directory) if resumes else 0
    model.fit(x, x, batch_size=4, epochs=epochs, shuffle=False, verbose=0)
    variables = [*model.variables, *model.optimizer.variables]
    tiers = sorted({getattr(variable.value, "tier", "device") for variable in variables})
    return steps, tiers, [hashlib.sha256(bits).hexdigest() for bits in values(variables)]


def test_a_keras_training_goes_on_in_another_process_as_if_it_had_not_ended(tmp_path):
    _, _, expected = emulated.call(64 << 20, __file__, "train", "", 2, False)
    tiers = ["device", "disk", "host"]
    assert emulated.call(64 << 20, __file__, "train", str(tmp_path), 1, False)[:2] == [0, tiers]
    assert emulated.call(64 << 20, __file__, "train", str(tmp_path), 1, True) == [4, tiers, expected]


def test_a_model_may_be_compiled_anew(tmp_path):
    model = make_model(directory=tmp_path)
    model.fit(X, X, batch_size=8, verbose=0)
    assert any(getattr(variable.value, "tier", "") == "disk" for variable in model.optimizer.variables)
    model.compile("sgd", "mse", graphswap=graphswap.Options("280KB", swap_to=tmp_path, planning_seconds=0.5))
    model.fit(X, X, batch_size=8, verbose=0)
    other = make_model(optimizer="sgd")
    assert graphswap.restore(other, tmp_path) == 8
    assert values(other.variables) == values(model.variables)


def test_two_trainings_need_two_directories(tmp_path):
    kept = committed(tmp_path)
    with pytest.raises(StateError, match=f"one training that keeps its state in '{tmp_path}/state', received a second"):
        committed(tmp_path)
    del kept
    committed(tmp_path)


# --- refused ----------------------------------------------------------------------------------------------------


def refused(model, directory, message):
    variables = model if isinstance(model, list) else [*model.variables, *model.optimizer.variables]
    before = values(variables)
    with pytest.raises(StateError, match=message):
        graphswap.restore(model, directory)
    assert values(variables) == before


def test_damaged_files_are_refused_whichever_it_is(tmp_path):
    _, far = committed(tmp_path)
    for file in sorted(last(far).checksums):
        path = tmp_path / "state" / file
        bits = path.read_bytes()
        others = make_variables()
        path.write_bytes(bits[:-1] + bytes([bits[-1] ^ 1]))
        refused(others, tmp_path, f"expected bytes of checksum .* in '.*{file}', received .* use a copy")
        path.write_bytes(bits[: len(bits) // 2])
        refused(others, tmp_path, "the state is damaged")
        path.unlink()
        refused(others, tmp_path, f"expected a file of values '.*{file}', received .*No such file")
        path.write_bytes(bits)
    assert graphswap.restore(make_variables(), tmp_path) == 1


def test_the_state_of_another_model_is_refused(tmp_path):
    committed(tmp_path)
    other = make_variables()
    other[1] = tf.Variable(tf.zeros((SIZE, SIZE + 1)), name="large1")
    refused(other, tmp_path, r"'large1:0': expected a value of float32\[160,161\], received one of float32\[160,160\]")
    other[1] = tf.Variable(tf.zeros((SIZE, SIZE), tf.float16), name="large1")
    refused(other, tmp_path, r"expected a value of float16\[160,160\], received one of float32")
    other[1] = tf.Variable(0.0, name="more")
    refused(other, tmp_path, "state of 4 variables, received that of 4 .*; not in it: more:0; only in it: large1:0.")
    refused(other[:1], tmp_path, "state of 1 variables, received that of 4 .*only in it: count:0, large1:0, small:0.")


def test_a_model_that_is_not_built_or_compiled_is_refused(tmp_path):
    committed(tmp_path)
    unbuilt = keras.Sequential([layers.Dense(2)], name="dense")
    for model in (unbuilt, keras.Sequential([keras.Input((2,)), layers.Dense(2)], name="dense")):
        with pytest.raises(StateError, match="expected a model that is built and compiled, received 'dense'"):
            graphswap.restore(model, tmp_path)


def test_a_directory_without_a_state_is_refused(tmp_path):
    refused(make_variables(), tmp_path, "expected the state of a training in '.*/state', received No such file")


def test_a_state_that_was_not_restored_is_not_trained_over(tmp_path, monkeypatch):
    committed(tmp_path)
    monkeypatch.setattr(state_directory, "_ours", set())  # as in another process
    variables = make_variables()
    before = values(variables)
    with pytest.raises(StateError, match="which holds that of step 1. Go on from it with graphswap.restore"):
        adopt(variables[0]).move("disk", tiers.Tiers(tmp_path))
    assert values(variables) == before
    graphswap.restore(variables, tmp_path)
    adopt(variables[0]).move("disk", tiers.Tiers(tmp_path))


def test_a_state_that_cant_be_written_leaves_the_last_one(tmp_path):
    variables, far = committed(tmp_path)
    expected = values(variables)
    variables[3].assign_add([1.0, 1.0])
    (tmp_path / "state" / "manifest.json.new").symlink_to("/dev/full")
    with pytest.raises(SwapSpaceError, match="swapping to '.*/state' failed: .*No space left.* Free space there"):
        model_state.commit(model_state.named_variables(variables), far)
    others = make_variables()
    assert graphswap.restore(others, tmp_path) == 1
    assert values(others) == expected


def test_a_copy_of_a_state_can_be_restored(tmp_path):
    (tmp_path / "first").mkdir()
    variables, _ = committed(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    (tmp_path / "second" / "state" / "lock").unlink()
    others = make_variables()
    graphswap.restore(others, tmp_path / "second")
    assert values(others) == values(variables)


if __name__ == "__main__":
    emulated.main(globals())
