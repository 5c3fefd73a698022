"""The layers that can multiply by a packed weight."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_topkast.layers.attention import ProductAttention
from lightning_topkast.layers.products import ProductConv1D, ProductLayer, ProductLinear, ProductPointwise
from lightning_topkast.layers.sparse_layer import SparseLayer


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
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        plain = (module.kernel_size, module.padding, module.groups) == ((1, 1), (0, 0), 1)
        return ProductPointwise if plain else None
    return None
