"""The paths in the state that a `ModelCheckpoint` has saved, which it would load, remove or hand to loggers."""

import filecmp
import os
from collections.abc import Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


class OwnCheckpoints(Callback):
    """Keep the other callbacks of a Trainer from touching files that only a loaded checkpoint names.

    A checkpoint may come from a stranger, and loads safely as data. But what it names as the best one is loaded for a
    test, and what it names as an older one is removed, be it a folder or a URL.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct the states of all `ModelCheckpoint`s, before they load them."""
        states = checkpoint.get("callbacks") or {}
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.state_key in states:
                states[callback.state_key] = own_state(callback, states[callback.state_key])


def own_state(callback: ModelCheckpoint, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state with paths of existing checkpoints in the callback's own folder only.

    A path in the folder that the state was saved for counts as the same place in the callback's folder, since a run may
    have been moved or copied.

    Raises:
        ValueError: The state is damaged.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"expected the state of a {type(callback).__name__}, got {state!r:.60}")
    kept = dict(state)
    saved_scores = state.get("best_k_models", {})
    if not isinstance(saved_scores, Mapping):
        raise ValueError(f"expected best_k_models to be a dict, got {saved_scores!r:.60}")
    scores = {
        own: _score(score, path) for path, score in saved_scores.items() if (own := _own_path(callback, state, path))
    }
    for name in ("best_model_score", "current_score", "kth_value"):
        if state.get(name) is not None:
            kept[name] = _score(state[name], name)
    kept |= {name: _own_path(callback, state, state.get(name)) for name in _PATHS}
    kept["best_k_models"] = scores
    best, worst = (max, min) if callback.mode == "max" else (min, max)
    if scores and kept["kth_best_model_path"] not in scores:
        kept["kth_best_model_path"] = worst(scores, key=lambda path: float(scores[path]))
        kept["kth_value"] = scores[kept["kth_best_model_path"]]
    if not kept["best_model_path"]:
        kept["best_model_path"] = best(scores, key=lambda path: float(scores[path])) if scores else ""
        kept["best_model_score"] = scores.get(kept["best_model_path"])
    if any(kept[name] for name in _PATHS):
        kept["dirpath"] = callback.dirpath  # Lightning takes nothing but the best path from the state of another folder
    return kept


def _own_path(callback: ModelCheckpoint, state: Mapping[str, Any], path: Any) -> str:
    """Return a saved path as one in the callback's own folder, or "" if there is no such checkpoint."""
    if is_own(callback, path):
        return str(path)
    saved_in = state.get("dirpath")
    if not isinstance(path, str) or not isinstance(saved_in, str) or not callback.dirpath:
        return ""
    try:
        moved = os.path.join(callback.dirpath, PurePath(path).relative_to(saved_in))
    except ValueError:  # it was elsewhere already
        return ""
    if not is_own(callback, moved) or (os.path.exists(path) and not _same(path, moved)):  # another run's
        return ""
    return moved


def _same(one: str, other: str) -> bool:
    """Return whether two paths are files with the same content, as after a run was copied."""
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _score(value: Any, name: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex() or value.layout is not torch.strided:
        raise ValueError(f"expected {name} to be a score, got {value!r:.60}")
    return value


def is_own(callback: ModelCheckpoint, path: Any) -> bool:
    """Return whether a path names an existing checkpoint in the folder that the callback writes to."""
    folder = str(callback.dirpath or "")
    if not isinstance(path, str) or not path or not folder:
        return False
    if "://" in folder:  # its files are not looked for, which would take a request each
        return path.startswith(f"{folder.rstrip('/')}/") and ".." not in PurePosixPath(path).parts
    if "://" in path:
        return False
    try:
        found = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # missing, not a path at all, or a loop of links
        return False
    return Path(folder).resolve() in found.parents
