"""Import torchvision, even if its compiled operators do not match the installed torch.

Import this module before Lightning, whose dependency torchmetrics imports torchvision.

The default torchvision wheel is built for CUDA. With a CPU-only torch its operators cannot be loaded and the import
fails, although models, transforms and datasets do not need them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

from lightning_topkast.app.errors import AppError

# Operators that `import torchvision` looks up; it needs no implementation of them.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def _make_importable() -> None:
    """Declare the operators without which torchvision cannot be imported, if it is installed and needs this."""
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
        return  # a matching build
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    # The failed import leaves partial modules, which would be taken for loaded ones.
    for module in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[module]
    _library = torch.library.Library("torchvision", "DEF")  # must live as long as the process
    for schema in _SCHEMAS:
        _library.define(schema)


def load_torchvision(submodule: str) -> ModuleType:
    """Import a submodule of torchvision, e.g. `load_torchvision("transforms.v2")`."""
    try:
        return importlib.import_module(f"torchvision.{submodule}")
    except ModuleNotFoundError as error:
        raise AppError(
            f"this model or data set needs torchvision ({error}): pip install 'lightning-topkast[vision]', or "
            "in a clone .venv/bin/pip install -c constraints.txt '.[vision]'"
        ) from error


_make_importable()
