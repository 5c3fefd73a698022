"""What a sparse run takes: arithmetic, memory and communication, known before anything is allocated."""

from lightning_topkast.costs.flops import Products, count_products
from lightning_topkast.costs.memory import Bytes, OptimizerState, Parallel
from lightning_topkast.costs.plan import Layer, Plan, make_plan

__all__ = ["Bytes", "Layer", "OptimizerState", "Parallel", "Plan", "Products", "count_products", "make_plan"]
