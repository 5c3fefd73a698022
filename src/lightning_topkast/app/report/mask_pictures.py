"""Pictures of masks."""

from __future__ import annotations

import io

from PIL import Image

from lightning_topkast.app.run_folder.masks import SavedWeight
from lightning_topkast.telemetry.pictures import mask_picture

MOST_PIXELS = 256  # along a side of a picture


def draw_mask(weight: SavedWeight) -> bytes:
    """Return a PNG of a weight's sets with transparent gaps between kernels."""
    file = io.BytesIO()
    image = mask_picture(weight.tiers.numpy(), MOST_PIXELS)
    image.quantize(256, method=Image.Quantize.FASTOCTREE).save(file, format="PNG", optimize=True)
    return file.getvalue()
