"""How strong the exploration penalty is, given the learning rates it is applied with."""

from collections.abc import Iterable, Mapping

from torch.optim import Optimizer

from lightning_topkast.errors import TopKastError
from lightning_topkast.settings import Settings
from lightning_topkast.weights import SparseWeight

# Below this share lost per step an exploring entry hardly notices the penalty (benchmarks/README.md).
_NEXT_TO_NOTHING = 1e-4


def peak_learning_rates(weights: Mapping[str, SparseWeight], optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Weight name → the highest learning rate that its parameter group is known to reach.

    Raises:
        TopKastError: a group without a learning rate.
    """
    names = {id(weight.parameter): name for name, weight in weights.items()}
    peaks: dict[str, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held = [names[id(parameter)] for parameter in group["params"] if id(parameter) in names]
            if held and group.get("lr") is None:
                raise TopKastError(
                    f"{type(optimizer).__name__} has no learning rate of its own for '{held[0]}' (lr=None), by which "
                    "the penalty is scaled; give it an lr"
                )
            # a scheduler notes the rate it started from, OneCycleLR the one it will reach
            peak = max(float(group.get(key) or 0) for key in ("lr", "initial_lr", "max_lr"))
            peaks |= dict.fromkeys(held, peak)
    return peaks


def strength_of(settings: Settings, name: str, density: float, peak: float | None) -> float:
    """λ of one weight.

    Args:
        settings: of the run.
        name: of the weight, for errors.
        density: its forward density.
        peak: the highest learning rate it will see, or None as long as no optimizer is known.

    Raises:
        TopKastError: the penalty would carry exploring entries past zero at the peak, or needs a peak that is 0.
    """
    if not settings.chosen_rule.explores:
        return 0.0
    strength = float(settings.penalty_strength)
    if settings.penalty_shrinkage is not None:
        if peak is None:
            return 0.0
        if peak == 0:
            raise TopKastError(
                f"penalty_shrinkage needs the learning rate's peak, but that of '{name}' is 0; give penalty_strength"
            )
        strength = settings.penalty_shrinkage * density / peak
    shrinkage = (peak or 0.0) * strength / density
    if settings.penalty == "l2" and shrinkage >= 1:
        raise TopKastError(
            f"penalty_strength={strength} carries exploring entries of '{name}' past zero: learning rate {peak} · "
            f"strength / forward density {density:.4g} = {shrinkage:.3g}, expected below 1; choose a strength below "
            f"{density / (peak or 1):.3g}"
        )
    return strength


def describe(shrinkage: float, update_every: int, least: float) -> list[str]:
    """What a loss of `shrinkage` per step at the peak learning rate amounts to, in words.

    Args:
        shrinkage: share lost per step.
        update_every: steps between refreshes.
        least: below this share the weights' own precision rounds the loss away.
    """
    if shrinkage == 0:
        return []
    kept = (1 - shrinkage) ** update_every
    note = (
        f"penalty: at the peak learning rate an exploring entry shrinks by {shrinkage:.2g} a step, "
        f"{1 - kept:.2%} between refreshes"
    )
    if shrinkage < _NEXT_TO_NOTHING:
        note += " - next to nothing; 5e-4 to 5e-3 a step worked best for SGD and Adam alike (penalty_shrinkage=1e-3)"
    if shrinkage < least:
        note += f" - which the weights' own precision rounds away (below {least:.2g}): keep them in float32"
    return [note]
