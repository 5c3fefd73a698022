"""Text files as a sequence of bytes, for next-byte prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_topkast.app.data.base import split_sizes
from lightning_topkast.app.data.windows import WindowData, Windows
from lightning_topkast.app.errors import AppError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Text(WindowData):
    """A text file, or all files in a folder in the order of their names, split into training, validation and test.

    The parts follow each other in the text, as in enwik8's usual split into 90, 5 and 5 million bytes.

    Args:
        path: File or folder. A file is mapped into memory and not read as a whole.
        pattern: Which files under a folder to take.
        sequence_length: Bytes a training example.
        split: Training, validation and test as fractions of the text or as counts of bytes.
        batch_size: Examples per step and process.
        num_workers: Worker processes of the loaders.
        seed: Seed of the order of the training examples.
        num_classes: 256, the values of a byte; models refer to it.
        fetch: The command that fetches a missing file, for the message.
    """

    def __init__(
        self,
        path: str,
        pattern: str = "*",
        sequence_length: int = 256,
        split: Sequence[float] = (0.9, 0.05, 0.05),
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        num_classes: int = 256,
        fetch: str | None = None,
    ) -> None:
        super().__init__(sequence_length, batch_size, num_workers, seed, num_classes)
        if len(split) != 3:
            raise ValueError(f"expected split to have three parts, training, validation and test, got {list(split)}")
        self.path = Path(path).expanduser()
        self.pattern = pattern
        self.split = split
        self.fetch = fetch

    def load(self) -> None:
        """Map the text into memory and split it."""
        content = self._read()
        sizes = split_sizes(len(content), self.split, "bytes")
        ends = np.cumsum(sizes)
        parts = [
            Windows(content[end - size : end], self.sequence_length) for end, size in zip(ends, sizes, strict=True)
        ]
        for name, size, part in zip(("training", "validation", "test"), sizes, parts, strict=True):
            if len(part) == 0:
                raise AppError(
                    f"{self.path}: the {name} part has {size} of {len(content):,} bytes, which is not enough for one "
                    f"sequence and its next byte: a longer text, another data.split or a shorter data.sequence_length"
                )
        self.train_set, self.val_set, self.test_set = parts

    def _read(self) -> Bytes:
        if self.path.is_dir():
            files = sorted(file for file in self.path.rglob(self.pattern) if file.is_file())
            if not files:
                raise AppError(f"{self.path} has no file that matches data.pattern='{self.pattern}'")
            content: Bytes = np.concatenate([np.fromfile(file, dtype=np.uint8) for file in files])
        elif self.path.is_file():
            empty = self.path.stat().st_size == 0
            content = np.empty(0, np.uint8) if empty else np.memmap(self.path, dtype=np.uint8, mode="r")
        else:
            how = f"fetch it with `{self.fetch}`" if self.fetch else "name a text file or a folder of text files"
            raise AppError(f"there is no text at {self.path.absolute()}: {how} (data.path=...)")
        if len(content) == 0:
            raise AppError(f"{self.path} is empty: set data.path=... to a text file or a folder of text files")
        return content
