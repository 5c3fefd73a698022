"""A linear product with a sparse weight, whose gradient covers more entries than the product."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_topkast.errors import TopKastError
from lightning_topkast.ops.csr import library
from lightning_topkast.ops.csr.pattern import CsrPattern
from lightning_topkast.ops.dtypes import dtypes_of
from lightning_topkast.ops.entries import EntryPattern


def sparse_linear(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: CsrPattern | EntryPattern,
    batch_last: bool = True,
) -> Tensor:
    """Compute `F.linear(input, A, bias)` for a sparse A, with a gradient that includes the exploring entries.

    Like `F.linear`, it returns the inputs' dtype or that of autocast; 16-bit types are computed in float32.

    Args:
        input: (..., in).
        values: (at least the pattern's updated entries,); the gradient of further values is zero.
        bias: (out,).
        pattern: the places of the values. With an `EntryPattern` of a matrix compiled kernels compute, so that
            `MATRIX_KERNELS` must be loaded; with a `CsrPattern` PyTorch's operators.
        batch_last: whether the batch is last in the result's memory, as the products need it, so that an adjacent
            sparse layer, with pointwise operations between, copies nothing. False: the result is contiguous.

    Returns:
        (..., out).

    Raises:
        TopKastError: shapes or dtypes do not fit.
    """
    _check(input, values, bias, pattern)
    computed, result = dtypes_of(input, values, bias)
    output: Tensor = _SparseLinear.apply(  # type: ignore[no-untyped-call]
        input.to(computed),
        values.to(computed),
        None if bias is None else bias.to(computed),
        pattern.kernels,
        pattern.sizes,
        batch_last,
        *pattern.index,
    )
    return output.to(result)


def _check(input: Tensor, values: Tensor, bias: Tensor | None, pattern: CsrPattern | EntryPattern) -> None:
    if input.dim() == 0 or input.shape[-1] != pattern.channels:
        raise TopKastError(f"expected input to be (..., {pattern.channels}), got {tuple(input.shape)}")
    if values.dim() != 1 or values.shape[0] < pattern.updated:
        raise TopKastError(f"expected 1-D values with at least {pattern.updated} entries, got {tuple(values.shape)}")
    if bias is not None and bias.shape != (pattern.rows,):
        raise TopKastError(f"expected bias to be ({pattern.rows},), got {tuple(bias.shape)}")
    if isinstance(pattern, CsrPattern):
        needs_transpose = pattern.transposed or (input.requires_grad and torch.is_grad_enabled())
        if needs_transpose and not pattern.places.t_crow.numel():
            raise TopKastError("the active pattern has no transpose; make it with transpose=True")
    elif pattern.shape[2:] != (1, 1) or pattern.groups != 1:
        raise TopKastError(f"expected the pattern of a matrix, got one of {pattern.shape} in {pattern.groups} groups")
    if not (input.device == values.device == pattern.device):
        raise TopKastError(
            f"input ({input.device}), values ({values.device}) and pattern ({pattern.device}) must be on the same "
            "device"
        )


class _SparseLinear(torch.autograd.Function):
    """The product and its gradients; torch.compile traces into it, down to the opaque operators."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        bias: Tensor | None,
        kernels: str,
        sizes: list[int],
        batch_last: bool,
        *index: Tensor,
    ) -> Tensor:
        # a view if the input came from another sparse layer
        inputs = _batch_last(input)
        ctx.save_for_backward(inputs, values, *index)
        ctx.kernels, ctx.sizes = kernels, sizes
        output: Tensor = library.product(kernels)(values, index, sizes, inputs, bias, input.shape[:-1])
        return output if batch_last else output.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, values, *index = ctx.saved_tensors
        grads = _batch_last(grad)
        of_input, of_values, of_bias = ctx.needs_input_grad[:3]
        input_grad = values_grad = None
        if of_input or of_values:
            input_grad, values_grad = library.gradients(ctx.kernels)(
                values, index, ctx.sizes, inputs, grads, grad.shape[:-1], of_input, of_values
            )
        return (
            input_grad if of_input else None,
            values_grad if of_values else None,
            grads.sum(1) if of_bias else None,
            *(None,) * (3 + len(index)),
        )


def _batch_last(tensor: Tensor) -> Tensor:
    """Return (..., features) as a contiguous (features, batch)."""
    *lead, features = tensor.shape
    return tensor.reshape(math.prod(lead), features).t().contiguous()
