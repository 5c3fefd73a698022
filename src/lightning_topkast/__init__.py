"""Always sparse training (Top-KAST) for PyTorch and Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_topkast.callback import TopKastCallback
    from lightning_topkast.errors import NonFiniteWeightError, TopKastError
    from lightning_topkast.layers import to_csr, to_dense
    from lightning_topkast.method.rule import Rule
    from lightning_topkast.method.schedule import SparsityRamp
    from lightning_topkast.telemetry.metrics import MaskChange, ReservoirActivation, Sparsity
    from lightning_topkast.topkast import TopKast
    from lightning_topkast.training.all_reduce import sparse_all_reduce
    from lightning_topkast.training.atomic_checkpoint import AtomicCheckpointIO
    from lightning_topkast.training.step_boundary import WholeStepCheckpoint
    from lightning_topkast.weights import SparseWeight

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
    "AtomicCheckpointIO": "training.atomic_checkpoint",
    "MaskChange": "telemetry.metrics",
    "NonFiniteWeightError": "errors",
    "ReservoirActivation": "telemetry.metrics",
    "Rule": "method.rule",
    "SparseWeight": "weights",
    "Sparsity": "telemetry.metrics",
    "SparsityRamp": "method.schedule",
    "TopKast": "topkast",
    "TopKastCallback": "callback",
    "TopKastError": "errors",
    "WholeStepCheckpoint": "training.step_boundary",
    "sparse_all_reduce": "training.all_reduce",
    "to_csr": "layers",
    "to_dense": "layers",
}


def __getattr__(name: str) -> Any:
    # On first use, so that a plain PyTorch loop with `TopKast` does not load Lightning.
    if name in _HOMES:
        return getattr(import_module(f"lightning_topkast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lightning_topkast' has no attribute '{name}'")
