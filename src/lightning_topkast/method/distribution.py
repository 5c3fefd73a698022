"""How a model-wide density is shared out among the weights."""

from collections.abc import Mapping
from math import prod


def uniform(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Give every weight the same density (the paper's ImageNet set-up)."""
    return dict.fromkeys(shapes, density)


def erdos_renyi_kernel(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Give a weight a density in proportion to (sum of its sizes) / (product of its sizes), at most 1.

    The total number of entries kept is that of `uniform`. A weight that would exceed density 1 is dense, and the
    others share what it does not take (Evci et al. 2020, "Rigging the Lottery", section 3). A larger total density
    gives every weight at least as much, so that forward densities never exceed backward ones.

    Args:
        shapes: weight name → shape.
        density: share of all entries to keep, in [0, 1].

    Returns:
        weight name → density in [0, 1].
    """
    dense: set[str] = set()
    while True:
        open_names = [name for name in shapes if name not in dense]
        budget = density * sum(prod(s) for s in shapes.values()) - sum(prod(shapes[name]) for name in dense)
        scale = budget / sum(sum(shapes[name]) for name in open_names) if open_names else 0.0
        densities = {name: scale * sum(shapes[name]) / prod(shapes[name]) for name in open_names}
        full = [name for name, value in densities.items() if value > 1]
        if not full:
            return {name: densities.get(name, 1.0) for name in shapes}
        dense.update(full)


# global: the weights compete for their places, of which they have as many together as under uniform
DISTRIBUTIONS = {"uniform": uniform, "erk": erdos_renyi_kernel, "global": uniform}
