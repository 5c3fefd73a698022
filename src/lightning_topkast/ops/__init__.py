from lightning_topkast.ops.blocks import BlockOperators, BlockPattern, block_sparse_linear, choose_block_operators
from lightning_topkast.ops.csr.compiled import Operators, choose_operators
from lightning_topkast.ops.csr.linear import sparse_linear
from lightning_topkast.ops.csr.pattern import Pattern

__all__ = [
    "BlockOperators",
    "BlockPattern",
    "Operators",
    "Pattern",
    "block_sparse_linear",
    "choose_block_operators",
    "choose_operators",
    "sparse_linear",
]
