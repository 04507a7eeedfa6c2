"""A GPT in JAX trains alike whatever is kept for its backward pass, and is as large as Keras's."""

import importlib.util
import math

import pytest

if not importlib.util.find_spec("jax"):
    pytest.skip("needs graphswap[pjrt]", allow_module_level=True)

import jax
import numpy as np

from graphswap import pjrt
from graphswap.tools import gpu_bench, jax_gpt, models

SIZES = {"blocks": 2, "width": 32, "heads": 2, "length": 16, "batch": 4}
SIZE = jax_gpt.Size(**SIZES)


def test_every_way_gives_the_same_losses_and_what_repeats_takes_less():
    found = {way: jax_gpt.train(SIZE, way, 3, "cpu") for way in jax_gpt.WAYS}
    plain = found["plain"]
    assert len(set(plain.losses)) == len(plain.seconds) == 3
    assert plain.peak_bytes == 0  # a CPU counts nothing
    for result in found.values():
        np.testing.assert_allclose(result.losses, plain.losses, rtol=1e-5)  # programs sum in other orders
    assert found["remat of blocks"].report["compiled_bytes"] < plain.report["compiled_bytes"]


def test_it_has_keras_s_weights_and_places_besides():
    """Keras's places are no input of its model, so that it does not count them."""
    (parameters, *_), words, _ = jax_gpt.arguments(SIZE, pjrt.local_device("cpu"))
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))
    assert weights - SIZE.length * SIZE.width == models.gpt(**SIZES).model.count_params()
    assert words.shape == next(models.gpt(**SIZES).batches)[0].shape
    assert jax_gpt.VOCABULARY == models.VOCABULARY


def test_it_runs_in_a_process_of_its_own():
    asked = {"size": SIZES, "way": "offloads what blocks read", "steps": 2, "device": "cpu"}
    result = gpu_bench.elsewhere("jax_gpt", asked)
    assert result.error == ""
    assert result.losses == jax_gpt.train(SIZE, asked["way"], 2, "cpu").losses


def test_a_device_that_is_not_here_is_named():
    result = gpu_bench.elsewhere("jax_gpt", {"size": SIZES, "way": "plain", "steps": 2, "device": "gpu"})
    assert result.error.startswith("device: expected one that JAX finds here, received 'gpu'")


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match=f"way: expected one of {', '.join(jax_gpt.WAYS)}, received 'no'"):
        jax_gpt.train(SIZE, "no", 1, "cpu")
