"""Long sequences of tokens, bytes or words, cut into windows for next-token prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_topkast.app.data.base import ArrayData, Batch, Example

Tokens = np.ndarray[Any, np.dtype[Any]]

IGNORED = -100  # target of positions without a prediction; the default of torch's losses


class Windows(Dataset[Any]):
    """Consecutive windows of `length` tokens with the token after each as targets, read a batch at a time.

    Every token but the first is a target at most once.

    Args:
        content: (n,), integers of any type; may be mapped into memory.
        length: Tokens a window.
        complete: What is left behind the last whole window is in one more, which ends with the content: those of its
            targets that the window before it has are `IGNORED`. Otherwise the remainder is left out.
        multiple: Add windows whose targets are all `IGNORED` until their number is a multiple of this one.
    """

    def __init__(self, content: Tokens, length: int, complete: bool = False, multiple: int = 1) -> None:
        self.content = content
        self.length = length
        self._targets = max(0, len(content) - 1)
        windows, rest = divmod(self._targets, length)
        if complete and windows and rest:
            windows += 1
        self._size = -(-windows // multiple) * multiple

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch; torch's loader calls this instead of `__getitem__` for each example."""
        begins = np.asarray(indices)[:, None] * self.length  # of the predicted tokens of each window
        starts = np.minimum(begins, self._targets - self.length)  # of the window itself, which has the full length
        rows = torch.from_numpy(self.content[starts + np.arange(self.length + 1)].astype(np.int64))
        before = torch.from_numpy(starts + np.arange(self.length) < begins)
        return rows[:, :-1], rows[:, 1:].masked_fill(before, IGNORED)


class WindowData(ArrayData):
    """A data module over `Windows`, the base of the text modules.

    Validation and test score every token of their part but the first exactly once, on any number of processes: what
    is left behind the last whole window too, and no window twice to give each process as many.

    Args:
        sequence_length: Tokens a window.
        batch_size: Windows a step and process.
        num_workers: Worker processes of the loaders.
        seed: Of the order of the training windows.
        num_classes: Size of the vocabulary; models refer to it.
    """

    train_set: Windows
    val_set: Windows
    test_set: Windows

    def __init__(self, sequence_length: int, batch_size: int, num_workers: int, seed: int, num_classes: int) -> None:
        super().__init__(batch_size, num_workers, seed)
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1; got {sequence_length}")
        self.sequence_length = sequence_length
        self.num_classes = num_classes

    def val_dataloader(self) -> DataLoader[Example]:
        """Return validation windows in order, the same number on each process."""
        return self._loader(self._shared(self.val_set))

    def test_dataloader(self) -> DataLoader[Example]:
        """Return test windows in order, the same number on each process."""
        return self._loader(self._shared(self.test_set))

    def _shared(self, windows: Windows) -> Windows:
        """Return windows that Lightning's sampler distributes evenly without repetition."""
        processes = self.trainer.world_size if self.trainer else 1
        return Windows(windows.content, windows.length, complete=True, multiple=processes)
