"""What a rank has not sent yet of the gradient of one weight."""

import torch
from torch import Tensor

from lightning_topkast.ops.flat import indices, positions
from lightning_topkast.weights import SparseWeight
from lightning_topkast.weights.layouts import Layout


class Residual:
    """One value for each entry of B, in the order in which the gradient has them.

    Args:
        weight: a weight that is not sharded, whose dtype and device the values have.
        before: of the same weight before its sets changed; values of entries that are still in B are taken from it.
    """

    def __init__(self, weight: SparseWeight, before: "Residual | None" = None) -> None:
        parameter = weight.parameter.detach()
        self.version = weight.version
        sets = weight.sets
        # Units in two sorted runs at most, so that the values can follow them. Their entries are at the beginning of a
        # packed gradient, and at `_places` in the memory of another.
        self._layout = sets if isinstance(sets, Layout) else None
        self._places: Tensor | None = None
        if self._layout is None:
            self._units, self._unit_size = indices(weight.updated.reshape(-1)).cpu(), 1
            places = self._units
            if not parameter.is_contiguous():
                places = torch.arange(weight.size).as_strided(weight.shape, parameter.stride()).reshape(-1)[places]
            self._places = places.to(parameter.device)
        else:
            self._units, self._unit_size = self._layout.units_in_order(), self._layout.unit_size
        self.values = parameter.new_zeros(self._units.numel() * self._unit_size)
        if before is not None:
            sources = positions(before._units, self._units, weight.size // self._unit_size)
            here = indices(sources >= 0)
            kept = before.values.view(-1, self._unit_size)[sources[here].to(parameter.device)]
            self.values.view(-1, self._unit_size)[here.to(parameter.device)] = kept.to(self.values)

    def __len__(self) -> int:
        return self.values.numel()

    @property
    def flat_indices(self) -> Tensor:
        """Flat indices of the entries in the weight: int64, on CPU."""
        return self._units if self._layout is None else self._layout.indices().cpu().long()

    def entries_of(self, gradient: Tensor) -> Tensor:
        """Return the values on B of a gradient in memory order."""
        return gradient[: len(self)] if self._places is None else gradient.index_select(0, self._places)

    def places(self, chosen: Tensor) -> Tensor:
        """Return where some of the entries are in a gradient in memory order."""
        return chosen if self._places is None else self._places[chosen]

    def load(self, entries: Tensor, values: Tensor) -> None:
        """Take over saved values.

        Args:
            entries: flat indices in the weight, sorted.
            values: of these entries.
        """
        own = self.flat_indices
        at = torch.searchsorted(entries, own).clamp_max_(entries.numel() - 1)
        found = entries[at] == own
        self.values.copy_(values[at] * found)
