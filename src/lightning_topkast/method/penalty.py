r"""The exploration penalty, applied in closed form after the optimizer's step (paper section 2.3).

The loss adds strength · R(θ) on A and (strength / D) · R(θ) on B\A, where D is the forward *density*. It depends on no
data, so it is decoupled from the optimizer as AdamW's weight decay is: inside an adaptive optimizer's gradient the
factor 1/D would be divided away again.

| penalty | R(θ) of a set of entries | closed form of a step of `amount` = lr · strength (or lr · strength / D) |
|---|---|---|
| `L2` | ½ ‖θ‖² | θ · (1 - amount) |
| `L1` | ‖θ‖₁ | sign(θ) · max(\|θ\| - amount, 0) |
| `Norm` | ‖θ‖₂ | θ · max(1 - amount / ‖θ‖₂, 0) |
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_topkast.checks import check, is_number
from lightning_topkast.errors import TopKastError

# Sums a scalar over all parts of a sharded weight; None: the values are the whole weight.
Total = Callable[[Tensor], Tensor] | None

# An exploring entry that loses a smaller share per step hardly notices the penalty (benchmarks/README.md).
_NEGLIGIBLE = 1e-4


class Penalty(ABC):
    """Form and strength of the exploration penalty."""

    @abstractmethod
    def shrink_(self, values: Tensor, amount: float | Tensor, total: Total = None) -> Tensor:
        """Take one penalty step on `values` in place, never past zero; zeros stay zeros.

        Args:
            values: entries of A or of B outside A; of a sharded weight this process' part.
            amount: learning rate · strength.
            total: sums over the parts of a sharded weight.
        """

    def factor(self, amount: float) -> float | None:
        """Return the number by which `shrink_` multiplies all values, or None if it depends on them."""
        return None

    @abstractmethod
    def value(self, values: Tensor, total: Total = None) -> Tensor:
        """Return R(values), a scalar tensor."""

    @abstractmethod
    def strength_for(self, name: str, density: float, peak: float | None) -> float:
        """Return λ of one weight.

        Args:
            name: of the weight, for errors.
            density: its forward density.
            peak: the highest learning rate it will see; None as long as no optimizer is known.

        Raises:
            TopKastError: the penalty would carry exploring entries past zero at the peak, or needs a peak that is 0.
        """

    def shrinkage_at(self, lr: float, strength: float, density: float) -> float:
        """Return the share that an exploring entry loses per step at a learning rate; 0 if it depends on the entry."""
        return 0.0

    def limit(self, density: float) -> float | None:
        """Return what learning rate · λ must not exceed, for which λ is lowered; None if λ is given."""
        return None


@dataclass(frozen=True)
class L2(Penalty):
    """½ ‖θ‖²: an exploring entry loses a constant share of its value per step.

    Args:
        shrinkage: share that an exploring entry loses per step at the peak learning rate, in [0, 1); 1e-3 unless
            `strength` is given. It works for SGD and Adam alike: λ is worked out from the learning rate, and lowered
            for good when a scheduler exceeds the peak known so far, so that no step takes more.
        strength: λ itself, at least 0, applied with the optimizer's current learning rate: λ on active entries, and
            λ / forward density on exploring ones. The paper's 1e-4 belongs to SGD's learning rates.

    Raises:
        TopKastError: both are given, or a value is out of range.
    """

    shrinkage: float | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.shrinkage is None and self.strength is None:
            object.__setattr__(self, "shrinkage", 1e-3)
        if self.shrinkage is not None:
            valid = is_number(self.shrinkage) and 0 <= self.shrinkage < 1
            check(valid, "L2.shrinkage", self.shrinkage, "a number in [0, 1)")
            if self.strength is not None:
                raise TopKastError(
                    f"expected either shrinkage or strength of the penalty, got shrinkage={self.shrinkage} and "
                    f"strength={self.strength}: set the other one to None"
                )
        else:
            _check_strength(self.strength)

    def shrink_(self, values: Tensor, amount: float | Tensor, total: Total = None) -> Tensor:
        """Multiply by 1 - amount."""
        return values.mul_((1 - amount).clamp_min(0) if isinstance(amount, Tensor) else self.factor(amount))

    def factor(self, amount: float) -> float:
        """Return 1 - amount."""
        return max(1 - amount, 0.0)

    def value(self, values: Tensor, total: Total = None) -> Tensor:
        """Return half the sum of squares."""
        return _summed(_norm(values).square() / 2, total)

    def strength_for(self, name: str, density: float, peak: float | None) -> float:
        """Return λ: as given, or the one with which exploring entries lose `shrinkage` per step at the peak."""
        if self.shrinkage is not None:
            if peak is None:
                return 0.0
            if peak == 0 and self.shrinkage:
                raise TopKastError(
                    f"the penalty's shrinkage refers to the peak learning rate, but that of '{name}' is 0; give "
                    "L2(strength=...), or penalty=None"
                )
            return self.shrinkage * density / (peak or 1.0)
        strength = float(self.strength or 0.0)
        shrinkage = self.shrinkage_at(peak or 0.0, strength, density)
        if shrinkage >= 1:
            raise TopKastError(
                f"the penalty's strength={strength} carries exploring entries of '{name}' past zero: learning rate "
                f"{peak} · strength / forward density {density:.4g} = {shrinkage:.3g}, expected below 1; choose a "
                f"strength below {density / (peak or 1):.3g}"
            )
        return strength

    def shrinkage_at(self, lr: float, strength: float, density: float) -> float:
        """Return lr · λ / D."""
        return lr * strength / density

    def limit(self, density: float) -> float | None:
        """Return shrinkage · D, if the shrinkage is given."""
        return None if self.shrinkage is None else self.shrinkage * density


@dataclass(frozen=True)
class _GivenStrength(Penalty):
    """A penalty whose λ does not depend on the learning rate."""

    strength: float

    def __post_init__(self) -> None:
        _check_strength(self.strength)

    def strength_for(self, name: str, density: float, peak: float | None) -> float:
        """Return λ."""
        return float(self.strength)


@dataclass(frozen=True)
class L1(_GivenStrength):
    """‖θ‖₁: every entry moves towards zero by the same amount.

    Args:
        strength: λ, at least 0, applied as that of `L2`.
    """

    def shrink_(self, values: Tensor, amount: float | Tensor, total: Total = None) -> Tensor:
        """Move towards zero by `amount`."""
        return values.copy_(values.sign() * (values.abs() - amount).clamp_min_(0))

    def value(self, values: Tensor, total: Total = None) -> Tensor:
        """Return the sum of magnitudes."""
        return _summed(values.abs().sum(dtype=_wide(values)), total)


@dataclass(frozen=True)
class Norm(_GivenStrength):
    """‖θ‖₂, not squared: a weight's entries lose the same share, larger as their norm gets smaller.

    Args:
        strength: λ, at least 0, applied as that of `L2`.
    """

    def shrink_(self, values: Tensor, amount: float | Tensor, total: Total = None) -> Tensor:
        """Shorten the vector of all values by `amount`."""
        norm = self.value(values, total)
        return values.mul_((1 - amount / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_min(0))

    def value(self, values: Tensor, total: Total = None) -> Tensor:
        """Return the norm."""
        norm = _norm(values)
        return norm if total is None else total(norm.double().square()).sqrt().to(norm.dtype)


def _wide(values: Tensor) -> torch.dtype:
    """Return a type in which sums of the values do not overflow where those of 16-bit values do."""
    return torch.promote_types(values.dtype, torch.float32)


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=_wide(values))


def _summed(value: Tensor, total: Total) -> Tensor:
    return value if total is None else total(value)


def _check_strength(strength: float | None) -> None:
    check(is_number(strength) and strength >= 0, "the penalty's strength", strength, "a number of at least 0")  # type: ignore[operator]


def peak_learning_rates(names: Mapping[int, str], optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Return weight name → the highest learning rate that its parameter group is known to reach.

    Args:
        names: id of a parameter → name of the weight.
        optimizers: those that train the weights.

    Raises:
        TopKastError: a group without a learning rate.
    """
    peaks: dict[str, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held = [names[id(parameter)] for parameter in group["params"] if id(parameter) in names]
            if held and group.get("lr") is None:
                raise TopKastError(
                    f"the penalty is scaled by the learning rate, but {type(optimizer).__name__} has none for "
                    f"'{held[0]}' (lr=None); give it an lr"
                )
            # a scheduler keeps the rate it started from, OneCycleLR the one it will reach
            peak = max(float(group.get(key) or 0) for key in ("lr", "initial_lr", "max_lr"))
            peaks |= dict.fromkeys(held, peak)
    return peaks


def describe_shrinkage(shrinkage: float, update_every: int, resolution: float) -> list[str]:
    """Return in words what a loss of `shrinkage` per step at the peak learning rate amounts to.

    Args:
        shrinkage: share lost per step.
        update_every: steps between refreshes.
        resolution: a smaller share is lost to rounding in the weights' own precision.
    """
    if shrinkage == 0:
        return []
    kept = (1 - shrinkage) ** update_every
    note = (
        f"penalty: at the peak learning rate an exploring entry shrinks by {shrinkage:.2g} per step, "
        f"{1 - kept:.2%} between refreshes"
    )
    if shrinkage < _NEGLIGIBLE:
        note += " - too little to matter; 5e-4 to 5e-3 per step worked best for SGD and Adam (L2(shrinkage=1e-3))"
    if shrinkage < resolution:
        note += f" - lost to rounding in the weights' own precision (below {resolution:.2g}): keep them in float32"
    return [note]
