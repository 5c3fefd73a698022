"""Convolutions with a packed weight."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_topkast.layers.products import ProductLayer
from lightning_topkast.weights.layouts import BlockConvLayout, ConvLayout, FlatLayout

_EXAMPLES = 16  # that the kernels take together, at most
_LEAST_BATCH = 6  # fewer examples cost as much, so that a dense copy of the weight is faster


class ProductConv(ProductLayer):
    """`nn.Conv2d` or `nn.Conv1d` with a packed weight."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:
        """`input` (batch, in, ...), or without the batch → the same with `out` channels."""
        values = cast(Tensor, self._parameters["weight"])
        layout, sides = self.packed_weights["weight"].layout_for(values), len(self.kernel_size)
        if isinstance(layout, FlatLayout) or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return cast(Tensor, super().forward(input))
        if not isinstance(layout, ConvLayout | BlockConvLayout):
            return self._as_matrix(input)
        if input.dim() != sides + 2 or not self._multiplies(layout, input):
            return cast(Tensor, super().forward(input))
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode)
            padding = (0,) * sides
        one = (1,) * (2 - sides)
        images = input if sides == 2 else input.unsqueeze(-2)
        output = layout.convolve(
            images,
            values,
            self.bias,
            cast(tuple[int, int], one + self.stride),
            cast(tuple[int, int], (0,) * len(one) + padding),
            cast(tuple[int, int], one + self.dilation),
        )
        return output if sides == 2 else output.squeeze(-2)

    def _multiplies(self, layout: ConvLayout | BlockConvLayout, input: Tensor) -> bool:
        """Return whether there are kernels for an input that are faster than a dense copy of the weight."""
        if isinstance(layout, BlockConvLayout):
            return layout.multiplies(input, self.stride)
        return input.shape[0] >= _LEAST_BATCH and not self._is_too_wide(input.shape[-1])

    def _is_too_wide(self, width: int) -> bool:
        """Return whether the rows of all channels that the kernels take together may not fit their 32-bit offsets."""
        out, inputs = self.packed_weights["weight"].shape[0], self.packed_weights["weight"].shape[1] * self.groups
        rows = self.kernel_size[0] * self.dilation[0] if len(self.kernel_size) == 2 else 1
        padding = 0 if isinstance(self.padding, str) else max(self.padding)
        span = width + 2 * max(self.kernel_size[-1] * self.dilation[-1], padding)
        return _EXAMPLES * max(out, inputs) * span * (rows + 2 * max(self.stride)) > torch.iinfo(torch.int32).max // 2

    def _as_matrix(self, input: Tensor) -> Tensor:
        """Compute a convolution with a 1×1 kernel, without padding and groups, as a linear layer."""
        vertical, horizontal = self.stride
        channels_last = input[..., ::vertical, ::horizontal].movedim(-3, -1)
        return self._product(channels_last, "weight", self.bias).movedim(-1, -3)
