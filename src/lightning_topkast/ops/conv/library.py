"""Custom PyTorch operators for a convolution with a sparse weight; only compiled kernels implement them.

They are opaque to torch.compile, which needs only their fake implementations, and are not differentiable themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_topkast.ops.library import LIBRARY

LIBRARY.define(
    "conv(Tensor values, Tensor[] index, int[] sizes, Tensor images, Tensor? bias, SymInt[] numbers, "
    "bool channels_last) -> Tensor"
)
LIBRARY.define(
    "conv_gradients(Tensor values, Tensor[] index, int[] sizes, Tensor images, Tensor grads, SymInt[] numbers, "
    "bool of_input, bool of_values) -> (Tensor, Tensor)"
)


def _fake_conv(
    values: Tensor,
    index: Sequence[Tensor],
    sizes: Sequence[int],
    images: Tensor,
    bias: Tensor | None,
    numbers: Sequence[int],
    channels_last: bool,
) -> Tensor:
    shape = images.shape[0], sizes[0], *numbers[-2:]
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=order)


def _fake_gradients(
    values: Tensor,
    index: Sequence[Tensor],
    sizes: Sequence[int],
    images: Tensor,
    grads: Tensor,
    numbers: Sequence[int],
    of_input: bool,
    of_values: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(images) if of_input else images.new_empty(0),
        torch.empty_like(values) if of_values else values.new_empty(0),
    )


torch.library.register_fake("topkast::conv", _fake_conv, lib=LIBRARY)
torch.library.register_fake("topkast::conv_gradients", _fake_gradients, lib=LIBRARY)
