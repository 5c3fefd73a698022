"""Cached folders of files that are expensive to create, which are complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_topkast.app.errors import AppError

_TIMEOUT = 3600.0  # seconds to wait for another process


def cached_folder(name: str, places: Sequence[Path], make: Callable[[Path], None]) -> Path:
    """Return the folder `name` in the first of `places` that has it, or create it in the first writable one.

    One process at a time makes it, under another name that it loses only when all is on the disk: whoever is killed
    leaves nothing that is taken for it, and what he leaves goes when it is made again.

    Args:
        name: tells what is in it; other contents need another name.
        places: folders to look in, which need not exist.
        make: fills the empty folder that it is given.

    Raises:
        AppError: No place is writable, or another process takes longer than an hour.
    """
    for place in places:
        if (place / name).is_dir():
            return place / name
    for place in places:
        if not _may_write(place):
            continue
        place.mkdir(parents=True, exist_ok=True)
        whole, part = place / name, place / f"{name}.part"
        try:
            with FileLock(place / f"{name}.lock", timeout=_TIMEOUT):
                if not whole.is_dir():  # otherwise another process has just created it
                    shutil.rmtree(part, ignore_errors=True)
                    part.mkdir()
                    make(part)
                    _to_disk(part)
                    part.rename(whole)
        except Timeout as error:
            raise AppError(
                f"another process has been writing {part} for an hour: end it, or set another data.cache"
            ) from error
        return whole
    raise AppError(
        f"nothing can be written to {' or '.join(str(place.absolute()) for place in places)}: name a folder where it "
        "can by data.cache=..."
    )


def user_cache() -> Path:
    """Return the folder of this package in the user's cache, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning-topkast"


def _may_write(place: Path) -> bool:
    """Return whether `place`, or the nearest existing folder above it, is writable."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _to_disk(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
