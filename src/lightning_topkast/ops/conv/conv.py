"""A convolution with a sparse weight, whose gradient covers more entries than the product."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_topkast.errors import TopKastError
from lightning_topkast.ops.conv import library  # noqa: F401  defines the operators
from lightning_topkast.ops.dtypes import dtypes_of
from lightning_topkast.ops.entries import EntryPattern


def sparse_conv2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: EntryPattern,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Compute `F.conv2d(input, A, bias, ...)` for a sparse A on CPU, with a gradient that covers the exploring entries.

    Like `F.conv2d`, it returns the inputs' dtype or that of autocast, in the input's memory format; 16-bit types are
    computed in float32. `CONV_KERNELS` must be loaded.

    Args:
        input: (batch, in, height, width).
        values: (at least the pattern's updated entries,); the gradient of further values is zero.
        bias: (out,).
        pattern: the places of the values.
        stride, padding, dilation: as in `F.conv2d`.

    Returns:
        (batch, out, height, width).

    Raises:
        TopKastError: shapes, dtypes or devices do not fit.
    """
    _check(input, values, bias, pattern)
    kernel = pattern.shape[2:]
    size = [
        (length + 2 * pad - step * (side - 1) - 1) // stride_ + 1
        for length, pad, step, side, stride_ in zip(input.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    if min(size) < 1:
        raise TopKastError(
            f"a kernel of {kernel[0]} × {kernel[1]}, dilated by {dilation}, does not fit an input of "
            f"{tuple(input.shape[2:])} with padding {padding}"
        )
    computed, result = dtypes_of(input, values, bias)
    output: Tensor = _SparseConv.apply(  # type: ignore[no-untyped-call]
        input.to(computed),
        values.to(computed),
        None if bias is None else bias.to(computed),
        *pattern.index,
        pattern.sizes,
        [*kernel, *stride, *dilation, *padding, *size],
    )
    return output.to(result)


def _check(input: Tensor, values: Tensor, bias: Tensor | None, pattern: EntryPattern) -> None:
    channels = pattern.shape[1] * pattern.groups
    if input.dim() != 4 or input.shape[1] != channels:
        raise TopKastError(f"expected input to be (batch, {channels}, height, width), got {tuple(input.shape)}")
    if values.dim() != 1 or values.shape[0] < pattern.updated:
        raise TopKastError(f"expected 1-D values with at least {pattern.updated} entries, got {tuple(values.shape)}")
    if bias is not None and bias.shape != (pattern.shape[0],):
        raise TopKastError(f"expected bias to be ({pattern.shape[0]},), got {tuple(bias.shape)}")
    if not (input.device.type == values.device.type == "cpu"):
        raise TopKastError(f"expected input ({input.device}) and values ({values.device}) to be on CPU")


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        bias: Tensor | None,
        forward_cut: Tensor,
        forward_keys: Tensor,
        backward_cut: Tensor,
        backward_keys: Tensor,
        backward_order: Tensor,
        sizes: list[int],
        numbers: list[int],
    ) -> Tensor:
        channels_last = is_channels_last(input)
        images = _dense(input, channels_last)
        index = [forward_cut, forward_keys, backward_cut, backward_keys, backward_order]
        ctx.save_for_backward(images, values, *index)
        ctx.sizes, ctx.numbers = sizes, numbers
        output: Tensor = torch.ops.topkast.conv(values, index, sizes, images, bias, numbers, channels_last)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, values, *index = ctx.saved_tensors
        of_input, of_values, of_bias = ctx.needs_input_grad[:3]
        input_grad = values_grad = None
        if of_input or of_values:
            grads = _dense(grad, is_channels_last(grad))
            input_grad, values_grad = torch.ops.topkast.conv_gradients(
                values, index, ctx.sizes, images, grads, ctx.numbers, of_input, of_values
            )
        return (
            input_grad if of_input else None,
            values_grad if of_values else None,
            grad.sum((0, 2, 3)) if of_bias else None,
            *(None,) * 7,
        )


def is_channels_last(images: Tensor) -> bool:
    """Return whether images are in `channels_last`, and not contiguous as well."""
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def _dense(images: Tensor, channels_last: bool) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
