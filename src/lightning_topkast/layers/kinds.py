"""The layers that can multiply by a packed weight."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_topkast.layers.attention import ProductAttention
from lightning_topkast.layers.conv import ProductConv
from lightning_topkast.layers.products import ProductConv1D, ProductLayer, ProductLinear
from lightning_topkast.layers.sparse_layer import SparseLayer
from lightning_topkast.weights.layouts import Product


def product_of(module: nn.Module, name: str) -> type[ProductLayer] | None:
    """Return the packed layer class for the weight `name` of a layer, or None if there is none."""
    if "forward" in module.__dict__:  # replaced on this object only
        return None
    # the exact type, since a subclass may compute something else
    kind = type(module).plain_class if isinstance(module, SparseLayer) else type(module)
    if kind is nn.MultiheadAttention and name == "in_proj_weight":
        return ProductAttention
    if name != "weight":
        return None
    if kind in (nn.Linear, NonDynamicallyQuantizableLinear):  # the latter is the output projection of attention
        return ProductLinear
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return ProductConv1D
    return ProductConv if kind in (nn.Conv1d, nn.Conv2d) else None


def products_of(module: nn.Module, name: str) -> list[Product]:
    """Return how a layer can multiply by its packed weight `name`, the fastest way first; empty if it cannot."""
    kind = product_of(module, name)
    if kind is None:
        return []
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return [Product(transposed=kind.transposed)]
    depthwise = module.groups > 1 and module.in_channels == module.groups
    # a matrix: the positions are examples
    plain = (module.kernel_size, module.padding, module.groups) == ((1, 1), (0, 0), 1)
    return [] if depthwise else [Product(module.groups), *([Product()] if plain else [])]
