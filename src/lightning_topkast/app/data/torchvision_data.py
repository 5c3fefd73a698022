"""CIFAR-10 and ImageNet, with the data sets and v2 transforms of torchvision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_topkast.app.data.base import SplitData, check_classes, shuffled, split_sizes
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.vision import load_torchvision

Transform = Callable[[Any], Any]


class TransformedSubset(Dataset[Any]):
    """A subset with its own transform, since training and validation share images but not augmentation."""

    def __init__(self, dataset: Dataset[Any], indices: Tensor, transform: Transform) -> None:
        self.dataset = dataset
        self.indices = indices.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[self.indices[index]]
        return self.transform(image), label


class _TorchvisionData(SplitData):
    """The base of both: a training set, some images of which are used for validation, and a test set."""

    mean: Sequence[float]
    std: Sequence[float]

    def __init__(
        self,
        folder: str,
        batch_size: int,
        num_workers: int,
        seed: int,
        val_size: float,
        split_seed: int,
        num_classes: int,
        input_shape: Sequence[int],
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.folder = Path(folder).expanduser()
        self.val_size = val_size
        self.split_seed = split_seed
        self.num_classes = num_classes
        self.input_shape = tuple(input_shape)

    def _split(self, train: Any, test: Any) -> None:
        check_classes(len(train.classes), self.num_classes, str(self.folder))
        order = shuffled(len(train), self.split_seed)
        (val_size,) = split_sizes(len(train), [self.val_size], "training images")
        augment, plain = self._transform(training=True), self._transform(training=False)
        self.train_set = TransformedSubset(train, order[val_size:], augment)
        self.val_set = TransformedSubset(train, order[:val_size], plain)
        self.test_set = TransformedSubset(test, torch.arange(len(test)), plain)

    def _transform(self, training: bool) -> Transform:
        v2 = load_torchvision("transforms.v2")
        steps = [
            *self._geometry(v2, training),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(self.mean, self.std),
            v2.ToPureTensor(),
        ]
        transform: Transform = v2.Compose(steps)
        return transform

    def _geometry(self, v2: Any, training: bool) -> list[Any]:
        raise NotImplementedError


class CIFAR10(_TorchvisionData):
    """CIFAR-10 with random crops and flips.

    Args:
        folder: Holds `cifar-10-batches-py`, as unpacked by torchvision.
        download: Whether torchvision downloads it if it is missing.
        batch_size: Examples per step and process.
        num_workers: Worker processes of the loaders.
        seed: Seed of the order of the training examples.
        val_size: Training images kept for validation, as a fraction or a count.
        split_seed: Seed of the choice of these images, the same in all runs.
        num_classes: 10; models refer to it.
        input_shape: [3, 32, 32]; models refer to it.
    """

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        folder: str = "data",
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        val_size: float = 5000,
        split_seed: int = 0,
        num_classes: int = 10,
        input_shape: Sequence[int] = (3, 32, 32),
    ) -> None:
        super().__init__(folder, batch_size, num_workers, seed, val_size, split_seed, num_classes, input_shape)
        self.download = download

    def prepare_data(self) -> None:
        """Download if asked to; Lightning calls this on one process per node."""
        if self.download:
            self._open(train=True, download=True)

    def load(self) -> None:
        """Open both parts, whose hashes torchvision checks."""
        self._split(self._open(train=True), self._open(train=False))

    def _open(self, train: bool, download: bool = False) -> Any:
        datasets = load_torchvision("datasets")
        try:
            return datasets.CIFAR10(self.folder, train=train, download=download)
        except (RuntimeError, OSError) as error:
            raise AppError(
                f"no complete CIFAR-10 in {self.folder.absolute() / 'cifar-10-batches-py'} ({error}): fetch it with "
                f"data.download=true, or name the folder that holds it with data.folder=..."
            ) from error

    def _geometry(self, v2: Any, training: bool) -> list[Any]:
        if not training:
            return []
        return [v2.RandomCrop(self.input_shape[-2:], padding=4), v2.RandomHorizontalFlip()]


class ImageNet(_TorchvisionData):
    """ImageNet, or any folder of images with the same layout: `train/<class>/*.jpg` and `val/<class>/*.jpg`.

    The labels of ImageNet's own test images aren't public: as usual its validation images are the test set here, and
    part of the training images serves for validation.

    Args:
        folder: Holds `train` and `val`.
        batch_size: Examples per step and process.
        num_workers: Worker processes of the loaders; decoding needs many.
        seed: Seed of the order of the training examples.
        val_size: Training images kept for validation, as a fraction or a count.
        split_seed: Seed of the choice of these images, the same in all runs.
        num_classes: Folders in `train`; models refer to it.
        input_shape: Channels, height and width of the crops; models refer to it.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        folder: str = "data/imagenet",
        batch_size: int = 256,
        num_workers: int = 8,
        seed: int = 0,
        val_size: float = 0.01,
        split_seed: int = 0,
        num_classes: int = 1000,
        input_shape: Sequence[int] = (3, 224, 224),
    ) -> None:
        super().__init__(folder, batch_size, num_workers, seed, val_size, split_seed, num_classes, input_shape)

    def load(self) -> None:
        """List both folders."""
        self._split(self._open("train"), self._open("val"))

    def _open(self, part: str) -> Any:
        folder = self.folder / part
        if not folder.is_dir():
            raise AppError(
                f"no ImageNet in {folder.absolute()}: get ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
                f'ILSVRC2012_devkit_t12.tar.gz from https://image-net.org/download, unpack them with `python -c "from '
                f"torchvision.datasets import ImageNet; "
                f"[ImageNet('{self.folder}', part) for part in ('train', 'val')]\"`"
                f", or name the folder that holds train/ and val/ with data.folder=..."
            )
        try:
            return load_torchvision("datasets").ImageFolder(folder)
        except FileNotFoundError as error:  # a class without images
            raise AppError(f"{folder}: {error}") from error

    def _geometry(self, v2: Any, training: bool) -> list[Any]:
        size = self.input_shape[-2:]
        if training:
            return [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        return [v2.Resize(round(max(size) * 256 / 224), antialias=True), v2.CenterCrop(size)]
