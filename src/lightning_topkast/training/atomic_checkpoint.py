"""`AtomicCheckpointIO`: checkpoint files that a crash at any moment leaves whole, the old one or the new one."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

if sys.platform != "win32":
    import fcntl

# Nothing of the checkpoint's own name: Lightning takes every file with "hpc_ckpt_" in its name for a checkpoint.
_PREFIX, _SUFFIX = ".checkpoint-", ".tmp"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, has it on the disk, and only then puts it in the target's place.

    Lightning's own plugin writes to the system's folder for temporary files. Where that is another file system, the
    checkpoint is copied over the old one, of which a kill in the middle leaves nothing; and where power fails, the
    disk may have neither. Paths of other than local file systems (s3:// and the like) are left to Lightning.

    A writer that was killed leaves a hidden file `.checkpoint-*.tmp`, which the next one to write in that folder
    removes. It knows them from those being written by a lock, which the system takes away from whoever dies.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()])
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            OSError: it could not be written, as on a full disk; what was there before is untouched.
        """
        fs, local = url_to_fs(str(path))
        if storage_options is not None or not isinstance(fs, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(local)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target.parent)
            with _temporary_file(target.parent) as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
                if sys.platform == "win32":
                    file.close()  # which renames no file that is open
                os.replace(file.name, target)
            _sync_folder(target.parent)
        except (OSError, RuntimeError) as error:
            # torch ends its archive even when writing has failed, and fails again
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            kept = "; the checkpoint that was there before is untouched" if target.is_file() else ""
            raise OSError(cause.errno, f"not written: {cause.strerror}{kept}", str(target)) from error


@contextmanager
def _temporary_file(folder: Path) -> Iterator[IO[bytes]]:
    """A new locked file in `folder`, which is gone afterwards unless it was given another name."""
    while True:
        path = folder / f"{_PREFIX}{uuid4().hex}{_SUFFIX}"
        file = open(path, "xb")  # noqa: SIM115  (not by `tempfile`, whose files only their owner may read)
        _lock(file, wait=True)
        if path.exists():  # nobody took it for a leftover before it was locked
            break
        file.close()
    try:
        with file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove files that writers have left who are no more."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError), open(path, "r+b") as file:
            if _lock(file, wait=False):
                path.unlink()


def _lock(file: IO[bytes], wait: bool) -> bool:
    """Lock `file` against other writers until it is closed; False: another has it, or there are no locks here."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Have the folder's entries on the disk, where the system lets us."""
    if sys.platform == "win32":  # folders can't be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do it by themselves and refuse to be asked
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
