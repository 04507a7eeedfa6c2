"""The faster back end goes on; what one refuses, the other runs."""

import numpy as np
import pytest

from graphswap import back_ends
from graphswap.back_ends import Choice, NoBackEndError
from graphswap.graphdef import UnsupportedGraphError
from graphswap.plan import Plan
from graphswap.report import Report, StepReport
from graphswap.strategies.base import InfeasibleBudgetError


class Runner:
    """Takes so many seconds for each step, the first one ten times as many; or raises an error."""

    def __init__(self, name, seconds, report, log):
        self.name, self.seconds, self.report, self.log, self.step = name, seconds, report, log, None

    def run(self, make, *args):
        if isinstance(self.seconds, Exception):
            raise self.seconds
        if self.step is None:
            self.step = StepReport(self.name, 0, 0, Plan(), "", 0, 0, 0.0, 0.0, breakdown={"plan": 2.0})
            self.report.steps.append(self.step)
        self.step.measured_seconds.append(self.seconds if self.step.measured_seconds else 10 * self.seconds)
        self.log.append(self.name)
        return args

    def resume(self):
        self.log.append("resume")


def run(seconds, steps=10):
    """What ran in which order, the last of the report's notes, and the choice."""
    report, log = Report(), []
    choice = Choice({name: Runner(name, each, report, log) for name, each in seconds.items()}, report)
    for number in range(steps):
        assert choice.run(list, number) == (number,)
    return log, report, choice


def test_the_faster_goes_on_and_the_report_says_what_was_measured():
    log, report, _ = run({"XLA": 0.5, "executor": 1.0})
    tried = back_ends.STEPS + 1
    assert log == ["XLA"] * tried + ["executor"] * tried + ["resume"] + ["XLA"] * 2
    assert report.steps[0].notes == [
        "back end: XLA 0.500 s, executor 1.000 s measured (median of 3); XLA is kept; "
        "the first steps took 19.0 s, planning and compiling included"
    ]


def test_the_one_that_ran_last_is_not_resumed():
    log, report, choice = run({"XLA": 1.0, "executor": 0.5})
    assert log[-2:] == ["executor"] * 2 and "resume" not in log
    assert "executor is kept" in report.steps[1].notes[0]
    assert list(choice._runners) == ["executor"]


@pytest.mark.parametrize("refused", ["XLA", "executor"])
def test_what_one_refuses_the_other_runs(refused):
    error = InfeasibleBudgetError(1 << 20, 2 << 20, "node")
    log, report, _ = run({"XLA": 1.0, "executor": 1.0} | {refused: error})
    assert [name for name in log if name != "resume"] == [("executor" if refused == "XLA" else "XLA")] * 10
    assert f"is kept; {refused} refused: memory_budget=1.0MiB is below the smallest" in report.steps[0].notes[0]


def test_where_none_can_run_it_both_reasons_are_named():
    report = Report()
    errors = {"XLA": UnsupportedGraphError("no kernel"), "executor": InfeasibleBudgetError(1 << 20, 2 << 20, "node")}
    choice = Choice({name: Runner(name, error, report, []) for name, error in errors.items()}, report)
    with pytest.raises(NoBackEndError) as caught:
        choice.run(list)
    first, *reasons = str(caught.value).splitlines()
    assert first == "expected a step that XLA or executor can run in the budget, received one that none can."
    assert reasons == ["XLA: no kernel", f"executor: {errors['executor']}"]


def test_other_errors_are_passed_on():
    report = Report()
    choice = Choice({"XLA": Runner("XLA", OSError("disk"), report, [])}, report)
    with pytest.raises(OSError, match="disk"):
        choice.run(list)


def test_a_training_goes_on_through_both_and_under_the_faster():
    import tensorflow as tf

    import graphswap

    def step(x, w):
        with tf.GradientTape() as tape:
            y = x
            for _ in range(6):
                y = tf.tanh(y @ w)
            loss = tf.reduce_mean(y * y)
        w.assign_sub(0.1 * tape.gradient(loss, w))
        return loss

    x = tf.random.stateless_uniform((64, 64), (0, 0))
    plain, ours = tf.Variable(tf.eye(64)), tf.Variable(tf.eye(64))
    ran = tf.function(lambda x: step(x, plain))
    function = graphswap.function(lambda x: step(x, ours), memory_budget="1GiB", jit_compile="auto")
    steps = 2 * (back_ends.STEPS + 1) + 2
    # XLA rounds a product and a sum once where the executor rounds twice.
    np.testing.assert_allclose([function(x) for _ in range(steps)], [ran(x) for _ in range(steps)], rtol=1e-6)
    np.testing.assert_allclose(ours.numpy(), plain.numpy(), rtol=1e-5, atol=1e-7)
    report = str(graphswap.report(function))
    assert "note    back end: XLA 0." in report and "median of 3" in report


def test_a_keras_model_takes_it_as_an_option():
    import keras

    import graphswap

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16)])
    model.compile("sgd", "mse", graphswap=graphswap.Options("1GiB", jit_compile="auto"))
    x = np.ones((8, 16), "float32")
    for _ in range(2 * (back_ends.STEPS + 1)):
        model.train_on_batch(x, x)
    assert "is kept" in str(graphswap.report(model))
    assert model.jit_compile is False
