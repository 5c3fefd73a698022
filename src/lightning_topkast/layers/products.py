"""Layers that multiply by a packed weight."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_topkast.layers.sparse_layer import SparseLayer


class ProductLayer(SparseLayer):
    """A layer that multiplies by a packed weight."""

    bias: Tensor | None
    batch_last = False  # whether the next layer takes its inputs so in memory
    transposed = False  # whether the weight is (in × out)

    def _product(self, input: Tensor, name: str, bias: Tensor | None) -> Tensor:
        """Multiply the last dimension of `input` by the weight `name` and add `bias`."""
        weight = self.packed_weights[name]
        values = cast(Tensor, self._parameters[name])
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            # a picture of the network is made of it; a trace does not hold our operators
            matrix = weight.layout_for(values).unpack(values).flatten(1)
            return F.linear(input, matrix.t() if self.transposed else matrix, bias)
        return weight.layout_for(values).product(input, values, bias, self.batch_last)


class ProductLinear(ProductLayer):
    """`nn.Linear` with a packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` (..., in) → (..., out)."""
        return self._product(input, "weight", self.bias)


class ProductConv1D(ProductLayer):
    """`Conv1D` of transformers' GPT-2, a linear layer with a (in × out) weight, with a packed weight."""

    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in) → (..., out)."""
        return self._product(x, "weight", self.bias)


def join_products(model: nn.Module) -> None:
    """Let a linear layer leave its output as the next one takes it, if only modules without parameters lie between.

    The next one is that in the order of the modules, so that this is a guess; where it is wrong, PyTorch copies.
    """
    layers = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, _LINEAR):
            layer.batch_last = isinstance(following, _LINEAR)


_LINEAR = ProductLinear, ProductConv1D
