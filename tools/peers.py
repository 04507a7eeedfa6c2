"""graphswap beside other ways to recompute in Keras: which run, what they save, which gradients are right.

    graphswap run --memory=4GiB -- tools/peers.py --out=peers.json

Every way trains a step of the same residual network. Its gradients, and what BatchNorm and Dropout keep
from step to step, are compared with plain Keras's.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from keras import layers

from graphswap import profiler
from graphswap.options import Options, format_bytes
from graphswap.tools.benchmark import markdown_table

KINDS: Mapping[str, Callable[[], keras.Layer]] = {
    "LayerNormalization": layers.LayerNormalization,
    "BatchNormalization": layers.BatchNormalization,
    "Dropout": lambda: layers.Dropout(0.2),
}
"""What each block holds beside its convolution."""
WAYS = ("plain", "graphswap", "tf.recompute_grad", "keras.RematScope", "keras.RematScope, no arguments")

_CHANNELS = 16


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one way.

    Attributes:
        kind: One of `KINDS`.
        way: One of `WAYS`.
        error: What was raised; empty if the step ran.
        gradient_error: Norm of the difference to plain Keras's gradients, relative to theirs.
        state_error: Norm of the difference to plain Keras's moving statistics and seeds, relative to theirs.
        step_bytes: The most that a step adds to the memory in use; None if the device does not count.
    """

    kind: str
    way: str
    error: str = ""
    gradient_error: float = 0.0
    state_error: float = 0.0
    step_bytes: int | None = None


class Block(layers.Layer):
    """A convolution, the layer in question and ReLU, with a skip around them."""

    def __init__(self, convolution: keras.Layer, layer: keras.Layer, recomputes: bool):
        super().__init__()
        self.convolution = convolution
        self.layer = layer
        self.recomputes = recomputes

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.convolution.build(shape)
        self.layer.build(shape)

    def body(self, x: Any, training: bool | None) -> Any:
        return x + tf.nn.relu(self.layer(self.convolution(x), training=training))

    def call(self, x: Any, training: bool | None = None) -> Any:
        if self.recomputes:
            return tf.recompute_grad(lambda t: self.body(t, training))(x)
        return self.body(x, training)


class BlockWithoutArguments(Block):
    """The same for RematScope, which fails on calls with keyword arguments; Keras passes `training` on by itself."""

    def call(self, x: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (Keras reads the signature)
        return self.body(x, None)


def compare(kind: str, blocks: int = 8, size: int = 32, batch: int = 16) -> Iterator[Outcome]:
    """Trains a step in every way, plainly first."""
    images = np.random.default_rng(0).normal(size=(batch, size, size, _CHANNELS)).astype("float32")
    plain: tuple[np.ndarray, np.ndarray] | None = None
    for way in WAYS:
        keras.backend.clear_session()
        keras.utils.set_random_seed(0)
        option: dict[str, Any] = {"graphswap": Options("min")} if way == "graphswap" else {}
        model = _model(kind, way, blocks, size)
        model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=False, **option)
        before = _flat(model.trainable_variables)
        try:
            model.train_on_batch(images, images[:, ::-1])
        except (ValueError, AttributeError) as error:
            yield Outcome(kind, way, _reason(error))
            continue
        found = before - _flat(model.trainable_variables), _flat(model.non_trainable_variables)
        plain = plain or found
        gradient_error, state_error = map(_difference, found, plain)
        step_bytes = _added_bytes(lambda model=model: model.train_on_batch(images, images[:, ::-1]))
        yield Outcome(kind, way, "", gradient_error, state_error, step_bytes)


def table(outcomes: list[Outcome]) -> str:
    """The outcomes for people."""
    header = ["block with", "way", "gradients", "statistics and seeds", "a step adds"]
    return markdown_table(header, map(_row, outcomes))


def _model(kind: str, way: str, blocks: int, size: int) -> keras.Model:
    x = inputs = keras.Input((size, size, _CHANNELS))
    for _ in range(blocks):
        # Layers made under the scope would each be recomputed alone, which saves nothing.
        parts = layers.Conv2D(_CHANNELS, 3, padding="same"), KINDS[kind]()
        block = BlockWithoutArguments if way == "keras.RematScope, no arguments" else Block
        with keras.RematScope("full" if way.startswith("keras.RematScope") else None):
            layer = block(*parts, recomputes=way == "tf.recompute_grad")
        x = layer(x)
    return keras.Model(inputs, x)


def _reason(error: Exception) -> str:
    """The line of Keras's message that says what is wrong, without the colours and the calls around it."""
    lines = [re.sub(r"\x1b\[\d+m", "", line).strip() for line in str(error).splitlines()]
    return next(line for line in lines if line and not line.startswith(("Exception encountered", "Could not auto")))


def _flat(variables: list[Any]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(variable.numpy().astype("float64").ravel() for variable in variables)])


def _difference(found: np.ndarray, plain: np.ndarray) -> float:
    return float(np.linalg.norm(found - plain) / (np.linalg.norm(plain) or 1.0))


def _added_bytes(step: Callable[[], Any]) -> int | None:
    before = profiler.memory_in_use()
    if before is None:
        return None
    tf.config.experimental.reset_memory_stats(profiler.device_name())
    step()
    return (profiler.memory_in_use("peak") or 0) - before


def _row(outcome: Outcome) -> list[str]:
    if outcome.error:
        return [outcome.kind, outcome.way, f"fails: {outcome.error[:100]}", "", ""]

    def verdict(error: float) -> str:
        return f"off by {error:.1e}" if error else "equal"

    added = "not counted" if outcome.step_bytes is None else format_bytes(outcome.step_bytes)
    errors = [verdict(outcome.gradient_error), verdict(outcome.state_error)]
    return [outcome.kind, outcome.way, *errors, added]


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, received {argv[1:]}.")
    # Both regroup sums and products where a value has a single reader, so that rounding differs.
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False, "constant_folding": False})
    outcomes = [outcome for kind in KINDS for outcome in compare(kind)]
    print(table(outcomes))
    if flags.FLAGS.out:
        text = json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1)
        pathlib.Path(flags.FLAGS.out).write_text(text + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "File for the results, as JSON.")
    app.run(_main)
