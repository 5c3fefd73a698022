"""The sparse products with PyTorch's own operators, for every device that supports them."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


def batch_last(like: Tensor, lead: Sequence[int], features: int) -> Tensor:
    """Return an uninitialised tensor (*lead, features) whose memory holds one row of the whole batch per feature.

    It is not a view, since in-place operations after a custom autograd function do not support views.
    """
    batch = math.prod(lead)
    strides = [math.prod(lead[dim + 1 :]) for dim in range(len(lead))]
    return torch.empty_strided((*lead, features), (*strides, batch), dtype=like.dtype, device=like.device)


def product(
    values: Tensor,
    index: Sequence[Tensor],
    sizes: Sequence[int],
    dense: Tensor,
    bias: Tensor | None,
    lead: Sequence[int],
) -> Tensor:
    """Compute A @ dense + bias, in the memory format of `batch_last`.

    Args:
        values: (at least nnz,) the entries of A.
        index, sizes: those of a `CsrPattern`.
        dense: contiguous (in, batch).
        bias: (out,), added to each column of the result.
        lead: the leading sizes, whose product is the batch.
    """
    crow, col, t_crow, t_col, t_order, _, _ = index
    out, _, transposed = sizes
    if transposed:
        return _product(values, t_crow, t_col, t_order, out, dense, bias, lead)
    return _product(values, crow, col, None, out, dense, bias, lead)


def gradients(
    values: Tensor,
    index: Sequence[Tensor],
    sizes: Sequence[int],
    inputs: Tensor,
    grads: Tensor,
    lead: Sequence[int],
    of_input: bool,
    of_values: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a layer's input, in the format of `batch_last`, and values; empty if not requested.

    Args:
        values: of the layer: A's entries, those of the second pattern, and a tail whose gradient is zero.
        index, sizes: those of a `CsrPattern`.
        inputs: contiguous (in, batch).
        grads: contiguous (out, batch), the gradient of the layer's output.
        lead: the leading sizes, whose product is the batch.
        of_input, of_values: which gradients to compute.
    """
    crow, col, t_crow, t_col, t_order, crow2, col2 = index
    _, channels, transposed = sizes
    input_grad, values_grad = inputs.new_empty(0), values.new_empty(0)
    if of_input:
        if transposed:
            input_grad = _product(values, crow, col, None, channels, grads, None, lead)
        else:
            input_grad = _product(values, t_crow, t_col, t_order, channels, grads, None, lead)
    if of_values:
        rows, columns = (inputs, grads) if transposed else (grads, inputs)
        values_grad = torch.zeros_like(values)
        updated = col.numel() + col2.numel()
        values_grad[: col.numel()] = _sampled(rows, columns, crow, col)
        values_grad[col.numel() : updated] = _sampled(rows, columns, crow2, col2)
    return input_grad, values_grad


def _product(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    order: Tensor | None,
    rows: int,
    dense: Tensor,
    bias: Tensor | None,
    lead: Sequence[int],
) -> Tensor:
    """Compute the product with compressed rows, whose entry k is values[order[k]] (None: values[k])."""
    columns, batch = dense.shape
    result = batch_last(dense, lead, rows)
    flat = result.as_strided((rows, batch), (batch, 1))
    if bias is not None:
        flat.copy_(bias.unsqueeze(1))
    if col.numel() == 0 or batch == 0:
        return result if bias is not None else result.zero_()
    entries = values.narrow(0, 0, col.numel()) if order is None else values.index_select(0, order)
    matrix = torch.sparse_csr_tensor(crow, col, entries, size=(rows, columns), check_invariants=False)
    # with `out`, autocast does not convert the operands
    torch.addmm(flat, matrix, dense, beta=0 if bias is None else 1, out=flat)
    return result


def _sampled(rows: Tensor, columns: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """Compute the entries of rows @ columns^T at the places of a pattern."""
    entries = rows.new_zeros(col.numel())
    if col.numel() == 0 or rows.shape[1] == 0:
        return entries
    size = rows.shape[0], columns.shape[0]
    pattern = torch.sparse_csr_tensor(crow, col, entries, size=size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, rows, columns.t(), beta=0.0).values()


with warnings.catch_warnings():
    # The first CSR tensor of a process warns that CSR support is in beta.
    warnings.simplefilter("ignore")
    _none = torch.zeros(1, dtype=torch.int32)
    torch.sparse_csr_tensor(_none, _none[:0], torch.zeros(0), size=(0, 0), check_invariants=False)
