"""The files of exports, and the packages that exports need."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from lightning_topkast.errors import TopKastError
from lightning_topkast.files import atomic_file


@contextmanager
def new_file(path: str | Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary file beside `path`, which replaces `path` when the block ends without an error.

    Raises:
        TopKastError: `path` exists and `overwrite` is false, or its folder does not exist.
        OSError: The file could not be written, for example because the disk is full. The old file is unchanged.
    """
    path = Path(path)
    check_target(path, overwrite)
    with atomic_file(path) as partial:
        yield partial


def check_target(path: Path, overwrite: bool) -> None:
    """Raise the errors of `new_file` before any work is done."""
    if path.is_dir():
        raise TopKastError(f"{path} is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise TopKastError(f"{path} exists already; name another file, or allow it to be overwritten")
    if not path.absolute().parent.is_dir():
        raise TopKastError(f"there is no folder {path.absolute().parent} for {path.name}; create it first")


def optional(module: str) -> ModuleType:
    """Import a module of the extra `export`.

    Raises:
        TopKastError: the module is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise TopKastError(
            f"this format needs {error.name}, which is not installed: pip install 'lightning-topkast[export]'"
        ) from error
