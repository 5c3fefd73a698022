"""Convolutions with a packed weight."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_topkast.layers.products import ProductLayer
from lightning_topkast.ops import sparse_conv2d
from lightning_topkast.weights.layouts import ConvLayout, FlatLayout

# The kernels take examples by 16 and fewer cost as much, so that a dense copy of the weight is faster.
_LEAST_BATCH = 6


class ProductConv(ProductLayer):
    """`nn.Conv2d` or `nn.Conv1d` with a packed weight."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:
        """`input` (batch, in, ...), or without the batch → the same with `out` channels."""
        layout, sides = self.packed_weights["weight"].layout, len(self.kernel_size)
        if isinstance(layout, FlatLayout) or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return cast(Tensor, super().forward(input))
        if not isinstance(layout, ConvLayout):
            return self._as_matrix(input)
        if input.dim() != sides + 2 or input.shape[0] < _LEAST_BATCH:
            return cast(Tensor, super().forward(input))
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode)
            padding = (0,) * sides
        one = (1,) * (2 - sides)
        images = input if sides == 2 else input.unsqueeze(-2)
        values = cast(Tensor, self._parameters["weight"])
        output = sparse_conv2d(
            images,
            values,
            self.bias,
            layout.pattern,
            cast(tuple[int, int], one + self.stride),
            cast(tuple[int, int], (0,) * len(one) + padding),
            cast(tuple[int, int], one + self.dilation),
        )
        return output if sides == 2 else output.squeeze(-2)

    def _as_matrix(self, input: Tensor) -> Tensor:
        """Compute a convolution with a 1×1 kernel, without padding and groups, as a linear layer."""
        vertical, horizontal = self.stride
        channels_last = input[..., ::vertical, ::horizontal].movedim(-3, -1)
        return self._product(channels_last, "weight", self.bias).movedim(-1, -3)
