"""Training steps of large models as graphs: traced, never run. `STEPS[name](batch)` returns an `ir.Graph`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from graphswap import graphdef, ir, pipeline
from graphswap.tools import architectures, models

_CLASSES = 1000
_PRIME = 1009


def function(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, loss: Callable[..., tf.Tensor], batch: int
) -> tuple[Callable[..., tf.Tensor], tuple[tf.TensorSpec, tf.TensorSpec]]:
    """The step of `train_on_batch` on a batch of so many examples, to be traced: forward pass, gradients, updates.

    Args:
        model: With one input and one output, whose targets are class numbers.
        optimizer: Not built yet.
        loss: Of (targets, outputs).
        batch: Number of examples.

    Returns:
        A function of inputs and targets, and what these are.
    """
    optimizer.build(model.trainable_variables)

    def step(inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            value = loss(targets, model(inputs, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        return value

    inputs = tf.TensorSpec((batch, *model.inputs[0].shape[1:]), model.inputs[0].dtype)
    targets = tf.TensorSpec((batch, *model.output_shape[1:-1]), tf.int32)
    return lambda *arguments: graphdef.call_inline(step, arguments, {}), (inputs, targets)


def trace(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, loss: Callable[..., tf.Tensor], batch: int
) -> ir.Graph:
    """The graph of `function`, whose arguments these are."""
    step, specs = function(model, optimizer, loss, batch)
    traced: Any = tf.function(step, autograph=False).get_concrete_function(*specs)
    return pipeline.imported(traced.graph, [tuple(spec.shape) for spec in specs])


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step that can be traced at any batch size.

    Attributes:
        build: From the number of examples to the graph.
        batch: How many there are if nobody says otherwise.
    """

    build: Callable[[int], ir.Graph]
    batch: int

    def __call__(self, batch: int | None = None) -> ir.Graph:
        """Traces the step. Keras numbers its layers anew."""
        keras.backend.clear_session()
        return self.build(self.batch if batch is None else batch)

    def at_batches(self) -> Callable[[int], ir.Graph]:
        """Traces the step once and returns what makes it anew at any batch size, in no time.

        It is traced at a large prime: only dimensions that hold the batch are multiples of it.
        """
        graph = self(_PRIME)

        def rebatched(value: ir.Value, batch: int) -> ir.Value:
            shape = value.shape and tuple(d if not d or d % _PRIME else d // _PRIME * batch for d in value.shape)
            return dataclasses.replace(value, shape=shape)

        def at(batch: int) -> ir.Graph:
            nodes = (
                dataclasses.replace(node, outputs=tuple(rebatched(value, batch) for value in node.outputs))
                for node in graph.nodes
            )
            return graph.replace(nodes=tuple(nodes))

        return at


_sgd = functools.partial(keras.optimizers.SGD, 0.1, momentum=0.9)
_adam = functools.partial(keras.optimizers.Adam, 1e-3)


def _application(name: str, batch: int) -> ir.Graph:
    model = getattr(keras.applications, name)(weights=None, classes=_CLASSES)
    return trace(model, _sgd(), keras.losses.SparseCategoricalCrossentropy(), batch)


def _architecture(
    model: Callable[[], keras.Model], batch: int, optimizer: Callable[[], keras.optimizers.Optimizer] = _sgd
) -> ir.Graph:
    return trace(model(), optimizer(), keras.losses.SparseCategoricalCrossentropy(from_logits=True), batch)


def _gpt(batch: int) -> ir.Graph:
    training = models.gpt(blocks=12, width=768, heads=12, length=1024, batch=batch)
    return trace(
        training.model, training.optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), batch
    )


def _unet() -> keras.Model:
    return models.unet(widths=(64, 128, 256, 512), size=256, batch=8).model


def cifar_resnet(blocks: int) -> Step:
    """A pre-activation ResNet for CIFAR with so many bottlenecks in each of three stages; 111 make ResNet-1001."""
    model = functools.partial(architectures.preactivation_resnet, (blocks,) * 3, size=32, classes=10)
    return Step(functools.partial(_architecture, model), 128)


_resnet200 = functools.partial(architectures.preactivation_resnet, (3, 24, 36, 3), size=224, classes=_CLASSES)
_wrn = functools.partial(architectures.wide_resnet, depth=28, factor=10, size=32, classes=10)
_vit = functools.partial(
    architectures.vision_transformer, blocks=12, width=768, heads=12, patch=16, size=224, classes=_CLASSES
)

STEPS: Mapping[str, Step] = {
    "resnet50": Step(functools.partial(_application, "ResNet50"), 256),
    "vgg16": Step(functools.partial(_application, "VGG16"), 256),
    "resnet200": Step(functools.partial(_architecture, _resnet200), 96),
    "wrn28_10": Step(functools.partial(_architecture, _wrn), 1280),
    "resnet1001": cifar_resnet(111),
    "densenet121": Step(functools.partial(_application, "DenseNet121"), 192),
    "efficientnet": Step(functools.partial(_application, "EfficientNetB0"), 256),
    "unet": Step(functools.partial(_architecture, _unet, optimizer=_adam), 64),
    "vit": Step(functools.partial(_architecture, _vit, optimizer=_adam), 112),
    "gpt": Step(_gpt, 16),
}
"""By name. Images are 224x224, the U-Net's 256x256, those of wrn28_10 and resnet1001 32x32; the GPT has 12 blocks
of width 768 and 1024 words."""
