"""Custom PyTorch operators for a sparse layer: `torch_*` for a `CsrPattern`, and `compiled_*` for an `EntryPattern`.

`*_product` computes A @ dense + bias, and `*_gradients` the gradients of the backward pass. The last dimension of their
matrices is the batch. They are opaque to torch.compile, which needs only their fake implementations, and are not
differentiable themselves.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_topkast.ops.csr import portable
from lightning_topkast.ops.library import LIBRARY

_PRODUCT = "_product(Tensor values, Tensor[] index, int[] sizes, Tensor dense, Tensor? bias, SymInt[] lead) -> Tensor"
_GRADIENTS = (
    "_gradients(Tensor values, Tensor[] index, int[] sizes, Tensor inputs, Tensor grads, SymInt[] lead, "
    "bool of_input, bool of_values) -> (Tensor, Tensor)"
)


def _fake_product(
    values: Tensor,
    index: Sequence[Tensor],
    sizes: Sequence[int],
    dense: Tensor,
    bias: Tensor | None,
    lead: Sequence[int],
) -> Tensor:
    return portable.batch_last(dense, lead, sizes[0])


def _fake_gradients(
    values: Tensor,
    index: Sequence[Tensor],
    sizes: Sequence[int],
    inputs: Tensor,
    grads: Tensor,
    lead: Sequence[int],
    of_input: bool,
    of_values: bool,
) -> tuple[Tensor, Tensor]:
    return (
        portable.batch_last(inputs, lead, sizes[1]) if of_input else inputs.new_empty(0),
        torch.empty_like(values) if of_values else values.new_empty(0),
    )


for _kernels in ("torch", "compiled"):
    for _schema, _fake in ((_PRODUCT, _fake_product), (_GRADIENTS, _fake_gradients)):
        LIBRARY.define(_kernels + _schema)
        torch.library.register_fake(f"topkast::{_kernels}{_schema.partition('(')[0]}", _fake, lib=LIBRARY)
LIBRARY.impl("torch_product", portable.product, "CompositeExplicitAutograd")
LIBRARY.impl("torch_gradients", portable.gradients, "CompositeExplicitAutograd")


def product(kernels: str) -> Callable[..., Tensor]:
    """Return the operator for A @ dense + bias; see `portable.product`."""
    return torch.ops.topkast.compiled_product if kernels == "compiled" else torch.ops.topkast.torch_product


def gradients(kernels: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the operator for the gradients of the input and the values; see `portable.gradients`."""
    return torch.ops.topkast.compiled_gradients if kernels == "compiled" else torch.ops.topkast.torch_gradients
