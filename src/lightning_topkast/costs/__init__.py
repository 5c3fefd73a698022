"""The costs of a sparse run, computed in advance: arithmetic, memory and communication."""

from lightning_topkast.costs.flops import Products, count_products
from lightning_topkast.costs.memory import Bytes, OptimizerState, Parallel
from lightning_topkast.costs.plan import Layer, Plan, make_plan

__all__ = ["Bytes", "Layer", "OptimizerState", "Parallel", "Plan", "Products", "count_products", "make_plan"]
