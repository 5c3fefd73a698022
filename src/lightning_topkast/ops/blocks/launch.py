"""Starts the Triton kernels: grids, tuning, and how the rows of a sum are split.

Importing it imports triton, which not every environment has; `choice` looks whether it can be had.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor

from lightning_topkast.ops.blocks.kernels import product_kernel, sampled_kernel
from lightning_topkast.ops.blocks.pattern import Lines

# A kernel runs in Python, on CPU tensors, if the variable TRITON_INTERPRET was set when triton was imported.
INTERPRETED = not isinstance(product_kernel, triton.JITFunction)

# What tuning chooses from, by the names of the kernels' arguments; the interpreter takes small fixed ones. The product
# finds its blocks by loaded indices, which takes stages of its own: 3, 5 and 7 stages are 2, 3 and 4 buffers of tiles.
_PRODUCT_TILES = [
    triton.Config({"TILE": tile, "STEP": step, "GROUP": 8}, num_warps=warps, num_stages=stages)
    for tile, step, warps, stages in (
        (16, 64, 4, 5),
        (32, 64, 4, 5),
        (64, 32, 4, 5),
        (64, 64, 4, 5),
        (128, 32, 4, 5),
        (128, 64, 4, 5),
        (128, 64, 8, 5),
        (128, 128, 8, 3),
        (256, 32, 8, 7),
        (256, 64, 8, 3),
        (256, 64, 8, 5),
    )
]
_SAMPLED_TILES = [
    triton.Config({"SIDE": side, "STEP": step}, num_warps=warps, num_stages=stages)
    for side, step, warps, stages in (
        (1, 64, 4, 3),
        (1, 64, 8, 4),
        (2, 64, 4, 4),
        (2, 64, 8, 3),
        (4, 64, 4, 3),
        (4, 32, 8, 4),
        (4, 64, 8, 3),
        (8, 64, 4, 3),
        (8, 64, 8, 3),
    )
]
_SUMS_PER_THREAD = 128  # so many float32 sums at most, or its registers spill
_FIXED_PRODUCT = {"TILE": 16, "STEP": 32, "GROUP": 2} if INTERPRETED else {}
_FIXED_SAMPLED = {"SIDE": 2, "STEP": 16} if INTERPRETED else {}
_tiles: dict[tuple[object, ...], dict[str, Any]] = {}  # what tuning chose, by case

# Splits begin at multiples of this many rows, whichever tile tuning chooses: the order of a sum must not depend on it.
_SPLIT_UNIT = 128
_MOST_SPLITS = 16


def product(dense: Tensor, values: Tensor, bias: Tensor | None, lines: Lines, transposed: bool) -> Tensor:
    """Same as `portable.product`."""
    height, width = values.shape[1:]
    depth, breadth = (height, width) if transposed else (width, height)
    rows, count = dense.shape[0], lines.starts.numel() - 1
    result = dense.new_empty(rows, count * breadth)
    if result.numel() == 0:
        return result
    values = values.contiguous()
    buckets = _bucket(rows), _bucket(lines.others.numel() // count)
    arguments = (
        dense,
        values,
        values if bias is None else bias.contiguous(),
        result,
        *lines,
        rows,
        count,
        *dense.stride(),
        *buckets,
    )
    constants = {"DEPTH": depth, "BREADTH": breadth, "TRANSPOSED": transposed, "HAS_BIAS": bias is not None}
    constants |= _FIXED_PRODUCT
    case = (*buckets, count, depth, breadth, transposed)
    _start(_product, case, lambda meta: (-(-rows // meta["TILE"]) * count,), dense, arguments, constants)
    return result


def sampled(grads: Tensor, dense: Tensor, lines: Lines, shape: Sequence[int]) -> Tensor:
    """Same as `portable.sampled`."""
    _, height, width = shape
    rows, count, present = dense.shape[0], lines.starts.numel() - 1, lines.others.numel()
    result = dense.new_empty(shape)
    if rows == 0 or present == 0:
        return result.zero_()
    result[present:] = 0
    splits, split_rows = split(rows, present, _processors(dense.device))
    partial = result if splits == 1 else dense.new_empty(splits, present, height, width, dtype=torch.float32)
    across = dense.shape[1] // width

    buckets = _bucket(rows), _bucket(present // count)
    arguments = (
        grads,
        dense,
        partial,
        lines.starts,
        lines.others,
        lines.blocks,
        rows,
        across,
        split_rows,
        *grads.stride(),
        *dense.stride(),
        present * height * width,
        *buckets,
    )
    case = (*buckets, across, height, width, partial.dtype)
    constants = {"HEIGHT": height, "WIDTH": width, **_FIXED_SAMPLED}
    _start(_sampled, case, lambda meta: (-(-across // meta["SIDE"]) * count, splits), dense, arguments, constants)
    if splits > 1:
        result[:present] = partial.sum(0)
    return result


def split(rows: int, blocks: int, processors: int) -> tuple[int, int]:
    """Into how many sums that of `rows` rows is split, and of how many rows each, so that few blocks use the device.

    Args:
        rows: at least 1.
        blocks: at least 1; each is a program's work.
        processors: of the device.
    """
    wanted = min(-(-2 * processors // blocks), _MOST_SPLITS, -(-rows // (2 * _SPLIT_UNIT)))
    split_rows = -(-rows // (wanted * _SPLIT_UNIT)) * _SPLIT_UNIT
    return -(-rows // split_rows), split_rows


def _start(
    kernel: Any,
    case: tuple[object, ...],
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    dense: Tensor,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Start a kernel in the tiling that was found the best for its case.

    Triton's tuner knows the case from the arguments, but to look through them at each start takes as long as starting.
    """
    constants |= _numerics(dense)
    key = (kernel, *case, dense.dtype, constants["PRECISION"])
    with _on(dense):
        if key in _tiles:
            kernel.fn[grid](*arguments, **constants, **_tiles[key])
        else:
            kernel[grid](*arguments, **constants)
            if not INTERPRETED:
                _tiles[key] = kernel.best_config.all_kwargs()


def _bucket(size: int) -> int:
    """Sizes that are tuned together."""
    return 1 << max(size - 1, 0).bit_length()


def _numerics(dense: Tensor) -> dict[str, Any]:
    """float32 as torch's own products: TensorFloat-32 where they may use it."""
    return {
        "PRECISION": "tf32" if dense.dtype == torch.float32 and _may_use_tf32() else "ieee",
        "WIDEN": INTERPRETED and dense.dtype == torch.bfloat16,
        "enable_fp_fusion": True,  # Triton's default until 3.9, which warns that it will change
    }


def _may_use_tf32() -> bool:
    settings = torch.backends.cuda.matmul
    # the newer of the two settings never raises, whichever of them was written
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: small tests are to split too
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(tensor: Tensor) -> Any:
    """Triton starts kernels on the current device, whichever the tensors are on."""
    elsewhere = tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else nullcontext()


def _product_tiles(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Tiles that are as large as the batch at most, and no two that come to the same.

    Below 64 rows there is one, and from there on none is below 64: that is where tensor cores change their
    instruction, and with it the order of sums.
    """
    batch, depth = arguments["batch_bucket"], constants["DEPTH"]
    smallest = min(max(batch, 16), 64)
    largest = smallest if smallest < 64 else max(batch, 64)
    steps = sorted({config.kwargs["STEP"] for config in configs})
    deepest = next((step for step in steps if step >= depth), steps[-1])
    fitting = [config for config in configs if smallest <= config.kwargs["TILE"] <= largest]
    return [config for config in fitting if config.kwargs["STEP"] <= deepest] or fitting


def _sampled_tiles(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Tiles of 64 to 256 columns that fit into registers."""
    height, width = constants["HEIGHT"], constants["WIDTH"]
    return [
        config
        for config in configs
        if 64 <= config.kwargs["SIDE"] * width <= 256
        and config.kwargs["SIDE"] * width * height <= _SUMS_PER_THREAD * 32 * config.num_warps
    ]


if INTERPRETED:
    _product, _sampled = product_kernel, sampled_kernel
else:
    _buckets = ["batch_bucket", "length_bucket"]
    _timing = partial(triton.testing.do_bench, warmup=5, rep=20)  # ms
    _product = triton.autotune(
        _PRODUCT_TILES,
        key=[*_buckets, "lines", "DEPTH", "BREADTH", "TRANSPOSED", "PRECISION"],
        prune_configs_by={"early_config_prune": _product_tiles},
        do_bench=_timing,
    )(product_kernel)
    _sampled = triton.autotune(
        _SAMPLED_TILES,
        key=[*_buckets, "across", "HEIGHT", "WIDTH", "PRECISION"],
        prune_configs_by={"early_config_prune": _sampled_tiles},
        do_bench=_timing,
    )(sampled_kernel)
