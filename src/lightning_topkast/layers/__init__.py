"""Layers whose weight is packed."""

from lightning_topkast.layers.csr import to_csr
from lightning_topkast.layers.kinds import product_of, products_of
from lightning_topkast.layers.products import join_products
from lightning_topkast.layers.sparse_layer import (
    SparseLayer,
    StackLayer,
    dense_copy,
    pack_layer,
    packed_weights,
    to_dense,
    unpack_layer,
)

__all__ = [
    "SparseLayer",
    "StackLayer",
    "dense_copy",
    "join_products",
    "pack_layer",
    "packed_weights",
    "product_of",
    "products_of",
    "to_csr",
    "to_dense",
    "unpack_layer",
]
