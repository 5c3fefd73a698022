"""What all data modules share: three data sets, their loaders, and splits that depend on nothing but a seed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_topkast.app.errors import AppError

Batch = tuple[Tensor, Tensor]
Example = Any


class SplitData(LightningDataModule):
    """Base of the data modules: a subclass fills `train_set`, `val_set` and `test_set` in `load`.

    The order of the training examples depends on `seed` and the epoch only: runs that differ in sparsity see the same
    batches, and a run resumed at an epoch's end continues with the batches it would have seen.

    Args:
        batch_size: Examples a step and process.
        num_workers: Loader processes; 0 is right for data that lies in memory.
        seed: Of the order of the training examples.
    """

    train_set: Dataset[Example]
    val_set: Dataset[Example]
    test_set: Dataset[Example]
    collate: Callable[[Any], Any] | None = None

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._loaded = False

    @abstractmethod
    def load(self) -> None:
        """Read the files and set the three data sets."""

    def setup(self, stage: str | None = None) -> None:
        """Read the data once, whichever stage comes first."""
        if not self._loaded:
            self.load()
            self._loaded = True

    def train_dataloader(self) -> DataLoader[Example]:
        """Shuffled batches; the last incomplete one is dropped, unless it is the only one."""
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return self._loader(self.train_set)  # the same batches each epoch
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        size = len(self.train_set)  # type: ignore[arg-type]
        # Lightning tells this sampler the epoch, also on one process; its order then survives a resume.
        sampler: DistributedSampler[Example] = DistributedSampler(
            self.train_set, num_replicas=world, rank=rank, shuffle=True, seed=self.seed
        )
        return self._loader(self.train_set, sampler=sampler, drop_last=size // world >= self.batch_size)

    def val_dataloader(self) -> DataLoader[Example]:
        """Validation batches in order."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Example]:
        """Test batches in order."""
        return self._loader(self.test_set)

    def _loader(self, dataset: Dataset[Example], **options: Any) -> DataLoader[Example]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate,
            **options,
        )


class ArrayDataset(Dataset[Any]):
    """Images and labels that lie in memory, read a whole batch at a time.

    Args:
        images: (n, channels, height, width), float or uint8; a batch of uint8 becomes (x / 255 - mean) / std.
        labels: (n,), int64.
        mean: Of the scaled pixels.
        std: Of the scaled pixels.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: float = 0.0, std: float = 1.0) -> None:
        self.images = images
        self.labels = labels
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self._convert(self.images[index]), self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch; torch's loader calls this in place of one call an example."""
        return self._convert(self.images[indices]), self.labels[indices]

    def _convert(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float().div_(255.0)
        return (images - self.mean) / self.std


class ArrayData(SplitData):
    """A data module over `ArrayDataset`s, whose batches come ready-made."""

    @staticmethod
    def collate(batch: Batch) -> Batch:
        """Pass the batch on: `ArrayDataset.__getitems__` has collated it."""
        return batch


def split_sizes(total: int, parts: Sequence[float], unit: str) -> list[int]:
    """Turn fractions (all below or equal to 1) or counts into counts whose sum is at most `total`."""
    if any(part < 0 for part in parts):
        raise AppError(f"a split can't be negative: {list(parts)}")
    fractions = all(part <= 1 for part in parts)
    if fractions and sum(parts) > 1 + 1e-9:
        raise AppError(f"the fractions {list(parts)} add up to more than 1")
    sizes = [int(part * total + 1e-6) if fractions else int(part) for part in parts]
    if sum(sizes) > total:
        raise AppError(f"the split {sizes} needs {sum(sizes):,} {unit}, but there are {total:,}")
    return sizes


def shuffled(total: int, seed: int) -> Tensor:
    """A permutation of `range(total)` that depends on `seed` only."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))


def check_classes(found: int, num_classes: int, source: str) -> None:
    """Refuse labels that the model's output has no place for."""
    if found != num_classes:
        raise AppError(
            f"{source} has {found} classes, but data.num_classes={num_classes}: set data.num_classes={found}"
        )
