"""The base of all data modules: three data sets, their loaders, and splits that depend on a seed only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_topkast.app.errors import AppError
from lightning_topkast.checks import is_count

Batch = tuple[Tensor, Tensor]
Example = Any


class SplitData(LightningDataModule):
    """Base of the data modules: a subclass fills `train_set`, `val_set` and `test_set` in `load`.

    The order of the training examples depends on `seed` and the epoch only: runs that differ in sparsity see the same
    batches, and a run that is resumed continues with the batches it would have seen, also in the middle of an epoch
    (but for `overfit_batches`).

    Args:
        batch_size: Examples per step and process.
        num_workers: Worker processes of the loaders; 0 is right for data that lies in memory.
        seed: Seed of the order of the training examples.
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
        self._train_loader: ResumableLoader | None = None
        self._position: Mapping[str, int] | None = None

    @abstractmethod
    def load(self) -> None:
        """Read the files and set the three data sets."""

    def setup(self, stage: str | None = None) -> None:
        """Read the data once, in the first stage."""
        if not self._loaded:
            self.load()
            self._loaded = True

    def train_dataloader(self) -> DataLoader[Example]:
        """Return shuffled batches; an incomplete last batch is dropped, unless it is the only one."""
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return self._loader(self.train_set)  # the same batches each epoch
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        size = len(self.train_set)  # type: ignore[arg-type]
        # Lightning sets the epoch of this sampler, also on a single process, so that its order survives a resume.
        sampler = ResumableSampler(self.train_set, num_replicas=world, rank=rank, shuffle=True, seed=self.seed)
        loader = self._loader(
            self.train_set, kind=ResumableLoader, sampler=sampler, drop_last=size // world >= self.batch_size
        )
        self._train_loader = cast(ResumableLoader, loader)
        self._train_loader.position, self._position = self._position, None
        return loader

    def state_dict(self) -> dict[str, int]:
        """Return the position of training in its epoch.

        Lightning asks the loader itself, too, but gives its state back to none that was made before the loops were
        restored, as it is where the length of the run is asked for.
        """
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start the next training loader at that position."""
        self._position = _checked_position(state_dict) if state_dict else None

    def val_dataloader(self) -> DataLoader[Example]:
        """Return validation batches in order."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Example]:
        """Return test batches in order."""
        return self._loader(self.test_set)

    def _loader(
        self, dataset: Dataset[Example], kind: type[DataLoader[Example]] = DataLoader, **options: Any
    ) -> DataLoader[Example]:
        return kind(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate,
            **options,
        )


class ResumableSampler(DistributedSampler[Example]):
    """A `DistributedSampler` that can skip the first examples of an epoch."""

    skip = 0

    def __iter__(self) -> Iterator[int]:
        """Yield indices from the first that is not skipped."""
        return islice(super().__iter__(), self.skip, None)


class ResumableLoader(DataLoader[Example]):
    """A loader over a `ResumableSampler` that can start in the middle of an epoch without reading what was seen."""

    sampler: ResumableSampler
    position: Mapping[str, int] | None = None  # where to start: an epoch, and the number of batches seen in it

    _batches = 0

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of batches returned in it, and their number of examples on all processes."""
        return {"epoch": self.sampler.epoch, "batches": self._batches, "examples": self._examples}

    @property
    def _examples(self) -> int:
        return (self.batch_size or 1) * self.sampler.num_replicas

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Start there the next time."""
        self.position = _checked_position(state_dict)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # what DataLoader returns is one
        """Yield the batches of an epoch, or the remaining ones."""
        position, self.position = self.position, None
        # a position at the end of an epoch belongs to the next epoch
        goes_on = position is not None and position["epoch"] == self.sampler.epoch
        self._batches = position["batches"] % len(self) if position is not None and goes_on else 0
        if self._batches and position is not None and position["examples"] != self._examples:
            rank_zero_warn(
                f"the checkpoint was saved in the middle of an epoch, of batches of {position['examples']} examples "
                f"over all processes; they have {self._examples} now, so that in what is left of it some examples are "
                "seen twice or not at all"
            )
        self.sampler.skip = self._batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._batches += 1
            yield batch


def _checked_position(state: Any) -> Mapping[str, int]:
    if not isinstance(state, Mapping) or not all(
        is_count(state.get(key), 0) for key in ("epoch", "batches", "examples")
    ):
        raise ValueError(f"expected a position in the training data (epoch, batches, examples), got {state!r:.80}")
    return state


class ArrayDataset(Dataset[Any]):
    """Images and labels in memory, read a batch at a time.

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
        """Return a batch; torch's loader calls this instead of `__getitem__` for each example."""
        return self._convert(self.images[indices]), self.labels[indices]

    def _convert(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float().div_(255.0)
        return (images - self.mean) / self.std


class ArrayData(SplitData):
    """A data module over `ArrayDataset`s, which return whole batches."""

    @staticmethod
    def collate(batch: Batch) -> Batch:
        """Return the batch, which `ArrayDataset.__getitems__` has collated."""
        return batch


def split_sizes(total: int, parts: Sequence[float], unit: str) -> list[int]:
    """Convert fractions (all at most 1) or counts to counts whose sum is at most `total`."""
    if any(part < 0 for part in parts):
        raise AppError(f"expected a split of non-negative numbers, got {list(parts)}")
    fractions = all(part <= 1 for part in parts)
    if fractions and sum(parts) > 1 + 1e-9:
        raise AppError(f"the fractions {list(parts)} add up to more than 1")
    sizes = [int(part * total + 1e-6) if fractions else int(part) for part in parts]
    if sum(sizes) > total:
        raise AppError(f"the split {sizes} needs {sum(sizes):,} {unit}, but there are {total:,}")
    return sizes


def shuffled(total: int, seed: int) -> Tensor:
    """Return a permutation of `range(total)` that depends on `seed` only."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))


def check_classes(found: int, num_classes: int, source: str) -> None:
    """Refuse labels that exceed the number of classes of the model."""
    if found != num_classes:
        raise AppError(
            f"{source} has {found} classes, but data.num_classes={num_classes}: set data.num_classes={found}"
        )
