"""A linear layer whose weight is block-sparse, and whose gradient covers more blocks than its product."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_topkast.errors import TopKastError
from lightning_topkast.ops.blocks import library
from lightning_topkast.ops.blocks.pattern import BlockPattern


def block_sparse_linear(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: BlockPattern,
    operators: str = "auto",
    transposed: bool = False,
) -> Tensor:
    """`F.linear(input, A, bias)` for a block-sparse A, whose gradient covers the exploring blocks too.

    Like `F.linear` it runs in the inputs' dtype, or autocast's. Sums are made in float32 at least.

    Args:
        input: (..., in), with any strides.
        values: (at least B's blocks, height, width): A's blocks, then the exploring ones, in the pattern's packed
            order. The gradient of what lies behind them is zero.
        bias: (out,).
        pattern: where the blocks are.
        operators: `"auto"`, `"torch"` or `"triton"`; see `choose_block_operators`.
        transposed: A lies as (in, out), as in GPT-2's Conv1D.

    Returns:
        (..., out), contiguous.

    Raises:
        TopKastError: shapes, dtypes or devices do not fit, or Triton's kernels can't be had.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, values = input.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(input, values, bias, pattern, transposed)
    output: Tensor = _BlockSparseLinear.apply(input, values, bias, pattern, operators, transposed)  # type: ignore[no-untyped-call]
    return output


def _check(input: Tensor, values: Tensor, bias: Tensor | None, pattern: BlockPattern, transposed: bool) -> None:
    outputs, inputs = reversed(pattern.shape) if transposed else pattern.shape
    if input.dim() == 0 or input.shape[-1] != inputs:
        raise TopKastError(f"input must be (..., {inputs}), got {tuple(input.shape)}")
    if values.dim() != 3 or values.shape[0] < pattern.updated_count or values.shape[1:] != pattern.block_shape:
        height, width = pattern.block_shape
        raise TopKastError(
            f"values must be at least ({pattern.updated_count}, {height}, {width}), got {tuple(values.shape)}"
        )
    if bias is not None and bias.shape != (outputs,):
        raise TopKastError(f"bias must be ({outputs},), got {tuple(bias.shape)}")
    if not values.dtype == input.dtype or not (bias is None or bias.dtype == input.dtype):
        raise TopKastError(
            f"input ({input.dtype}), values ({values.dtype}) and bias must have one dtype; convert the input, or run "
            "under torch.autocast"
        )
    if not (input.device == values.device == pattern.device == (pattern if bias is None else bias).device):
        raise TopKastError(
            f"input ({input.device}), values ({values.device}), bias and pattern ({pattern.device}) must be on one "
            "device"
        )


class _BlockSparseLinear(torch.autograd.Function):
    """The product and its gradients; torch.compile traces into it, as far as the opaque operators."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: BlockPattern,
        operators: str,
        transposed: bool,
    ) -> Tensor:
        of_input, of_values = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if of_values else None, values if of_input else None)
        ctx.shapes = input.shape, values.shape
        ctx.pattern, ctx.operators, ctx.transposed = pattern, operators, transposed
        lines = pattern.active_by_column if transposed else pattern.active_by_row
        output: Tensor = library.block_product(_flat(input), values, bias, *lines, transposed, operators)
        return output.view(input.shape[:-1] + output.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, values = ctx.saved_tensors
        pattern, operators, transposed, grads = ctx.pattern, ctx.operators, ctx.transposed, _flat(grad)
        of_input, of_values, of_bias = ctx.needs_input_grad[:3]
        input_grad = values_grad = None
        if of_input:
            lines = pattern.active_by_row if transposed else pattern.active_by_column
            input_grad = library.block_product(grads, values, None, *lines, not transposed, operators)
            input_grad = input_grad.view(ctx.shapes[0])
        if of_values:
            flat = _flat(input)
            factors = (flat, grads) if transposed else (grads, flat)
            values_grad = library.block_sampled(*factors, *pattern.updated_by_row, ctx.shapes[1], operators)
        return input_grad, values_grad, grads.sum(0) if of_bias else None, None, None, None


def _flat(tensor: Tensor) -> Tensor:
    """(..., features) as (batch, features)."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
