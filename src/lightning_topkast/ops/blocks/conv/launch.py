"""Launch of the Triton kernels for convolutions by blocks; see `blocks.launch`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_topkast.ops.blocks.conv.geometry import Geometry
from lightning_topkast.ops.blocks.conv.kernels import conv_kernel, conv_sampled_kernel
from lightning_topkast.ops.blocks.launch import (
    FIXED_PRODUCT,
    FIXED_SAMPLED,
    bucket,
    deep,
    fold,
    numerics,
    sampled_grid,
    splits_for,
    start,
    tune_product,
    tune_sampled,
)
from lightning_topkast.ops.blocks.pattern import Lines

# Whether float32 may be computed in TensorFloat-32; before torch 2.9 convolutions have no setting of their own.
_SETTINGS: Any = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)

_SHIFTS = ("POSITIONS", "ACROSS", "UP_Y", "UP_X")
_product = tune_product(conv_kernel, *_SHIFTS, "DOWN_Y", "DOWN_X")
_sampled = tune_sampled(conv_sampled_kernel, *_SHIFTS)


def product(
    images: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lines: Lines,
    geometry: Geometry,
    size: Sequence[int],
    transposed: bool,
) -> Tensor:
    """Same as `portable.product`."""
    height, width = values.shape[1:]
    depth, breadth = (height, width) if transposed else (width, height)
    rows, count = images.shape[0] * size[0] * size[1], lines.starts.numel() - 1
    result = images.new_empty(images.shape[0], *size, count * breadth)
    if result.numel() == 0:
        return result
    if values.numel() == 0:
        return result.zero_() if bias is None else result.copy_(bias)
    vertical, horizontal = geometry.axes(transposed)
    images, values = images.contiguous(), values.contiguous()
    arguments = {
        "dense": images,
        "values": values,
        "bias": result if bias is None else bias.contiguous(),
        "result": result,
        **lines._asdict(),
        "rows": rows,
        "lines": count,
        "value_rows": values.shape[0] * height,
        "dense_stride": images.shape[3],
        **_shifts(images, geometry, size, transposed),
        "result_height": size[0],
        "result_width": size[1],
        "batch_bucket": bucket(rows),
        "length_bucket": bucket(lines.others.numel() // count),
        "DOWN_Y": vertical.down,
        "DOWN_X": horizontal.down,
        "DEPTH": depth,
        "BREADTH": breadth,
        "DEEP": deep(depth, images),
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias is not None,
        **numerics(images, _SETTINGS),
    }
    start(_product, lambda meta: (-(-rows // meta["TILE"]) * count,), arguments | FIXED_PRODUCT)
    return result


def sampled(grads: Tensor, images: Tensor, lines: Lines, geometry: Geometry, shape: Sequence[int]) -> Tensor:
    """Same as `portable.sampled`."""
    packed, height, width = shape
    size = grads.shape[1:3]
    rows, count, present = grads.shape[:3].numel(), lines.starts.numel() - 1, lines.others.numel()
    result = images.new_empty(packed, height, width)
    if rows == 0 or present == 0:
        return result.zero_()
    elements = present * height * width
    splits, split_rows = splits_for(images, rows, present * width)
    sums = result if splits == 1 else images.new_empty(splits, elements, dtype=torch.float32)
    grads, images = grads.contiguous(), images.contiguous()
    arguments = {
        "grads": grads,
        "dense": images,
        "result": sums,
        "starts": lines.starts,
        "others": lines.others,
        "blocks": lines.blocks,
        "rows": rows,
        "lines": count,
        "split_rows": split_rows,
        "grads_stride": grads.shape[3],
        "dense_stride": images.shape[3],
        "split_stride": elements,
        **_shifts(images, geometry, size, False),
        "grads_height": size[0],
        "grads_width": size[1],
        "batch_bucket": bucket(rows),
        "length_bucket": bucket(present // count),
        "HEIGHT": height,
        "WIDTH": width,
        "LINES": bucket(count),
        "ITEM": images.element_size(),
        **numerics(images, _SETTINGS),
    }
    start(_sampled, partial(sampled_grid, present, count, splits), arguments | FIXED_SAMPLED)
    fold(sums, result, elements, splits)
    return result


def _shifts(images: Tensor, geometry: Geometry, size: Sequence[int], transposed: bool) -> dict[str, Any]:
    """Return the arguments that say which pixels of the images a pixel of the result needs."""
    vertical, horizontal = geometry.axes(transposed)
    return {
        "height": images.shape[1],
        "width": images.shape[2],
        "first_y": vertical.first,
        "first_x": horizontal.first,
        "step_y": vertical.step,
        "step_x": horizontal.step,
        "POSITIONS": geometry.kernel[0] * geometry.kernel[1],
        "ACROSS": geometry.kernel[1],
        "UP_Y": vertical.up,
        "UP_X": horizontal.up,
    }
