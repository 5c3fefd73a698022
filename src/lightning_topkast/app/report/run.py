"""What a run has left in its folder, read for a report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_topkast.app.collect import check_form
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.report.curves import Curve, has_log, read_curves
from lightning_topkast.app.report.masks import Saved, read_masks
from lightning_topkast.app.result import DONE, RESULT_FILE, read_result

_CONFIG = Path(".hydra", "config.yaml")


@dataclass(frozen=True)
class RunFolder:
    """A run, as far as it is known.

    Attributes:
        folder: of the run.
        result: `result.json`; empty where the run did not get so far.
        curves: by name.
        saved: the sparse weights of its checkpoint.
        notes: what is missing, and why.
    """

    folder: Path
    result: Mapping[str, Any]
    curves: Mapping[str, Curve]
    saved: Saved | None
    notes: tuple[str, ...]

    @property
    def config(self) -> Any:
        """The resolved settings in the result, else the configuration as Hydra has kept it; None without either."""
        if self.result.get("config"):
            return self.result["config"]
        try:
            return yaml.safe_load((self.folder / _CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None

    @property
    def title(self) -> str:
        """The chosen options that tell what it was, or the folder's name."""
        choices = self.result.get("choices") or {}
        named = [str(choices[group]) for group in ("data", "model", "sparsity") if choices.get(group)]
        return " · ".join(named) or self.folder.name

    @property
    def command(self) -> str | None:
        """The command line that computes the same again."""
        overrides = self.result.get("overrides")
        return None if overrides is None else shlex.join(["topkast-train", *map(str, overrides)])


def is_run(folder: Path) -> bool:
    """Whether `folder` is that of a run, and not one with runs in it."""
    return (folder / RESULT_FILE).is_file() or (folder / "checkpoints").is_dir() or has_log(folder)


def read_run(folder: Path) -> RunFolder:
    """Read what there is; what can't be read is noted."""
    notes = []
    result: Mapping[str, Any] = {}
    try:
        result = read_result(folder) or {}
        if result.get("status") in DONE:
            check_form(dict(result), folder / RESULT_FILE)
        if not result:
            notes.append(f"There is no {RESULT_FILE}: the run has not come to its end.")
    except AppError as error:
        result = {}
        notes.append(f"{RESULT_FILE} was passed over: {error}.")
    saved = None
    try:
        saved = read_masks(folder)
        if saved is None:
            notes.append(
                "There is no checkpoint of this run on disk that can be read as a whole, so there are no masks and "
                "magnitudes: they are drawn from checkpoints/*.ckpt."
            )
    except AppError as error:
        notes.append(f"Masks and magnitudes are missing: {error}.")
    curves = read_curves(folder)
    if not curves:
        notes.append(
            "The run kept no curves on disk: train with logger=csv or the default, or with logger=tensorboard where "
            "tensorboard is installed."
        )
    return RunFolder(folder, result, curves, saved, tuple(notes))
