"""λ of every weight, which may follow from the learning rate of its optimizer."""

from collections.abc import Iterable, Mapping

from torch.optim import Optimizer

from lightning_topkast.method.penalty import L2, Penalty, peak_learning_rates
from lightning_topkast.weights import SparseWeight


class Strengths:
    """Sets λ of each weight once, when the learning rate of its optimizer is known.

    Args:
        penalty: of the run, if any.
        weights: by name.
    """

    def __init__(self, penalty: Penalty | None, weights: Mapping[str, SparseWeight]) -> None:
        self._penalty = penalty
        self._weights = weights
        self._known: set[SparseWeight] = set()  # those whose λ was loaded, or worked out for an optimizer

    @property
    def shrinkage(self) -> float | None:
        """The shrinkage from which λ is worked out, if the penalty has one."""
        return self._penalty.shrinkage if isinstance(self._penalty, L2) else None

    def unknown(self, weights: Iterable[SparseWeight]) -> set[SparseWeight]:
        """Return those of the weights whose λ was not set for good yet."""
        return set(weights) - self._known

    def set(self, optimizers: Iterable[Optimizer]) -> None:
        """Set λ of all weights but those for which this is done already.

        Args:
            optimizers: that train the weights; for those that they hold this is done then.

        Raises:
            TopKastError: see `Penalty.strength_for`.
        """
        names = {id(weight.parameter): name for name, weight in self._weights.items()}
        peaks = peak_learning_rates(names, optimizers)
        for name, weight in self._weights.items():
            # until a learning rate is known again, λ stays
            if weight not in self._known and (name in peaks or not weight.strength):
                density, peak = weight.forward_density_target, peaks.get(name)
                found = 0.0 if self._penalty is None else self._penalty.strength_for(name, density, peak)
                weight.shrinkage.strength = found
        self._known.update(self._weights[name] for name in peaks)

    def forget(self) -> None:
        """Let the learning rates of another run determine λ."""
        self._known.clear()

    def keep(self, before: Mapping[str, float], shrinkage: float | None) -> None:
        """Keep the λ of a state that was loaded if it was worked out as here, since the peak may no longer be known.

        Args:
            before: weight name → λ before it was loaded.
            shrinkage: in the settings of the run that was saved.
        """
        is_alike = shrinkage is not None and shrinkage == self.shrinkage
        for name, weight in self._weights.items():
            if is_alike and weight.strength:  # 0: it was not known yet
                self._known.add(weight)
            else:
                weight.shrinkage.strength = before[name]
