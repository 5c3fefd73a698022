"""Sparse weights, one class per storage."""

from lightning_topkast.weights.base import EntryState, SparseWeight, Traits
from lightning_topkast.weights.masked import MaskedWeight
from lightning_topkast.weights.packed import PackedWeight

__all__ = ["EntryState", "MaskedWeight", "PackedWeight", "SparseWeight", "Traits"]
