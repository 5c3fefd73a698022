"""Starts the Triton kernels: grids, tuning, and how the rows of a sum are split.

Importing it imports triton, which not every environment has; `choice` looks whether it can be had.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lightning_topkast.ops.blocks.kernels import fold_kernel, product_kernel, sampled_kernel
from lightning_topkast.ops.blocks.pattern import Lines

# A kernel runs in Python, on CPU tensors, if the variable TRITON_INTERPRET was set when triton was imported.
INTERPRETED = not isinstance(product_kernel, triton.JITFunction)

# Where the hardware copies boxes of a matrix by itself, tensor descriptors tell it their shape.
_DESCRIBING = (9, 0)  # NVIDIA's first compute capability that does; Triton's stand-in for the others copies by 2 bytes


def _shape_product_boxes(arguments: dict[str, Any]) -> None:
    tile, deep, breadth = (arguments[name] for name in ("TILE", "DEEP", "BREADTH"))
    _shape(arguments["dense"], tile, deep)
    _shape(arguments["values"], *((deep, breadth) if arguments["TRANSPOSED"] else (breadth, deep)))
    _shape(arguments["result"], tile, breadth)


def _shape_sampled_boxes(arguments: dict[str, Any]) -> None:
    down = arguments["STEP"] // arguments["ITEM"]
    _shape(arguments["grads"], down, arguments["HEIGHT"])
    _shape(arguments["dense"], down, arguments["WIDTH"])


def _shape(matrix: Tensor | TensorDescriptor, tall: int, broad: int) -> None:
    if isinstance(matrix, TensorDescriptor):
        matrix.block_shape = [tall, broad]


# What tuning chooses from, by the names of the kernels' arguments; the interpreter takes small fixed ones. The product
# finds its blocks by loaded indices, which takes stages of its own: 3 and 5 stages are 2 and 3 buffers of tiles.
_PRODUCT_TILES = [
    triton.Config({"TILE": tile, "GROUP": group}, num_warps=warps, num_stages=stages, pre_hook=_shape_product_boxes)
    for tile, warps, stages, group in (
        (16, 4, 5, 8),
        (32, 4, 5, 8),
        (64, 4, 3, 8),
        (128, 4, 3, 4),
        (128, 4, 5, 8),
        (128, 8, 5, 8),
        (256, 8, 5, 2),
    )
]
_SAMPLED_TILES = [
    triton.Config({"SIDE": side, "STEP": step}, num_warps=warps, num_stages=stages, pre_hook=_shape_sampled_boxes)
    for side, step, warps, stages in (
        (1, 128, 4, 3),
        (2, 128, 4, 4),
        (2, 128, 8, 4),
        (4, 128, 4, 3),
        (4, 64, 4, 4),
        (4, 64, 8, 4),
        (8, 128, 4, 3),
        (8, 128, 8, 3),
    )
]
_TERMS = 128  # bytes of a row of `dense` that a product sums at a time: as the shared memory of a tensor core lies
_SUMS_PER_THREAD = 128  # so many float32 sums at most, or its registers spill
_FIXED_PRODUCT = {"TILE": 16, "GROUP": 2} if INTERPRETED else {}
_FIXED_SAMPLED = {"SIDE": 2, "STEP": 64} if INTERPRETED else {}
_tiles: dict[tuple[object, ...], dict[str, Any]] = {}  # what tuning chose, by case
_entered = threading.local()

# Splits begin at multiples of this many rows, whichever tile tuning chooses: the order of a sum must not depend on it.
_SPLIT_UNIT = 128
_MOST_SPLITS = 16
_ROWS_TO_FOLD = 700  # to write and fold the sums of a split takes as long as summing so many rows; on an H200
_TYPICAL_COLUMNS = 128  # of the blocks that a program computes side by side, whichever tile tuning chooses
_FOLD_CHUNK = 2048


def product(dense: Tensor, values: Tensor, bias: Tensor | None, lines: Lines, transposed: bool) -> Tensor:
    """Same as `portable.product`."""
    height, width = values.shape[1:]
    depth, breadth = (height, width) if transposed else (width, height)
    rows, count = dense.shape[0], lines.starts.numel() - 1
    result = dense.new_empty(rows, count * breadth)
    if result.numel() == 0:
        return result
    if values.numel() == 0:
        return result.zero_() if bias is None else result.copy_(bias)
    described = _describes(dense.device)
    matrices = [_aligned(dense), _aligned(values.contiguous().view(-1, width)), result]
    arguments = {
        **dict(zip(("dense", "values", "result"), map(_describe, matrices) if described else matrices, strict=True)),
        "bias": result if bias is None else bias.contiguous(),
        **lines._asdict(),
        "rows": rows,
        "lines": count,
        "value_rows": matrices[1].shape[0],
        "dense_stride": matrices[0].stride(0),
        "batch_bucket": _bucket(rows),
        "length_bucket": _bucket(lines.others.numel() // count),
        "DEPTH": depth,
        "BREADTH": breadth,
        "DEEP": min(depth, _TERMS // dense.element_size()),
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias is not None,
        "DESCRIBED": described,
        **_numerics(dense),
    }
    _start(_product, lambda meta: (-(-rows // meta["TILE"]) * count,), arguments | _FIXED_PRODUCT, _shape_product_boxes)
    return result


def sampled(grads: Tensor, dense: Tensor, lines: Lines, shape: Sequence[int]) -> Tensor:
    """Same as `portable.sampled`."""
    packed, height, width = shape
    rows, count, present = dense.shape[0], lines.starts.numel() - 1, lines.others.numel()
    result = dense.new_empty(packed, height, width)
    if rows == 0 or present == 0:
        return result.zero_()
    size = present * height * width
    splits, split_rows = split(rows, -(-present * width // _TYPICAL_COLUMNS), _processors(dense.device))
    partial = result if splits == 1 else dense.new_empty(splits, present, height, width, dtype=torch.float32)
    # A tensor core multiplies 64 rows at least: of narrower blocks it takes several, which no box holds.
    described = _describes(dense.device) and (INTERPRETED or min(height, width) >= 64)
    matrices = [_aligned(grads), _aligned(dense)]
    arguments = {
        **dict(zip(("grads", "dense"), map(_describe, matrices) if described else matrices, strict=True)),
        "result": partial,
        "starts": lines.starts,
        "others": lines.others,
        "blocks": lines.blocks,
        "rows": rows,
        "lines": count,
        "split_rows": split_rows,
        "grads_stride": matrices[0].stride(0),
        "dense_stride": matrices[1].stride(0),
        "split_stride": size,
        "batch_bucket": _bucket(rows),
        "length_bucket": _bucket(present // count),
        "HEIGHT": height,
        "WIDTH": width,
        "LINES": _bucket(count),
        "ITEM": dense.element_size(),
        "DESCRIBED": described,
        **_numerics(dense),
    }

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        """As many programs as lines of any lengths may need."""
        side = meta["SIDE"]
        return min(present, (present + count * (side - 1)) // side), splits

    _start(_sampled, grid, arguments | _FIXED_SAMPLED, _shape_sampled_boxes)
    if splits > 1:
        with _on(result):
            chunks = -(-result.numel() // _FOLD_CHUNK)
            fold_kernel[(chunks,)](partial, result, size, result.numel(), splits, CHUNK=_FOLD_CHUNK)
    elif present < packed:
        result[present:] = 0
    return result


def split(rows: int, programs: int, processors: int) -> tuple[int, int]:
    """Into how many sums that of `rows` rows is split, and of how many rows each, so that the device is used evenly.

    Args:
        rows: at least 1.
        programs: at least 1; how many there are without a split.
        processors: of the device.
    """

    def cost(splits: int) -> float:
        """The rows that the busiest processor sums, and what folding costs in rows."""
        rounds = max(-(-programs * splits // processors), 1.5)  # one program alone does not keep a processor busy
        folding = programs * splits / processors * _ROWS_TO_FOLD if splits > 1 else 0.0
        return rounds * _split_rows(rows, splits) + folding

    best = min(range(1, _MOST_SPLITS + 1), key=cost)
    split_rows = _split_rows(rows, best)
    return -(-rows // split_rows), split_rows


def _split_rows(rows: int, splits: int) -> int:
    return -(-rows // (splits * _SPLIT_UNIT)) * _SPLIT_UNIT


def _start(
    kernel: Any,
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    arguments: dict[str, Any],
    shape_boxes: Callable[[dict[str, Any]], None],
) -> None:
    """Start a kernel in the tiling that was found the best for its case.

    Triton's tuner knows the case from the arguments, but to look through them at each start takes as long as starting.
    """
    described = arguments["result"]
    result = described.base if isinstance(described, TensorDescriptor) else described
    with _on(result):
        if INTERPRETED:
            shape_boxes(arguments)
            kernel[grid](**arguments)
            return
        case = (kernel, result.get_device(), result.dtype, *[arguments[name] for name in kernel.keys])
        if case in _tiles:
            arguments |= _tiles[case]
            shape_boxes(arguments)
            kernel.fn[grid](**arguments)
        else:
            kernel[grid](**arguments)
            _tiles[case] = kernel.best_config.all_kwargs()


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
        return 64  # the interpreter: small tests are to split too
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(tensor: Tensor) -> Any:
    """Triton starts kernels on the current device, whichever the tensors are on."""
    if not tensor.is_cuda:
        return nullcontext()
    device = tensor.get_device()
    if device not in _entered.__dict__.setdefault("devices", set()):
        # A thread of autograd's may not have entered the device's context yet, which describing a matrix needs.
        torch.cuda.mem_get_info(device)
        _entered.devices.add(device)
    return torch.cuda.device(device) if device != torch.cuda.current_device() else nullcontext()


@cache
def _describes(device: torch.device) -> bool:
    if device.type != "cuda":
        return True  # the interpreter
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _DESCRIBING


def _describe(matrix: Tensor) -> TensorDescriptor:
    """Of an aligned matrix. What a box of it is depends on the tile, which is chosen later."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [16, 16])


def _aligned(matrix: Tensor) -> Tensor:
    """The matrix, or its copy, with contiguous rows that begin at multiples of 16 bytes, as copies of boxes need it."""
    stride, step = matrix.stride()
    apart = stride >= matrix.shape[1] and stride * matrix.element_size() % 16 == 0
    if step == 1 and apart and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _product_tiles(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Tiles that are as large as the batch at most.

    Below 64 rows there is one, and from there on none is below 64: that is where tensor cores change their
    instruction, and with it the order of sums.
    """
    batch = (arguments | constants)["batch_bucket"]
    smallest = min(max(batch, 16), 64)
    largest = smallest if smallest < 64 else max(batch, 64)
    return [config for config in configs if smallest <= config.kwargs["TILE"] <= largest]


def _sampled_tiles(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Tiles of 128 to 256 columns that fit into registers."""
    height, width = constants["HEIGHT"], constants["WIDTH"]
    return [
        config
        for config in configs
        if 128 <= config.kwargs["SIDE"] * width <= 256
        and config.kwargs["SIDE"] * width * height <= _SUMS_PER_THREAD * 32 * config.num_warps
    ]


if INTERPRETED:
    _product, _sampled = product_kernel, sampled_kernel
else:
    _buckets = ["batch_bucket", "length_bucket", "lines", "DESCRIBED", "PRECISION"]
    _timing = partial(triton.testing.do_bench, warmup=5, rep=20)  # ms
    _product = triton.autotune(
        _PRODUCT_TILES,
        key=[*_buckets, "DEPTH", "BREADTH", "TRANSPOSED"],
        prune_configs_by={"early_config_prune": _product_tiles},
        do_bench=_timing,
    )(product_kernel)
    _sampled = triton.autotune(
        _SAMPLED_TILES,
        key=[*_buckets, "HEIGHT", "WIDTH", "ITEM"],
        prune_configs_by={"early_config_prune": _sampled_tiles},
        do_bench=_timing,
    )(sampled_kernel)
