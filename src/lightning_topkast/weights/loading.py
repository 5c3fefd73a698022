"""The sets of values that other code has written or loaded in place of those that the sets were chosen for."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_topkast.method.selection import ACTIVE, RESERVOIR, drawn
from lightning_topkast.weights.base import Before, SparseWeight


def replace(weight: SparseWeight, values: Tensor, before: Before, was_written: bool = False) -> None:
    """Let a weight go on from other values: A has their largest entries, B the largest of θ besides.

    If they are α of a state that was replaced since the last step, it is put back. If they are zero outside the present
    A, or one that was replaced, these sets and θ outside it stay or are put back. Where other values that are sparse
    already are zero, θ of the last step is kept. Ties of zeros are drawn as for the first sets of a run.

    Args:
        weight: whose values are replaced.
        values: the other ones; for a sharded weight this process' part.
        before: what `SparseWeight.before` has returned before they were loaded, or after they were written.
        was_written: the latter.

    Raises:
        NonFiniteScoresError: the values hold NaN or infinity.
    """
    # what was written is in `before` already, so that it tells nothing
    like = best_fit(weight, values, [*weight.replaced, *([] if was_written else [before])])
    if like is not None:
        theta, tiers = torch.where(like.tiers == ACTIVE, values, like.theta), like.tiers
    else:
        theta, tiers = _sets_of(weight, values, (weight.replaced or [before])[0])
        if weight.clears_dropped:
            theta = theta.masked_fill(tiers == RESERVOIR, 0)
        # as after a load of the same values by each of two modules that share the weight
        differ = torch.count_nonzero(theta != before.theta) + torch.count_nonzero(tiers != before.tiers)
        like = None if int(weight.sharding.sum(differ)) else before
    weight.replace(theta, tiers, before, like, was_written)


def best_fit(weight: SparseWeight, values: Tensor, known: Sequence[Before]) -> Before | None:
    """Return the first of `known` whose α `values` are, or else the last outside whose A they are zero, or None.

    This is a collective if the weight is sharded.
    """
    if not known:
        return None
    counts = []
    for each in known:
        active = each.tiers == ACTIVE
        outside = torch.count_nonzero(values.masked_fill(active, 0))
        counts += [outside, outside + torch.count_nonzero((values != each.theta) & active)]
    outsides, differing = weight.sharding.sum(torch.stack(counts)).view(-1, 2).T.tolist()
    equal, fitting = (
        [each for each, count in zip(known, counted, strict=True) if not count] for counted in (differing, outsides)
    )
    return equal[0] if equal else fitting[-1] if fitting else None


def _sets_of(weight: SparseWeight, values: Tensor, before: Before) -> tuple[Tensor, Tensor]:
    structure, sharding = weight.structure, weight.sharding
    was_active, support = before.tiers == ACTIVE, values != 0
    active, updated = (_units_in(weight, members) for members in (was_active, before.tiers != RESERVOIR))

    def draw() -> Tensor:
        numbers = partial(drawn, weight.seed, 0, weight.name, structure.grid(weight.shape))
        return structure.drawn(numbers, sharding).to(values.device)

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
