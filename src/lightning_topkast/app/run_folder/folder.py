"""`RunFolder`: where everything lies that a run leaves, and how it is read."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.interpolations import check_size
from lightning_topkast.app.run_folder.logs import Curve, has_log, read_curves
from lightning_topkast.app.run_folder.result import RESULT_FILE, RUNNING, Result, Status, read_result
from lightning_topkast.app.yaml_files import checked_text, read_yaml
from lightning_topkast.errors import TopKastError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}  # of a file system without them


class RunFolder:
    """The folder of a run. Whatever it holds is read as data; no code in it is run.

    ```
    result.json                              what came out
    .hydra/config.yaml, overrides.yaml       what was asked for
    checkpoints/**/*.ckpt, hpc_ckpt_*.ckpt   files, or folders if they are sharded; the latter are SLURM's
    csv*/metrics.csv, tensorboard*/events*   curves
    masks.json                               masks of a few weights over the run
    ```

    Which checkpoint is *the* checkpoint depends on what it is for, and there are two answers: `best_checkpoint` to
    evaluate, export or draw, `newest_checkpoint` to resume from.

    Args:
        path: The folder, which need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def hydra(self) -> Path:
        """The folder of Hydra's files."""
        return self.path / ".hydra"

    @property
    def is_run(self) -> bool:
        """Whether a run has left anything here, as opposed to a folder with runs in it."""
        return (self.path / RESULT_FILE).is_file() or (self.path / "checkpoints").is_dir() or has_log(self.path)

    @property
    def is_used(self) -> bool:
        """Whether a run has left anything here that another would replace, continue or stand beside."""
        return (self.path / RESULT_FILE).exists() or has_log(self.path) or bool(_checkpoints_below(self._checkpoints))

    @property
    def is_of_trainer(self) -> bool:
        """Whether the loggers of somebody's own Trainer have filled the folder, and not topkast-train."""
        return has_log(self.path) and not ((self.path / RESULT_FILE).exists() or self.hydra.exists())

    def result(self) -> Result | None:
        """Return the result, or None if there is none; raises as `read_result`."""
        return read_result(self.path)

    @property
    def status(self) -> Status:
        """The status in the result; "running" also where there is no valid one.

        Raises:
            OSError: The result cannot be read.
        """
        try:
            result = self.result()
        except AppError:
            return RUNNING
        return RUNNING if result is None else result.status

    def config(self) -> DictConfig | None:
        """Return the configuration of the run, or None if there is none.

        Raises:
            AppError: It cannot be read, or is not a configuration of `topkast-train`.
        """
        path = self.hydra / "config.yaml"
        if not path.is_file():
            return None
        try:
            config = OmegaConf.create(checked_text(path))
        except AppError:
            raise
        except Exception as error:  # of OmegaConf
            raise AppError(f"{path} cannot be read: {error}") from error
        parts = ("model", "data", "sparsity")
        nodes = [config._get_node(part) for part in parts] if isinstance(config, DictConfig) else [None]
        if not isinstance(config, DictConfig) or not all(isinstance(node, DictConfig) for node in nodes):
            raise AppError(f"{path} is not a configuration of topkast-train: it needs a model, data and sparsity")
        check_size(config)
        return config

    def plain_config(self) -> Any:
        """Return the configuration as plain data, unchecked; None if it cannot be read."""
        try:
            return _read_yaml(self.hydra / "config.yaml")
        except OSError:
            return None

    def overrides(self) -> list[str] | None:
        """Return the overrides that the run was started with, or None if there are no valid ones."""
        read = _read_yaml(self.hydra / "overrides.yaml")
        return [str(override) for override in read] if isinstance(read, list) else None

    def checkpoints(self, beside: Iterable[Path] = ()) -> list[Path]:
        """Return all checkpoints, complete or not.

        Args:
            beside: Further folders that the run writes checkpoints to.

        Raises:
            OSError: A folder cannot be read, which says nothing of what is in it.
        """
        folders = (self._checkpoints, *self._checkpoints_of_loggers(), *beside)
        found = {path for folder in folders for path in _checkpoints_below(folder)}
        return sorted(found | {path for path in _entries(self.path) if fnmatchcase(path.name, "hpc_ckpt_*.ckpt")})

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _checkpoints_of_loggers(self) -> Iterator[Path]:
        """Yield the folders that Lightning chooses for a `ModelCheckpoint` without one; not those of runs in here."""
        for pattern in ("*/checkpoints", "*/*/checkpoints"):
            for path in self.path.glob(pattern):
                if not any((parent / ".hydra").is_dir() for parent in path.parents if self.path in parent.parents):
                    yield path

    def best_checkpoint(self) -> Path | None:
        """Return the checkpoint to evaluate, export or draw, or None if there is none.

        It is the latest `best*.ckpt`, without one the latest `last*.ckpt`, and otherwise the latest of all in
        `checkpoints`; `best/*.ckpt` counts likewise. It is not opened here, so it may be damaged, or a folder.

        Raises:
            OSError: The folder cannot be read.
        """
        files = _checkpoints_below(self._checkpoints)
        for name in ("best", "last", ""):
            found = [file for file in files if _is_named(file.relative_to(self._checkpoints), name)]
            if found:
                return max(found, key=lambda file: file.stat().st_mtime_ns)
        return None

    def newest_checkpoint(
        self, skip: Callable[[Exception], None], beside: Iterable[Path] = ()
    ) -> tuple[Path, int] | None:
        """Return the checkpoint to resume from and its step, or None if the run has not written one yet.

        It is the one with the most steps, and of several at the same step the latest. One that cannot be read may be
        it, so that no other is taken instead.

        Args:
            skip: Called with the reason for each checkpoint that is not complete.
            beside: Further folders that the run writes checkpoints to.

        Raises:
            AppError: There are checkpoints, and training can resume from none; a new start would overwrite them.
            OSError: A checkpoint cannot be read.
        """
        # late: PyTorch takes seconds, and a command line that names no run is answered without it
        from lightning_topkast.app.run_folder.checkpoint import UnfinishedCheckpoint, check_sharded

        complete: list[tuple[int, int, str]] = []
        lost: list[Exception] = []
        for path in self.checkpoints(beside):
            try:
                step = check_sharded(path) if path.is_dir() else _step(path)
                complete.append((step, path.stat().st_mtime_ns, str(path)))
            except UnfinishedCheckpoint as error:
                skip(error)
            except (AppError, TopKastError) as error:
                skip(error)
                lost.append(error)
        if not complete:
            if lost:
                raise AppError(
                    f"there are {len(lost)} checkpoints of {self.path}, and training can resume from none "
                    f"({str(lost[-1]).partition(';')[0]}): name another one with ckpt_path=FILE, or begin anew in "
                    "another folder, since a new start here would overwrite them"
                )
            return None
        step, _, name = max(complete)
        return Path(name), step

    def curves(self, skip: Callable[[str], None]) -> dict[str, Curve]:
        """Return the logged curves by name; see `read_curves`."""
        return read_curves(self.path, skip)


@contextmanager
def only_run_in(folder: Path, program: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of a folder, which the system releases when this process ends, however it ends.

    Args:
        folder: The folder, which is created if it is missing.
        program: Name of the program, which is also in the name of the lock.
        patience: Seconds to wait for another process, which may be about to end.

    Raises:
        AppError: Another process holds the lock, or it cannot be opened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{program}.lock"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise AppError(f"the lock {path} is a link or no regular file: remove it, or choose another folder")
    lock = FileLock(path, mode=folder.stat().st_mode & 0o666)  # who may write to the folder may lock it
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise AppError(
            f"another {program} is running in {folder}: wait for it to end, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise AppError(
                f"the lock {path}, which keeps other runs out of the folder, cannot be taken ({error.strerror}): make "
                "it writable for you, or choose another folder"
            ) from error
    try:
        yield
    finally:
        lock.release()


def refuse_missing(checkpoint: Path) -> None:
    """Raise an `AppError` if there is no such checkpoint; it names those that are there."""
    if not checkpoint.exists():
        siblings = sorted(path.name for path in checkpoint.parent.glob("*.ckpt"))
        hint = f"; that folder has {', '.join(siblings)}" if siblings else ""
        raise AppError(f"there is no checkpoint {checkpoint.absolute()}{hint}")


def run_of(checkpoint: Path) -> RunFolder | None:
    """Return the run that a checkpoint lies in, or None if it lies somewhere else."""
    runs = (RunFolder(folder) for folder in checkpoint.absolute().parents[:2])
    return next((run for run in runs if (run.hydra / "config.yaml").is_file()), None)


def files_below(folder: Path, name: str) -> list[Path]:
    """Return all files called `name` below a folder, sorted.

    Raises:
        OSError: A folder cannot be read, which says nothing of what is in it.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # removed meanwhile
            raise error

    return sorted(Path(where) / name for where, _, files in os.walk(folder, onerror=refuse) if name in files)


def runs_in(folder: Path) -> list[Path]:
    """Return the folders of all runs below `folder`, sorted by name."""
    found = {path.parent for path in files_below(folder, RESULT_FILE)}
    for left in ("metrics.csv", "events.out.tfevents.*", "*.ckpt"):
        below = (path.parents[1] for path in folder.rglob(left) if len(path.relative_to(folder).parts) > 2)
        found |= {run for run in below if RunFolder(run).is_run}
    return sorted(run for run in found if run != folder)


def _step(file: Path) -> int:
    from lightning_topkast.app.run_folder.checkpoint import Checkpoint

    checkpoint = Checkpoint(str(file))
    checkpoint.check_complete()
    return checkpoint.step


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, nothing if it is missing. A glob takes a folder that cannot be read for empty."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _checkpoints_below(folder: Path) -> list[Path]:
    """Return all checkpoints in a folder and its subfolders, into which a `/` in their file names puts them."""
    found: list[Path] = []
    for path in _entries(folder):
        if path.suffix == ".ckpt":
            found.append(path)
        elif path.is_dir() and not path.is_symlink() and not (path / ".hydra").exists():  # of another run
            found += _checkpoints_below(path)
    return found


def _is_named(path: Path, name: str) -> bool:
    return path.name.startswith(name) or path.parts[0].startswith(name)


def _read_yaml(path: Path) -> Any:
    try:
        return read_yaml(path)
    except (FileNotFoundError, NotADirectoryError, AppError):
        return None
