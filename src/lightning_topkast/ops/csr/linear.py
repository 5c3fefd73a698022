"""A linear product with a sparse weight, whose gradient covers more entries than the product."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_topkast.errors import TopKastError
from lightning_topkast.ops.csr import library
from lightning_topkast.ops.csr.pattern import Pattern
from lightning_topkast.ops.dtypes import dtypes_of


def sparse_linear(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    active: Pattern,
    exploring: Pattern,
    kernels: str = "torch",
    transposed: bool = False,
    batch_last: bool = True,
) -> Tensor:
    """Compute `F.linear(input, A, bias)` for a sparse A, with a gradient that includes the exploring entries.

    Like `F.linear`, it returns the inputs' dtype or that of autocast; 16-bit types are computed in float32.

    Args:
        input: (..., in).
        values: (at least nnz of both patterns,): A's values row by row, then those of the exploring entries. The
            gradient of further values is zero.
        bias: (out,).
        active: the places of A's entries in (out, in). Its transpose is used for the input's gradient.
        exploring: the places of the exploring entries, whose transpose is not used.
        kernels: `"torch"` or `"compiled"`, the result of `MATRIX_KERNELS.choose`.
        transposed: the weight and the patterns are (in, out); then A's transpose is used for the product.
        batch_last: whether the batch is last in the result's memory, as the products need it, so that an adjacent
            sparse layer, with pointwise operations between, copies nothing. False: the result is contiguous.

    Returns:
        (..., out).

    Raises:
        TopKastError: shapes or dtypes do not fit.
    """
    _check(input, values, bias, active, exploring, transposed)
    computed, result = dtypes_of(input, values, bias)
    output: Tensor = _SparseLinear.apply(  # type: ignore[no-untyped-call]
        input.to(computed),
        values.to(computed),
        None if bias is None else bias.to(computed),
        active.crow,
        active.col,
        active.t_crow,
        active.t_col,
        active.t_order,
        exploring.crow,
        exploring.col,
        kernels,
        transposed,
        batch_last,
    )
    return output.to(result)


def _check(
    input: Tensor, values: Tensor, bias: Tensor | None, active: Pattern, exploring: Pattern, transposed: bool
) -> None:
    columns, rows = active.shape if transposed else active.shape[::-1]
    if exploring.shape != active.shape:
        raise TopKastError(f"expected an exploring pattern of shape {active.shape}, got {exploring.shape}")
    if input.dim() == 0 or input.shape[-1] != columns:
        raise TopKastError(f"expected input to be (..., {columns}), got {tuple(input.shape)}")
    if values.dim() != 1 or values.shape[0] < active.nnz + exploring.nnz:
        raise TopKastError(
            f"expected 1-D values with at least {active.nnz} + {exploring.nnz} entries, got {tuple(values.shape)}"
        )
    if bias is not None and bias.shape != (rows,):
        raise TopKastError(f"expected bias to be ({rows},), got {tuple(bias.shape)}")
    if not active.t_crow.numel() and (transposed or (input.requires_grad and torch.is_grad_enabled())):
        raise TopKastError("the active pattern has no transpose; make it with transpose=True")
    if not (input.device == values.device == active.col.device == exploring.col.device):
        raise TopKastError(
            f"input ({input.device}), values ({values.device}) and patterns ({active.col.device}, "
            f"{exploring.col.device}) must be on the same device"
        )


class _SparseLinear(torch.autograd.Function):
    """The product and its gradients; torch.compile traces into it, down to the opaque operators."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        bias: Tensor | None,
        crow: Tensor,
        col: Tensor,
        t_crow: Tensor,
        t_col: Tensor,
        t_order: Tensor,
        crow2: Tensor,
        col2: Tensor,
        kernels: str,
        transposed: bool,
        batch_last: bool,
    ) -> Tensor:
        lead = input.shape[:-1]
        # a view if the input came from another sparse layer
        inputs = _batch_last(input)
        ctx.save_for_backward(inputs, values, crow, col, t_crow, t_col, t_order, crow2, col2)
        ctx.kernels, ctx.transposed = kernels, transposed
        product = library.product(kernels)
        places = (t_crow, t_col, t_order) if transposed else (crow, col, None)
        output: Tensor = product(values, *places, inputs, bias, lead)
        return output if batch_last else output.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *tensors = ctx.saved_tensors
        grads = _batch_last(grad)
        of_input, of_values, of_bias = ctx.needs_input_grad[:3]
        input_grad = values_grad = None
        if of_input or of_values:
            input_grad, values_grad = library.gradients(ctx.kernels)(
                *tensors, inputs, grads, grad.shape[:-1], ctx.transposed, of_input, of_values
            )
        return (
            input_grad if of_input else None,
            values_grad if of_values else None,
            grads.sum(1) if of_bias else None,
            *(None,) * 10,
        )


def _batch_last(tensor: Tensor) -> Tensor:
    """Return (..., features) as a contiguous (features, batch)."""
    *lead, features = tensor.shape
    return tensor.reshape(math.prod(lead), features).t().contiguous()
