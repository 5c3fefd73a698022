"""Which of the two implementations computes: Triton's kernels, or torch's own operators."""

from functools import cache
from types import ModuleType
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from lightning_topkast.errors import TopKastError
from lightning_topkast.ops.blocks import portable

BlockOperators = Literal["auto", "torch", "triton"]

_SIDES = (16, 32, 64, 128)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON = (3, 4)  # the first with tensor descriptors
_CAPABILITY = (8, 0)  # NVIDIA's first with bfloat16 and TensorFloat-32


def choose_block_operators(
    name: BlockOperators, device: torch.device, block_shape: tuple[int, int], dtype: torch.dtype
) -> Literal["torch", "triton"]:
    """The operators that `block_sparse_linear` runs by.

    Args:
        name: `"auto"` takes Triton's kernels on a GPU where they can be had, and torch's operators elsewhere.
        device: where the tensors are; on CPU `"triton"` needs the variable TRITON_INTERPRET, and is for tests only.
        block_shape: of the weight's blocks.
        dtype: that is computed in.

    Raises:
        TopKastError: `"triton"` and its kernels can't be had.
    """
    if name not in get_args(BlockOperators):
        raise TopKastError(f"operators must be one of {', '.join(get_args(BlockOperators))}, got {name!r}")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return "torch"
    obstacle = _obstacle(device, block_shape, dtype)
    if not obstacle:
        return "triton"
    if name == "triton":
        raise TopKastError(f"operators='triton' can't be had: {obstacle}; use operators='auto' or 'torch'")
    return "torch"


def implementation(operators: str, dense: Tensor, block_shape: tuple[int, int]) -> ModuleType:
    """The module with the products, of which there are two, for these operators (see `choose_block_operators`)."""
    chosen = choose_block_operators(cast(BlockOperators, operators), dense.device, block_shape, dense.dtype)
    if chosen == "torch":
        return portable
    from lightning_topkast.ops.blocks import launch

    return launch


def _obstacle(device: torch.device, block_shape: tuple[int, int], dtype: torch.dtype) -> str:
    found = _triton_version()
    if not found:
        return "triton is not installed"
    if tuple(map(int, found.split(".")[:2])) < _TRITON:
        return f"triton {'.'.join(map(str, _TRITON))} or newer is needed, this is {found}"
    if not set(block_shape) <= set(_SIDES):
        return f"a block's sides must be of {_SIDES}, these are {tuple(block_shape)}"
    if dtype not in _DTYPES:
        return f"it computes in {', '.join(map(str, _DTYPES))}, not in {dtype}"
    if device.type == "cpu":
        from lightning_topkast.ops.blocks import launch

        return "" if launch.INTERPRETED else "on CPU it needs TRITON_INTERPRET=1 in the environment"
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    capability = _capability(device)
    if torch.version.hip is None and capability < _CAPABILITY:
        return f"it needs compute capability {_CAPABILITY}, this device has {capability}"
    return ""


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _triton_version() -> str:
    """Empty where it can't be imported."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)
