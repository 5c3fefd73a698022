"""Files that others write or read meanwhile, or that come from somebody else.

One is written atomically, so that a reader finds the old file or the new one, complete, at any moment. One is read only
if it is a file with an end, and up to a size.
"""

import errno
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from lightning_topkast.errors import TopKastError

if sys.platform != "win32":
    import fcntl

# Contains nothing of the file's own name: Lightning takes every file with "hpc_ckpt_" in its name for a checkpoint.
_PREFIX, _SUFFIX = ".partial-", ".tmp"

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


@contextmanager
def atomic_file(path: Path, kind: str = "file") -> Iterator[Path]:
    """Yield an empty temporary file beside `path`, which replaces `path` when the block ends without an error.

    The content is on the disk before the file is renamed, and its permissions follow the user's umask. The folder is
    created if it is missing.

    Args:
        path: The file to write or to replace.
        kind: What the file is, for the error message.

    Raises:
        OSError: The file could not be written, for example because the disk is full. The old file is unchanged.
    """
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_file(path.parent) as partial:
            mode = partial.stat().st_mode  # safetensors creates files that only their owner may read
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            partial.chmod(mode)
            os.replace(partial, path)
        _sync_folder(path.parent)
    except TopKastError:
        raise
    except Exception as error:
        own = {None, *map(str, (partial, path, path.parent))}
        cause = _system_error(error)
        if cause is None or cause.filename not in own:
            raise
        kept = f"; the {kind} that was there before is untouched" if path.is_file() else ""
        raise OSError(cause.errno, f"not written: {cause.strerror}{kept}", str(path)) from error


def regular_file(path: str | Path, flags: int) -> int:
    """Open a file, or a link to one; anything else could wait for a writer, have no end, or act on being opened.

    Args:
        path: The file.
        flags: As of `os.open`. This function is the `opener` of `open(path, opener=regular_file)`.

    Raises:
        TopKastError: It is a folder, a named pipe, a socket, a device, or a link that leads back to itself.
    """
    try:
        _check_regular(path, os.stat(path).st_mode)  # before it is opened
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise TopKastError(f"{path} is a link that leads back to itself, where a file is expected") from error
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)  # it may be another one by now
    except TopKastError:
        os.close(descriptor)
        raise
    return descriptor


def read_file(path: Path, most: int) -> bytes:
    """Return the content of a file.

    Args:
        path: A file, or a link to one.
        most: Bytes that it may have.

    Raises:
        TopKastError: It is no file, or larger.
        OSError: It cannot be read.
    """
    with open(path, "rb", opener=regular_file) as file:
        content = file.read(most + 1) or b""  # None where a file of the system has nothing to read yet
    if len(content) > most:
        raise TopKastError(f"{path} is larger than {most / (1 << 20):,.0f} MiB, the most that such a file may have")
    return content


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed.

    A file that is being written is locked, and the system releases the lock of a process that dies.
    """
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError), open(path, "r+b") as file:
            if _lock(file, wait=False):
                path.unlink()


@contextmanager
def _locked_file(folder: Path) -> Iterator[Path]:
    """Yield a new locked file in `folder`, which is removed afterwards unless it was renamed."""
    while True:
        path = folder / f"{_PREFIX}{uuid4().hex}{_SUFFIX}"
        file = open(path, "xb")  # noqa: SIM115  (not by `tempfile`, whose files only their owner may read)
        _lock(file, wait=True)
        if path.exists():  # no other process took it for a leftover before it was locked
            break
        file.close()
    try:
        if sys.platform == "win32":  # Windows does not rename an open file
            file.close()
        with file:
            yield path
    finally:
        path.unlink(missing_ok=True)


def _lock(file: IO[bytes], wait: bool) -> bool:
    """Lock `file` until it is closed; return False if another process holds the lock or the system has no locks."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _check_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise TopKastError(f"{path} is {kind}, where a file is expected")


def _sync_folder(folder: Path) -> None:
    """Flush the entries of `folder` to the disk, where the system supports it."""
    if sys.platform == "win32":  # Windows does not open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems flush by themselves and refuse the request
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error(error: Exception) -> OSError | None:
    """Return the error of the system behind a failed write, or None if the failure has another cause."""
    # torch closes its archive even after a failed write, and fails again.
    for each in (error, error.__context__):
        if isinstance(each, OSError):
            return each
    rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors raises an error class of its own
    return OSError(int(rust.group(1)), os.strerror(int(rust.group(1)))) if rust else None
