"""Sparse weights, one class per storage."""

from lightning_topkast.weights.base import SparseWeight, Traits
from lightning_topkast.weights.masked import MaskedWeight
from lightning_topkast.weights.packed import PackedWeight

__all__ = ["MaskedWeight", "PackedWeight", "SparseWeight", "Traits"]
