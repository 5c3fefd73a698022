"""A linear product with a block-sparse weight, whose gradient covers more blocks than the product."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_topkast.errors import TopKastError
from lightning_topkast.ops.blocks import library
from lightning_topkast.ops.blocks.pattern import BlockPattern
from lightning_topkast.ops.dtypes import to_autocast


def block_sparse_linear(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: BlockPattern,
    kernels: str = "auto",
    transposed: bool = False,
) -> Tensor:
    """Compute `F.linear(input, A, bias)` for a block-sparse A, with a gradient that includes the exploring blocks.

    Like `F.linear`, it computes in the inputs' dtype or that of autocast. Sums are at least float32.

    Args:
        input: (..., in), with any strides.
        values: (at least B's blocks, height, width): A's blocks, then the exploring blocks, in the pattern's packed
            order. The gradient of further values is zero.
        bias: (out,).
        pattern: the places of the blocks.
        kernels: `"auto"`, `"torch"` or `"triton"`; see `choose_block_kernels`.
        transposed: A is stored as (in, out), as in GPT-2's Conv1D.

    Returns:
        (..., out), contiguous.

    Raises:
        TopKastError: shapes, dtypes or devices do not fit, or Triton's kernels are not available.
    """
    input, values, bias = to_autocast(input, values, bias)
    _check(input, values, bias, pattern, transposed)
    output: Tensor = _BlockSparseLinear.apply(input, values, bias, pattern, kernels, transposed)  # type: ignore[no-untyped-call]
    return output


def _check(input: Tensor, values: Tensor, bias: Tensor | None, pattern: BlockPattern, transposed: bool) -> None:
    if len(pattern.shape) != 2:
        raise TopKastError(f"expected the pattern of a matrix, got that of a convolution's weight of {pattern.shape}")
    outputs, inputs = reversed(pattern.shape) if transposed else pattern.shape
    if input.dim() == 0 or input.shape[-1] != inputs:
        raise TopKastError(f"expected input to be (..., {inputs}), got {tuple(input.shape)}")
    check_blocks(input, values, bias, pattern, outputs)


def check_blocks(input: Tensor, values: Tensor, bias: Tensor | None, pattern: BlockPattern, outputs: int) -> None:
    """Refuse values and a bias that do not fit the pattern or the input."""
    if values.dim() != 3 or values.shape[0] < pattern.updated_count or values.shape[1:] != pattern.block_shape:
        height, width = pattern.block_shape
        raise TopKastError(
            f"expected values to be at least ({pattern.updated_count}, {height}, {width}), got {tuple(values.shape)}"
        )
    if bias is not None and bias.shape != (outputs,):
        raise TopKastError(f"expected bias to be ({outputs},), got {tuple(bias.shape)}")
    if not values.dtype == input.dtype or not (bias is None or bias.dtype == input.dtype):
        raise TopKastError(
            f"input ({input.dtype}), values ({values.dtype}) and bias must have the same dtype; convert the input, or "
            "run under torch.autocast"
        )
    if not (input.device == values.device == pattern.device == (pattern if bias is None else bias).device):
        raise TopKastError(
            f"input ({input.device}), values ({values.device}), bias and pattern ({pattern.device}) must be on the "
            "same device"
        )


class _BlockSparseLinear(torch.autograd.Function):
    """The product and its gradients; torch.compile traces into it, down to the opaque operators."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: BlockPattern,
        kernels: str,
        transposed: bool,
    ) -> Tensor:
        of_input, of_values = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if of_values else None, values if of_input else None)
        ctx.shapes = input.shape, values.shape
        ctx.pattern, ctx.kernels, ctx.transposed = pattern, kernels, transposed
        lines = pattern.active_by_column if transposed else pattern.active_by_row
        output: Tensor = library.block_product(_flat(input), values, bias, *lines, transposed, kernels)
        return output.view(input.shape[:-1] + output.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, values = ctx.saved_tensors
        pattern, kernels, transposed, grads = ctx.pattern, ctx.kernels, ctx.transposed, _flat(grad)
        of_input, of_values, of_bias = ctx.needs_input_grad[:3]
        input_grad = values_grad = None
        if of_input:
            lines = pattern.active_by_row if transposed else pattern.active_by_column
            input_grad = library.block_product(grads, values, None, *lines, not transposed, kernels)
            input_grad = input_grad.view(ctx.shapes[0])
        if of_values:
            flat = _flat(input)
            factors = (flat, grads) if transposed else (grads, flat)
            values_grad = library.block_sampled(*factors, *pattern.updated_by_row, ctx.shapes[1], kernels)
        return input_grad, values_grad, grads.sum(0) if of_bias else None, None, None, None


def _flat(tensor: Tensor) -> Tensor:
    """Reshape (..., features) to (batch, features)."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
