"""The exploration penalty of one weight, which follows the optimizer's learning rate."""

import torch
from torch import Tensor

from lightning_topkast.method.penalty import Penalty, Total
from lightning_topkast.ops import addresses


class Shrinkage:
    """What the exploration penalty does to one weight: its strength λ, and the values that it shrinks.

    Args:
        penalty: of the run, if any.
        density: D, the allocated |A| / n.
    """

    def __init__(self, penalty: Penalty | None, density: float) -> None:
        self._penalty = penalty
        self._density = density
        self._strength: float | Tensor = 0.0
        # whether the penalty has carried all active entries to zero; looked at when the learning rate is a new highest
        self.was_emptied = False
        self._highest_lr = 0.0

    @property
    def strength(self) -> float:
        """λ, which the engine sets once it knows the learning rate; it may wait for a GPU."""
        return float(self._strength)

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = value

    @property
    def fixed(self) -> float | int:
        """What a captured step holds fixed: λ, or its address if it is on a GPU."""
        return self._strength.data_ptr() if isinstance(self._strength, Tensor) else self._strength

    def limit(self, lr: float | Tensor) -> None:
        """Lower λ for good if the learning rate exceeds the peak that λ was worked out from.

        Args:
            lr: the learning rate of this step. On a GPU it is not read, and neither is λ from then on.
        """
        limit = None if self._penalty is None else self._penalty.limit(self._density)
        if limit is None:
            return
        if isinstance(lr, Tensor) and addresses.stays(lr.device):
            if not isinstance(self._strength, Tensor):
                self._strength = torch.full_like(lr, self._strength)
            torch.minimum(self._strength, limit / lr, out=self._strength)  # in place, since a graph may hold it
        elif float(lr) * self.strength > limit:
            self._strength = limit / float(lr)

    def share_at(self, lr: float) -> float:
        """Return the share that an exploring entry loses per step at a learning rate; 0 if it depends on the entry."""
        return 0.0 if self._penalty is None else self._penalty.shrinkage_at(lr, self.strength, self._density)

    def overshoots(self, lr: float) -> bool:
        """Return whether the penalty would carry exploring entries past zero, where it stops, at this learning rate."""
        return self.share_at(lr) >= 1

    def apply_(self, values: Tensor, exploring: bool, lr: float | Tensor, total: Total = None) -> None:
        """Shrink values of A, or of B outside A, in place."""
        if self._penalty is None or self._is_idle(lr):
            return
        strength = self._strength / self._density if exploring else self._strength
        watched = not exploring and self._may_empty(lr) and _holds_values(values, total)
        self._penalty.shrink_(values, lr * strength, total)
        if watched and not _holds_values(values, total):
            self.was_emptied = True

    def factors(self, lr: float | Tensor) -> tuple[float, float] | None:
        r"""Return what `apply_` would multiply the values of B\A and of A by, or None if it does anything else."""
        if self._penalty is None or self._is_idle(lr):
            return 1.0, 1.0
        if isinstance(lr, Tensor) or isinstance(self._strength, Tensor) or self.share_at(lr) * self._density >= 1:
            return None
        explored = self._penalty.factor(lr * (self._strength / self._density))
        active = self._penalty.factor(lr * self._strength)
        return None if explored is None or active is None else (explored, active)

    def value(self, active: Tensor, exploring: Tensor, total: Total = None) -> Tensor:
        """Return the penalty's value for values of A and of B outside A."""
        if self._penalty is None:
            return active.new_zeros(())
        strength = self._strength / self._density
        return self._penalty.value(active, total) * self._strength + self._penalty.value(exploring, total) * strength

    def _is_idle(self, lr: float | Tensor) -> bool:
        return any(isinstance(x, float | int) and x == 0 for x in (self._strength, lr))

    def _may_empty(self, lr: float | Tensor) -> bool:
        """Return whether a step at this rate may be the first to carry all active entries to zero."""
        if isinstance(lr, Tensor) or lr <= self._highest_lr:
            return False
        self._highest_lr = lr
        share = self.share_at(lr)  # 0 if it depends on the entries
        return share == 0 or share * self._density >= 1


def _holds_values(values: Tensor, total: Total) -> bool:
    count = torch.count_nonzero(values)
    return bool(count if total is None else total(count))
