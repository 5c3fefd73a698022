"""Launch of the Triton kernels: grids, tuning and the splitting of sums over rows.

Importing this module imports triton, which is optional; `choice` checks whether it is available.
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

# Kernels run in Python, on CPU tensors, if the variable TRITON_INTERPRET was set when triton was imported.
INTERPRETED = not isinstance(product_kernel, triton.JITFunction)

# Tensor descriptors give the shape of boxes of a matrix to hardware that copies such boxes by itself.
_DESCRIBING = (9, 0)  # NVIDIA's first compute capability with such copies; Triton's emulation copies 2 bytes at a time


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


# Candidates of tuning, by the names of the kernels' arguments; the interpreter uses small fixed values. The product
# loads the indices of its blocks, which needs additional stages: 3 and 5 stages are 2 and 3 buffers of tiles.
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
_TERMS = 128  # bytes of a row of `dense` that a product sums at a time: a row of a tensor core's shared memory
_SUMS_PER_THREAD = 128  # largest number of float32 sums per thread without register spilling
FIXED_PRODUCT = {"TILE": 16, "GROUP": 2} if INTERPRETED else {}
FIXED_SAMPLED = {"SIDE": 2, "STEP": 64} if INTERPRETED else {}
_tiles: dict[tuple[object, ...], dict[str, Any]] = {}  # results of tuning by case
_entered = threading.local()

# Splits start at multiples of this many rows for all tiles, since the order of a sum must not depend on the tile.
_SPLIT_UNIT = 128
_MOST_SPLITS = 16
_ROWS_TO_FOLD = 700  # writing and folding the sums of a split takes as long as summing this many rows, on an H200
_TYPICAL_COLUMNS = 128  # of the blocks that a program computes side by side, independent of the chosen tile
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
        "batch_bucket": bucket(rows),
        "length_bucket": bucket(lines.others.numel() // count),
        "DEPTH": depth,
        "BREADTH": breadth,
        "DEEP": deep(depth, dense),
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias is not None,
        "DESCRIBED": described,
        **numerics(dense),
    }
    start(_product, lambda meta: (-(-rows // meta["TILE"]) * count,), arguments | FIXED_PRODUCT, _shape_product_boxes)
    return result


def sampled(grads: Tensor, dense: Tensor, lines: Lines, shape: Sequence[int]) -> Tensor:
    """Same as `portable.sampled`."""
    packed, height, width = shape
    rows, count, present = dense.shape[0], lines.starts.numel() - 1, lines.others.numel()
    result = dense.new_empty(packed, height, width)
    if rows == 0 or present == 0:
        return result.zero_()
    size = present * height * width
    splits, split_rows = splits_for(dense, rows, present * width)
    sums = result if splits == 1 else dense.new_empty(splits, present, height, width, dtype=torch.float32)
    # A tensor core multiplies at least 64 rows, so it needs several narrower blocks, which are not in one box.
    described = _describes(dense.device) and (INTERPRETED or min(height, width) >= 64)
    matrices = [_aligned(grads), _aligned(dense)]
    arguments = {
        **dict(zip(("grads", "dense"), map(_describe, matrices) if described else matrices, strict=True)),
        "result": sums,
        "starts": lines.starts,
        "others": lines.others,
        "blocks": lines.blocks,
        "rows": rows,
        "lines": count,
        "split_rows": split_rows,
        "grads_stride": matrices[0].stride(0),
        "dense_stride": matrices[1].stride(0),
        "split_stride": size,
        "batch_bucket": bucket(rows),
        "length_bucket": bucket(present // count),
        "HEIGHT": height,
        "WIDTH": width,
        "LINES": bucket(count),
        "ITEM": dense.element_size(),
        "DESCRIBED": described,
        **numerics(dense),
    }

    grid = partial(sampled_grid, present, count, splits)
    start(_sampled, grid, arguments | FIXED_SAMPLED, _shape_sampled_boxes)
    fold(sums, result, size, splits)
    return result


def sampled_grid(blocks: int, lines: int, splits: int, meta: dict[str, Any]) -> tuple[int, int]:
    """Return the grid of a sampled product: the largest number of programs that lines of any lengths may need."""
    side = meta["SIDE"]
    return min(blocks, (blocks + lines * (side - 1)) // side), splits


def fold(sums: Tensor, result: Tensor, size: int, splits: int) -> None:
    """Sum `sums` over its splits into the first `size` elements of `result`; the others become zero."""
    if splits > 1:
        with on(result):
            chunks = -(-result.numel() // _FOLD_CHUNK)
            fold_kernel[(chunks,)](sums, result, size, result.numel(), splits, CHUNK=_FOLD_CHUNK)
    elif size < result.numel():
        result.view(-1)[size:] = 0


def splits_for(dense: Tensor, rows: int, columns: int) -> tuple[int, int]:
    """Return the `split` of a sampled product of blocks with this many columns together."""
    return split(rows, -(-columns // _TYPICAL_COLUMNS), processors(dense.device))


def split(rows: int, programs: int, processors: int) -> tuple[int, int]:
    """Return the number of sums into which a sum over `rows` rows is split to use the device evenly, and their rows.

    Args:
        rows: at least 1.
        programs: number of programs without a split, at least 1.
        processors: number of processors of the device.
    """

    def cost(splits: int) -> float:
        """Return the rows that the busiest processor sums, plus the cost of folding in rows."""
        rounds = max(-(-programs * splits // processors), 1.5)  # a single program does not keep a processor busy
        folding = programs * splits / processors * _ROWS_TO_FOLD if splits > 1 else 0.0
        return rounds * _split_rows(rows, splits) + folding

    best = min(range(1, _MOST_SPLITS + 1), key=cost)
    split_rows = _split_rows(rows, best)
    return -(-rows // split_rows), split_rows


def _split_rows(rows: int, splits: int) -> int:
    return -(-rows // (splits * _SPLIT_UNIT)) * _SPLIT_UNIT


def start(
    kernel: Any,
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    arguments: dict[str, Any],
    shape_boxes: Callable[[dict[str, Any]], None] = lambda arguments: None,
) -> None:
    """Start a kernel with the best tiling for its case.

    Triton's tuner derives the case from the arguments, but doing so at each start takes as long as the start itself.
    """
    described = arguments["result"]
    result = described.base if isinstance(described, TensorDescriptor) else described
    with on(result):
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


def bucket(size: int) -> int:
    """Return the bucket of a size; sizes in one bucket are tuned together."""
    return 1 << max(size - 1, 0).bit_length()


def deep(depth: int, dense: Tensor) -> int:
    """Return how many of the `depth` terms of a block a product sums at a time."""
    return min(depth, _TERMS // dense.element_size())


def numerics(dense: Tensor, settings: Any = torch.backends.cuda.matmul) -> dict[str, Any]:
    """Return the precision arguments: float32 as PyTorch's own kernels compute it, TensorFloat-32 if they may use it.

    Args:
        dense: a factor.
        settings: where PyTorch says what these kernels may use.
    """
    return {
        "PRECISION": "tf32" if dense.dtype == torch.float32 and _may_use_tf32(settings) else "ieee",
        "WIDEN": INTERPRETED and dense.dtype == torch.bfloat16,
        "enable_fp_fusion": True,  # Triton's default until 3.9, which warns that it will change
    }


def _may_use_tf32(settings: Any) -> bool:
    # reading the newer of the two settings never raises, whichever of them was set
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32


@cache
def processors(device: torch.device) -> int:
    """Return the number of processors of the device."""
    if device.type != "cuda":
        return 64  # the interpreter: small tests should also use splits
    return torch.cuda.get_device_properties(device).multi_processor_count


def on(tensor: Tensor) -> Any:
    """Return a context that makes the tensor's device the current one, on which Triton starts kernels."""
    if not tensor.is_cuda:
        return nullcontext()
    device = tensor.get_device()
    if device not in _entered.__dict__.setdefault("devices", set()):
        # An autograd thread may not have entered the device's context yet, which a tensor descriptor needs.
        torch.cuda.mem_get_info(device)
        _entered.devices.add(device)
    return torch.cuda.device(device) if device != torch.cuda.current_device() else nullcontext()


@cache
def _describes(device: torch.device) -> bool:
    if device.type != "cuda":
        return True  # the interpreter
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _DESCRIBING


def _describe(matrix: Tensor) -> TensorDescriptor:
    """Return the descriptor of an aligned matrix; the tile, chosen later, determines the shape of a box."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [16, 16])


def _aligned(matrix: Tensor) -> Tensor:
    """Return the matrix or a copy, with contiguous rows that start at multiples of 16 bytes, as box copies require."""
    stride, step = matrix.stride()
    apart = stride >= matrix.shape[1] and stride * matrix.element_size() % 16 == 0
    if step == 1 and apart and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _product_tiles(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Return the tiles that are at most as large as the batch.

    Below 64 rows this is one tile; from 64 rows on all tiles have at least 64 rows, since tensor cores use another
    instruction, and so another order of sums, below 64.
    """
    batch = (arguments | constants)["batch_bucket"]
    smallest = min(max(batch, 16), 64)
    largest = smallest if smallest < 64 else max(batch, 64)
    return [config for config in configs if smallest <= config.kwargs["TILE"] <= largest]


def _sampled_tiles(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Return the tiles of 128 to 256 columns that fit into registers."""
    height, width = constants["HEIGHT"], constants["WIDTH"]
    return [
        config
        for config in configs
        if 128 <= config.kwargs["SIDE"] * width <= 256
        and config.kwargs["SIDE"] * width * height <= _SUMS_PER_THREAD * 32 * config.num_warps
    ]


_BUCKETS = ["batch_bucket", "length_bucket", "lines", "PRECISION"]


def tune_product(kernel: Any, *keys: str) -> Any:
    """Return a kernel of products of blocks, tuned for each case; `keys` are arguments that distinguish cases."""
    return _tune(kernel, _PRODUCT_TILES, _product_tiles, [*_BUCKETS, "DEPTH", "BREADTH", "TRANSPOSED", *keys])


def tune_sampled(kernel: Any, *keys: str) -> Any:
    """Return a kernel of sampled products, tuned likewise."""
    return _tune(kernel, _SAMPLED_TILES, _sampled_tiles, [*_BUCKETS, "HEIGHT", "WIDTH", "ITEM", *keys])


def _tune(kernel: Any, tiles: list[Any], fitting: Callable[..., list[Any]], keys: list[str]) -> Any:
    if INTERPRETED:
        return kernel
    timing = partial(triton.testing.do_bench, warmup=5, rep=20)  # ms
    return triton.autotune(tiles, key=keys, prune_configs_by={"early_config_prune": fitting}, do_bench=timing)(kernel)


_product = tune_product(product_kernel, "DESCRIBED")
_sampled = tune_sampled(sampled_kernel, "DESCRIBED")
