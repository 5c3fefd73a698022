"""Layers that multiply by their weight in packed form."""

from typing import cast

from torch import Tensor

from lightning_topkast.layers.sparse_layer import SparseLayer
from lightning_topkast.ops import sparse_linear


class ProductLayer(SparseLayer):
    """A layer that multiplies by a packed weight."""

    bias: Tensor | None

    def _product(self, input: Tensor, name: str, bias: Tensor | None, transposed: bool = False) -> Tensor:
        """The last dimension of `input` times the rows (`transposed`: columns) of the weight `name`, plus `bias`."""
        weight = self.packed_weights[name]
        packing = weight.packing
        assert packing.active is not None
        assert packing.exploring is not None
        values = cast(Tensor, self._parameters[name])
        # chosen before the model was moved, perhaps to a device that the compiled ones don't run on
        operators = weight.operators if values.device.type == "cpu" else "torch"
        return sparse_linear(input, values, bias, packing.active, packing.exploring, operators, transposed)


class ProductLinear(ProductLayer):
    """`nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` (..., in) → (..., out)."""
        return self._product(input, "weight", self.bias)


class ProductConv1D(ProductLayer):
    """The `Conv1D` of transformers' GPT-2, a linear layer whose weight is (in × out)."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in) → (..., out)."""
        return self._product(x, "weight", self.bias, transposed=True)


class ProductPointwise(ProductLayer):
    """`nn.Conv2d` with a 1×1 kernel."""

    stride: tuple[int, int]

    def forward(self, input: Tensor) -> Tensor:
        """`input` (batch, in, height, width) or without the batch → the same with out channels."""
        vertical, horizontal = self.stride
        channels_last = input[..., ::vertical, ::horizontal].movedim(-3, -1)
        return self._product(channels_last, "weight", self.bias).movedim(-1, -3)
