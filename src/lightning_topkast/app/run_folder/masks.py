"""The masks of a run's sparse weights, read from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import lightning_topkast.app.vision  # noqa: F401  before Lightning
from lightning_topkast import TopKastCallback
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run_folder.checkpoint import Checkpoint
from lightning_topkast.app.run_folder.folder import RunFolder

ACTIVE, EXPLORING, RESERVOIR = 2, 1, 0  # tiers, as stored in checkpoints
_MOST_SAMPLES = 400_000  # in a histogram

_T = TypeVar("_T")


@dataclass(frozen=True)
class SavedWeight:
    r"""A sparse weight in a checkpoint. Its tensors stay in the file until they are used.

    Attributes:
        name: Name of the parameter.
        tiers: uint8 tensor in the shape of the weight: 2 on A, 1 on B\A, 0 on C.
        alpha: θ on A, 0 elsewhere; None if the checkpoint has no such weight.
        latent: Latent values: θ outside A, 0 on it; None likewise.
    """

    name: str
    tiers: Tensor
    alpha: Tensor | None
    latent: Tensor | None

    @property
    def magnitudes(self) -> np.ndarray | None:
        """Flat |θ|, or None if it is not known. Not cached, since those of all weights may not fit in memory."""
        if self.alpha is None or self.latent is None:
            return None
        return (self.alpha.float() + self.latent.float()).abs().flatten().numpy()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.tiers.shape)

    @property
    def entries(self) -> int:
        """Number of entries."""
        return self.tiers.numel()

    @property
    def active(self) -> int:
        """Number of active entries, |A|."""
        return int((self.tiers == ACTIVE).sum())

    @property
    def updated(self) -> int:
        """Number of updated entries, |B|."""
        return int((self.tiers != RESERVOIR).sum())

    def thresholds(self) -> tuple[float | None, float | None]:
        """Return the |A|-th and the |B|-th largest magnitude, where selection by magnitude cuts; None for no cut."""
        cuts = [count for count in (self.active, self.updated) if 0 < count < self.entries]
        magnitudes = self.magnitudes if cuts else None
        if magnitudes is None:
            return None, None
        ordered = np.partition(magnitudes, [self.entries - count for count in cuts])
        forward, backward = (
            float(ordered[self.entries - count]) if count in cuts else None for count in (self.active, self.updated)
        )
        return forward, backward if self.updated > self.active else None

    def groups(self) -> dict[int, np.ndarray]:
        """Return the magnitudes by tier, of a regular sample of the entries if there are very many."""
        magnitudes = self.magnitudes
        if magnitudes is None:
            return {}
        stride = -(-self.entries // _MOST_SAMPLES)
        tiers, magnitudes = self.tiers.flatten().numpy()[::stride], magnitudes[::stride]
        return {tier: magnitudes[tiers == tier] for tier in (RESERVOIR, EXPLORING, ACTIVE)}


@dataclass(frozen=True)
class SavedMasks:
    """The sparse weights in a checkpoint.

    Attributes:
        file: The checkpoint.
        step: Optimizer steps taken when it was written.
        weights: In the order of the model; empty for a dense run.
    """

    file: Path
    step: int
    weights: tuple[SavedWeight, ...]


def spread(weights: Sequence[_T], most: int = 6) -> list[_T]:
    """Return the weights to draw: at most `most`, evenly spaced in depth, including the first and the last."""
    if len(weights) <= most:
        return list(weights)
    return [weights[index] for index in np.linspace(0, len(weights) - 1, most).round().astype(int)]


def read_masks(run: RunFolder) -> SavedMasks | None:
    """Return the masks in a run's best checkpoint, or None if it has none in a single file.

    Raises:
        AppError: The checkpoint is damaged, or cannot be read without running code.
    """
    file = run.best_checkpoint()
    if file is None or file.is_dir():
        return None
    checkpoint = Checkpoint(str(file))
    state = checkpoint.content["state_dict"]
    weights = []
    for key, callback in checkpoint.content.get("callbacks", {}).items():
        if str(key).startswith(TopKastCallback.__qualname__) and isinstance(callback, dict):
            kept = callback.get("weights")
            for name, saved in (kept if isinstance(kept, dict) else {}).items():
                weights.append(_saved_weight(str(name), saved, state.get(name)))
    order = {name: index for index, name in enumerate(state)}
    return SavedMasks(
        file, checkpoint.step, tuple(sorted(weights, key=lambda weight: order.get(weight.name, len(order))))
    )


def _saved_weight(name: str, saved: Any, alpha: Any) -> SavedWeight:
    tiers, latent = (saved.get(part) if isinstance(saved, dict) else None for part in ("tiers", "latent"))
    if not (_is_plain(tiers) and tiers.dtype == torch.uint8 and tiers.numel()):
        raise AppError(f"the checkpoint has no valid tiers for '{name}'")
    if not (_is_plain(alpha) and _is_plain(latent) and alpha.is_floating_point() and latent.is_floating_point()):
        return SavedWeight(name, tiers, None, None)
    if not alpha.shape == latent.shape == tiers.shape:
        return SavedWeight(name, tiers, None, None)
    return SavedWeight(name, tiers, alpha.detach(), latent)


def _is_plain(value: Any) -> TypeGuard[Tensor]:
    """Return whether `value` is an ordinary dense tensor with data, since a file may hold any other."""
    return type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta
