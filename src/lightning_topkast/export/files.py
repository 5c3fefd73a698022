"""Writing a file so that whoever reads at any moment finds the old one or the new one, whole."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from uuid import uuid4

from lightning_topkast.errors import TopKastError


@contextmanager
def new_file(path: str | Path, overwrite: bool) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends without an error.

    Raises:
        TopKastError: `path` exists and is not to be overwritten, or its folder does not.
        OSError: it could not be written, as on a full disk; what was there before is untouched.
    """
    path = Path(path)
    check_target(path, overwrite)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode  # what the user's umask leaves; safetensors makes files for their owner only
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.chmod(mode)
        os.replace(partial, path)
    except Exception as error:
        if (cause := _system_error(error)) is None:
            raise
        raise OSError(cause.errno, f"not written: {cause.strerror}", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _system_error(error: Exception) -> OSError | None:
    """What the system refused in writing, None where something else went wrong."""
    # torch ends its archive even when writing has failed, and fails again
    for each in (error, error.__context__):
        if isinstance(each, OSError):
            return each
    rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has a class of its own
    return OSError(int(rust.group(1)), os.strerror(int(rust.group(1)))) if rust else None


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse what `new_file` would, before any work is done."""
    if path.is_dir():
        raise TopKastError(f"{path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise TopKastError(f"{path} exists already: name another file, or ask for it to be overwritten")
    if not path.absolute().parent.is_dir():
        raise TopKastError(f"there is no folder {path.absolute().parent} to write {path.name} into")


def optional(module: str) -> ModuleType:
    """A module of the extra `export`.

    Raises:
        TopKastError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise TopKastError(
            f"this format needs {error.name}, which is not installed: pip install 'lightning-topkast[export]'"
        ) from error
