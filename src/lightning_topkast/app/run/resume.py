"""Resume a run from the newest complete checkpoint in its folder.

`ckpt_path=auto` does so with the command that started the run, `--resume FOLDER` without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_topkast.app.errors import EXIT_CODE, AppError, explain, is_full_disk
from lightning_topkast.app.overrides import config_dir, more_than_a_value, quoted, split_options
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.terminal import say
from lightning_topkast.training.module import after_setup

AUTO = "auto"
RESUME, TRUST = "--resume", "--trust"

_NAMELESS = "torchrun-none"  # trainer=multinode without --rdzv-id


def resumed(arguments: Sequence[str]) -> list[str]:
    """Replace `--resume FOLDER [overrides]` by the overrides of that run; leave any other command line unchanged.

    The run's own overrides come first, so that those beside `--resume` take precedence; options such as `--config-dir`
    are those of the command line. Without `--trust` the run's overrides may only set values.

    Raises:
        AppError: There is no folder, no run in it that can be resumed, or an override of the run does more.
    """
    folder, rest = _split(arguments)
    trusted = TRUST in rest
    rest = [text for text in rest if text != TRUST]
    if folder is None:
        if trusted:
            raise AppError(
                f"{TRUST} is about the overrides in the folder of a run: topkast-train {RESUME} FOLDER {TRUST}"
            )
        return rest
    if not folder or folder.startswith("-"):
        raise AppError(f"{RESUME} needs the folder of a run: topkast-train {RESUME} outputs/<day>/<time>")
    path = Path(folder).resolve()
    if path.is_file():
        raise AppError(f"{RESUME}: {folder} is a file: expected the folder of a run")
    if not path.is_dir():
        raise AppError(f"{RESUME}: there is no folder {folder}")
    if not trusted and (problem := _leads_out(path)):
        raise AppError(f"{RESUME}: {problem}, and the run might write to it: remove it, or add {TRUST} if it is yours")
    own = RunFolder(path).overrides()
    if own is None:
        runs = sorted(file.parents[1] for file in path.glob("*/.hydra/overrides.yaml"))
        hint = f"name one of its runs, such as {runs[0]}" if runs else "it lacks .hydra/overrides.yaml"
        raise AppError(f"{RESUME}: {folder} is not the folder of a run of topkast-train: {hint}")
    kept = _to_repeat(own)
    for text in () if trusted else kept:
        if problem := more_than_a_value(text):
            raise AppError(
                f"{RESUME}: the override '{text:.80}' in {folder} {problem}, where only values of the shipped "
                f"configuration are accepted: if you trust this run, add {TRUST}"
            )
    options, more = split_options(rest)
    return [*options, *kept, f"hydra.run.dir={quoted(path)}", f"ckpt_path={AUTO}", *more]


def resume_options(run: RunFolder) -> list[str]:
    """Return the arguments of `topkast-train` that resume a run of the present command line."""
    beside = config_dir(sys.argv[1:])
    trust = any(more_than_a_value(text) for text in _to_repeat(run.overrides() or [])) or _leads_out(run.path)
    more = [*(["--config-dir", beside] if beside else []), *([TRUST] if trust else [])]
    return [RESUME, str(run.path), *more]


@contextmanager
def kept_if_refused(arguments: Sequence[str]) -> Iterator[None]:
    """Restore the `.hydra` folder of a run if resuming it is refused; otherwise later attempts would be refused, too.

    Hydra writes all overrides there, including those beside `--resume`, before any of them is checked.

    Args:
        arguments: The command line before `resumed`.
    """
    named, _ = _split(arguments)
    if not named:
        yield
        return
    folder = Path(named).resolve()
    before = {path: path.read_bytes() for path in folder.glob(".hydra/*.yaml") if path.is_file()}
    trained = _written(folder)
    try:
        yield
    except (Exception, SystemExit) as error:
        refused = not isinstance(error, SystemExit) or error.code == EXIT_CODE
        with suppress(OSError):  # the error that refused it is the one to show
            if refused and _written(folder) == trained:
                for path, content in before.items():
                    path.write_bytes(content)
        raise


def newest_checkpoint(folder: RunFolder, places: Iterable[str] = ()) -> str | None:
    """Return the checkpoint that a run resumes from, or None if it has no complete one; print the choice.

    Args:
        folder: The folder of the run.
        places: The folders that its configuration names for checkpoints, which may lie elsewhere or be URLs.

    Raises:
        AppError: There are checkpoints, but one cannot be read, or training can resume from none; or torchrun was given
            no name for the run, so that all unnamed runs would share a folder.
    """
    if _NAMELESS in folder.path.parts:
        raise AppError(
            "ckpt_path=auto finds the checkpoints of a run by its name: start it with torchrun --rdzv-id=NAME, or name "
            "its folder with hydra.run.dir=..."
        )
    places = list(places)
    local = [Path(place).expanduser() for place in places if "://" not in place]
    try:
        found = folder.newest_checkpoint(lambda error: _say(f"skipped: {error}"), local)
    except OSError as error:
        raise AppError(
            f"ckpt_path=auto: {error.filename} cannot be read ({error.strerror}), so that the newest checkpoint is not "
            "known: start the same command once it can be read, or name a checkpoint with ckpt_path=FILE"
        ) from error
    if found is None:
        for place in places:
            if "://" in place:
                _refuse_remote(place)
        return None
    _say(f"resuming from {found[0]}, step {found[1]}")
    return str(found[0])


def checkpoint_places(cfg: DictConfig) -> list[str]:
    """Return the folders that the configuration of a run names for its checkpoints."""
    callbacks = cfg.get("callbacks")
    entries = callbacks.values() if isinstance(callbacks, DictConfig) else ()
    return [str(entry.dirpath) for entry in entries if isinstance(entry, DictConfig) and entry.get("dirpath")]


class FirstStep(Callback):
    """Tell what a checkpoint breaks after it was opened: from its loading to the end of the first step after it.

    Its parts are restored by Lightning and torch, which take their types and names for granted, and fail with errors
    that do not name the checkpoint, some of them in the first step only. Optimizers for which it has no state would
    begin anew without a word.
    """

    _trainer: Trainer | None = None  # from the loading to the end of the step
    _states: list[Any] | None = None  # of the optimizers; None: sharded checkpoints keep them elsewhere
    _step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin before Lightning loads a checkpoint, once the data, the module and the callbacks are set up."""

        def begin() -> None:
            self._trainer = trainer

        after_setup(pl_module, begin)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note which state it has; the optimizers are made later."""
        self._states = checkpoint.get("optimizer_states")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step that training resumes from."""
        self._step = trainer.global_step
        found, expected = self._states, len(trainer.optimizers)
        if self._trainer is not None and found is not None and len(found) != expected:
            raise AppError(
                f"the checkpoint {trainer.ckpt_path} has the state of {len(found)} optimizers, and this run has "
                f"{expected}: resume with those that it was trained with, or use another checkpoint"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End after an optimizer step."""
        if trainer.global_step > self._step:
            self._trainer = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End once the checkpoint of a test is loaded."""
        self._trainer = None

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise an error that is not explained elsewhere as one that names the checkpoint.

        Raises:
            AppError: An error came between the loading of a checkpoint and the end of the first step after it.
        """
        try:
            yield
        except Exception as error:
            path = None if self._trainer is None else self._trainer.ckpt_path
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if path is None or memory or is_full_disk(error) or explain(error) is not None:
                raise
            reason = (str(error).strip().splitlines() or [""])[0]
            raise AppError(
                f"the run cannot go on from the checkpoint {path} ({type(error).__name__}: {reason:.200}): use "
                "another one, unless your own code is at fault; HYDRA_FULL_ERROR=1 shows the traceback"
            ) from error
        finally:
            self._trainer = None


class SameCheckpoint(Callback):
    """Refuse ranks that resume from different checkpoints, which happens if they do not share the run's folder.

    Args:
        path: The checkpoint of this rank.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare with rank 0, once the processes are connected and before anything is loaded."""
        mine = self.path or "no checkpoint"
        first: str = trainer.strategy.broadcast(mine)
        if not trainer.strategy.reduce_boolean_decision(mine == first, all=True):
            raise AppError(
                f"ckpt_path=auto: rank 0 resumes from {first}, rank {trainer.global_rank} from {mine}: all nodes must "
                "see the same run folder, set hydra.run.dir=... to one on a shared file system"
            )


def _refuse_remote(place: str) -> None:
    """Refuse to begin anew where checkpoints are left at a URL."""
    try:
        fs, path = url_to_fs(place)
        left = fs.glob(f"{path}/**/*.ckpt") if fs.exists(path) else []
    except Exception as error:  # each file system has its own
        raise AppError(
            f"ckpt_path=auto: {place} cannot be read ({error}); name a checkpoint, or ckpt_path=null"
        ) from error
    if left:
        raise AppError(
            f"ckpt_path=auto does not look at URLs, and there is {fs.unstrip_protocol(left[0])}: name the one to "
            "resume from with ckpt_path=URL, or begin anew with another dirpath"
        )


def _leads_out(folder: Path) -> str | None:
    """Return what in a folder a run could write through to another place, or wait for forever; None if nothing.

    Links to places within the folder are in the folders of many runs. What is in the folders of W&B's earlier runs is
    not written to again, and has links to its log elsewhere.
    """
    for where, folders, files in os.walk(folder):
        if Path(where).parent == folder / "wandb":
            folders.clear()
            continue
        for path in (Path(where, name) for name in (*folders, *files)):
            if path.is_symlink():
                if not Path(os.path.realpath(path)).is_relative_to(folder):
                    return f"{path} is a link to another place"
            elif not (path.is_file() or path.is_dir()):
                return f"{path} is no regular file"
    return None


def _split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the folder after `--resume`, "" if it is missing and None without `--resume`; and all other arguments."""
    at = next((i for i, text in enumerate(arguments) if text.partition("=")[0] == RESUME), None)
    if at is None:
        return None, list(arguments)
    _, given, folder = arguments[at].partition("=")
    rest = [*arguments[:at], *arguments[at + (1 if given else 2) :]]
    return folder if given else "".join(arguments[at + 1 : at + 2]), rest


def _to_repeat(overrides: Sequence[str]) -> list[str]:
    return [text for text in overrides if text.partition("=")[0].lstrip("+") != "ckpt_path"]


def _written(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in RunFolder(folder).checkpoints()}


def _say(text: str) -> None:
    if getattr(rank_zero_only, "rank", 0) == 0:
        say(f"topkast-train: {text}", error=True)
