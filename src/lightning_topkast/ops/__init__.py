from lightning_topkast.ops.compiled import Operators, choose_operators
from lightning_topkast.ops.linear import sparse_linear
from lightning_topkast.ops.pattern import Pattern

__all__ = ["Operators", "Pattern", "choose_operators", "sparse_linear"]
