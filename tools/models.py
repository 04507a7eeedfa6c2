"""Models to try graphswap on, each with real data: `MODELS[name]()` returns a `Training`."""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import functools
import importlib.resources
import inspect
import itertools
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from sklearn import datasets

from graphswap.tools import architectures

VOCABULARY = 1000
Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Training:
    """A model, how it is compiled, and what it is trained on.

    Attributes:
        model: Not compiled yet.
        optimizer: For `compile`.
        loss: For `compile`.
        batches: Endless, in numpy's memory.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    loss: str | keras.losses.Loss
    batches: Iterator[Batch]


def mlp() -> Training:
    """A perceptron on scikit-learn's digits, to try things out: batch 1024, SGD."""
    model = keras.Sequential([keras.Input((64,)), *(layers.Dense(512, "relu") for _ in range(12)), layers.Dense(10)])
    images, digits = _digits()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Training(model, keras.optimizers.SGD(0.1), loss, _batches(images[..., 0].reshape(-1, 64), digits, 1024))


def wide_mlp(
    depth: int = 24,
    width: int = 1024,
    batch: int = 256,
    policy: str = "float32",
    is_loss_scaled: bool = False,
    **optimizer: Any,
) -> Training:
    """Square layers on parts of photographs: nearly all its memory is weights and optimizer state. Adam."""
    hidden = (layers.Dense(width, "relu", dtype=policy) for _ in range(depth))
    model = keras.Sequential([keras.Input((width,)), *hidden])
    side = int(width**0.5)
    noisy = _noisy_photographs(side, batch)
    flat = ((x[..., 0].reshape(len(x), -1), y[..., 0].reshape(len(y), -1)) for x, y in noisy)
    adam: Any = keras.optimizers.Adam(1e-3, **optimizer)
    if is_loss_scaled:
        adam = keras.optimizers.LossScaleOptimizer(adam, dynamic_growth_steps=2)
    return Training(model, adam, "mean_squared_error", flat)


def resnet50(size: int = 96, batch: int = 32) -> Training:
    """ResNet-50 on scikit-learn's digits, enlarged to size x size x 3: SGD."""
    model = keras.applications.ResNet50(weights=None, input_shape=(size, size, 3), classes=10)
    return Training(model, keras.optimizers.SGD(0.001), "sparse_categorical_crossentropy", _large_digits(batch, size))


def efficientnet() -> Training:
    """EfficientNetB0 with its Dropout on scikit-learn's digits, scaled to 96x96x3: batch 16, Adam."""
    model = keras.applications.EfficientNetB0(weights=None, input_shape=(96, 96, 3), classes=10)
    return Training(model, keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", _large_digits(16))


def gpt(
    blocks: int = 8, width: int = 256, heads: int = 4, length: int = 128, batch: int = 16, rate: float = 3e-4
) -> Training:
    """A GPT on the source text of Python's library, split into words: Adam."""
    tokens = keras.Input((length,), dtype="int32")
    x = layers.Embedding(VOCABULARY, width)(tokens) + layers.Embedding(length, width)(np.arange(length)[None])
    for _ in range(blocks):
        x = architectures.transformer_block(x, heads, is_causal=True)
    words = layers.Dense(VOCABULARY)(layers.LayerNormalization()(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Training(keras.Model(tokens, words), keras.optimizers.Adam(rate), loss, _text(length, batch))


def vit(blocks: int = 8, width: int = 192, heads: int = 3, patch: int = 8, batch: int = 16) -> Training:
    """A vision transformer on scikit-learn's digits, enlarged to 96x96x3: Adam."""
    model = architectures.vision_transformer(blocks, width, heads, patch, size=96, classes=10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Training(model, keras.optimizers.Adam(3e-4), loss, _large_digits(batch))


def lstm(width: int = 256, length: int = 128, batch: int = 32) -> Training:
    """Two stacked LSTMs on the source text of Python's library, split into words: Adam."""
    tokens = keras.Input((length,), dtype="int32")
    x = layers.Embedding(VOCABULARY, width)(tokens)
    for _ in range(2):
        x = layers.LSTM(width, return_sequences=True)(x)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = keras.Model(tokens, layers.Dense(VOCABULARY)(x))
    return Training(model, keras.optimizers.Adam(1e-3), loss, _text(length, batch))


def unet(widths: Sequence[int] = (16, 32, 64, 128), size: int = 128, batch: int = 8) -> Training:
    """A U-Net with skips and Conv2DTranspose that removes noise from photographs: Adam."""

    def twice(x: Any, width: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        return x

    image = x = keras.Input((size, size, 3))
    skips = []
    for width in widths:
        skips.append(twice(x, width))
        x = layers.MaxPooling2D()(skips[-1])
    x = twice(x, 2 * widths[-1])
    for width, skip in zip(reversed(widths), reversed(skips), strict=True):
        x = layers.Conv2DTranspose(width, 2, strides=2)(x)
        x = twice(layers.Concatenate()([x, skip]), width)
    model = keras.Model(image, layers.Conv2D(3, 1)(x))
    return Training(model, keras.optimizers.Adam(1e-3), "mean_squared_error", _noisy_photographs(size, batch))


MODELS: Mapping[str, Callable[[], Training]] = {
    "mlp": mlp,
    "resnet50": resnet50,
    "gpt": gpt,
    "vit": vit,
    "unet": unet,
    "efficientnet": efficientnet,
    "lstm": lstm,
}


GPU_MODELS: Mapping[str, Callable[[], Training]] = {
    "resnet50_gpu": functools.partial(resnet50, size=224, batch=128),
    "gpt_gpu": functools.partial(gpt, blocks=12, width=1024, heads=16, length=1024, batch=8),
}
"""Large enough to keep a GPU busy."""

JIT_MODELS: Mapping[str, Callable[[], Training]] = {
    "gpt_12": functools.partial(gpt, blocks=12, width=128),
    "resnet50_64": functools.partial(resnet50, size=64, batch=32),
}
"""Of sizes that XLA compiles in a minute or two."""


LARGE_MODELS: Mapping[str, Callable[[], Training]] = {
    "mlp_24": wide_mlp,
    "mlp_24_64": functools.partial(wide_mlp, batch=64),
    "mlp_24_clipped": functools.partial(wide_mlp, global_clipnorm=1.0),
    "mlp_24_bfloat16": functools.partial(wide_mlp, policy="mixed_bfloat16"),
    "mlp_24_accumulated": functools.partial(wide_mlp, gradient_accumulation_steps=4),
    "mlp_24_scaled": functools.partial(wide_mlp, is_loss_scaled=True),
    "mlp_96": functools.partial(wide_mlp, depth=96, batch=64),
    "gpt_100m": functools.partial(gpt, blocks=14, width=768, heads=12, length=256, batch=8),
    "gpt_100m_64": functools.partial(gpt, blocks=14, width=768, heads=12, length=64, batch=2, rate=2e-5),
    "gpt_300m": functools.partial(gpt, blocks=24, width=1024, heads=16, length=64, batch=2, rate=2e-5),
    "gpt_1b": functools.partial(gpt, blocks=20, width=2048, heads=16, length=64, batch=2, rate=4e-6),
}
"""Of which weights and optimizer state are the larger part."""


class _Recomputed(layers.Layer):
    """A part of a model that is run again for its gradients."""

    def __init__(self, part: keras.Model):
        super().__init__()
        self.part = part

    def call(self, x: Any, training: bool | None = None) -> Any:
        return tf.recompute_grad(lambda t: self.part(t, training=training))(x)


def recomputed_by_hand(training: Training) -> Training:
    """The same training with `tf.recompute_grad` around every block of a GPT or a ResNet, as one places it by hand."""
    model = training.model
    outputs = [layer.output for layer in model.layers if layer.name.endswith("_out") and "block" in layer.name]
    if not outputs:  # a transformer: the embeddings' sum, and of the two sums in each block the second
        outputs = [operation.output for operation in model.operations if type(operation).__name__ == "Add"][::2]
    x = keras.Model(model.input, outputs[0])(model.input)
    for start, end in itertools.pairwise(outputs):
        x = _Recomputed(keras.Model(start, end))(x)
    x = keras.Model(outputs[-1], model.output)(x)
    return dataclasses.replace(training, model=keras.Model(model.input, x))


def _batches(inputs: np.ndarray, targets: np.ndarray, size: int) -> Iterator[Batch]:
    """Whole batches, over and over."""
    for start in itertools.cycle(range(0, len(inputs) - size + 1, size)):
        yield inputs[start : start + size], targets[start : start + size]


def _digits() -> Batch:
    """Images (n, 8, 8, 1) from 0 to 1, and what they show."""
    digits = datasets.load_digits()
    return (digits.images[..., None] / 16).astype("float32"), digits.target.astype("int32")


def _large_digits(batch: int, size: int = 96) -> Iterator[Batch]:
    images, digits = _digits()
    for image, digit in _batches(images, digits, batch):
        yield image.repeat(size // 8, axis=1).repeat(size // 8, axis=2).repeat(3, axis=3), digit


def _text(length: int, batch: int) -> Iterator[Batch]:
    """Stretches of words, and the word that follows each. Rare words are word 0."""
    modules: tuple[types.ModuleType, ...] = (argparse, ast, collections, dataclasses, inspect)
    words = re.findall(r"\w+|\s+|[^\w\s]", "".join(map(inspect.getsource, modules)))
    common = collections.Counter(words).most_common(VOCABULARY - 1)
    numbers = {word: number for number, (word, _) in enumerate(common, 1)}
    text = np.array([numbers.get(word, 0) for word in words], "int32")
    stretches = np.lib.stride_tricks.sliding_window_view(text, length + 1)[::length]
    return _batches(stretches[:, :-1], stretches[:, 1:], batch)


def _noisy_photographs(size: int, batch: int) -> Iterator[Batch]:
    """Squares of scikit-learn's two photographs with noise, and without."""
    folder = importlib.resources.files("sklearn.datasets.images")
    squares = []
    for name in ("china.jpg", "flower.jpg"):
        photograph = tf.io.decode_jpeg((folder / name).read_bytes()).numpy()
        height, width = (pixels // size * size for pixels in photograph.shape[:2])
        rows = photograph[:height, :width].reshape(height // size, size, width // size, size, 3)
        squares.append(rows.swapaxes(1, 2).reshape(-1, size, size, 3))
    clean = np.concatenate(squares).astype("float32") / 255
    noisy = clean + np.random.default_rng(0).normal(0, 0.1, clean.shape).astype("float32")
    return _batches(noisy, clean, batch)
