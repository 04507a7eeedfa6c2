"""A variable in a far tier is the variable that it was, in everything that TensorFlow and Keras do with one."""

import contextlib
import gc
import itertools
import os
import pathlib
import resource
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
from graphswap import far_memory, tiers
from graphswap.host_variable import HostVariable, adopt
from graphswap.tiers import SwapSpaceError

TIERS = pytest.mark.parametrize("tier", ["host", "disk"])
X = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(6, 3)).astype("float32")


def moved(value, tier, directory=None):
    variable = adopt(tf.Variable(value))
    variable.move(tier, None if directory is None else tiers.Tiers(directory))
    return variable


def bits(variables):
    return [np.asarray(variable.numpy()).tobytes() for variable in variables]


def make_model(tier="device", seed=0, optimizer="adam"):
    """A trained model, all its variables and its optimizer's in a tier."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((8,)), layers.Dense(7, "relu"), layers.Dense(3)])
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    if tier != "device":
        for variable in all_variables(model):
            adopt(variable).move(tier)
    model.fit(X, Y, batch_size=2, shuffle=False, verbose=0)
    return model


def all_variables(model):
    return [variable.value for variable in (*model.variables, *model.optimizer.variables)]


# --- the value --------------------------------------------------------------------------------------------------


@TIERS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool", "complex64"])
def test_every_type_is_kept(tier, dtype):
    value = tf.cast(tf.reshape(tf.range(-6, 6), (3, 4)), dtype)
    variable = moved(value, tier)
    assert (variable.tier, variable.dtype, variable.shape) == (tier, value.dtype, value.shape)
    np.testing.assert_array_equal(variable.numpy(), value.numpy())


@TIERS
def test_there_and_back_between_all_tiers(tier):
    value = tf.random.stateless_normal((5, 1 << 20), (0, 0))
    variable = adopt(tf.Variable(value))
    for where in (tier, "device", "disk", "host", "disk", tier, "device"):
        variable.move(where)
        assert variable.tier == where
        assert bool(tf.reduce_all(variable == value))
        assert (tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=tf.float32).shape == (0,)) == (
            where != "device"
        )
    assert variable.file() is None


def test_a_variable_beyond_2_gib_is_kept():
    nbytes = (2 << 30) + (64 << 20)
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") < 3 * nbytes:
        pytest.skip("too little memory")
    variable = adopt(tf.Variable(tf.zeros((nbytes,), tf.uint8)))
    variable[-1].assign(7)
    variable.move("disk")
    variable.move("device")
    value = variable.numpy()
    assert (np.count_nonzero(value), value[-1]) == (1, 7)


@TIERS
def test_it_is_read_and_assigned(tier):
    variable = moved([[1.0, 2.0], [3.0, 4.0]], tier)
    assert variable.assign(variable * 2) is variable
    variable.assign_add(tf.ones((2, 2)))
    variable.assign_sub([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_array_equal(variable.numpy(), [[2, 5], [7, 8]])
    np.testing.assert_array_equal(variable.value(), variable.read_value())
    np.testing.assert_array_equal(tf.gather(variable, [1]), [[7, 8]])
    np.testing.assert_array_equal(variable.sparse_read([0]), [[2, 5]])
    np.testing.assert_array_equal(variable.gather_nd([[1, 0]]), [7])
    np.testing.assert_array_equal(variable[1], [7, 8])
    # Ops that read a variable by themselves.
    np.testing.assert_array_equal(tf.zeros_like(variable), np.zeros((2, 2)))
    np.testing.assert_array_equal(tf.raw_ops.Square(x=variable), [[4, 25], [49, 64]])
    np.testing.assert_array_equal(tf.raw_ops.AddN(inputs=[variable, variable]), [[4, 10], [14, 16]])


SCATTERS = {
    **{f"scatter_{kind}": ([1], [[0.5, 8.0]]) for kind in "sub add max min mul div update".split()},
    **{f"scatter_nd_{kind}": ([[1, 0]], [0.5]) for kind in "sub add max min update".split()},
}


@TIERS
@pytest.mark.parametrize("method", SCATTERS)
def test_it_is_scattered_into(tier, method):
    indices, updates = SCATTERS[method]
    plain, variable = tf.Variable([[1.0, 2.0], [3.0, 4.0]]), moved([[1.0, 2.0], [3.0, 4.0]], tier)
    for each in (plain, variable):
        argument = (indices, updates) if "_nd_" in method else (tf.IndexedSlices(tf.constant(updates), indices),)
        getattr(each, method)(*argument)
    np.testing.assert_array_equal(variable.numpy(), plain.numpy())
    assert variable.tier == tier


@TIERS
def test_a_value_of_another_shape_is_refused(tier):
    variable = moved([[1.0, 2.0]], tier)
    with pytest.raises(ValueError, match=r"expected a value of shape \(1, 2\), received one of \(2,\)\. Assign one"):
        variable.assign([1.0, 2.0])
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        tf.function(lambda value: variable.assign(value), input_signature=[tf.TensorSpec(None)])(tf.ones((2,)))
    np.testing.assert_array_equal(variable.numpy(), [[1, 2]])


def test_a_function_traced_before_a_variable_came_back_is_refused():
    variable = moved([1.0, 2.0], "host")
    doubled = tf.function(lambda: variable.assign(variable * 2.0))
    doubled()
    variable.move("device")
    with pytest.raises(tf.errors.OpError, match="a tensor with 0 values, but the requested shape has 2"):
        doubled()
    with pytest.raises(tf.errors.OpError, match="one that has moved there since. Trace the function anew"):
        assigned = tf.function(lambda: variable.assign(tf.ones((2,))))
        variable.move("host")
        assigned.get_concrete_function()
        variable.move("device")
        assigned()
    np.testing.assert_array_equal(variable.numpy(), [2, 4])


def test_files_go_when_a_variable_moves_to_another_directory(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one, other = tiers.Tiers(tmp_path / "one"), tiers.Tiers(tmp_path / "other")
    variable = moved([1.0, 2.0], "disk")
    variable.reserve(is_updated=True)
    private = variable.file()
    assert private is not None
    for far, directory in ((one, "one"), (other, "other")):
        variable.move("disk", far)
        file = variable.file()
        assert file is not None
        assert file.parent == tmp_path / directory / "state"
        assert len(list(file.parent.iterdir())) == 3  # the lock, the value, and memory for the next one
        np.testing.assert_array_equal(variable.numpy(), [1, 2])
    assert not private.exists()
    assert [file.name for file in (tmp_path / "one" / "state").iterdir()] == ["lock"]


@TIERS
def test_what_was_read_stays_as_it_was(tier):
    variable = moved([1.0, 2.0], tier)
    read, inside = variable.read_value(), tf.function(variable.read_value)()
    variable.reserve(is_updated=True)
    stored = tf.function(lambda value: far_memory.store(value, *variable.store_handles)[0] and None, autograph=False)
    for number in range(3):
        stored(tf.fill((2,), float(number)))
        np.testing.assert_array_equal(variable.numpy(), [number, number])
    np.testing.assert_array_equal(read, [1, 2])
    np.testing.assert_array_equal(inside, [1, 2])


def test_an_array_is_taken_over_as_it_is():
    variable = moved(X, "host")
    array = X * 2
    variable.assign(array)
    array[:] = 0
    np.testing.assert_array_equal(variable.numpy(), X * 2)
    variable.assign(X.astype("float64"))  # of another type
    np.testing.assert_array_equal(variable.numpy(), X)
    with pytest.raises(ValueError, match=r"expected a value of shape \(6, 8\), received one of \(2,\)"):
        variable.assign(np.ones(2, "float32"))


@pytest.mark.parametrize("dtype", ["", "string", "float8_e5m2", "float32"])
def test_what_can_not_leave_the_device_is_refused(dtype):
    with graphswap.host_variables():
        value = 1.0
        if dtype:
            zeros = tf.fill((1 << 17,), "") if dtype == "string" else tf.cast(tf.zeros((1 << 17,)), dtype)
            value = tf.Variable(zeros, shape=tf.TensorShape(None if dtype == "float32" else zeros.shape))
    assert not isinstance(value, HostVariable)
    with pytest.raises(
        TypeError, match=r"(?s)expected a tf.Variable of numbers .*, received .*\. Variables of tf.distri"
    ):
        adopt(value)


# --- functions --------------------------------------------------------------------------------------------------


@TIERS
def test_gradients_are_those_of_a_plain_variable(tier):
    plain, variable, x = tf.Variable(X[:4, :3]), moved(X[:4, :3], tier), tf.constant(X[:, :4])

    def gradients(weight):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.tanh(x @ weight) ** 2) + tf.reduce_sum(weight)
        return loss, tape.gradient(loss, weight)

    nested = tf.function(lambda weight=variable: tf.function(lambda: gradients(weight))())
    expected = gradients(plain)
    for found in (gradients(variable), nested()):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@TIERS
def test_rows_that_are_looked_up_have_gradients(tier):
    plain, variable = tf.Variable(X), moved(X, tier)

    def gradient(table):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.nn.embedding_lookup(table, [1, 1, 2]) ** 2)
        return tf.convert_to_tensor(tape.gradient(loss, table))

    np.testing.assert_array_equal(gradient(variable), gradient(plain))


@TIERS
def test_a_function_sees_each_new_value(tier):
    variable = moved(1.0, tier)

    @tf.function
    def doubled(times):
        for _ in tf.range(times):
            variable.assign(variable * 2.0)
        return variable + 0.0

    assert [float(doubled(n)) for n in (0, 1, 3)] == [1, 2, 16]
    variable.assign(3.0)
    assert float(doubled(1)) == 6
    assert float(tf.function(lambda v: v + 1.0)(variable)) == 7


# --- Keras ------------------------------------------------------------------------------------------------------


@TIERS
def test_keras_trains_evaluates_and_predicts(tier):
    plain, model = make_model(), make_model(tier)
    assert bits(all_variables(model)) == bits(all_variables(plain))
    assert {variable.tier for variable in all_variables(model)} == {tier}
    assert model.evaluate(X, Y, verbose=0) == plain.evaluate(X, Y, verbose=0)
    np.testing.assert_array_equal(model.predict(X, verbose=0), plain.predict(X, verbose=0))
    np.testing.assert_array_equal(model(X), plain(X))


def save_and_load(kind, source, target, path):
    """Returns the model that has the variables of `source` then: `target`, or a new one."""
    if kind == "weights":
        source.save_weights(path / "saved.weights.h5")
        target.load_weights(path / "saved.weights.h5")
    elif kind == "keras":
        source.save(path / "saved.keras")
        return keras.saving.load_model(path / "saved.keras")
    else:
        saved = tf.train.Checkpoint(model=source, optimizer=source.optimizer).write(str(path / "saved"))
        tf.train.Checkpoint(model=target, optimizer=target.optimizer).read(saved).assert_consumed()
    return target


def test_200_round_trips_lose_no_bit(tmp_path):
    models = {tier: make_model(tier) for tier in ("device", "host", "disk")}
    rng = np.random.default_rng(0)
    ways = itertools.product(
        ("weights", "keras", "checkpoint"),
        (("host", "device"), ("device", "host"), ("disk", "device"), ("device", "disk")),
    )
    for kind, (source, target) in itertools.islice(itertools.cycle(ways), 200):
        for variable in all_variables(models[source]):
            if variable.dtype.is_floating:
                variable.assign(rng.normal(size=variable.shape).astype("float32"))
        loaded = save_and_load(kind, models[source], models[target], tmp_path)
        names = slice(None) if kind != "weights" else slice(len(models[source].variables))
        assert bits(all_variables(loaded)[names]) == bits(all_variables(models[source])[names])
        assert all(variable.tier == target for variable in all_variables(models[target]) if target != "device")


@TIERS
def test_saved_models_need_no_graphswap(tier, tmp_path):
    model = make_model(tier)
    tf.saved_model.save(model, str(tmp_path / "saved"))
    model.export(str(tmp_path / "exported"), verbose=False)
    np.save(tmp_path / "x.npy", X)
    code = """
import sys, numpy as np, tensorflow as tf
x = tf.constant(np.load("x.npy"))
exported, saved = map(tf.saved_model.load, ("exported", "saved"))
y = [exported.serve(x), *saved.signatures["serving_default"](x).values()]
assert "graphswap" not in sys.modules
np.save("y.npy", y)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})
    for found in np.load(tmp_path / "y.npy"):
        np.testing.assert_array_equal(found, model(X))


@TIERS
@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
def test_a_checkpoint_of_another_shape_is_refused(tier, kind, tmp_path):
    model = make_model(tier)
    other = keras.Sequential([keras.Input((8,)), layers.Dense(9, "relu"), layers.Dense(3)])
    other.compile("adam", "mse")
    other.optimizer.build(other.trainable_variables)
    weights = [model.layers[0].kernel.value, model.layers[0].bias.value, model.layers[1].kernel.value]
    before = bits(weights)
    with pytest.raises(ValueError, match=r"(?s)shape.*9|9.*shape"):
        save_and_load(kind, other, model, tmp_path)
    assert bits(weights) == before
    assert {variable.tier for variable in weights} == {tier}


def build_and_train():
    """On a device of 24 MiB: weights and slots of 36 MiB."""
    keras.utils.set_random_seed(0)
    with graphswap.host_variables():
        model = keras.Sequential([keras.Input((1024,)), *(layers.Dense(1024, use_bias=False) for _ in range(3))])
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
    nbytes = sum(int(np.prod(v.shape)) * 4 for v in all_variables(model))
    x = np.ones((1, 1024), "float32")
    norms = [float(tf.norm(weight)) for weight in model.weights]
    model.predict(x, verbose=0)
    return nbytes, norms, tf.config.experimental.get_memory_info("CPU:0")["peak"]


def test_a_model_larger_than_the_device_is_built_and_used():
    nbytes, norms, peak = emulated.call(24 << 20, __file__, "build_and_train")
    assert nbytes > 36 << 20
    assert peak <= 24 << 20
    assert len(norms) == 3
    assert min(norms) > 1


def make_and_fill(small_count, rest):
    """On a device of 64 MiB: variables of 4 MiB leave it, some of 48 KiB stay; then one buffer takes the rest of it."""
    large, small = [], []
    with graphswap.host_variables():
        for _ in range(4):
            large.append(tf.Variable(tf.zeros((1 << 20,))))
            small += [tf.Variable(tf.zeros((12 << 10,))) for _ in range(small_count)]
    filling = tf.raw_ops.Empty(shape=(rest,), dtype=tf.uint8, init=False)
    return len(filling), len([variable for variable in large if variable.tier == "host"]), len(small)


@pytest.mark.parametrize(("small_count", "rest"), [(0, 62 << 20), (8, 59 << 20)])
def test_what_leaves_does_not_cut_the_memory_in_two(small_count, rest):
    found = emulated.call(64 << 20, __file__, "make_and_fill", small_count, rest)
    assert found == [rest, 4, 4 * small_count]


def make_on_a_full_device():
    """On a device of 16 MiB, of which 14 are taken: a variable of 400 KiB leaves it."""
    sizes = [2 << 20] * 6 + [1 << 20] * 2  # the last 4 MiB would be given away whole
    taken = [tf.raw_ops.Empty(shape=(size,), dtype=tf.uint8, init=False) for size in sizes]
    with graphswap.host_variables():
        variable = tf.Variable(tf.ones((100 << 10,)))
    return [variable.tier, float(tf.reduce_sum(variable)), len(taken)]


def test_variables_leave_a_device_that_is_nearly_full():
    assert emulated.call(16 << 20, __file__, "make_on_a_full_device") == ["host", 100 << 10, 8]


# --- planned steps ----------------------------------------------------------------------------------------------


def make_step(seed=0, shared=None):
    """A step of gradient descent with momentum, and its variables, of 100 KiB each."""
    rng = np.random.default_rng(seed)
    weight = tf.Variable(rng.normal(size=(160, 160)).astype("float32"), name="weight") if shared is None else shared
    momentum = tf.Variable(tf.zeros((160, 160)), name=f"momentum{seed}")

    def step(batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.tanh(batch @ weight) @ weight)
        momentum.assign(0.9 * momentum + tape.gradient(loss, weight))
        weight.assign_sub(0.001 * momentum)
        return loss

    return step, [weight, momentum]


BATCH = np.random.default_rng(2).normal(size=(4, 160)).astype("float32")


def planned(step, directory, **options):
    return graphswap.function(
        step, **{"memory_budget": "390KB", "swap_to": directory, "planning_seconds": 0.5, **options}
    )


def test_a_user_may_assign_between_planned_steps(tmp_path):
    found = []
    for plan in (tf.function, lambda step: planned(step, tmp_path)):
        step, variables = make_step()
        function = plan(step)
        for number in range(4):
            function(BATCH)
            variables[number % 2].assign(variables[number % 2] * 0.5)
            if isinstance(variables[1], HostVariable) and number == 2:
                variables[1].move("device")  # the step is planned anew
        found.append(bits(variables))
    assert any(isinstance(variable, HostVariable) and variable.tier == "disk" for variable in variables)
    assert found[0] == found[1]


def test_two_steps_may_share_a_variable(tmp_path):
    found = []
    for plan in (lambda step, _: tf.function(step), planned):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "b").mkdir(exist_ok=True)
        step, variables = make_step()
        other, others = make_step(1, shared=variables[0])
        first, second = plan(step, tmp_path / "a"), plan(other, tmp_path / "b")
        for function in (first, second, second, first, second):
            function(BATCH)
        found.append(bits([*variables, *others]))
    assert found[0] == found[1]
    for directory, mine in (("a", variables), ("b", [variables[0], others[1]])):
        again = [tf.Variable(tf.zeros((160, 160)), name=variable.name[:-2]) for variable in mine]
        graphswap.restore(again, tmp_path / directory)
        assert bits(again[1:]) == bits(mine[1:])


# --- bad disks --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(directory):
    """A directory that takes 512 KiB: a file system of its own where that is allowed, else a limit on each file."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(directory)]
    if not subprocess.run(mount, capture_output=True, check=False).returncode:
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(tmp_path):
    variables = [tf.Variable(tf.random.stateless_normal((160, 160), (0, i))) for i in range(8)]
    before = bits(variables)
    far = tiers.Tiers(tmp_path)
    with small_disk(tmp_path):
        with pytest.raises(SwapSpaceError, match=f"swapping to '{tmp_path}.*' failed: .*Free space there, or name"):
            for variable in variables:
                adopt(variable).move("disk", far)
        on_disk = next((variable for variable in variables if adopt(variable).tier == "disk"), None)
        if on_disk is not None:
            with pytest.raises(SwapSpaceError, match="failed"):
                for _ in range(9):
                    adopt(variables[-1]).move("disk", far)
        assert bits(variables) == before
        for variable in variables:
            adopt(variable).move("device")
    assert bits(variables) == before


def test_a_full_disk_stops_a_training_between_two_steps(tmp_path):
    step, variables = make_step()
    expected, expected_variables = make_step()
    plain = tf.function(expected)
    function = planned(step, tmp_path)
    function(BATCH)
    plain(BATCH)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    on_disk = next(variable for variable in variables if isinstance(variable, HostVariable))
    try:
        # The files that a step writes to are there; but not what a copy of the other variables needs.
        with pytest.raises(SwapSpaceError, match=f"swapping to '{tmp_path}/state' failed: .*File too large"):
            function(BATCH)
        plain(BATCH)
        for _ in range(2):  # to go on would be to write over the last state
            with pytest.raises(SwapSpaceError, match=f"swapping to '{tmp_path}/state' failed: .*File too large"):
                function(BATCH)
        with pytest.raises(SwapSpaceError, match=f"swapping to '{tmp_path}/state' failed: .*File too large"):
            on_disk.assign(on_disk * 2)
        assert bits(variables) == bits(expected_variables)
        again = make_step(3)[1]
        again[1] = tf.Variable(again[1], name="momentum0")
        assert graphswap.restore(again, tmp_path) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert bits(variables) == bits(expected_variables)
    function(BATCH)
    plain(BATCH)
    assert bits(variables) == bits(expected_variables)
    assert graphswap.restore(again, tmp_path) == 2
    assert bits(again) == bits(variables)


def test_a_directory_that_was_removed_is_named_and_nothing_is_lost(tmp_path):
    directory = tmp_path / "far"
    directory.mkdir()
    step, variables = make_step()
    expected, expected_variables = make_step()
    plain = tf.function(expected)
    function = planned(step, directory)
    function(BATCH)
    plain(BATCH)
    shutil.rmtree(directory)
    for _ in range(2):
        with pytest.raises(SwapSpaceError, match=f"swapping to '{directory}/state' failed: .*No such file"):
            function(BATCH)
    assert any(isinstance(variable, HostVariable) and variable.tier == "disk" for variable in variables)
    while bits(variables) != bits(expected_variables):  # after one step more, or none
        plain(BATCH)
    other = tmp_path / "other"
    other.mkdir()
    function = planned(step, other)
    function(BATCH)
    plain(BATCH)
    assert bits(variables) == bits(expected_variables)
    again = make_step(3)[1]
    again[1] = tf.Variable(again[1], name="momentum0")
    assert graphswap.restore(again, other) == 1
    assert bits(again) == bits(variables)


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write anywhere")
def test_lost_permission_is_named_and_loses_nothing(tmp_path):
    tmp_path.chmod(0o755)
    code = """
import os, sys
import numpy as np
import tensorflow as tf
from graphswap import far_memory, tiers
from graphswap.host_variable import adopt
directory = sys.argv[1]
if os.geteuid() == 0:
    os.setegid(65534); os.seteuid(65534)
variable = adopt(tf.Variable(tf.ones((160, 160))))
variable.move("disk", tiers.Tiers(directory))
os.chmod(directory + "/state", 0o500)
try:
    variable.assign_add(tf.ones((160, 160)))
except tiers.SwapSpaceError as error:
    print(error)
assert (variable.numpy() == 1).all()
os.chmod(directory + "/state", 0o700)
variable.assign_add(tf.ones((160, 160)))
assert (variable.numpy() == 2).all()
"""
    directory = pathlib.Path("/tmp" if os.geteuid() == 0 else tmp_path) / f"graphswap-test-{os.getpid()}"
    directory.mkdir()
    directory.chmod(0o777)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(directory)], env=environment, capture_output=True, text=True, check=False
        )
    finally:
        shutil.rmtree(directory)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"swapping to '{directory}/state' failed" in done.stdout
    assert "ermission denied" in done.stdout


def test_files_of_variables_that_are_gone_go_too(tmp_path):
    far = tiers.Tiers(tmp_path)
    kept, gone = moved([1.0], "disk"), moved([2.0], "disk")
    for variable in (kept, gone):
        variable.move("device")
        variable.move("disk", far)
    file = kept.file()
    assert file is not None
    del gone, variable
    gc.collect()
    far.clean()
    assert sorted(file.name for file in (tmp_path / "state").iterdir()) == sorted([file.name, "lock"])


if __name__ == "__main__":
    emulated.main(globals())
