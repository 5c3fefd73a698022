"""The products of block-sparse matrices as operators of torch, opaque to torch.compile.

`block_linear` is differentiable; the other two are its backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_topkast.ops.blocks.choice import implementation
from lightning_topkast.ops.blocks.pattern import BlockPattern

# How many tensors of `indices` belong to the rows of A, its columns, and the rows of B.
_ROWS, _COLUMNS, _UPDATED = slice(0, 4), slice(4, 8), slice(8, 11)


def indices(pattern: BlockPattern) -> list[Tensor]:
    """What `block_linear` needs of a pattern."""
    rows, columns, updated = pattern.active_by_row, pattern.active_by_column, pattern.updated_by_row
    return [
        *(rows.starts, rows.others, rows.blocks, rows.longest_first),
        *(columns.starts, columns.others, columns.blocks, columns.longest_first),
        *(updated.starts, updated.others, updated.blocks),
    ]


@torch.library.custom_op("topkast::block_linear", mutates_args=())
def block_linear(
    input: Tensor, values: Tensor, bias: Tensor | None, indices: Sequence[Tensor], operators: str
) -> Tensor:
    """`input` (M, in) @ Aᵀ + `bias`; see `block_sparse_linear`."""
    return implementation(operators).product(input, values, bias, *indices[_ROWS], False)


@torch.library.custom_op("topkast::block_product", mutates_args=())
def block_product(
    dense: Tensor, values: Tensor, line_indices: Sequence[Tensor], transposed: bool, operators: str
) -> Tensor:
    """See `portable.product`."""
    return implementation(operators).product(dense, values, None, *line_indices, transposed)


@torch.library.custom_op("topkast::block_sampled", mutates_args=())
def block_sampled(
    grads: Tensor, dense: Tensor, line_indices: Sequence[Tensor], shape: Sequence[int], operators: str
) -> Tensor:
    """See `portable.sampled`."""
    return implementation(operators).sampled(grads, dense, *line_indices, shape)


@block_linear.register_fake
def _(input: Tensor, values: Tensor, bias: Tensor | None, indices: Sequence[Tensor], operators: str) -> Tensor:
    return input.new_empty(input.shape[0], (indices[0].shape[0] - 1) * values.shape[1])


@block_product.register_fake
def _(dense: Tensor, values: Tensor, line_indices: Sequence[Tensor], transposed: bool, operators: str) -> Tensor:
    return dense.new_empty(dense.shape[0], (line_indices[0].shape[0] - 1) * values.shape[2 if transposed else 1])


@block_sampled.register_fake
def _(grads: Tensor, dense: Tensor, line_indices: Sequence[Tensor], shape: Sequence[int], operators: str) -> Tensor:
    return dense.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, _, indices, ctx.operators = inputs
    ctx.save_for_backward(input, values, *indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, values, *indices = ctx.saved_tensors
    of_input, of_values, of_bias = ctx.needs_input_grad[:3]
    input_grad = values_grad = None
    if of_input:
        input_grad = block_product(grad, values, indices[_COLUMNS], True, ctx.operators)
    if of_values:
        values_grad = block_sampled(grad, input, indices[_UPDATED], values.shape, ctx.operators)
    return input_grad, values_grad, grad.sum(0) if of_bias else None, [None] * len(indices), None


block_linear.register_autograd(_backward, setup_context=_setup_context)
