"""`AtomicCheckpointIO`, which writes checkpoint files that stay complete if the process crashes at any moment.

It reads them without running code in them.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_topkast.files import atomic_file, remove_leftovers
from lightning_topkast.loading import load


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint to a temporary file beside its target, flush it to the disk, and only then replace the target.

    Lightning's own plugin writes to the system's folder for temporary files. If that is on another file system, the
    checkpoint is copied over the old one, and a kill during the copy destroys both; after a power failure the disk may
    also have neither. Paths on other than local file systems (such as s3://) are left to Lightning.

    A writer that was killed leaves a hidden file `.partial-*.tmp`, which the next writer in that folder removes. A file
    that is being written is locked, and the system releases the lock of a process that dies.

    Checkpoints are loaded with `weights_only=True`, also by versions of Lightning that have no such argument, unless
    `fit` and the like are called with `weights_only=False`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()])
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            OSError: the file could not be written, for example because the disk is full. The old file is unchanged.
        """
        fs, local = url_to_fs(str(path))
        if storage_options is not None or not isinstance(fs, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(local)
        if target.parent.is_dir():
            remove_leftovers(target.parent)
        with atomic_file(target, "checkpoint") as partial, open(partial, "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the content of a checkpoint.

        Args:
            path: of the file, or its URL.
            map_location: as in `torch.load`; None keeps tensors in host memory, from where Lightning moves them.
            weights_only: False also runs the code in the checkpoint, as unpickling does.

        Raises:
            TopKastError: the file would take far more memory than it has bytes.
            OSError: the file cannot be read.
        """
        if weights_only is False:
            return super().load_checkpoint(path, map_location, weights_only=False)
        fs, place = url_to_fs(str(path))
        if isinstance(fs, LocalFileSystem):
            return load(Path(place), map_location or "cpu")
        with fs.open(place, "rb") as file:
            return load(BytesIO(file.read()), map_location or "cpu")
