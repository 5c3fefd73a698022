"""A report's pictures for TensorBoard, which would otherwise have the curves only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lightning_topkast.app.report.page import PICTURES

FOLDER = "tensorboard"  # where logger=tensorboard writes, in the run's folder


def log_to_tensorboard(folder: Path) -> None:
    """Log the pictures of the report in `folder` as images `report/...`, if the run there logged to TensorBoard."""
    if not any((folder / FOLDER).glob("events.out.tfevents.*")):
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the run's logger was tensorboardX
        return
    with SummaryWriter(str(folder / FOLDER)) as writer:
        for path in sorted((folder / PICTURES).glob("*.png")):
            with Image.open(path) as image:
                white = Image.new("RGBA", image.size, "white")
                pixels = np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
            writer.add_image(f"report/{path.stem}", pixels, dataformats="HWC")
