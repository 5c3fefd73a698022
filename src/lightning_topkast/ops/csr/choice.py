"""Which kernels multiply by unstructured sparse matrices."""

from pathlib import Path
from typing import Literal, get_args

import torch

from lightning_topkast.errors import TopKastError
from lightning_topkast.ops.compiled import Compiled
from lightning_topkast.ops.csr import library  # noqa: F401  the kernels implement its operators

Kernels = Literal["auto", "torch", "compiled"]

_COMPILED = Compiled(
    Path(__file__).with_name("kernels.cpp"),
    "using PyTorch's sparse operators, which are slower than dense ones at sparsities of 80/50",
)


def choose_kernels(name: Kernels, device: torch.device) -> Literal["torch", "compiled"]:
    """Return the kernels that `sparse_linear` uses on `device`; the first call may compile them.

    Args:
        name: `"auto"` uses the compiled kernels if they are available, and PyTorch's otherwise.
        device: of the tensors.

    Raises:
        TopKastError: `"compiled"` and the kernels are not available.
    """
    if name not in get_args(Kernels):
        raise TopKastError(f"expected kernels to be one of {', '.join(get_args(Kernels))}, got {name!r}")
    if name == "torch":
        return "torch"
    obstacle = _COMPILED.obstacle() if device.type == "cpu" else f"they run on CPU, not on {device.type}"
    if not obstacle:
        return "compiled"
    if name == "compiled":
        raise TopKastError(f"kernels='compiled' is not available: {obstacle}\nUse kernels='auto' or 'torch'.")
    return "torch"
