"""Passes over many masked weights on a GPU, around the optimizer's step: one kernel for all, not a few for each."""

from lightning_topkast.ops.fused.step import Masked, close_, fits, open_, works

__all__ = ["Masked", "close_", "fits", "open_", "works"]
