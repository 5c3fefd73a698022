"""FashionMNIST from its original idx files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_topkast.app.data.base import ArrayData, ArrayDataset, shuffled, split_sizes
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.vision import load_torchvision

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_HELP = (
    "fetch it with `apt-get install dataset-fashion-mnist` (Debian, Ubuntu), let torchvision download it with "
    "data.folder=null data.download=true, or name the folder that holds train-images-idx3-ubyte.gz with data.folder=..."
)


class FashionMNIST(ArrayData):
    """60,000 training images, some of which are used for validation, and 10,000 test images.

    Args:
        folder: Where the four idx files are, compressed or not. None: the folder of the Debian package
            `dataset-fashion-mnist`, else `download_folder`.
        download_folder: Where torchvision's download goes.
        download: Whether torchvision downloads the files if they are missing.
        batch_size: Examples per step and process.
        num_workers: Worker processes of the loaders.
        seed: Seed of the order of the training examples.
        val_size: Training images kept for validation, as a fraction or a count.
        split_seed: Seed of the choice of these images, the same in all runs.
        num_classes: 10; models refer to it.
        input_shape: [1, 28, 28]; models refer to it.
    """

    def __init__(
        self,
        folder: str | None = None,
        download_folder: str = "data",
        download: bool = True,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        val_size: float = 5000,
        split_seed: int = 0,
        num_classes: int = 10,
        input_shape: Sequence[int] = (1, 28, 28),
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.folder = Path(folder).expanduser() if folder else None
        self.download_folder = Path(download_folder).expanduser()
        self.download = download
        self.val_size = val_size
        self.split_seed = split_seed
        self.num_classes = num_classes
        self.input_shape = tuple(input_shape)

    def prepare_data(self) -> None:
        """Download the files if they are missing; Lightning calls this on one process per node."""
        if self._find() is not None:
            return
        if self.folder is not None or not self.download:
            raise AppError(f"no FashionMNIST in {self._looked_at()}: {_HELP}")
        try:
            load_torchvision("datasets").FashionMNIST(self.download_folder, train=True, download=True)
        except (OSError, RuntimeError) as error:  # torchvision raises either if no mirror responds
            raise AppError(f"no FashionMNIST in {self._looked_at()}, and the download failed: {_HELP}") from error

    def load(self) -> None:
        """Read the idx files; pixels stay bytes."""
        folder = self._find()
        if folder is None:
            raise AppError(f"no FashionMNIST in {self._looked_at()}: {_HELP}")
        images, labels = _read_pair(folder, "train")
        order = shuffled(len(labels), self.split_seed)
        (val_size,) = split_sizes(len(labels), [self.val_size], "images")
        val, train = order[:val_size], order[val_size:]
        scale: dict[str, Any] = {"mean": 0.286, "std": 0.353}
        self.train_set = ArrayDataset(images[train], labels[train], **scale)
        self.val_set = ArrayDataset(images[val], labels[val], **scale)
        self.test_set = ArrayDataset(*_read_pair(folder, "test"), **scale)

    def _candidates(self) -> list[Path]:
        if self.folder is not None:
            return [self.folder, self.folder / "FashionMNIST" / "raw"]
        return [DEBIAN_FOLDER, self.download_folder / "FashionMNIST" / "raw"]

    def _looked_at(self) -> str:
        return " or ".join(str(folder) for folder in self._candidates())

    def _find(self) -> Path | None:
        names = [name for pair in _FILES.values() for name in pair]
        for folder in self._candidates():
            if all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in names):
                return folder
        return None


def _read_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images, labels = (torch.from_numpy(_read_idx(folder, name)) for name in _FILES[part])
    if len(images) != len(labels):
        raise AppError(f"{folder}: {len(images)} {part} images but {len(labels)} labels; {_HELP}")
    return images.unsqueeze(1), labels.long()


def _read_idx(folder: Path, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read one idx file: two zero bytes, the type (8, unsigned byte), the rank, the sizes as big-endian int32, data."""
    plain = folder / name
    path = plain if plain.is_file() else folder / f"{name}.gz"
    try:
        content = path.read_bytes() if path == plain else gzip.decompress(path.read_bytes())
        if content[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        sizes = np.frombuffer(content, dtype=">i4", offset=4, count=content[3])
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * content[3]).reshape(sizes).copy()
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise AppError(f"{path} is damaged ({error}); {_HELP}") from error
