"""How a sparse weight is kept."""

from lightning_topkast.weights.masked import MaskedWeight

# What `TopKast.weights` holds.
SparseWeight = MaskedWeight

__all__ = ["MaskedWeight", "SparseWeight"]
