"""Always sparse training (Top-KAST) for PyTorch and Lightning."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__: str

if TYPE_CHECKING:
    from lightning_topkast.baselines import SET, RigL, Static
    from lightning_topkast.callback import TopKastCallback
    from lightning_topkast.engine.optimizers import register_optimizer
    from lightning_topkast.errors import NonFiniteWeightError, TopKastError
    from lightning_topkast.gradients import TopKGradients
    from lightning_topkast.layers import dense_copy, to_csr, to_dense
    from lightning_topkast.method.penalty import L1, L2, Norm, Penalty
    from lightning_topkast.method.rule import Magnitude, Rule
    from lightning_topkast.method.schedule import Ramp, Schedule
    from lightning_topkast.method.structure import Block, NOfM, Structure, Unstructured
    from lightning_topkast.method.targets import Targets
    from lightning_topkast.ops.memory import keep_freed_memory
    from lightning_topkast.settings import Settings
    from lightning_topkast.storage import Masked, Packed
    from lightning_topkast.telemetry.metrics import MaskChange, ReservoirActivation, Sparsity
    from lightning_topkast.top_k.dart import Dart
    from lightning_topkast.top_k.diverse import diverse_top_k
    from lightning_topkast.top_k.private import private_top_k
    from lightning_topkast.top_k.soft import soft_top_k
    from lightning_topkast.topkast import TopKast
    from lightning_topkast.training.all_reduce import sparse_all_reduce
    from lightning_topkast.training.atomic_checkpoint import AtomicCheckpointIO
    from lightning_topkast.training.step_boundary import StepBoundaryCheckpoint
    from lightning_topkast.training.top_k_all_reduce import TopKAllReduce
    from lightning_topkast.weights import SparseWeight

__all__ = [
    "L1",
    "L2",
    "SET",
    "AtomicCheckpointIO",
    "Block",
    "Dart",
    "Magnitude",
    "MaskChange",
    "Masked",
    "NOfM",
    "NonFiniteWeightError",
    "Norm",
    "Packed",
    "Penalty",
    "Ramp",
    "ReservoirActivation",
    "RigL",
    "Rule",
    "Schedule",
    "Settings",
    "SparseWeight",
    "Sparsity",
    "Static",
    "StepBoundaryCheckpoint",
    "Structure",
    "Targets",
    "TopKAllReduce",
    "TopKGradients",
    "TopKast",
    "TopKastCallback",
    "TopKastError",
    "Unstructured",
    "dense_copy",
    "diverse_top_k",
    "keep_freed_memory",
    "private_top_k",
    "register_optimizer",
    "soft_top_k",
    "sparse_all_reduce",
    "to_csr",
    "to_dense",
]

# name → module
_HOMES = {
    "AtomicCheckpointIO": "training.atomic_checkpoint",
    "Block": "method.structure",
    "Dart": "top_k.dart",
    "L1": "method.penalty",
    "L2": "method.penalty",
    "Magnitude": "method.rule",
    "MaskChange": "telemetry.metrics",
    "Masked": "storage",
    "NOfM": "method.structure",
    "NonFiniteWeightError": "errors",
    "Norm": "method.penalty",
    "Packed": "storage",
    "Penalty": "method.penalty",
    "Ramp": "method.schedule",
    "ReservoirActivation": "telemetry.metrics",
    "RigL": "baselines",
    "Rule": "method.rule",
    "SET": "baselines",
    "Schedule": "method.schedule",
    "Settings": "settings",
    "SparseWeight": "weights",
    "Sparsity": "telemetry.metrics",
    "Static": "baselines",
    "StepBoundaryCheckpoint": "training.step_boundary",
    "Structure": "method.structure",
    "Targets": "method.targets",
    "TopKAllReduce": "training.top_k_all_reduce",
    "TopKGradients": "gradients",
    "TopKast": "topkast",
    "TopKastCallback": "callback",
    "TopKastError": "errors",
    "Unstructured": "method.structure",
    "dense_copy": "layers",
    "diverse_top_k": "top_k.diverse",
    "keep_freed_memory": "ops.memory",
    "private_top_k": "top_k.private",
    "register_optimizer": "engine.optimizers",
    "soft_top_k": "top_k.soft",
    "sparse_all_reduce": "training.all_reduce",
    "to_csr": "layers",
    "to_dense": "layers",
}


def __getattr__(name: str) -> Any:
    # On first use, so that a plain PyTorch loop with `TopKast` does not load Lightning.
    if name == "__version__":
        return version("lightning-topkast")
    if name in _HOMES:
        return getattr(import_module(f"lightning_topkast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lightning_topkast' has no attribute '{name}'")
