"""Custom PyTorch operators for the products of block-sparse matrices, computed by PyTorch's or Triton's kernels.

They are opaque to torch.compile, which needs only their fake implementations, and are not differentiable themselves.
`Lines` are passed as four tensors, which the dispatcher processes faster than a list.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_topkast.ops.blocks.choice import implementation
from lightning_topkast.ops.blocks.pattern import Lines
from lightning_topkast.ops.library import LIBRARY

LINES = "Tensor starts, Tensor others, Tensor blocks, Tensor longest_first"
_PRODUCT = f"block_product(Tensor dense, Tensor values, Tensor? bias, {LINES}, bool transposed, str kernels) -> Tensor"
_SAMPLED = f"block_sampled(Tensor grads, Tensor dense, {LINES}, SymInt[] shape, str kernels) -> Tensor"


def _product(
    dense: Tensor,
    values: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    others: Tensor,
    blocks: Tensor,
    longest_first: Tensor,
    transposed: bool,
    kernels: str,
) -> Tensor:
    lines = Lines(starts, others, blocks, longest_first)
    return implementation(kernels, dense, (values.shape[1], values.shape[2])).product(
        dense, values, bias, lines, transposed
    )


def _fake_product(
    dense: Tensor,
    values: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    others: Tensor,
    blocks: Tensor,
    longest_first: Tensor,
    transposed: bool,
    kernels: str,
) -> Tensor:
    return dense.new_empty(dense.shape[0], (starts.shape[0] - 1) * values.shape[2 if transposed else 1])


def _sampled(
    grads: Tensor,
    dense: Tensor,
    starts: Tensor,
    others: Tensor,
    blocks: Tensor,
    longest_first: Tensor,
    shape: Sequence[int],
    kernels: str,
) -> Tensor:
    lines = Lines(starts, others, blocks, longest_first)
    return implementation(kernels, dense, (shape[1], shape[2])).sampled(grads, dense, lines, shape)


def _fake_sampled(
    grads: Tensor,
    dense: Tensor,
    starts: Tensor,
    others: Tensor,
    blocks: Tensor,
    longest_first: Tensor,
    shape: Sequence[int],
    kernels: str,
) -> Tensor:
    return dense.new_empty(shape)


for _schema, _implementation, _fake in ((_PRODUCT, _product, _fake_product), (_SAMPLED, _sampled, _fake_sampled)):
    _name = LIBRARY.define(_schema)
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"topkast::{_name}", _fake, lib=LIBRARY)

# The overloads themselves, since PyTorch would search for them at each call.
block_product = torch.ops.topkast.block_product.default
block_sampled = torch.ops.topkast.block_sampled.default
