"""The sets of a run's sparse weights, from a checkpoint, and pictures of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_topkast import TopKastCallback
from lightning_topkast.app.checkpoint import Checkpoint
from lightning_topkast.app.errors import AppError

ACTIVE, EXPLORING, RESERVOIR = 2, 1, 0  # tiers, as weights keep them
RGB = {ACTIVE: (47, 111, 222), EXPLORING: (230, 126, 20), RESERVOIR: (140, 150, 165)}
_RESERVOIR_ALPHA = 0.16  # a hint of grey, which the page's own background shines through
_MOST_PIXELS = 256  # of a picture's side; larger masks are averaged, smaller ones enlarged
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
    if not isinstance(tiers, Tensor) or tiers.dtype != torch.uint8 or type(tiers) is not Tensor or tiers.is_meta:
        raise AppError(f"the checkpoint has no tiers of '{name}' that can be drawn")
    if isinstance(alpha, Tensor) and isinstance(reserve, Tensor) and alpha.shape == reserve.shape == tiers.shape:
        return SavedWeight(name, tiers, alpha.detach(), reserve)
    return SavedWeight(name, tiers, None, None)


def chosen(weights: Sequence[SavedWeight], most: int = 6) -> list[SavedWeight]:
    """Return so many weights to be drawn, evenly over the depth, the first and the last among them."""
    if len(weights) <= most:
        return list(weights)
    return [weights[index] for index in np.linspace(0, len(weights) - 1, most).round().astype(int)]


def picture(weight: SavedWeight) -> bytes:
    """Return a PNG of a weight's sets: outputs downwards, inputs to the right, a convolution's kernels as tiles.

    The reservoir is nearly transparent. A large weight's pixels are blocks of entries: the more are active or
    exploring, the stronger the mean of their colours.
    """
    tiers = _as_matrix(weight.tiers).numpy()
    layers = np.stack([(tiers == tier).astype(np.float32) for tier in (ACTIVE, EXPLORING, RESERVOIR)], axis=-1)
    for axis in (0, 1):
        edges = np.arange(0, layers.shape[axis], -(-layers.shape[axis] // _MOST_PIXELS))
        sizes = np.diff([*edges, layers.shape[axis]]).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        layers = np.add.reduceat(layers, edges, axis=axis) / sizes
    # Blocks of many entries would all look grey: colours reach from none to the block that has most.
    layers[..., :2] /= max(float(layers[..., :2].sum(axis=-1).max()), 1e-6)
    layers[..., 2] = 1 - layers[..., :2].sum(axis=-1)
    opacity = layers * np.array([1, 1, _RESERVOIR_ALPHA], dtype=np.float32)
    alpha = opacity.sum(axis=-1, keepdims=True)
    colours = np.array([RGB[tier] for tier in (ACTIVE, EXPLORING, RESERVOIR)], dtype=np.float32)
    rgb = opacity @ colours / np.maximum(alpha, 1e-6)
    pixels = np.concatenate([rgb, 255 * alpha], axis=-1).round().astype(np.uint8)
    zoom = max(1, _MOST_PIXELS // max(pixels.shape[:2]))
    file = io.BytesIO()
    image = Image.fromarray(pixels.repeat(zoom, axis=0).repeat(zoom, axis=1))
    image.quantize(256, method=Image.Quantize.FASTOCTREE).save(file, format="PNG", optimize=True)
    return file.getvalue()


def _as_matrix(tiers: Tensor) -> Tensor:
    """Outputs × inputs; where each pair has a kernel, that is a tile of it."""
    if tiers.dim() == 4:
        out, into, height, width = tiers.shape
        return tiers.permute(0, 2, 1, 3).reshape(out * height, into * width)
    return tiers.reshape(len(tiers), -1) if tiers.dim() > 1 else tiers.reshape(1, -1)
