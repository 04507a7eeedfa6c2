"""Training steps of large models as graphs: traced, never run. `STEPS[name]()` returns an `ir.Graph`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import keras
import tensorflow as tf

from graphswap import graphdef, ir
from graphswap.tools import models

_CLASSES = 1000


def trace(model: keras.Model, optimizer: keras.optimizers.Optimizer, loss: keras.losses.Loss, batch: int) -> ir.Graph:
    """The step of `train_on_batch` on a batch of so many examples: forward pass, gradients, updates.

    Args:
        model: With one input and one output, whose targets are class numbers.
        optimizer: Not built yet.
        loss: Of (targets, outputs).
        batch: Number of examples.
    """
    optimizer.build(model.trainable_variables)

    def step(inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            value = loss(targets, model(inputs, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        return value

    inputs = tf.TensorSpec((batch, *model.inputs[0].shape[1:]), model.inputs[0].dtype)
    targets = tf.TensorSpec((batch, *model.output_shape[1:-1]), tf.int32)
    traced = tf.function(lambda *arguments: graphdef.call_inline(step, arguments, {}), autograph=False)
    func_graph = traced.get_concrete_function(inputs, targets).graph
    folding = graphdef.constant_folding(func_graph)
    if folding is not None:
        graphdef.regroup(func_graph, folding)
    shapes = (tuple(inputs.shape), tuple(targets.shape))
    return graphdef.import_function(func_graph, shapes, folding)


def _application(name: str, batch: int) -> ir.Graph:
    model = getattr(keras.applications, name)(weights=None, classes=_CLASSES)
    sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    return trace(model, sgd, keras.losses.SparseCategoricalCrossentropy(), batch)


def _gpt(batch: int) -> ir.Graph:
    training = models.gpt(blocks=12, width=768, heads=12, length=1024, batch=batch)
    return trace(
        training.model, training.optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), batch
    )


def _unet(batch: int) -> ir.Graph:
    model = models.unet(widths=(64, 128, 256, 512), size=256, batch=8).model
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return trace(model, keras.optimizers.Adam(1e-3), loss, batch)


STEPS: Mapping[str, Callable[[], ir.Graph]] = {
    "resnet50": functools.partial(_application, "ResNet50", 256),
    "vgg16": functools.partial(_application, "VGG16", 128),
    "densenet121": functools.partial(_application, "DenseNet121", 128),
    "efficientnet": functools.partial(_application, "EfficientNetB0", 256),
    "unet": functools.partial(_unet, 64),
    "gpt": functools.partial(_gpt, 16),
}
"""By name. Images are 224x224, the U-Net's 256x256; the GPT has 12 blocks of width 768 and 1024 words."""
