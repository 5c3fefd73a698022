"""Metrics of sparse training for torchmetrics; each sums counts, so it is exact over batches, weights and ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class _Share(Metric):
    """A share of entries: counted / total over all updates, 0 before the first update."""

    full_state_update = False
    higher_is_better: bool | None = None
    is_differentiable = False
    counted: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counted", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def count(self, counted: Tensor | int, total: Tensor | int) -> None:
        """Add existing counts."""
        self._update_count += 1  # as in `update`; without it `compute` warns
        self._computed = None
        self.counted += torch.as_tensor(counted, device=self.counted.device)
        self.total += torch.as_tensor(total, device=self.total.device)

    def compute(self) -> Tensor:
        """Return the share, a scalar in [0, 1]."""
        return self.counted / self.total.clamp_min(1)


class Sparsity(_Share):
    """Share of entries that are zero (or False), over all tensors passed to `update`."""

    def update(self, entries: Tensor) -> None:
        """Count the zeros of a weight or mask of any shape."""
        self.count(entries.numel() - torch.count_nonzero(entries), entries.numel())


class MaskChange(_Share):
    """Share of the active entries that were not active before."""

    def update(self, before: Tensor, after: Tensor) -> None:
        """Compare two bool masks of the same shape."""
        self.count(torch.count_nonzero(after & ~before), torch.count_nonzero(after))


class ReservoirActivation(_Share):
    """Share of a reservoir's entries that have become active (paper section 4.2: how far exploration reaches)."""

    def update(self, reservoir: Tensor, activated: Tensor) -> None:
        """Count the entries of the bool mask `reservoir` that are in the bool mask `activated`."""
        self.count(torch.count_nonzero(reservoir & activated), torch.count_nonzero(reservoir))
