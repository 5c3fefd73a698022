"""The FLOPs that our planner counts for a sparse ResNet-50, beside those that RigL's authors published.

Run: python benchmarks/published_flops.py (needs torchvision; seconds, since nothing is allocated)

Their shares of a dense network's inference FLOPs are those of the tables in https://github.com/google-research/rigl.
By its code, `uniform` keeps the first convolution dense and makes the last layer sparse, and `ERK` makes every layer
sparse, but the first one at 99 %. The Top-KAST paper keeps the first and the last layer dense; this is the last column.
"""

from typing import Any

import torch
from tables import Row, table

import lightning_topkast.app  # noqa: F401  (makes torchvision importable)
from lightning_topkast import Targets
from lightning_topkast.app.models import resnet
from lightning_topkast.costs import OptimizerState, Parallel, Plan, make_plan
from lightning_topkast.settings import Settings

# (distribution, sparsity) → inference FLOPs over those of a dense ResNet-50
PUBLISHED = {
    ("uniform", 0.8): 0.23,
    ("uniform", 0.9): 0.13,
    ("uniform", 0.95): 0.08,
    ("uniform", 0.965): 0.07,
    ("erk", 0.8): 0.42,
    ("erk", 0.9): 0.24,
    ("erk", 0.95): 0.12,
    ("erk", 0.965): 0.09,
    ("erk", 0.99): 0.05,
}
DENSE_FLOPS = 8.2e9  # of one image


def plan_resnet50(distribution: str, sparsity: float, targets: Targets | None = None) -> Plan:
    """Plan a ResNet-50 on one image of 224 by 224 pixels, with B = A."""
    settings = Settings(sparsity, sparsity, distribution=distribution, targets=targets)
    with torch.device("meta"):
        net, images = resnet(50, (3, 224, 224), 1000), torch.zeros(1, 3, 224, 224)
        return make_plan(net, [images], settings, OptimizerState(lambda p: torch.optim.SGD(p, lr=0.1)), Parallel())


def as_rigl(distribution: str, sparsity: float) -> dict[str, Any]:
    """Totals with the dense layers that RigL has."""
    keep_first = distribution == "uniform" or sparsity >= 0.99
    return plan_resnet50(distribution, sparsity, Targets(keep_first_dense=keep_first, keep_last_dense=False)).totals()


def rows() -> list[Row]:
    """One a published figure."""
    found = []
    for (distribution, sparsity), published in PUBLISHED.items():
        totals, as_topkast = as_rigl(distribution, sparsity), plan_resnet50(distribution, sparsity).totals()
        found.append(
            {
                "distribution": distribution,
                "sparsity": f"{sparsity:.1%}",
                "published": f"{published:.2f}",
                "ours": totals["forward_flops_ratio"],
                "difference": f"{totals['forward_flops_ratio'] - published:+.3f}",
                "with first and last layer dense": as_topkast["forward_flops_ratio"],
            }
        )
    return found


if __name__ == "__main__":
    dense = as_rigl("uniform", 0.8)["dense_forward_flops"]
    print(f"dense: {dense:.3g} FLOPs an image, published {DENSE_FLOPS:.3g}\n")
    table("ResNet-50, inference FLOPs over those of the dense network", rows())
