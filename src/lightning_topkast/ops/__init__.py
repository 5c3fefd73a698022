from lightning_topkast.ops.blocks import (
    BlockKernels,
    BlockPattern,
    block_sparse_conv2d,
    block_sparse_linear,
    choose_block_kernels,
    convolves_by_blocks,
    cost_of_conv,
)
from lightning_topkast.ops.compiled import Kernels
from lightning_topkast.ops.conv.choice import CONV_KERNELS
from lightning_topkast.ops.conv.conv import sparse_conv2d
from lightning_topkast.ops.csr.choice import MATRIX_KERNELS
from lightning_topkast.ops.csr.linear import sparse_linear
from lightning_topkast.ops.csr.pattern import CsrPattern, Pattern
from lightning_topkast.ops.entries import EntryPattern

__all__ = [
    "CONV_KERNELS",
    "MATRIX_KERNELS",
    "BlockKernels",
    "BlockPattern",
    "CsrPattern",
    "EntryPattern",
    "Kernels",
    "Pattern",
    "block_sparse_conv2d",
    "block_sparse_linear",
    "choose_block_kernels",
    "convolves_by_blocks",
    "cost_of_conv",
    "sparse_conv2d",
    "sparse_linear",
]
