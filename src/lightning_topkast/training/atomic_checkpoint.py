"""`AtomicCheckpointIO`, which writes checkpoint files that stay complete if the process crashes at any moment."""

from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_topkast.files import atomic_file, remove_leftovers


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint to a temporary file beside its target, flush it to the disk, and only then replace the target.

    Lightning's own plugin writes to the system's folder for temporary files. If that is on another file system, the
    checkpoint is copied over the old one, and a kill during the copy destroys both; after a power failure the disk may
    also have neither. Paths on other than local file systems (such as s3://) are left to Lightning.

    A writer that was killed leaves a hidden file `.partial-*.tmp`, which the next writer in that folder removes. A file
    that is being written is locked, and the system releases the lock of a process that dies.

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
