"""The sets of a run's sparse weights, from a checkpoint, and pictures of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_topkast import TopKastCallback
from lightning_topkast.app.checkpoint import Checkpoint
from lightning_topkast.app.errors import AppError
from lightning_topkast.telemetry.pictures import mask_picture

ACTIVE, EXPLORING, RESERVOIR = 2, 1, 0  # tiers, as weights keep them
_MOST_PIXELS = 256  # of a picture's side
_MOST_SAMPLES = 400_000  # of a histogram


@dataclass(frozen=True)
class SavedWeight:
    r"""A sparse weight in a checkpoint; its tensors stay in the file until they are looked at.

    Attributes:
        name: of the parameter.
        tiers: uint8 in the weight's shape: 2 on A, 1 on B\A, 0 on C.
        alpha: θ on A, 0 elsewhere; None where the checkpoint has no such weight.
        reserve: θ outside A, 0 on it; None likewise.
    """

    name: str
    tiers: Tensor
    alpha: Tensor | None
    reserve: Tensor | None

    @property
    def magnitudes(self) -> np.ndarray | None:
        """|θ|, flat; None where it is not known. Computed anew each time, since all of them may not fit in memory."""
        if self.alpha is None or self.reserve is None:
            return None
        return (self.alpha.float() + self.reserve.float()).abs().flatten().numpy()

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own."""
        return tuple(self.tiers.shape)

    @property
    def entries(self) -> int:
        """How many there are."""
        return self.tiers.numel()

    @property
    def active(self) -> int:
        """|A|."""
        return int((self.tiers == ACTIVE).sum())

    @property
    def updated(self) -> int:
        """|B|."""
        return int((self.tiers != RESERVOIR).sum())

    def thresholds(self) -> tuple[float | None, float | None]:
        """The |A|-th and the |B|-th largest magnitude, at which selection by magnitude would cut now; None: no cut."""
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
        """Magnitudes by tier, of every so-many-th entry where there are very many."""
        magnitudes = self.magnitudes
        if magnitudes is None:
            return {}
        stride = -(-self.entries // _MOST_SAMPLES)
        tiers, magnitudes = self.tiers.flatten().numpy()[::stride], magnitudes[::stride]
        return {tier: magnitudes[tiers == tier] for tier in (RESERVOIR, EXPLORING, ACTIVE)}


@dataclass(frozen=True)
class Saved:
    """The sparse weights in a checkpoint.

    Attributes:
        file: the checkpoint.
        step: optimizer steps taken when it was written.
        weights: in the model's order; none in a dense run's.
    """

    file: Path
    step: int
    weights: tuple[SavedWeight, ...]


def read_masks(folder: Path) -> Saved | None:
    """Return the sets in the checkpoint of the run in `folder` that was tested, None where it left none.

    Raises:
        AppError: it is damaged, or can't be read without running its code.
    """
    files = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    files = [file for file in files if file.is_file()]  # sharded ones are folders
    if not files:
        return None
    file = next((file for file in files if file.name.startswith("best")), files[0])
    checkpoint = Checkpoint(str(file))
    state = checkpoint.content["state_dict"]
    weights = []
    for key, callback in checkpoint.content.get("callbacks", {}).items():
        if str(key).startswith(TopKastCallback.__qualname__) and isinstance(callback, dict):
            kept = callback.get("weights")
            for name, saved in (kept if isinstance(kept, dict) else {}).items():
                weights.append(_saved_weight(str(name), saved, state.get(name)))
    order = {name: index for index, name in enumerate(state)}
    return Saved(file, checkpoint.step, tuple(sorted(weights, key=lambda weight: order.get(weight.name, len(order)))))


def _saved_weight(name: str, saved: Any, alpha: Any) -> SavedWeight:
    tiers, reserve = (saved.get(part) if isinstance(saved, dict) else None for part in ("tiers", "reserve"))
    if not (_is_plain(tiers) and tiers.dtype == torch.uint8 and tiers.numel()):
        raise AppError(f"the checkpoint has no tiers of '{name}' that can be drawn")
    if not (_is_plain(alpha) and _is_plain(reserve) and alpha.is_floating_point() and reserve.is_floating_point()):
        return SavedWeight(name, tiers, None, None)
    if not alpha.shape == reserve.shape == tiers.shape:
        return SavedWeight(name, tiers, None, None)
    return SavedWeight(name, tiers, alpha.detach(), reserve)


def _is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether it is an ordinary tensor with its values: a file may hold any other."""
    return type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta


def chosen(weights: Sequence[SavedWeight], most: int = 6) -> list[SavedWeight]:
    """Return so many weights to be drawn, evenly over the depth, the first and the last among them."""
    if len(weights) <= most:
        return list(weights)
    return [weights[index] for index in np.linspace(0, len(weights) - 1, most).round().astype(int)]


def picture(weight: SavedWeight) -> bytes:
    """Return a PNG of a weight's sets, which the page's own background shines through."""
    file = io.BytesIO()
    image = mask_picture(weight.tiers.numpy(), _MOST_PIXELS)
    image.quantize(256, method=Image.Quantize.FASTOCTREE).save(file, format="PNG", optimize=True)
    return file.getvalue()
