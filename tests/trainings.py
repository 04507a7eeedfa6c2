"""Trains the same model twice, plainly and with graphswap, and compares every bit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import graphswap
from graphswap import ir, planning
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.report import StepReport
from graphswap.strategies import gaps

Training = Callable[..., Sequence[keras.Model]]
"""Called with a log, to which it adds what is to be compared, and the compile option; returns its models."""


@dataclasses.dataclass(frozen=True)
class EvictAll:
    """A strategy that keeps nothing it could evict, whatever the budget, and decides in no time.

    Attributes:
        ways: What happens to the gaps, in turn; what can't be recomputed is swapped.
    """

    ways: tuple[str, ...] = ("swap", "recompute")

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        problem = gaps.problem(graph, cost_model)
        evicted: dict[int, str] = {}
        for gap in range(len(problem.gaps)):
            way = self.ways[len(evicted) % len(self.ways)]
            is_repeatable = way == "swap" or math.isfinite(problem.recompute_seconds(gap, evicted, ()))
            evicted[gap] = way if is_repeatable else "swap"
        decisions = problem.decide(evicted)
        enough = 2 * problem.outline(decisions).peak_bytes
        return problem.plan(decisions, "evict_all", max(memory_budget, enough))


PINS = {"arithmetic_optimization": False, "constant_folding": False}
"""Grappler's optimisers that regroup sums and products of floats: they round differently.

Both do it only where a part has no second reader and no control edge, and constant folding also only where
sizes are known. A repeated node is a second reader; a trace for one batch size knows more sizes than Keras's
own. TF_ENABLE_ONEDNN_OPTS=0, in conftest.py, belongs to the pins: oneDNN fuses by the same rules.
"""


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Makes TensorFlow compute the same bits for a graph and for the same graph with more nodes and edges."""
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({**before, **PINS})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({**dict.fromkeys(PINS, True), **before})


def assert_equal_to_plain(
    train: Training, wanted: Sequence[str] = ("swaps", "recomputes"), **options: Any
) -> list[StepReport]:
    """Trains plainly and with graphswap: all that was logged and all variables must be the same bits.

    Args:
        train: The training.
        wanted: What the plan of the step that ran most often must have, so that the comparison means something.
        **options: Of `graphswap.Options`.

    Returns:
        The report of the step that ran most often, for each model.
    """
    options = {"memory_budget": "min", "strategy": EvictAll(), "swap_to": "host", "planning_seconds": 0.5, **options}
    plain_log, plain_models = _run(train)
    log, models = _run(train, graphswap=graphswap.Options(**options))
    assert len(plain_log) >= 5
    for step, (expected, received) in enumerate(zip(plain_log, log, strict=True)):
        _assert_same(f"entry {step} of the log", expected, received)
    for plain, ours in zip(plain_models, models, strict=True):
        expected, received = variables(plain), variables(ours)
        assert list(expected) == list(received)
        for name in expected:
            _assert_same(name, expected[name], received[name])
    steps = [graphswap.report(model).step for model in models]
    for step in steps:
        for what in wanted:
            assert getattr(step.plan, what), f"no {what} in\n{step}"
    return steps


def variables(model: keras.Model) -> dict[str, np.ndarray]:
    """Weights, statistics, seeds, metrics and the optimizer's slots, by name."""
    owned = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    return {f"{index} {variable.name}": variable.numpy() for index, variable in enumerate(owned)}


def loss_of_chain(x: tf.Tensor, weight: tf.Variable) -> tf.Tensor:
    """The sum of four layers that share their weight, whose values can be swapped and made again."""
    for _ in range(4):
        x = tf.tanh(x @ weight)
    return tf.reduce_sum(x)


class Recorder(keras.callbacks.Callback):
    """Adds the logs of every batch and epoch to a list."""

    def __init__(self, log: list[Any]):
        super().__init__()
        self.log = log

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.log.append(dict(logs))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.log.append(dict(logs))


@contextlib.contextmanager
def analytic_costs() -> Iterator[None]:
    """Skips the measuring of steps, where a test is about something else."""
    measured = planning.Planner.profile
    setattr(planning.Planner, "profile", lambda *args: None)  # noqa: B010
    try:
        yield
    finally:
        planning.Planner.profile = measured


def _run(train: Training, **option: Any) -> tuple[list[Any], Sequence[keras.Model]]:
    keras.backend.clear_session()
    keras.utils.set_random_seed(11)
    log: list[Any] = []
    models = train(log, **option)
    return log, models


def _assert_same(what: str, expected: Any, received: Any) -> None:
    tf.nest.assert_same_structure(expected, received)
    for left, right in zip(tf.nest.flatten(expected), tf.nest.flatten(received), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=what)
