"""Published image classifiers that keras.applications does not have, in plain Keras layers, without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers


def preactivation_resnet(blocks: Sequence[int], size: int, classes: int) -> keras.Model:
    """A residual network of pre-activation bottlenecks (He et al., 2016, arXiv 1603.05027).

    (3, 24, 36, 3) at 224 pixels is their ResNet-200, (111, 111, 111) at 32 pixels their ResNet-1001.

    Args:
        blocks: Of each stage; four stages as for ImageNet, three as for CIFAR.
        size: Height and width of the images in pixels.
        classes: Number of outputs, which are logits.
    """
    image = keras.Input((size, size, 3))
    if len(blocks) == 4:
        width, x = 64, layers.Conv2D(64, 7, 2, "same", use_bias=False)(image)
        x = layers.MaxPooling2D(3, 2, "same")(_activated(x))
    else:
        width, x = 16, layers.Conv2D(16, 3, 1, "same", use_bias=False)(image)
    for stage, count in enumerate(blocks):
        for block in range(count):
            x = _bottleneck(x, width << stage, stride=2 if stage and not block else 1)
    return keras.Model(image, layers.Dense(classes)(layers.GlobalAveragePooling2D()(_activated(x))))


def wide_resnet(depth: int, factor: int, size: int, classes: int) -> keras.Model:
    """A wide residual network without Dropout (Zagoruyko and Komodakis, 2016, arXiv 1605.07146).

    Depth 28 and factor 10 at 32 pixels are their WRN-28-10.

    Args:
        depth: 6 n + 4 convolutions, shortcuts not counted.
        factor: By which stages are wider than a ResNet's 16, 32 and 64.
        size: Height and width of the images in pixels.
        classes: Number of outputs, which are logits.
    """
    image = keras.Input((size, size, 3))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(image)
    for stage in range(3):
        for block in range((depth - 4) // 6):
            x = _wide_block(x, 16 * factor << stage, stride=2 if stage and not block else 1)
    return keras.Model(image, layers.Dense(classes)(layers.GlobalAveragePooling2D()(_activated(x))))


def vision_transformer(blocks: int, width: int, heads: int, patch: int, size: int, classes: int) -> keras.Model:
    """A vision transformer (Dosovitskiy et al., 2021, arXiv 2010.11929), averaged instead of with a class token.

    12 blocks of width 768 with 12 heads and patches of 16 pixels are their ViT-B/16. The average is that of
    Beyer et al., 2022, arXiv 2205.01580.

    Args:
        blocks: Number of transformer blocks.
        width: Of the tokens.
        heads: Of each attention.
        patch: Height and width of a token's patch in pixels.
        size: Height and width of the images in pixels.
        classes: Number of outputs, which are logits.
    """
    image = keras.Input((size, size, 3))
    length = (size // patch) ** 2
    x = layers.Reshape((length, width))(layers.Conv2D(width, patch, patch)(image))
    x = _Positions()(x)
    for _ in range(blocks):
        x = transformer_block(x, heads)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(image, layers.Dense(classes)(x))


def transformer_block(x: Any, heads: int, is_causal: bool = False) -> Any:
    """Attention and a perceptron four times as wide, each normalised first and added to what it read."""
    width = x.shape[-1]
    y = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=is_causal)
    y = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
    return x + layers.Dense(width)(y)


class _Positions(layers.Layer):
    """Adds to every token what is learned about its position."""

    def build(self, input_shape: Sequence[int]) -> None:
        self.table = self.add_weight(shape=input_shape[1:], initializer="random_normal")

    def call(self, tokens: Any) -> Any:
        return tokens + self.table


def _activated(x: Any) -> Any:
    return layers.ReLU()(layers.BatchNormalization()(x))


def _bottleneck(x: Any, width: int, stride: int) -> Any:
    """1x1, 3x3, 1x1, the last four times as wide. The shortcut is a convolution only where shapes differ."""
    y = _activated(x)
    if stride > 1 or x.shape[-1] != 4 * width:
        x = layers.Conv2D(4 * width, 1, stride, use_bias=False)(y)
    y = layers.Conv2D(width, 1, use_bias=False)(y)
    y = layers.Conv2D(width, 3, stride, "same", use_bias=False)(_activated(y))
    return x + layers.Conv2D(4 * width, 1, use_bias=False)(_activated(y))


def _wide_block(x: Any, width: int, stride: int) -> Any:
    """Two 3x3. The shortcut is a convolution only where shapes differ."""
    y = _activated(x)
    if stride > 1 or x.shape[-1] != width:
        x = layers.Conv2D(width, 1, stride, use_bias=False)(y)
    y = layers.Conv2D(width, 3, stride, "same", use_bias=False)(y)
    return x + layers.Conv2D(width, 3, padding="same", use_bias=False)(_activated(y))
