"""Image classifiers: a multi-layer perceptron, a small convolutional network, and torchvision's ResNets."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_topkast.app.models.narrow import narrow_, scaled
from lightning_topkast.app.vision import load_torchvision

_SMALL_IMAGE = 64


class MLP(nn.Sequential):
    """Flatten, then hidden layers with ReLU, then a linear output.

    Args:
        input_shape: Shape of one example, e.g. `[1, 28, 28]`.
        num_classes: Number of logits.
        hidden: Widths of the hidden layers.
        dropout: Probability after each hidden layer.
        width_factor: Factor of the hidden widths.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        width_factor: float = 1.0,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        width = math.prod(input_shape)
        for i, out in enumerate([scaled(width, width_factor) for width in hidden], start=1):
            layers[f"hidden{i}"] = nn.Linear(width, out)
            layers[f"relu{i}"] = nn.ReLU()
            if dropout:
                layers[f"dropout{i}"] = nn.Dropout(dropout)
            width = out
        layers["output"] = nn.Linear(width, num_classes)
        super().__init__(layers)


class CNN(nn.Sequential):
    """Blocks of 3×3 convolution, batch norm, ReLU and halving, then one hidden and one output layer.

    Args:
        input_shape: Channels, height and width, large enough for the halvings.
        num_classes: Number of logits.
        channels: Output channels of each block; every block but the last halves the image.
        hidden: Width of the hidden layer.
        width_factor: Factor of the channels and of the hidden width.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        channels: Sequence[int] = (32, 64, 64),
        hidden: int = 128,
        width_factor: float = 1.0,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        width, height, breadth = input_shape
        channels, hidden = [scaled(out, width_factor) for out in channels], scaled(hidden, width_factor)
        for i, out in enumerate(channels, start=1):
            layers[f"conv{i}"] = nn.Conv2d(width, out, kernel_size=3, padding=1, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm2d(out)
            layers[f"relu{i}"] = nn.ReLU()
            if i < len(channels):
                layers[f"pool{i}"] = nn.MaxPool2d(2)
                height, breadth = height // 2, breadth // 2
            width = out
        if min(height, breadth) < 1:
            raise ValueError(
                f"images of {list(input_shape)} are too small for {len(channels)} blocks: use fewer channels="
            )
        layers["shrink"] = nn.AdaptiveAvgPool2d(min(4, height, breadth))
        layers["flatten"] = nn.Flatten()
        layers["hidden"] = nn.Linear(width * min(4, height, breadth) ** 2, hidden)
        layers["relu"] = nn.ReLU()
        layers["output"] = nn.Linear(hidden, num_classes)
        super().__init__(layers)


def resnet(
    depth: int,
    input_shape: Sequence[int],
    num_classes: int,
    small_images: bool | None = None,
    width_factor: float = 1.0,
    **options: object,
) -> nn.Module:
    """Return torchvision's ResNet, with a stem for the size of the images.

    Args:
        depth: 18, 34, 50, 101 or 152.
        input_shape: Channels, height and width.
        num_classes: Number of logits.
        small_images: Use a 3×3 stem without max-pooling (as for CIFAR); None does so up to 64 pixels.
        width_factor: Factor of all channels except those of the images, at most 1.
        options: Further arguments of `torchvision.models.resnet<depth>`.
    """
    models = load_torchvision("models")
    if (build := getattr(models, f"resnet{depth}", None)) is None:
        raise ValueError(f"depth={depth}: torchvision has ResNets of depth 18, 34, 50, 101 and 152")
    net: nn.Module = build(num_classes=num_classes, **options)
    channels, *size = input_shape
    if small_images is None:
        small_images = max(size) <= _SMALL_IMAGE
    if small_images:
        net.conv1 = _stem(channels, kernel=3, stride=1)
        net.maxpool = nn.Identity()
    elif channels != 3:
        net.conv1 = _stem(channels, kernel=7, stride=2)
    return net if width_factor == 1.0 else narrow_(net, width_factor)


def _stem(channels: int, kernel: int, stride: int) -> nn.Conv2d:
    stem = nn.Conv2d(channels, 64, kernel_size=kernel, stride=stride, padding=kernel // 2, bias=False)
    weight: Tensor = stem.weight
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")  # as torchvision initializes its own
    return stem
