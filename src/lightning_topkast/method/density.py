"""Exact sizes of the sets A and B for every sparse weight."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch

from lightning_topkast.errors import TopKastError
from lightning_topkast.method.distribution import DISTRIBUTIONS
from lightning_topkast.settings import Settings


def allocate(shapes: Mapping[str, torch.Size], settings: Settings, ramp: float = 0.0) -> dict[str, tuple[int, int]]:
    """Exact sizes of A and B for every sparse weight, in entries; where blocks differ in size, those on average.

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
    counts, units = {}, settings.chosen_granularity
    for name, shape in shapes.items():
        density, updated_density = overridden.get(name) or (forward_densities[name], backward_densities[name])
        active = units.active_count(density, shape)
        if active < 1:
            number, what = units.grid(shape).numel(), units.noun
            raise TopKastError(
                f"weight '{name}' has {number} {what[1]}, too few for one active {what[0]} at forward density "
                f"{density:.4g}; exclude it, or give it a lower forward_sparsity through overrides"
            )
        counts[name] = (active, max(units.updated_count(updated_density, shape), active))
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
