"""Resume a run from the newest complete checkpoint in its folder.

`ckpt_path=auto` does so with the command that started the run, `--resume FOLDER` without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_topkast.app.errors import AppError, explain, is_full_disk
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.terminal import say
from lightning_topkast.training.module import after_setup

_NAMELESS = "torchrun-none"  # trainer=multinode without --rdzv-id


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


def _say(text: str) -> None:
    if getattr(rank_zero_only, "rank", 0) == 0:
        say(f"topkast-train: {text}", error=True)
