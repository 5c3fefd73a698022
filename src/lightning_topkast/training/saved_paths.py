"""The paths in the state that a `ModelCheckpoint` has saved, which it would load, remove or hand to loggers."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

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
    """Return a saved state without paths other than those of existing checkpoints in the callback's own folder."""
    kept = dict(state)
    scores = state.get("best_k_models")
    scores = scores if isinstance(scores, dict) else {}
    scores = {path: score for path, score in scores.items() if is_own(callback, path) and isinstance(score, Tensor)}
    kept |= {name: state.get(name) if is_own(callback, state.get(name)) else "" for name in _PATHS}
    kept["best_k_models"] = scores
    best, worst = (max, min) if callback.mode == "max" else (min, max)
    if scores and kept["kth_best_model_path"] not in scores:
        kept["kth_best_model_path"] = worst(scores, key=lambda path: float(scores[path]))
        kept["kth_value"] = scores[kept["kth_best_model_path"]]
    if not kept["best_model_path"]:
        kept["best_model_path"] = best(scores, key=lambda path: float(scores[path])) if scores else ""
        kept["best_model_score"] = scores.get(kept["best_model_path"])
    return kept


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
