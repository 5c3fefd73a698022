"""Always sparse training (Top-KAST) for PyTorch and Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_topkast.all_reduce import sparse_all_reduce
    from lightning_topkast.callback import TopKastCallback
    from lightning_topkast.checkpoint_io import AtomicCheckpointIO
    from lightning_topkast.errors import NonFiniteWeightError, TopKastError
    from lightning_topkast.layers import to_csr, to_dense
    from lightning_topkast.metrics import MaskChange, ReservoirActivation, Sparsity
    from lightning_topkast.rule import Rule
    from lightning_topkast.schedule import SparsityRamp
    from lightning_topkast.topkast import TopKast
    from lightning_topkast.weights import SparseWeight
    from lightning_topkast.whole_steps import WholeStepCheckpoint

__all__ = [
    "AtomicCheckpointIO",
    "MaskChange",
    "NonFiniteWeightError",
    "ReservoirActivation",
    "Rule",
    "SparseWeight",
    "Sparsity",
    "SparsityRamp",
    "TopKast",
    "TopKastCallback",
    "TopKastError",
    "WholeStepCheckpoint",
    "sparse_all_reduce",
    "to_csr",
    "to_dense",
]

_HOMES = {
    "all_reduce": ("sparse_all_reduce",),
    "callback": ("TopKastCallback",),
    "checkpoint_io": ("AtomicCheckpointIO",),
    "errors": ("NonFiniteWeightError", "TopKastError"),
    "layers": ("to_csr", "to_dense"),
    "metrics": ("MaskChange", "ReservoirActivation", "Sparsity"),
    "rule": ("Rule",),
    "schedule": ("SparsityRamp",),
    "topkast": ("TopKast",),
    "weights": ("SparseWeight",),
    "whole_steps": ("WholeStepCheckpoint",),
}


def __getattr__(name: str) -> Any:
    # On first use, so that a plain PyTorch loop with `TopKast` does not load Lightning.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"lightning_topkast.{module}"), name)
    raise AttributeError(f"module 'lightning_topkast' has no attribute '{name}'")
