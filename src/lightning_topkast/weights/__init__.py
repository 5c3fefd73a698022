"""How a sparse weight is kept."""

from lightning_topkast.weights.base import SparseWeight
from lightning_topkast.weights.masked import MaskedWeight
from lightning_topkast.weights.packed import PackedWeight

__all__ = ["MaskedWeight", "PackedWeight", "Sharding", "SparseWeight", "own_part"]
