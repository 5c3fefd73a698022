"""A convolution with a block-sparse weight, whose gradient covers more blocks than the product."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_topkast.errors import TopKastError
from lightning_topkast.ops.blocks.conv import library
from lightning_topkast.ops.blocks.conv.geometry import Geometry
from lightning_topkast.ops.blocks.linear import check_blocks
from lightning_topkast.ops.blocks.pattern import BlockPattern
from lightning_topkast.ops.conv.conv import is_channels_last
from lightning_topkast.ops.dtypes import to_autocast


def block_sparse_conv2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: BlockPattern,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    kernels: str = "auto",
) -> Tensor:
    """Compute `F.conv2d(input, A, bias, ...)` for a block-sparse A, with a gradient that covers the exploring blocks.

    Like `F.conv2d`, it computes in the inputs' dtype or that of autocast, and keeps the input's memory format; images
    in another one than `channels_last` are copied. Sums are at least float32. Groups are not supported.

    Args:
        input: (batch, in, height, width).
        values: (at least B's blocks, outputs, inputs): A's blocks, then the exploring blocks, in the pattern's packed
            order. The gradient of further values is zero.
        bias: (out,).
        pattern: the places of the blocks in the weight (out, in, *kernel).
        stride, padding, dilation: as in `F.conv2d`.
        kernels: `"auto"`, `"torch"` or `"triton"`; see `choose_block_kernels`.

    Returns:
        (batch, out, height, width).

    Raises:
        TopKastError: shapes, dtypes or devices do not fit, or Triton's kernels are not available.
    """
    input, values, bias = to_autocast(input, values, bias)
    if len(pattern.shape) != 4:
        raise TopKastError(f"expected the pattern of a weight (out, in, height, width), got one of {pattern.shape}")
    if input.dim() != 4 or input.shape[1] != pattern.shape[1]:
        raise TopKastError(f"expected input to be (batch, {pattern.shape[1]}, height, width), got {tuple(input.shape)}")
    check_blocks(input, values, bias, pattern, pattern.shape[0])
    geometry = Geometry((pattern.shape[2], pattern.shape[3]), stride, padding, dilation)
    output: Tensor = _BlockSparseConv.apply(input, values, bias, pattern, geometry, kernels)  # type: ignore[no-untyped-call]
    return output


class _BlockSparseConv(torch.autograd.Function):
    """The product and its gradients; torch.compile traces into it, down to the opaque operators."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: BlockPattern,
        geometry: Geometry,
        kernels: str,
    ) -> Tensor:
        images = _channels_last(input)
        of_input, of_values = ctx.needs_input_grad[:2]
        ctx.save_for_backward(images if of_values else None, values if of_input else None)
        ctx.size, ctx.shape = input.shape[2:], values.shape
        ctx.pattern, ctx.geometry, ctx.kernels, ctx.format = pattern, geometry, kernels, _format(input)
        size = geometry.result_size(input.shape[2:])
        output: Tensor = library.block_conv(
            images, values, bias, *pattern.active_by_row, geometry.numbers, size, False, kernels
        )
        return output.permute(0, 3, 1, 2).contiguous(memory_format=ctx.format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, values = ctx.saved_tensors
        pattern, numbers, kernels, grads = ctx.pattern, ctx.geometry.numbers, ctx.kernels, _channels_last(grad)
        of_input, of_values, of_bias = ctx.needs_input_grad[:3]
        input_grad = values_grad = None
        if of_input:
            lines = pattern.active_by_column
            input_grad = library.block_conv(grads, values, None, *lines, numbers, ctx.size, True, kernels)
            input_grad = input_grad.permute(0, 3, 1, 2).contiguous(memory_format=ctx.format)
        if of_values:
            lines = pattern.updated_by_row
            values_grad = library.block_conv_sampled(grads, images, *lines, numbers, ctx.shape, kernels)
        return input_grad, values_grad, grads.sum((0, 1, 2)) if of_bias else None, None, None, None


def _format(images: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(images) else torch.contiguous_format


def _channels_last(images: Tensor) -> Tensor:
    """Return images as (batch, height, width, channels), contiguous: a view of those in `channels_last`."""
    return images.permute(0, 2, 3, 1).contiguous()
