import re

import keras

from graphswap import ir
from graphswap.tools import steps


def test_a_step_is_traced_with_its_batch():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(4)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    graph = ir.verify(steps.trace(model, keras.optimizers.SGD(0.1), loss, 32))
    assert any(value.shape == (32, 16) for node in graph.nodes for value in node.outputs)
    assert any(node.op.startswith("Assign") for node in graph.nodes)


def test_a_step_traced_once_is_that_of_any_batch():
    def traced(batch):
        model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(8, 3, padding="same")])
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.GlobalAveragePooling2D())
        model.add(keras.layers.Dense(4))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return steps.trace(model, keras.optimizers.SGD(0.1, momentum=0.9), loss, batch)

    def numbered(graph):
        """The text, without the numbers that TensorFlow gives to variables."""
        text = str(graph)
        for number, node in enumerate(graph.nodes):
            text = re.sub(rf"%{re.escape(node.name)}(?![\w/.-])", f"%{number}", text)
        return text

    step = steps.Step(traced, 8)
    at = step.at_batches()
    assert numbered(at(8)).splitlines() == numbered(step()).splitlines()
    assert numbered(at(24)).splitlines() == numbered(step(24)).splitlines()
