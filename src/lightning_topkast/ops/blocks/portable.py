"""The products of block-sparse matrices with PyTorch's own operators, for every device and dtype.

For each line of the grid, the parts of the dense matrix that its blocks need are gathered, so that one dense product
computes all of them, with sums in the order of the blocks. On one CPU thread this took half as long as PyTorch's BSR
matrices.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_topkast.ops.blocks.pattern import Lines

# From the positions of some blocks within a line, (M, blocks × depth): what they are multiplied by, side by side.
Gather = Callable[[Tensor], Tensor]


def product(dense: Tensor, values: Tensor, bias: Tensor | None, lines: Lines, transposed: bool) -> Tensor:
    """Multiply `dense` by the blocks of each line and add `bias`.

    Args:
        dense: (M, in); (M, out) if `transposed`.
        values: (blocks, height, width).
        bias: (columns of the result,).
        lines: the rows of the grid; its columns if `transposed`.
        transposed: multiply by the blocks themselves instead of their transposes.

    Returns:
        (M, out); (M, in) if `transposed`; zero, or the bias, for lines without blocks.
    """
    depth = values.shape[1 if transposed else 2]
    return product_of(_cut(dense, depth), dense.shape[0], values, bias, lines, transposed)


def product_of(
    gather: Gather, rows: int, values: Tensor, bias: Tensor | None, lines: Lines, transposed: bool
) -> Tensor:
    """Compute `product` from the parts that `gather` returns; `rows` is M."""
    breadth = values.shape[2 if transposed else 1]
    result = values.new_empty(rows, (lines.starts.numel() - 1) * breadth)
    for line, begin, end in _spans(lines):
        part = slice(line * breadth, (line + 1) * breadth)
        if begin == end:
            result[:, part] = 0 if bias is None else bias[part]
            continue
        gathered = gather(lines.others[begin:end])
        factors = values.index_select(0, lines.blocks[begin:end])
        matrix = factors.flatten(0, 1) if transposed else factors.transpose(0, 1).flatten(1).t()
        if bias is None:
            torch.mm(gathered, matrix, out=result[:, part])
        else:
            torch.addmm(bias[part], gathered, matrix, out=result[:, part])
    return result


def sampled(grads: Tensor, dense: Tensor, lines: Lines, shape: Sequence[int]) -> Tensor:
    """Compute the blocks of gradsᵀ @ dense.

    Args:
        grads: (M, out).
        dense: (M, in).
        lines: the rows of the grid.
        shape: of the result.

    Returns:
        (packed blocks, height, width); zero for blocks that are in none of the lines.
    """
    return sampled_of(_cut(dense, shape[2]), grads, lines, shape)


def sampled_of(gather: Gather, grads: Tensor, lines: Lines, shape: Sequence[int]) -> Tensor:
    """Compute `sampled` from the parts of `dense` that `gather` returns."""
    count, height, width = shape
    result = grads.new_empty(count, height, width)
    result[lines.others.numel() :] = 0
    for line, begin, end in _spans(lines):
        if begin < end:
            gathered = gather(lines.others[begin:end])
            rows = grads[:, line * height : (line + 1) * height]
            found = gathered.new_empty(height, gathered.shape[1])
            torch.mm(rows.t(), gathered, out=found)  # autocast, if on in the backward pass, would change `@`'s dtype
            found = found.view(height, end - begin, width).transpose(0, 1)
            result.index_copy_(0, lines.blocks[begin:end].long(), found)
    return result


def _cut(dense: Tensor, width: int) -> Gather:
    """Return a function that gathers the parts of `dense` of this width at some positions."""
    cut = dense.reshape(dense.shape[0], dense.shape[1] // width, width)
    return lambda others: cut.index_select(1, others).flatten(1)


def _spans(lines: Lines) -> Iterator[tuple[int, int, int]]:
    bounds = lines.starts.tolist()
    return zip(range(len(bounds) - 1), bounds[:-1], bounds[1:], strict=True)
