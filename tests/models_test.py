import numpy as np
import pytest

from graphswap.tools import models


@pytest.mark.parametrize("name", models.MODELS)
def test_batches_fit_the_model(name):
    training = models.MODELS[name]()
    inputs, targets = next(training.batches)
    assert training.model.input_shape == (None, *inputs.shape[1:])
    output_shape = training.model.output_shape[1:]
    assert targets.shape[1:] == (output_shape if targets.dtype == np.float32 else output_shape[:-1])
    assert len(inputs) == len(targets)


def test_a_vision_transformer_sees_all_patches():
    """Its output hangs on every patch and, through the positions, on where it lies."""
    model = models.vit(blocks=1, width=24, heads=3, patch=48, batch=2).model
    image = np.random.default_rng(0).random((1, 96, 96, 3), "float32")
    seen = model(image).numpy()
    for row, column in np.ndindex(2, 2):
        changed = image.copy()
        changed[:, 48 * row : 48 * row + 48, 48 * column : 48 * column + 48] = 0
        assert not np.allclose(model(changed), seen, atol=1e-6)
    assert not np.allclose(model(np.flip(image, 1)), seen, atol=1e-6)
