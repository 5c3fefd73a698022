"""What a run has left in its folder, read for a report."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
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


def known_result(folder: Path) -> Mapping[str, Any]:
    """Return `result.json`, empty where there is none.

    Raises:
        AppError: it can't be read, or something in it is of another form than runs write.
    """
    result = read_result(folder) or {}
    if result.get("status") in DONE:
        check_form(result, folder / RESULT_FILE)
    for key, fits in _FORM.items():
        if result.get(key) is not None and not fits(result[key]):
            raise AppError(f"{folder / RESULT_FILE}: its {key} is {result[key]!r:.60}, which no run writes")
    return result


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, int | float | None) for each in value.values())


def _monitor(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and _numbers({0: value.get("value")})


def _parameters(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), int) for key in ("total", "nonzero"))


def _weights(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("name"), str)
        and isinstance(each.get("shape"), list)
        and all(isinstance(each.get(key), int) for key in ("entries", "nonzero"))
        for each in value
    )


# Whether what a report reads besides is as runs write it, where it is there: older ones lack some of it.
_FORM: dict[str, Callable[[Any], bool]] = {
    "seconds": lambda value: isinstance(value, int | float),
    "steps": lambda value: isinstance(value, int),
    "examples": lambda value: isinstance(value, int | float),
    "monitor": _monitor,
    "metrics": _numbers,
    "sparsity": _numbers,
    "parameters": _parameters,
    "flops": lambda value: _numbers(value) and (not value or value.get("training_flops") is not None),
    "weights": _weights,
    "versions": lambda value: isinstance(value, dict),
    "hardware": lambda value: isinstance(value, dict),
}


def read_run(folder: Path) -> RunFolder:
    """Read what there is; what can't be read is noted."""
    notes = []
    result: Mapping[str, Any] = {}
    try:
        result = known_result(folder)
        if not result:
            notes.append(f"There is no {RESULT_FILE}: the run has not come to its end, or is not one of topkast-train.")
    except AppError as error:
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
    return RunFolder(folder.resolve(), result, curves, saved, tuple(notes))
