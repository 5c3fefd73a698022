"""Masks over a run: for each weight the pictures of all moments, one below the other, of which a page shows one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lightning_topkast.app import formatting
from lightning_topkast.app.report.mask_pictures import MOST_PIXELS
from lightning_topkast.app.report.page import Inline, inline_png
from lightning_topkast.app.run_folder.mask_history import MaskHistory
from lightning_topkast.telemetry.pictures import block_side, colour_shares


@dataclass(frozen=True)
class Reel:
    """The pictures of one weight.

    Attributes:
        inline: All of them in one image.
        width: Of one of them in the page, in CSS pixels.
        height: Likewise.
    """

    inline: Inline
    width: int
    height: int


@dataclass(frozen=True)
class Film:
    """The masks over a run.

    Attributes:
        moments: What each moment is, in words.
        reels: One for each weight.
    """

    moments: Sequence[str]
    reels: Sequence[Reel]


def film(history: MaskHistory, pictures: dict[str, bytes]) -> Film | None:
    """Return the masks over a run, or None if they never changed.

    Args:
        history: The masks.
        pictures: Each image is added as a PNG file.
    """
    if all(moment.masks == history.moments[0].masks for moment in history.moments):
        return None
    reels = []
    for number, weight in enumerate(history.weights):
        name, shape = f"masks-over-run-{number + 1}", formatting.shape(weight.shape) or "scalar"
        pictures[name] = _draw(history.shares(number))
        label = f"sets of {weight.name}, {shape}, over the run"
        height, width = (-(-side // block_side(side, MOST_PIXELS)) for side in (weight.height, weight.width))
        grow = max(1, MOST_PIXELS // max(height, width))  # as large as the picture of a mask
        inline = inline_png(name, label, pictures[name], f"{weight.name}  {shape}")
        reels.append(Reel(inline, grow * width, grow * height))
    moments = [f"step {moment.step:,}, refresh {moment.refresh:,}" for moment in history.moments]
    return Film(moments, reels)


def _draw(shares: np.ndarray) -> bytes:
    """Return a PNG of all moments, one below the other, with colours of one scale."""
    top = max(float(shares.sum(axis=-1).max()), 1e-6)
    pixels = np.concatenate(list(colour_shares((shares / top).clip(0, 1))))
    file = io.BytesIO()
    image = Image.fromarray(pixels).convert("RGB").quantize(64)
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()
