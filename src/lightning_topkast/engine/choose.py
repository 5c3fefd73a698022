"""Choosing the sets of weights: what a rule sees of them, and what becomes of its choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from lightning_topkast.distributed import Sharding, to_local
from lightning_topkast.errors import NonFiniteWeightError
from lightning_topkast.method.density import Counts
from lightning_topkast.method.rule import Candidates, Rule
from lightning_topkast.method.selection import ACTIVE, NonFiniteScoresError, drawn
from lightning_topkast.method.stack import Stack
from lightning_topkast.method.structure import Structure
from lightning_topkast.weights import SparseWeight


@dataclass(frozen=True)
class Choice:
    """The settings, step and set sizes of one refresh.

    Args:
        rule: of the run.
        structure: of the run.
        seed: of the run; with `step` it decides what is drawn at random.
        step: number of optimizer steps taken.
        counts: weight name → sizes of A and B.
        progress: elapsed share of the time in which sets change, or None if its end is not known.
        is_first: whether these are the first sets.
        compete: whether the entries of all weights, and of all matrices of a stack, compete for the same places.
    """

    rule: Rule
    structure: Structure
    seed: int
    step: int
    counts: Counts
    progress: float | None = None
    is_first: bool = False
    compete: bool = False


def choose(
    weights: Sequence[SparseWeight], choice: Choice, scores: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Choose the next sets of weights that compete with each other, or of a single weight.

    Args:
        weights: those that compete.
        choice: settings, step and set sizes of this refresh.
        scores: scores of each weight's units; None: those of its present values.

    Returns:
        weight name → tiers; for a sharded weight this process' part of them, computed by a collective.

    Raises:
        NonFiniteWeightError: a weight, or a gradient that the rule uses, holds NaN or infinity.
    """
    join, structures = _joined, [weight.structure for weight in weights]
    scores = [weight.scores() for weight in weights] if scores is None else scores
    gradients = [weight.gradient_magnitudes for weight in weights if weight.gradient_magnitudes is not None]
    counts = [
        [weight.structure.units(count, weight.shape) for count in choice.counts[weight.name]] for weight in weights
    ]
    select = choice.structure.selection if choice.compete else structures[0].selection

    @cache  # ties of zeros may be drawn for A and for B, and a rule may draw besides
    def draw() -> Tensor:
        return join([_drawn(weight, choice) for weight in weights])

    candidates = Candidates(
        scores=join(scores),
        active_count=sum(active for active, _ in counts),
        updated_count=sum(updated for _, updated in counts),
        active=lambda: join([w.structure.members(w.own_tiers == ACTIVE, w.sharding) for w in weights]),
        draw=draw,
        gradient=join([w.structure.scores(values, w.sharding) for w, values in zip(weights, gradients, strict=True)])
        if len(gradients) == len(weights)
        else None,
        progress=choice.progress,
        select=select(weights[0].sharding, draw),
    )
    chosen = choice.rule.first if choice.is_first else choice.rule.choose
    try:
        if isinstance(structures[0], Stack) and not choice.compete:
            tiers = _chosen_in_each(candidates, structures[0], weights[0].sharding, chosen)
        else:
            tiers = chosen(candidates)
    except NonFiniteScoresError:
        broken = [w.name for w, values in zip(weights, scores, strict=True) if not bool(torch.isfinite(values).all())]
        # the value may be in another process' part of a sharded weight
        named = broken or [weight.name for weight in weights]
        what = f"weight '{named[0]}'" + (" or its gradient" if gradients and not broken else "")
        raise NonFiniteWeightError(
            f"{what} holds NaN or infinity at step {choice.step}; its sets are unchanged. "
            "Lower the learning rate, clip gradients, or resume from the last checkpoint"
        ) from None
    if len(weights) == 1:
        return {weights[0].name: structures[0].tiers(tiers, weights[0].sharding)}
    grids = [weight.structure.grid(weight.shape) for weight in weights]
    parts = zip(weights, tiers.split([grid.numel() for grid in grids]), grids, strict=True)
    return {weight.name: weight.structure.tiers(part.view(grid), weight.sharding) for weight, part, grid in parts}


def _chosen_in_each(
    candidates: Candidates, stack: Stack, sharding: Sharding, chosen: Callable[[Candidates], Tensor]
) -> Tensor:
    """Return the tiers of a stack, of which a rule sees each matrix as a weight of its own.

    Raises:
        NonFiniteScoresError: a score of any matrix is NaN or infinite; raised on every process that has some of them.
    """
    scores, gradient, matrices = candidates.scores, candidates.gradient, sharding.shape[0]
    broken = sum(torch.count_nonzero(~torch.isfinite(each)) for each in (scores, gradient) if each is not None)
    if int(sharding.sum(torch.as_tensor(broken))):
        raise NonFiniteScoresError("scores must be finite")
    active, draw = cache(candidates.active), candidates.draw
    selection = stack.selections(sharding, draw)
    tiers = torch.zeros_like(scores, dtype=torch.uint8)
    for at in range(len(scores)):
        tiers[at] = chosen(
            replace(
                candidates,
                scores=scores[at],
                active_count=candidates.active_count // matrices,
                updated_count=candidates.updated_count // matrices,
                active=partial(_at, active, at),
                draw=partial(_at, draw, at),
                gradient=None if gradient is None else gradient[at],
                select=selection(at),
            )
        )
    return tiers


def _at(get: Callable[[], Tensor], index: int) -> Tensor:
    return get()[index]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of all tensors in one dimension; a single tensor keeps its shape."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([tensor.reshape(-1).to(tensors[0].device) for tensor in tensors])


def _drawn(weight: SparseWeight, choice: Choice) -> Tensor:
    """Return the numbers drawn for the units of which this process chooses."""
    draw = partial(drawn, choice.seed, choice.step, weight.name, weight.structure.grid(weight.shape))
    return weight.structure.drawn(draw, weight.sharding).to(to_local(weight.parameter).device)
