"""Other methods of sparse training, as rules beside Top-KAST's: `TopKastCallback(0.9, 0.9, rule=RigL())`."""

from lightning_topkast.baselines.dynamic import SET, RigL
from lightning_topkast.baselines.gradual import GradualPruning
from lightning_topkast.baselines.static import Static

__all__ = ["SET", "GradualPruning", "RigL", "Static"]
