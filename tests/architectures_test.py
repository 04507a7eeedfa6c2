import keras
import pytest

from graphswap.tools import architectures

# Trainable weights in millions: WRN-28-10 in its paper's tables, ResNet-200 as imgclsmob's preresnet200, which KARMA
# trained, and ViT-B/16 as timm's vit_base_patch16_224.
PUBLISHED = {
    "wrn28_10": (lambda: architectures.wide_resnet(28, 10, 32, 10), 36.5),
    "resnet200": (lambda: architectures.preactivation_resnet((3, 24, 36, 3), 224, 1000), 64.7),
    "vit": (lambda: architectures.vision_transformer(12, 768, 12, 16, 224, 1000), 86.6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_those_published(name):
    make, millions = PUBLISHED[name]
    model = make()
    weights = sum(weight.shape.num_elements() for weight in model.trainable_weights)
    assert weights / 1e6 == pytest.approx(millions, abs=0.1)


def test_depth_of_resnets_for_cifar():
    model = architectures.preactivation_resnet((2, 2, 2), 32, 10)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert len(convolutions) == 1 + 3 * 2 * 3 + 3  # with three shortcuts: ResNet-1001 has (111, 111, 111)
    assert model.output_shape == (None, 10)
