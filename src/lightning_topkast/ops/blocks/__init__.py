from lightning_topkast.ops.blocks.choice import BlockKernels, choose_block_kernels, convolves_by_blocks, cost_of_conv
from lightning_topkast.ops.blocks.conv.conv import block_sparse_conv2d
from lightning_topkast.ops.blocks.linear import block_sparse_linear
from lightning_topkast.ops.blocks.pattern import BlockPattern

__all__ = [
    "BlockKernels",
    "BlockPattern",
    "block_sparse_conv2d",
    "block_sparse_linear",
    "choose_block_kernels",
    "convolves_by_blocks",
    "cost_of_conv",
]
