"""What the report of a run shows, as far as it can be read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_topkast.app.errors import AppError, explain
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.run_folder.logs import Curve
from lightning_topkast.app.run_folder.mask_history import MaskHistory, read_mask_history
from lightning_topkast.app.run_folder.masks import SavedMasks, read_masks
from lightning_topkast.app.run_folder.result import RESULT_FILE, Result


@dataclass(frozen=True)
class RunContents:
    """The contents of a run's folder.

    Attributes:
        folder: Folder of the run.
        result: None if the run has not written one, or it cannot be read.
        config: Resolved settings from the result, or else Hydra's configuration; None without either.
        curves: Logged curves by name.
        saved: Sparse weights of the best checkpoint.
        history: Masks of a few weights over the run; None if they were not recorded, or cannot be read.
        notes: What is missing, and why.
    """

    folder: Path
    result: Result | None
    config: Any
    curves: Mapping[str, Curve]
    saved: SavedMasks | None
    history: MaskHistory | None
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The chosen data, model and sparsity, or else the folder's name."""
        choices = self.result.choices if self.result else {}
        return " · ".join(choices[group] for group in ("data", "model", "sparsity") if choices.get(group)) or (
            self.folder.name
        )

    @property
    def order(self) -> list[str]:
        """The names of weights in the order of the model, as far as it is known."""
        counted = (self.result.weights if self.result else None) or []
        return [each.name for each in (counted or (self.saved.weights if self.saved else ()))]

    @property
    def command(self) -> str | None:
        """The command line that repeats the run."""
        return None if self.result is None else shlex.join(["topkast-train", *self.result.overrides])


def read_contents(folder: Path) -> RunContents:
    """Read what there is, and note what is missing or damaged."""
    run, notes = RunFolder(folder), []
    result = saved = history = None
    try:
        result = run.result()
        if result is None and not run.is_of_trainer:
            notes.append(f"There is no {RESULT_FILE}: the run has not ended, or is not a run of topkast-train.")
        elif result and result.incomplete_logs:
            notes += [f"A log is incomplete: {lacking}." for lacking in result.incomplete_logs]
    except (AppError, OSError) as error:
        notes.append(f"The result is ignored: {explain(error)}.")
    curves = run.curves(notes.append)
    try:
        saved = read_masks(run)
        if saved is None and (not run.is_of_trainer or any(name.startswith("topkast/") for name in curves)):
            notes.append(
                "Masks and magnitudes are missing: the run has no checkpoint in a single file, checkpoints/*.ckpt."
            )
    except (AppError, OSError) as error:
        notes.append(f"Masks and magnitudes are missing: {explain(error)}.")
    try:
        history = read_mask_history(folder)
    except (AppError, OSError) as error:
        notes.append(f"Masks over the run are missing: {explain(error)}.")
    if not curves:
        notes.append(
            "Curves are missing: the run has no log on disk. Train with logger=csv or the default, or with "
            "logger=tensorboard if tensorboard is installed."
        )
    config = result.config if result and result.config else run.plain_config()
    return RunContents(folder.resolve(), result, config, curves, saved, history, tuple(notes))
