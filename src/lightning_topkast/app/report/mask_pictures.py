"""Pictures of masks."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lightning_topkast.app.run_folder.masks import SavedWeight
from lightning_topkast.telemetry.pictures import mask_picture

_MOST_PIXELS = 256  # along a side of a picture


def choose_weights(weights: Sequence[SavedWeight], most: int = 6) -> list[SavedWeight]:
    """Return at most `most` weights to draw, evenly spaced in depth, including the first and the last."""
    if len(weights) <= most:
        return list(weights)
    return [weights[index] for index in np.linspace(0, len(weights) - 1, most).round().astype(int)]


def draw_mask(weight: SavedWeight) -> bytes:
    """Return a PNG of a weight's sets with transparent gaps between kernels."""
    file = io.BytesIO()
    image = mask_picture(weight.tiers.numpy(), _MOST_PIXELS)
    image.quantize(256, method=Image.Quantize.FASTOCTREE).save(file, format="PNG", optimize=True)
    return file.getvalue()
