"""Training through PJRT in a process of its own: numbers of TensorFlow's, inside a budget, and refusals."""

import dataclasses
import importlib.util

import pytest

if not importlib.util.find_spec("jax"):
    pytest.skip("needs graphswap[pjrt]", allow_module_level=True)

import keras
import numpy as np

from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.tools import gpu_bench, models, pjrt_trial
from graphswap.tools.trial import Trial


def test_a_plan_keeps_the_budget_once_compiled_and_the_numbers():
    """On a CPU only what is repeated saves memory: what is swapped stays in the same memory."""
    plain = pjrt_trial.train(Trial("mlp", 0, steps=3), "cpu", "h200")
    budget = int(0.6 * plain.report["compiled_bytes"])
    trial = Trial("mlp", 0, graphswap=f"{budget}B", steps=3, planning_seconds=3)
    planned = pjrt_trial.train(trial, "cpu", "h200")
    assert planned.losses == plain.losses and len(set(plain.losses)) == 3
    assert planned.report["compiled_bytes"] <= budget
    assert planned.report["repeated_nodes"] > 0
    assert planned.report["predicted_seconds"] >= plain.report["predicted_seconds"]
    assert plain.peak_bytes == 0  # a CPU counts nothing
    keras.utils.set_random_seed(0)
    training = models.mlp()
    training.model.compile(training.optimizer, training.loss, jit_compile=False)
    losses = []
    for _ in range(3):
        training.model.reset_metrics()
        losses.append(float(training.model.train_on_batch(*next(training.batches))))
    np.testing.assert_allclose(plain.losses, losses, rtol=1e-6)  # as in pjrt_test


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(InfeasibleBudgetError, match="memory_budget=1.0MiB is below the smallest reachable peak"):
        pjrt_trial.train(Trial("mlp", 0, graphswap="1MiB", steps=3, planning_seconds=0.5), "cpu", "h200")


def test_a_device_that_is_not_here_is_named():
    asked = {"trial": dataclasses.asdict(Trial("mlp", 0)), "device": "gpu", "data_sheet": "h200"}
    assert gpu_bench.elsewhere("pjrt_trial", asked).error.startswith("device: expected one that JAX finds here")


def test_it_runs_in_a_process_of_its_own():
    asked = {"trial": dataclasses.asdict(Trial("mlp", 0, steps=2)), "device": "cpu", "data_sheet": "h200"}
    result = gpu_bench.elsewhere("pjrt_trial", asked)
    assert (result.error, len(result.losses)) == ("", 2)
