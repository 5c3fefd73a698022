"""Exact sizes of the sets A and B for every sparse weight."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch

from lightning_topkast.distribution import DISTRIBUTIONS
from lightning_topkast.errors import TopKastError
from lightning_topkast.settings import Settings


def allocate(shapes: Mapping[str, torch.Size], settings: Settings, ramp: float = 0.0) -> dict[str, tuple[int, int]]:
    """Exact sizes of A and B for every sparse weight.

    Overridden weights get what their override says; the distribution shares the run's density among the others.

    Args:
        shapes: of the sparse weights, by name.
        settings: of the run.
        ramp: what is left of the way from the sparsities that the run starts with to its own.

    Raises:
        TopKastError: an override that matches no sparse weight, or a weight too small for one active entry.
    """
    overridden = overridden_densities(shapes, settings)
    free = {name: shape for name, shape in shapes.items() if name not in overridden}
    share_out = DISTRIBUTIONS[settings.distribution]
    forward, backward = settings.sparsities_on_ramp(ramp)
    forward_densities, backward_densities = share_out(free, 1 - forward), share_out(free, 1 - backward)
    counts = {}
    for name, shape in shapes.items():
        size = shape.numel()
        density, updated_density = overridden.get(name) or (forward_densities[name], backward_densities[name])
        active = round(density * size)
        if active < 1:
            raise TopKastError(
                f"weight '{name}' has {size} entries, too few for one active entry at forward density {density:.4g}; "
                "exclude it, or give it a lower forward_sparsity through overrides"
            )
        counts[name] = (active, max(round(updated_density * size), active))
    return counts


def overridden_densities(names: Iterable[str], settings: Settings) -> dict[str, tuple[float, float]]:
    """Forward and backward density of the weights that have an override.

    Raises:
        TopKastError: an override that matches none of the names.
    """
    names = list(names)
    overridden: dict[str, tuple[float, float]] = {}
    for pattern, values in (settings.overrides or {}).items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise TopKastError(f"overrides: '{pattern}' matches no sparse weight; they are: {', '.join(names)}")
        forward, backward = settings.sparsities_in(values)
        overridden |= dict.fromkeys(matched, (1 - forward, 1 - backward))
    return overridden
