"""The sets of weights that were loaded in place of those that the sets were chosen for."""

import torch
from torch import Tensor

from lightning_topkast.distributed import to_local
from lightning_topkast.method.selection import drawn
from lightning_topkast.weights.base import SparseWeight


def sets_of(weight: SparseWeight, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return θ and the tiers for other values: A has their largest entries, B the largest of θ besides.

    Where values that are sparse already are zero, θ is kept. Ties of zeros are drawn as for the first sets of a run.

    Args:
        weight: whose values are replaced.
        alpha: the other values; for a sharded weight this process' part.

    Raises:
        NonFiniteScoresError: the values hold NaN or infinity.
    """
    structure, sharding = weight.structure, weight.sharding
    active, updated = (_units_in(weight, to_local(members)) for members in (weight.active, weight.updated))
    support = alpha != 0

    def draw() -> Tensor:
        numbers = drawn(weight.seed, 0, weight.name, structure.grid(weight.shape))
        return structure.part_of(numbers, sharding).to(alpha.device)

    select = structure.selection(sharding, draw)
    first = select(structure.scores(alpha.abs(), sharding), (active,)).bool()
    theta = alpha
    if int(sharding.sum(torch.count_nonzero(support))) <= int(weight.active_entries):
        chosen = structure.tiers(first.to(torch.uint8), sharding).bool()
        theta = torch.where(support | chosen, alpha, to_local(weight.theta()))
    scores = structure.scores(theta.abs(), sharding)
    tiers = select(scores.masked_fill(first, torch.finfo(scores.dtype).max), (updated, active))
    return theta, structure.tiers(tiers, sharding)


def _units_in(weight: SparseWeight, members: Tensor) -> int:
    """Return the number of units in a set; a collective if the weight is sharded."""
    units = weight.structure.members(members, weight.sharding)
    counts = torch.tensor([int(torch.count_nonzero(units)), units.numel()], device=units.device)
    counted, all_units = weight.sharding.sum(counts).tolist()  # every process may have all of them
    return counted * weight.structure.grid(weight.shape).numel() // max(all_units, 1)
