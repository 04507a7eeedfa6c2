"""What a session does when things go well, and when they don't."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys

import emulated
import numpy as np
import pytest
import tensorflow as tf
import trainings

import graphswap
from graphswap import graphdef, parser, planning, profiler, tiers
from graphswap.cost_model import CostModel, DeviceSpec, Workspace
from graphswap.model_data import Room
from graphswap.options import parse_bytes
from graphswap.plan import Place, Plan, PlanError
from graphswap.strategies import budgets

LAYERS = 6


def make_step(extra=None):
    """A step of gradient descent with momentum on a perceptron, and its variables.

    Args:
        extra: Called in the step with its first activation; returns what replaces it.
    """
    random = np.random.default_rng(0)
    weights = [tf.Variable(random.normal(0, 0.1, (64, 64)).astype("float32")) for _ in range(LAYERS)]
    momenta = [tf.Variable(tf.zeros_like(weight)) for weight in weights]

    def step(x):
        with tf.GradientTape() as tape:
            for index, weight in enumerate(weights):
                x = tf.nn.relu(x @ weight)
                x = extra(x) if extra and not index else x
            loss = tf.reduce_mean(tf.square(x - 1))
        for weight, momentum, gradient in zip(weights, momenta, tape.gradient(loss, weights), strict=True):
            momentum.assign(0.9 * momentum + gradient)
            weight.assign_sub(0.01 * momentum)
        return loss

    return step, [*weights, *momenta]


def batch(rows=1024, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=(rows, 64)).astype("float32"))


def values(variables):
    return [variable.numpy() for variable in variables]


def assert_same(received, expected):
    for left, right in zip(received, expected, strict=True):
        np.testing.assert_array_equal(left, right)


def train_plainly(steps, extra=None):
    """The variables after some plain steps."""
    step, variables = make_step(extra)
    function = tf.function(step)
    for _ in range(steps):
        function(batch())
    return values(variables)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphswap" / "profiles"


@pytest.fixture(autouse=True, scope="module")
def pins():
    with trainings.reproducible():
        yield


@pytest.fixture
def counted(monkeypatch):
    """A device that seems to count its memory, so that steps can be repeated."""
    monkeypatch.setattr(profiler, "memory_in_use", lambda kind="current": 1000)


def evict_all(**options):
    return {"memory_budget": "min", "strategy": trainings.EvictAll(), "swap_to": "host", **options}


# --- budgets ----------------------------------------------------------------------------------------------------


def test_an_impossible_budget_names_one_that_works():
    step, variables = make_step()
    before = values(variables)
    with pytest.raises(graphswap.InfeasibleBudgetError, match="smallest reachable peak") as caught:
        graphswap.function(step, memory_budget="4MiB", swap_to="host")(batch(8192))
    assert "memory_budget=4.0MiB is below" in str(caught.value)
    assert_same(values(variables), before)
    smallest = re.search(r"at least ([\d.]+MiB)", str(caught.value))
    assert smallest is not None
    again = graphswap.function(step, memory_budget=smallest[1], swap_to="host")
    again(batch(8192))
    assert graphswap.report(again).step.predicted_peak_bytes <= parse_bytes(smallest[1])
    assert graphswap.report(again).step.plan.decisions


def test_a_budget_is_not_refused_by_estimates():
    kernel = tf.Variable(tf.ones((3, 3, 16, 16)))

    def step(images):
        with tf.GradientTape() as tape:
            x = images
            for _ in range(4):
                x = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME"))
            loss = tf.reduce_sum(x)
        kernel.assign_sub(tape.gradient(loss, kernel))

    images = tf.ones((8, 16, 16, 16))
    smallest = graphswap.function(step, memory_budget="min", swap_to="host")
    smallest(images)
    budget = graphswap.report(smallest).step.memory_budget * 5 // 4
    profile = next(iter(pathlib.Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json")))
    profile.unlink()
    graphswap.function(step, memory_budget=budget, swap_to="host")(images)


def test_min_is_the_smallest_reachable_budget():
    step, _ = make_step()
    smallest = graphswap.function(step, memory_budget="min", swap_to="host")
    smallest(batch())
    report = graphswap.report(smallest).step
    assert report.plan.decisions
    assert report.predicted_peak_bytes <= report.memory_budget < report.plain_peak_bytes
    with pytest.raises(graphswap.InfeasibleBudgetError):
        graphswap.function(step, memory_budget=report.memory_budget * 9 // 10, swap_to="host")(batch())


def test_the_free_budget_is_one_without_a_slow_down():
    step, variables = make_step()
    function = graphswap.function(step, memory_budget="free", swap_to="host", planning_seconds=1.0)
    function(batch())
    report = graphswap.report(function).step
    assert report.predicted_peak_bytes <= report.memory_budget
    assert report.memory_bound_bytes is not None and report.free_bound_bytes is not None
    assert report.memory_bound_bytes <= report.free_bound_bytes <= report.memory_budget
    assert report.predicted_seconds <= report.plain_seconds * (1 + budgets.TOLERANCE)
    assert_same(values(variables), train_plainly(1))
    (line,) = [line for line in str(report).splitlines() if line.startswith("  budget")]
    assert "MiB, the smallest found that takes no longer (by 0.1% at most); none below" in line


def test_a_device_without_room_for_full_speed(monkeypatch):
    measured = profiler.device_spec
    monkeypatch.setattr(
        profiler, "device_spec", lambda *args: dataclasses.replace(measured(*args), memory_bytes=1500 << 10)
    )
    step, variables = make_step()
    before = values(variables)
    with pytest.raises(
        ValueError, match="'free': expected a device with room for the step at full speed, .*MiB, rec"
    ) as e:
        graphswap.function(step, memory_budget="free", swap_to="host", planning_seconds=0.5)(batch())
    assert "received one of 1.5MiB, of which 99% can be planned for. Write memory_budget='auto'" in str(e.value)
    assert_same(values(variables), before)


def test_a_step_that_fits_is_left_alone(monkeypatch):
    monkeypatch.setattr(graphdef, "export_function", lambda *args: pytest.fail("the step was rewritten"))
    monkeypatch.setattr(profiler, "measure_step", lambda *args: pytest.fail("the step was measured"))
    step, variables = make_step()
    function = graphswap.function(step, memory_budget="1GiB")
    function(batch())
    assert graphswap.report(function).step.status == "needs nothing"
    assert_same(values(variables), train_plainly(1))


def test_the_budget_auto_is_what_the_device_has():
    step, variables = make_step()
    graphswap.function(step, memory_budget="auto", swap_to="host")(batch())
    assert_same(values(variables), train_plainly(1))


# --- errors -----------------------------------------------------------------------------------------------------


def test_an_error_inside_a_step_leaves_the_variables():
    def refuse_large(x):
        with tf.control_dependencies([tf.debugging.assert_less(tf.reduce_max(x), 50.0)]):
            return tf.identity(x)

    step, variables = make_step(refuse_large)
    function = graphswap.function(step, **evict_all())
    function(batch())
    before = values(variables)
    with pytest.raises(tf.errors.InvalidArgumentError):
        function(batch() * 1000)
    assert_same(values(variables), before)
    function(batch())
    assert_same(values(variables), train_plainly(2))


def test_out_of_memory_in_spite_of_the_plan_is_planned_again(counted):
    failures = []

    def run_out_once():
        if not failures:
            failures.append(1)
            raise MemoryError  # TensorFlow makes it a ResourceExhaustedError

    step, variables = make_step()

    def fail_after_updates(x):
        loss = step(x)
        with tf.control_dependencies([loss, *variables]):
            tf.py_function(run_out_once, [], [])
        return loss

    function = graphswap.function(fail_after_updates, memory_budget="3MiB", swap_to="host")
    function(batch())
    assert failures
    assert_same(values(variables), train_plainly(1))
    first, second = graphswap.report(function).steps
    assert "ran out of memory" in first.notes[-1]
    assert second.memory_budget < first.memory_budget


def test_out_of_memory_that_no_plan_prevents_is_raised(counted):
    def run_out():
        raise MemoryError

    step, variables = make_step()

    def fail(x):
        loss = step(x)
        with tf.control_dependencies([loss]):
            tf.py_function(run_out, [], [])
        return loss

    before = values(variables)
    with pytest.raises((tf.errors.ResourceExhaustedError, graphswap.InfeasibleBudgetError)):
        graphswap.function(fail, memory_budget="3MiB", swap_to="host")(batch())
    assert_same(values(variables), before)


def test_ctrl_c_while_planning_leaves_the_step_trainable():
    class Interrupted(trainings.EvictAll):
        def plan(self, graph, cost_model, memory_budget):
            if not interrupts:
                interrupts.append(1)
                raise KeyboardInterrupt
            return super().plan(graph, cost_model, memory_budget)

    interrupts = []
    step, variables = make_step()
    before = values(variables)
    function = graphswap.function(step, memory_budget="min", strategy=Interrupted(), swap_to="host")
    with pytest.raises(KeyboardInterrupt):
        function(batch())
    assert_same(values(variables), before)
    function(batch())
    assert graphswap.report(function).step.plan.swaps
    assert_same(values(variables), train_plainly(1))


def unknown_sizes(x):
    return tf.tile(tf.boolean_mask(x, tf.reduce_sum(x, 1) > 0), (2, 1))


def test_an_unsupported_graph_is_refused_by_name():
    step, variables = make_step(unknown_sizes)
    before = values(variables)
    with pytest.raises(graphswap.UnsupportedGraphError, match="from node 'boolean_mask/") as caught:
        graphswap.function(step, memory_budget="1MiB")(batch())
    assert "on_unsupported='run_unchanged'" in str(caught.value)
    assert_same(values(variables), before)


def test_an_unsupported_graph_runs_unchanged_if_asked():
    step, variables = make_step(unknown_sizes)
    function = graphswap.function(step, memory_budget="1MiB", on_unsupported="run_unchanged")
    function(batch())
    assert graphswap.report(function).step.status.startswith("runs unchanged: expected known shapes")
    assert_same(values(variables), train_plainly(1, unknown_sizes))


# --- swap space -------------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_leaves_the_variables(tmp_path):
    step, variables = make_step()
    function = graphswap.function(step, **evict_all(swap_to=tmp_path, strategy=trainings.EvictAll(("swap",))))
    function(batch())
    before = values(variables)
    (directory,) = tmp_path.glob("graphswap-*")
    for file in directory.iterdir():
        if file.name != "lock":
            file.unlink()
            file.symlink_to("/dev/full")
    with pytest.raises(tiers.SwapSpaceError, match=f"swapping to '{directory}' failed") as caught:
        function(batch())
    assert "name another directory" in str(caught.value)
    assert_same(values(variables), before)


def test_a_swap_directory_that_was_removed_is_made_again(tmp_path):
    step, variables = make_step()
    function = graphswap.function(step, **evict_all(swap_to=tmp_path))
    function(batch())
    (directory,) = tmp_path.glob("graphswap-*")
    shutil.rmtree(directory)
    function(batch())
    assert directory.is_dir()
    assert_same(values(variables), train_plainly(2))


def test_a_swap_directory_that_takes_no_files_is_named():
    step, variables = make_step()
    before = values(variables)
    with pytest.raises(tiers.SwapSpaceError, match="/proc"):
        graphswap.function(step, **evict_all(swap_to="/proc"))(batch())
    assert_same(values(variables), before)


# --- shapes -----------------------------------------------------------------------------------------------------


def test_growing_batches_are_planned_again():
    sizes = (512, 544, 576, 608, 640, 672, 704, 640, 1024, 512)
    plain_step, plain_variables = make_step()
    step, variables = make_step()
    plain = tf.function(plain_step, reduce_retracing=True)
    function = graphswap.function(step, **evict_all())
    for rows in sizes:
        assert function(batch(rows)) == plain(batch(rows)), rows
    assert_same(values(variables), values(plain_variables))
    steps = graphswap.report(function).steps
    assert steps[-1].plain_peak_bytes > 1024 * 64 * 4 * LAYERS  # planned for the largest
    for rows in (640, *sizes):
        function(batch(rows))
    assert len(steps) <= len(sizes) + 1  # one plan with open sizes serves all


# --- the cache of profiles --------------------------------------------------------------------------------------


def count_measurements(monkeypatch):
    counted, measure = [], profiler.measure_step

    def measure_step(*args):
        counted.append(args)
        return measure(*args)

    monkeypatch.setattr(profiler, "measure_step", measure_step)
    return counted


def test_a_step_is_measured_once(monkeypatch, cache):
    measured = count_measurements(monkeypatch)
    for _ in range(2):
        graphswap.function(make_step()[0], **evict_all())(batch())
    assert len(measured) == 1
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_profile_is_measured_again(monkeypatch, cache):
    graphswap.function(make_step()[0], **evict_all())(batch())
    (file,) = cache.iterdir()
    text = file.read_text()
    measured = count_measurements(monkeypatch)
    for damaged in ("", text[: len(text) // 2], "[]", '{"seconds": 3}'):
        file.write_text(damaged)
        graphswap.function(make_step()[0], **evict_all())(batch())
        assert json.loads(file.read_text()).keys() == json.loads(text).keys()
    assert len(measured) == 4


def test_a_profile_serves_other_processes(cache):
    for _ in range(2):
        emulated.call(1 << 30, __file__, "train_once")
        assert len(list(cache.iterdir())) == 1


def train_once():
    import keras

    x = inputs = keras.Input((64,))
    for _ in range(LAYERS):
        x = keras.layers.Dropout(0.1)(keras.layers.BatchNormalization()(keras.layers.Dense(64, "relu")(x)))
    model = keras.Model(inputs, x)
    option = graphswap.Options("min", swap_to="host", planning_seconds=1)
    model.compile("adam", "mse", metrics=["mae"], graphswap=option)
    model.train_on_batch(batch(), batch())


# --- replanning -------------------------------------------------------------------------------------------------


@pytest.fixture
def ten_times_too_slow(monkeypatch):
    """Measured costs that no step will confirm."""
    measure = profiler.measure_step
    monkeypatch.setattr(profiler, "measure_step", lambda *args: slowed(measure(*args), 10))


def slowed(profile, factor):
    return dataclasses.replace(profile, seconds={name: factor * s for name, s in profile.seconds.items()})


def test_wrong_predictions_are_corrected_from_the_steps_of_the_training(ten_times_too_slow, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    step, variables = make_step()
    function = graphswap.function(step, **evict_all())
    for _ in range(12):
        function(batch())
    report = graphswap.report(function).step
    assert 1 <= len(report.rounds) <= 3
    first = report.rounds[0]
    assert first.corrected_seconds is not None
    assert first.corrected_seconds < first.seen.predicted_seconds / 2
    assert report.predicted_seconds < first.seen.predicted_seconds / 2
    assert f"round 1 {first}" in str(report)
    assert "graphswap: replan step, round 1 of 3 ..." in capsys.readouterr().err
    assert_same(values(variables), train_plainly(12))


def test_a_step_is_not_measured_while_somebody_else_uses_the_profiler(ten_times_too_slow, tmp_path):
    step, variables = make_step()
    function = graphswap.function(step, **evict_all())
    function(batch())
    tf.profiler.experimental.start(str(tmp_path))
    try:
        for _ in range(7):
            function(batch())
    finally:
        tf.profiler.experimental.stop()
    (only,) = graphswap.report(function).step.rounds
    assert only.outcome.startswith("not measured: TensorFlow's profiler is busy")
    assert_same(values(variables), train_plainly(8))


def test_bytes_beyond_the_prediction_are_reserved_in_the_next_plan(monkeypatch):
    budget, counted = 3 << 20, [1000]
    step, variables = make_step()
    function = graphswap.function(step, memory_budget=budget, swap_to="host")

    def memory_in_use(kind="current"):
        if any(step.measured_seconds for step in graphswap.report(function).steps):
            counted.append(budget + (256 << 10))  # what the first step is taken to have reached
        return 1000 if kind == "current" else counted[-1]

    monkeypatch.setattr(profiler, "memory_in_use", memory_in_use)
    for _ in range(6):
        function(batch())
    first, second = graphswap.report(function).steps
    assert first.rounds[0].outcome == "the new plan is taken"
    assert second.plan.memory_budget is not None
    assert second.plan.memory_budget <= budget - first.rounds[0].seen.excess_bytes
    assert f"{first.rounds[0].seen.excess_bytes / 2**20:.1f}MiB above prediction" in str(second)
    assert_same(values(variables), train_plainly(6))


# --- side effects -----------------------------------------------------------------------------------------------


def test_tensorflows_settings_stay_as_they_were():
    def settings():
        return (
            tf.config.optimizer.get_experimental_options(),
            tf.config.threading.get_inter_op_parallelism_threads(),
            tf.config.get_soft_device_placement(),
            tf.config.functions_run_eagerly(),
            tf.config.optimizer.get_jit(),
            {name: value for name, value in os.environ.items() if name.startswith(("TF_", "XLA_"))},
        )

    before = settings()
    random = tf.random.get_global_generator().state.numpy()
    graphswap.function(make_step()[0], **evict_all())(batch())
    assert settings() == before
    np.testing.assert_array_equal(tf.random.get_global_generator().state.numpy(), random)


# --- on an emulated accelerator ---------------------------------------------------------------------------------


def train_with_rosy_costs(budget):
    """Trains a chain of convolutions although a tenth of their workspace goes unnoticed."""
    measure = profiler.measure_step

    def rosy(*args):
        profile = measure(*args)
        workspace = {
            name: Workspace(*(tuple(nbytes * 9 // 10 for nbytes in part) for part in found))
            for name, found in profile.workspace.items()
        }
        return dataclasses.replace(profile, workspace=workspace)

    profiler.measure_step = rosy
    kernel = tf.Variable(tf.random.stateless_normal((3, 3, 16, 16), (0, 0), 0, 0.1))

    def step(x):
        with tf.GradientTape() as tape:
            for _ in range(32):
                x = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME"))
            loss = tf.reduce_mean(tf.square(x - 1))
        kernel.assign_sub(0.01 * tape.gradient(loss, kernel))
        return loss

    function = graphswap.function(step, memory_budget=budget)
    images = tf.random.stateless_normal((16, 32, 32, 16), (0, 1))
    losses = [float(function(images)) for _ in range(3)]
    peak = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    return {"losses": losses, "peak": peak, "notes": [step.notes for step in graphswap.report(function).steps]}


def test_a_step_that_runs_out_of_memory_is_planned_tighter_and_repeated():
    budget = 60 << 20
    ours = emulated.call(budget, __file__, "train_with_rosy_costs", budget)
    ample = emulated.call(1 << 30, __file__, "train_with_rosy_costs", 1 << 30)
    assert "ran out of memory (OOM when allocating tensor with shape" in str(ours["notes"])
    assert ours["peak"] <= budget
    assert ours["losses"] == ample["losses"]


def train_freely(option):
    """Trains a small Keras model on an emulated accelerator, plainly if the option is empty."""
    import keras

    keras.utils.set_random_seed(11)
    with trainings.reproducible():
        x = inputs = keras.Input((64,))
        for _ in range(LAYERS):
            x = keras.layers.Dropout(0.1)(keras.layers.Dense(64, "relu")(x))
        model = keras.Model(inputs, x)
        options = graphswap.Options(option, swap_to="host", planning_seconds=2.0) if option else None
        model.compile("adam", "mse", **({"graphswap": options} if options else {}))
        losses = [float(model.train_on_batch(batch(8192).numpy(), batch(8192, 1).numpy())) for _ in range(3)]
    found = {
        "losses": losses,
        "weights": [hashlib.sha256(np.asarray(weight).tobytes()).hexdigest() for weight in model.weights],
    }
    if options:
        step = graphswap.report(model).step
        found |= {"peak": step.measured_peak_bytes, "budget": step.memory_budget, "report": str(step)}
        found |= {"plain": step.plain_seconds, "predicted": step.predicted_seconds, "bound": step.free_bound_bytes}
    return found


def test_the_free_budget_on_an_emulated_accelerator():
    plain = emulated.call(1 << 30, __file__, "train_freely", "")
    ours = emulated.call(1 << 30, __file__, "train_freely", "free")
    assert {name: ours[name] for name in plain} == plain
    assert max(ours["bound"], ours["peak"]) <= ours["budget"], ours["report"]
    # The bound, too, is of a budget, of which a hundredth is left free.
    assert 0.99 * ours["bound"] <= ours["peak"] + 1, ours["report"]
    assert ours["predicted"] <= ours["plain"] * (1 + budgets.TOLERANCE)


def train_with_wrong_costs(budget, cost_factor, link_factor, steps):
    """Trains a perceptron; costs and links are measured wrong by these factors."""
    measure, link = profiler.measure_step, profiler.measure_link
    profiler.measure_step = lambda *args: slowed(measure(*args), cost_factor)

    def slow_link(*args):
        found = link(*args)
        return dataclasses.replace(
            found,
            out_bytes_per_second=found.out_bytes_per_second / link_factor,
            in_bytes_per_second=found.in_bytes_per_second / link_factor,
        )

    setattr(profiler, "measure_link", slow_link)  # noqa: B010
    step, variables = make_step()
    # With time to end, search finds the same plan in every process.
    function = graphswap.function(step, memory_budget=budget, planning_seconds=30.0)
    x = batch(8192)
    losses = [float(function(x)) for _ in range(steps)]
    report = graphswap.report(function)
    last = report.steps[-1]
    return {
        "losses": losses,
        "variables": [float(np.sum(value)) for value in values(variables)],
        "peak": tf.config.experimental.get_memory_info("CPU:0")["peak"],
        "plans": [str(step.plan) for step in report.steps],
        "rounds": [dataclasses.asdict(one) for one in last.rounds],
        "predicted": last.predicted_seconds,
        "text": str(last),
    }


@pytest.mark.parametrize(("cost_factor", "link_factor"), [(10, 1), (1, 10)])
def test_rounds_mend_wrong_costs_and_later_runs_have_the_plan(cost_factor, link_factor):
    budget = 25 << 20
    wrong = (budget, cost_factor, link_factor, 20)
    first = emulated.call(budget, __file__, "train_with_wrong_costs", *wrong)
    plain = emulated.call(1 << 30, __file__, "train_with_wrong_costs", 1 << 30, 1, 1, 20)
    assert first["peak"] <= budget
    assert (first["losses"], first["variables"]) == (plain["losses"], plain["variables"])
    assert 1 <= len(first["rounds"]) <= 3
    for number, done in enumerate(first["rounds"], start=1):
        assert f"round {number} {done['seen']['predicted_seconds']:.3f} s predicted" in first["text"]
    if cost_factor != 1:
        done = first["rounds"][0]
        assert done["corrected_seconds"] < done["seen"]["predicted_seconds"] / 2
    again = emulated.call(budget, __file__, "train_with_wrong_costs", *wrong)
    assert again["rounds"] == []
    assert again["plans"] == first["plans"][-1:]
    assert again["losses"] == first["losses"]


if __name__ == "__main__":
    emulated.main(globals())


def test_a_plan_that_has_the_host_compute_needs_a_device_where_that_is_exact(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(Plan(decisions=(Place("m", computes_there=True),)).to_json())
    planner = planning.Planner(graphswap.Options("1MiB", plan=path), tiers.Tiers())
    graph = parser.parse("graph step(%m) -> () {\n%m = Placeholder() : (resource[])\n}")

    def place(device):
        return planner.place(graph, CostModel(device), 1 << 20, ["m"], (), Room())

    assert place(DeviceSpec(computes_there=True)) == (Place("m", computes_there=True),)
    with pytest.raises(PlanError, match="plan.json' has the host compute with .* received 'cpu'. Plan again on this"):
        place(DeviceSpec())


def test_a_plan_that_moves_another_models_variable_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(Plan(decisions=(Place("other"),)).to_json())
    planner = planning.Planner(graphswap.Options("1MiB", plan=path), tiers.Tiers())
    graph = parser.parse("graph step(%m) -> () {\n%m = Placeholder() : (resource[])\n}")
    with pytest.raises(PlanError) as error:
        planner.place(graph, CostModel(DeviceSpec()), 1 << 20, ["m"], (), Room())
    assert str(error.value) == (
        f"expected a plan for graph 'step', received '{path}', which is for another one: it has a variable 'other'. "
        "Plan again for this graph."
    )
