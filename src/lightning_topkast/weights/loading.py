"""The sets of values that other code has written or loaded in place of those that the sets were chosen for."""

import torch
from torch import Tensor

from lightning_topkast.method.selection import ACTIVE, RESERVOIR, drawn
from lightning_topkast.weights.base import Before, SparseWeight


def replace(weight: SparseWeight, values: Tensor, before: Before) -> None:
    """Let a weight go on from other values: A has their largest entries, B the largest of θ besides.

    If they are zero outside the A of before, the sets stay. Where values that are sparse already are zero, θ is kept.
    Ties of zeros are drawn as for the first sets of a run.

    Args:
        weight: whose values are replaced.
        values: the other ones; for a sharded weight this process' part.
        before: what was there before they were written.

    Raises:
        NonFiniteScoresError: the values hold NaN or infinity.
    """
    active = before.tiers == ACTIVE
    outside = torch.count_nonzero(values.masked_fill(active, 0))
    if not int(weight.sharding.sum(outside)):
        theta, tiers = torch.where(active, values, before.theta), before.tiers
    else:
        theta, tiers = _sets_of(weight, values, before)
        if weight.clears_dropped:
            theta = theta.masked_fill(tiers == RESERVOIR, 0)
    weight.replace(theta, tiers, before)


def _sets_of(weight: SparseWeight, values: Tensor, before: Before) -> tuple[Tensor, Tensor]:
    structure, sharding = weight.structure, weight.sharding
    was_active, support = before.tiers == ACTIVE, values != 0
    active, updated = (_units_in(weight, members) for members in (was_active, before.tiers != RESERVOIR))

    def draw() -> Tensor:
        numbers = drawn(weight.seed, 0, weight.name, structure.grid(weight.shape))
        return structure.part_of(numbers, sharding).to(values.device)

    select = structure.selection(sharding, draw)
    first = select(structure.scores(values.abs(), sharding), (active,)).bool()
    theta = values
    if int(sharding.sum(torch.count_nonzero(support) - torch.count_nonzero(was_active))) <= 0:
        chosen = structure.tiers(first.to(torch.uint8), sharding).bool()
        theta = torch.where(support | chosen, values, before.theta)
    scores = structure.scores(theta.abs(), sharding)
    tiers = select(scores.masked_fill(first, torch.finfo(scores.dtype).max), (updated, active))
    return theta, structure.tiers(tiers, sharding)


def _units_in(weight: SparseWeight, members: Tensor) -> int:
    """Return the number of units in a set; a collective if the weight is sharded."""
    units = weight.structure.members(members, weight.sharding)
    counts = torch.tensor([int(torch.count_nonzero(units)), units.numel()], device=units.device)
    counted, all_units = weight.sharding.sum(counts).tolist()  # every process may have all of them
    return counted * weight.structure.grid(weight.shape).numel() // max(all_units, 1)
