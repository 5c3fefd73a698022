"""Wide residual networks for small images (Zagoruyko and Komodakis 2016), which torchvision does not have."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_topkast.app.models.narrow import scaled


class WideResNet(nn.Module):
    """Three groups of pre-activation blocks with 16, 32 and 64 times `widen` channels; WRN-22-2 has depth 22, widen 2.

    Args:
        input_shape: Channels, height and width; the image is halved twice.
        num_classes: Number of logits.
        depth: 6n + 4, for n blocks per group.
        widen: Widening factor of the groups.
        dropout: Dropout probability between the two convolutions of a block.
        width_factor: Factor of all channels except those of the images, on top of `widen`.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int = 22,
        widen: int = 2,
        dropout: float = 0.0,
        width_factor: float = 1.0,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={depth} is not valid: expected 6n + 4, such as 16, 22 or 28")
        channels = [scaled(width, width_factor) for width in (16, 16 * widen, 32 * widen, 64 * widen)]
        self.conv1 = nn.Conv2d(input_shape[0], channels[0], kernel_size=3, padding=1, bias=False)
        self.groups = nn.Sequential(
            *(
                _group(blocks, inputs, outputs, stride, dropout)
                for inputs, outputs, stride in zip(channels, channels[1:], (1, 2, 2), strict=False)
            )
        )
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels[-1]), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (batch, classes)."""
        logits: Tensor = self.fc(self.head(self.groups(self.conv1(images))))
        return logits


class Block(nn.Module):
    """Twice batch norm, ReLU and 3×3 convolution, added to the input, or to its projection if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.project = None if same else nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return (batch, outputs, height, width), the latter two divided by the stride."""
        active = self.norm1(images).relu()
        residual = self.conv2(self.dropout(self.norm2(self.conv1(active)).relu()))
        skipped = images if self.project is None else self.project(active)
        out: Tensor = skipped + residual
        return out


def _group(blocks: int, inputs: int, outputs: int, stride: int, dropout: float) -> nn.Sequential:
    first = Block(inputs, outputs, stride, dropout)
    return nn.Sequential(first, *(Block(outputs, outputs, 1, dropout) for _ in range(blocks - 1)))
