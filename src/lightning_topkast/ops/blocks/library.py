"""Custom PyTorch operators for the products of block-sparse matrices, computed by PyTorch's or Triton's kernels.

They are opaque to torch.compile, which needs only their fake implementations, and are not differentiable themselves.
`Lines` are passed as four tensors, which the dispatcher processes faster than a list.
"""

from collections.abc import Sequence

from torch import Tensor

from lightning_topkast.ops.blocks.choice import implementation
from lightning_topkast.ops.blocks.pattern import Lines
from lightning_topkast.ops.library import define

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
    products = implementation(kernels, dense, (values.shape[1], values.shape[2]), __package__)
    return products.product(dense, values, bias, lines, transposed)


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
    return implementation(kernels, dense, (shape[1], shape[2]), __package__).sampled(grads, dense, lines, shape)


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


block_product = define(_PRODUCT, _product, _fake_product)
block_sampled = define(_SAMPLED, _sampled, _fake_sampled)
