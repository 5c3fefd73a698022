"""Exact sizes of the sets A and B for every sparse weight."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning_topkast.distribution import DISTRIBUTIONS
from lightning_topkast.errors import TopKastError
from lightning_topkast.settings import Settings
from lightning_topkast.targets import Target


def allocate(targets: Sequence[Target], settings: Settings) -> dict[str, tuple[int, int]]:
    """Exact sizes of A and B for every sparse weight.

    Overridden weights get what their override says; the distribution shares the run's density among the others.

    Raises:
        TopKastError: an override that matches no sparse weight, or a weight too small for one active entry.
    """
    shapes = {target.name: tuple(target.shape) for target in targets}
    overridden: dict[str, tuple[float, float]] = {}
    for pattern, values in (settings.overrides or {}).items():
        matched = [name for name in shapes if fnmatchcase(name, pattern)]
        if not matched:
            raise TopKastError(f"overrides: '{pattern}' matches no sparse weight; they are: {', '.join(shapes)}")
        forward, backward = settings.sparsities_in(values)
        overridden |= dict.fromkeys(matched, (1 - forward, 1 - backward))
    free = {name: shape for name, shape in shapes.items() if name not in overridden}
    share_out = DISTRIBUTIONS[settings.distribution]
    forward_densities = share_out(free, 1 - settings.forward_sparsity)
    backward_densities = share_out(free, 1 - settings.backward_sparsity)
    counts = {}
    for target in targets:
        name, size = target.name, target.shape.numel()
        density, updated_density = overridden.get(name) or (forward_densities[name], backward_densities[name])
        active = round(density * size)
        if active < 1:
            raise TopKastError(
                f"weight '{name}' has {size} entries, too few for one active entry at forward density {density:.4g}; "
                "exclude it, or give it a lower forward_sparsity through overrides"
            )
        counts[name] = (active, max(round(updated_density * size), active))
    return counts
