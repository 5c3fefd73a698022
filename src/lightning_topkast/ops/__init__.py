from lightning_topkast.ops.blocks import BlockKernels, BlockPattern, block_sparse_linear, choose_block_kernels
from lightning_topkast.ops.csr.choice import Kernels, choose_kernels
from lightning_topkast.ops.csr.linear import sparse_linear
from lightning_topkast.ops.csr.pattern import Pattern

__all__ = [
    "BlockKernels",
    "BlockPattern",
    "Kernels",
    "Pattern",
    "block_sparse_linear",
    "choose_block_kernels",
    "choose_kernels",
    "sparse_linear",
]
