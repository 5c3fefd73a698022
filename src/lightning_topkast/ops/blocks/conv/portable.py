"""The products of a convolution by blocks with PyTorch's own operators, for every device and dtype.

As with matrices (`blocks.portable`), but what a line's blocks need are channels of shifted images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_topkast.ops.blocks.conv.geometry import Axis, Geometry
from lightning_topkast.ops.blocks.pattern import Lines
from lightning_topkast.ops.blocks.portable import Gather, product_of, sampled_of


def product(
    images: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lines: Lines,
    geometry: Geometry,
    size: Sequence[int],
    transposed: bool,
) -> Tensor:
    """Convolve `images` with the blocks of each line and add `bias`.

    Args:
        images: (N, height, width, in); of the results' sides and channels if `transposed`.
        values: (blocks, height, width).
        bias: (channels of the result,).
        lines: the rows of the grid; its columns if `transposed`.
        geometry: of the convolution.
        size: height and width of the result.
        transposed: compute the gradient of the images from that of the result.

    Returns:
        (N, *size, out); (N, *size, in) if `transposed`; zero, or the bias, for lines without blocks.
    """
    gather = _shifted(images, geometry, size, transposed, values.shape[1 if transposed else 2])
    rows = images.shape[0] * size[0] * size[1]
    result = product_of(gather, rows, values, bias, lines, transposed)
    return result.view(images.shape[0], *size, result.shape[1])


def sampled(grads: Tensor, images: Tensor, lines: Lines, geometry: Geometry, shape: Sequence[int]) -> Tensor:
    """Compute the blocks of the gradient of a convolution's weight.

    Args:
        grads: (N, height, width, out).
        images: (N, height, width, in).
        lines: the rows of the grid.
        geometry: of the convolution.
        shape: of the result.

    Returns:
        (packed blocks, height, width); zero for blocks that are in none of the lines.
    """
    gather = _shifted(images, geometry, grads.shape[1:3], False, shape[2])
    return sampled_of(gather, grads.reshape(-1, grads.shape[3]), lines, shape)


def _shifted(images: Tensor, geometry: Geometry, size: Sequence[int], transposed: bool, width: int) -> Gather:
    """Return a function that gathers the channels of some blocks of this width, at their positions of the kernel."""
    axes = geometry.axes(transposed)
    sides = zip(images.shape[1:3], size, geometry.kernel, axes, strict=True)
    (before_y, height), (before_x, breadth) = (_border(*each) for each in sides)
    vertical, horizontal = axes
    padded = images.new_zeros(images.shape[0], height, breadth, images.shape[3])
    padded[:, before_y :: vertical.down, before_x :: horizontal.down][:, : images.shape[1], : images.shape[2]] = images

    def gather(others: Tensor) -> Tensor:
        parts = []
        for other in others.tolist():
            channel, position = divmod(other, geometry.kernel[0] * geometry.kernel[1])
            y, x = divmod(position, geometry.kernel[1])
            down = _places(vertical, before_y, y, size[0])
            across = _places(horizontal, before_x, x, size[1])
            parts.append(padded[:, down, across, channel * width : (channel + 1) * width])
        return torch.cat(parts, -1).flatten(0, 2)

    return gather


def _border(length: int, size: int, kernel: int, axis: Axis) -> tuple[int, int]:
    """Return how far before an image's first pixel a result reaches, and the length with all that it needs."""
    reach = axis.step * (kernel - 1)
    before = max(0, -(axis.first + min(0, reach)))
    last = max((length - 1) * axis.down, axis.up * (size - 1) + axis.first + max(0, reach))
    return before, before + last + 1


def _places(axis: Axis, before: int, position: int, size: int) -> slice:
    begin = before + axis.first + axis.step * position
    return slice(begin, begin + axis.up * (size - 1) + 1, axis.up)
