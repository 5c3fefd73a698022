"""The choice between the two implementations: Triton kernels and PyTorch's own operators."""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from lightning_topkast.errors import TopKastError

BlockKernels = Literal["auto", "torch", "triton"]

_SIDES = (16, 32, 64, 128)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON = (3, 4)  # first version with tensor descriptors
_CAPABILITY = (8, 0)  # first NVIDIA GPUs with bfloat16 and TensorFloat-32


def choose_block_kernels(
    name: BlockKernels, device: torch.device, block_shape: tuple[int, int], dtype: torch.dtype
) -> Literal["torch", "triton"]:
    """Return the kernels that `block_sparse_linear` uses.

    Args:
        name: `"auto"` uses Triton's kernels on a GPU if they are available, and PyTorch's otherwise.
        device: of the tensors; on CPU `"triton"` needs the environment variable TRITON_INTERPRET, for tests only.
        block_shape: of the weight's blocks.
        dtype: of the computation.

    Raises:
        TopKastError: `"triton"` and its kernels are not available.
    """
    if name not in get_args(BlockKernels):
        raise TopKastError(f"expected kernels to be one of {', '.join(get_args(BlockKernels))}, got {name!r}")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return "torch"
    obstacle = _obstacle(device, block_shape, dtype)
    if not obstacle:
        return "triton"
    if name == "triton":
        raise TopKastError(f"kernels='triton' is not available: {obstacle}; use kernels='auto' or 'torch'")
    return "torch"


def convolves_by_blocks(
    name: BlockKernels, device: torch.device, block_shape: tuple[int, int], dtype: torch.dtype, share: float
) -> bool:
    """Return whether a layer multiplies by the blocks of a convolution's weight, rather than by a dense copy of it.

    Args:
        name: `"auto"` does so where it should be faster: with Triton's kernels on a GPU, and on a CPU with PyTorch's in
            float32 and float64 if `share` is small. Other kernels always do.
        device: of the tensors.
        block_shape: of the weight's blocks.
        dtype: of the computation.
        share: multiplications by the blocks in forward and backward pass, as a share of those of the dense weight.
    """
    if name != "auto":
        return True
    if device.type == "cpu":
        return dtype in (torch.float32, torch.float64) and share * cost_of_conv(block_shape) < 1
    return _chooses_triton(device, block_shape, dtype)


def cost_of_conv(block_shape: tuple[int, int]) -> float:
    """Return the time of a convolution by PyTorch's kernels on a CPU per entry of a block, relative to a dense one.

    Fitted to square blocks of side 8 to 128 in float32 (`python benchmarks/gpu_conv.py`); in bfloat16 a CPU's dense
    convolution takes a fifth of that time, and is faster than blocks nearly always.
    """
    return 2 + 150 / min(block_shape)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _chooses_triton(device: torch.device, block_shape: tuple[int, int], dtype: torch.dtype) -> bool:
    return choose_block_kernels("auto", device, block_shape, dtype) == "triton"


def implementation(kernels: str, dense: Tensor, block_shape: tuple[int, int], package: str) -> ModuleType:
    """Return the module of a package with its two products for these kernels; see `choose_block_kernels`."""
    chosen = choose_block_kernels(cast(BlockKernels, kernels), dense.device, block_shape, dense.dtype)
    return import_module(f"{package}.{'portable' if chosen == 'torch' else 'launch'}")  # the latter imports triton


def _obstacle(device: torch.device, block_shape: tuple[int, int], dtype: torch.dtype) -> str:
    found = triton_version()
    if not found:
        return "triton is not installed"
    if tuple(map(int, found.split(".")[:2])) < _TRITON:
        return f"expected triton {'.'.join(map(str, _TRITON))} or newer, got {found}"
    if not set(block_shape) <= set(_SIDES):
        return f"expected block sides from {_SIDES}, got {tuple(block_shape)}"
    if dtype not in _DTYPES:
        return f"expected {', '.join(map(str, _DTYPES))}, got {dtype}"
    if device.type == "cpu":
        from lightning_topkast.ops.blocks import launch

        return "" if launch.INTERPRETED else "on CPU it needs TRITON_INTERPRET=1 in the environment"
    if device.type != "cuda":
        return f"expected a CUDA device, got {device.type}"
    capability = _capability(device)
    if torch.version.hip is None and capability < _CAPABILITY:
        return f"expected compute capability {_CAPABILITY} or higher, got {capability}"
    return ""


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def triton_version() -> str:
    """Return Triton's version, or "" if it cannot be imported."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)
