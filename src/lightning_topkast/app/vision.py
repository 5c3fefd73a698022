"""The one place that deals with torchvision, also where its compiled operators don't fit the installed torch.

The usual torchvision wheel is built for CUDA. Beside a CPU-only torch its operators can't be loaded and the import
fails, although models, transforms and datasets need none of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

# Declarations that `import torchvision` looks up; no implementation is needed to import it.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def make_torchvision_importable() -> None:
    """Declare the operators that torchvision lacks, if it is installed and fails to import for want of them."""
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
        return  # a build that fits: nothing to do
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    # What the failed import left behind would be taken for loaded modules.
    for module in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[module]
    _library = torch.library.Library("torchvision", "DEF")  # lives as long as the process, or its entries vanish
    for schema in _SCHEMAS:
        _library.define(schema)


def load_torchvision(submodule: str) -> ModuleType:
    """Import a submodule of torchvision, e.g. `load_torchvision("transforms.v2")`."""
    make_torchvision_importable()
    try:
        return importlib.import_module(f"torchvision.{submodule}")
    except ModuleNotFoundError as error:
        # Imported here, since the errors' module needs Lightning, which needs this module to have done its work.
        from lightning_topkast.app.errors import AppError

        raise AppError(
            f"this model or data set needs torchvision ({error}): pip install 'lightning-topkast[vision]', or "
            "in a clone .venv/bin/pip install -c constraints.txt '.[vision]'"
        ) from error
