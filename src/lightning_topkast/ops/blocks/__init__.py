from lightning_topkast.ops.blocks.choice import BlockOperators, choose_block_operators
from lightning_topkast.ops.blocks.linear import block_sparse_linear
from lightning_topkast.ops.blocks.pattern import BlockPattern

__all__ = ["BlockOperators", "BlockPattern", "block_sparse_linear", "choose_block_operators"]
