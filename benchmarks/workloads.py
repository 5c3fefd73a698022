"""What the benchmarks train: networks, optimizers and random data, none of it downloaded."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_topkast.app.models import MLP, TransformerLM

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A network with the optimizer and the batches it is trained with."""

    name: str
    build: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    batch: Callable[[int], Batch]
    sizes: tuple[int, ...]  # batch sizes that are timed
    rounds: int  # timed steps of each variant, per batch size
    ageing: tuple[int, int]  # (steps, batch size) between the early and the late timing
    keep_first_dense: bool = True


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    # fused: ten times as fast on CPU; and the plain one takes roots by MKL, which is slow on zeros (README.md)
    return AdamW(parameters, lr=1e-3, weight_decay=1e-2, fused=True)


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


def workloads(quick: bool) -> list[Workload]:
    """The three networks; `quick` shrinks them until a test can wait for them."""
    hidden, channels, width, time = ([64], 8, 32, 16) if quick else ([1024, 1024, 1024], 64, 384, 128)
    depth = 2 if quick else 6
    return [
        Workload(
            "MLP",
            lambda: MLP((1, 28, 28), 10, hidden),
            adamw,
            lambda size: (torch.randn(size, 1, 28, 28), torch.randint(10, (size,))),
            sizes=(8,) if quick else (128,),
            rounds=3 if quick else 60,
            ageing=(10, 8) if quick else (1000, 128),
            keep_first_dense=False,
        ),
        Workload(
            "ResNet-18",
            lambda: ResNet18(channels),
            sgd,
            lambda size: (torch.randn(size, 3, 32, 32), torch.randint(10, (size,))),
            sizes=(2, 4) if quick else (32, 128),
            rounds=2 if quick else 5,
            ageing=(2, 2) if quick else (150, 2),
        ),
        Workload(
            "transformer",
            lambda: TransformerLM(256, time, width=width, depth=depth, heads=4),
            adamw,
            lambda size: (torch.randint(256, (size, time)), torch.randint(256, (size, time))),
            sizes=(2,) if quick else (8,),
            rounds=2 if quick else 25,
            ageing=(2, 1) if quick else (150, 1),
        ),
    ]


class ResNet18(nn.Sequential):
    """ResNet-18 for small images: 3×3 stem, no max-pooling, `channels` times 1, 2, 4 and 8."""

    def __init__(self, channels: int = 64, num_classes: int = 10) -> None:
        widths = [channels * 2**stage for stage in range(4)]
        blocks = [Residual(3, channels, stride=1, stem=True)]
        for before, width in zip([channels, *widths], widths, strict=False):
            blocks += [Residual(before, width, stride=1 if width == channels else 2), Residual(width, width, stride=1)]
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)]
        super().__init__(*blocks, *pool)


class Residual(nn.Module):
    """Two 3×3 convolutions and a shortcut; the stem is a single one without."""

    def __init__(self, inside: int, outside: int, stride: int, stem: bool = False) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside))
        self.shortcut: nn.Module | None = None if stem else nn.Identity()
        if not stem:
            self.main.append(nn.ReLU())
            self.main.append(nn.Conv2d(outside, outside, 3, 1, 1, bias=False))
            self.main.append(nn.BatchNorm2d(outside))
            if stride != 1 or inside != outside:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
                )

    def forward(self, x: Tensor) -> Tensor:
        main = self.main(x)
        return torch.relu(main if self.shortcut is None else main + self.shortcut(x))


class ResNet50(nn.Sequential):
    """ResNet-50 for images of 224 × 224, `channels` times 1, 2, 4 and 8 in its bottlenecks."""

    def __init__(self, channels: int = 64, num_classes: int = 1000, blocks: Sequence[int] = (3, 4, 6, 3)) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        ]  # fmt: skip
        inside = channels
        for stage, count in enumerate(blocks):
            width = channels * 2**stage
            for block in range(count):
                layers.append(Bottleneck(inside, width, stride=2 if stage and not block else 1))
                inside = 4 * width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, num_classes))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, of which the last has four times as many channels, and a shortcut."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.shortcut(x))
