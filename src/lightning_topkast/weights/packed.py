r"""A sparse weight kept as the values of its updated set B: nothing dense is on the device but what operators ask for.

The parameter is 1-D: θ on A, then θ on B\A, so that gradient and optimizer state are as small. The reservoir, the sets
and the telemetry lie in host memory and are touched at a refresh only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_topkast.penalty import Penalty, penalty_of, shrink_
from lightning_topkast.selection import ACTIVE, nested_top_k
from lightning_topkast.weights.base import SparseWeight
from lightning_topkast.weights.entries import indices
from lightning_topkast.weights.packing import Packing


class PackedWeight(SparseWeight):
    """One weight θ, its active set A and its updated set B, packed.

    Args:
        name: the parameter's name in the model.
        dense: θ, dense; on CPU its memory becomes the host's copy.
        active_count: |A|.
        updated_count: |B| while exploring, at least `active_count`.
        products: whether its layer multiplies by it in packed form, else by a dense α that lives as long as autograd
            needs it (`execution` is "packed" or "compact").
        operators: which implementation of the products its layer uses.
    """

    def __init__(
        self,
        name: str,
        dense: nn.Parameter,
        active_count: int,
        updated_count: int,
        products: bool,
        operators: str = "torch",
    ) -> None:
        values = nn.Parameter(dense.detach().new_zeros(updated_count))
        super().__init__(name, values, dense.shape, active_count, updated_count)
        self.execution = "packed" if products else "compact"
        self.operators = operators
        # Host memory. θ is up to date on C; on B the parameter has it.
        self._theta = dense.detach().cpu().contiguous().view(-1)
        # At first everything is active, and nothing is packed: only `apply` chooses.
        self._tiers = torch.full(dense.shape, ACTIVE, dtype=torch.uint8)
        self._dormant = torch.zeros(dense.shape, dtype=torch.bool)
        self._packing = Packing.of(torch.zeros_like(self._tiers), products)
        # what a refresh is about to write: tensors and their new content, and the new sets
        self._pending: tuple[list[tuple[Tensor, Tensor]], Tensor, Packing] | None = None

    @property
    def packing(self) -> Packing:
        """The places of the parameter's values, on the parameter's device."""
        self.match_layout()
        return self._packing

    # --- the sets -------------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tensor:
        """uint8 in the weight's shape, on CPU: 0 reservoir, 1 exploring, 2 active."""
        return self._tiers.clone()

    @property
    def active_entries(self) -> Tensor:
        """Realised |A|, a scalar tensor."""
        return torch.tensor(self._packing.active_count)

    @property
    def updated_entries(self) -> Tensor:
        """Realised |B|, a scalar tensor."""
        return torch.tensor(self._packing.updated_count)

    @property
    def dormant_entries(self) -> Tensor:
        """Entries of the first reservoir that have never been active, a scalar tensor."""
        return torch.count_nonzero(self._dormant)

    @property
    def is_exploring(self) -> bool:
        r"""Whether B\A has entries at present."""
        return self._packing.updated_count > self._packing.active_count

    def alpha(self) -> Tensor:
        """θ on A and zero elsewhere, dense, on CPU."""
        alpha = torch.zeros_like(self._theta)
        count = self._packing.active_count
        alpha.index_copy_(0, self._places()[:count], self._values()[:count])
        return alpha.view(self.shape)

    def theta(self) -> Tensor:
        """The stored θ, dense, a copy on CPU."""
        return self._theta_with(self._values())

    def magnitudes(self) -> Tensor:
        """|θ|, on CPU in the weight's shape: the scores of the selection."""
        return self.theta().abs_()

    def snapshot(self) -> Callable[[], Tensor]:
        """What gives `magnitudes` as they are now; only B's values are copied, for those of C stay until a refresh."""
        values = self._values().clone()
        return lambda: self._theta_with(values).abs_()

    def _theta_with(self, values: Tensor) -> Tensor:
        # numpy asks for huge pages, torch does not: filling new memory takes half the time
        whole = np.empty(self.size, dtype=np.float32) if self._theta.dtype == torch.float32 else None
        theta = self._theta.clone() if whole is None else torch.from_numpy(whole).copy_(self._theta)
        return theta.index_copy_(0, self._places(), values).view(self.shape)

    def apply(self, tiers: Tensor, state: Sequence[Tensor] = ()) -> None:
        """Take over new sets: values of entries that stay in B are moved, the others come from and go to the host."""
        self._repack(tiers.cpu(), state)

    def _repack(self, tiers: Tensor, state: Sequence[Tensor]) -> None:
        places = self._places()
        self._theta.index_copy_(0, places, self._values())
        packing = Packing.of(tiers, self.execution == "packed")
        new_places = packing.indices().long()
        writes = [(self.parameter.detach(), self._values_at(new_places))]
        if state:
            # where in the packed values each entry was
            position = torch.from_numpy(np.full(self.size, -1, dtype=np.int32 if self.size < 2**31 else np.int64))
            position.index_copy_(0, places, torch.arange(places.numel(), dtype=position.dtype))
            source = position.index_select(0, new_places)
            kept = indices(source >= 0)
            source = source.index_select(0, kept)
            for tensor in state:
                on = tensor.device
                moved = torch.zeros_like(tensor)
                moved.index_copy_(0, kept.to(on), tensor.index_select(0, source.to(on)))
                writes.append((tensor, moved))
        active = new_places[: packing.active_count]
        self.promoted = int(torch.count_nonzero(self._tiers.view(-1).index_select(0, active) != ACTIVE))
        # All is prepared; writing it twice does no harm, so that an interruption is mended by writing it again.
        self._pending = (writes, tiers, packing)
        self._settle()
        self._dormant.view(-1).index_fill_(0, active, False)

    def _values_at(self, places: Tensor) -> Tensor:
        values = torch.zeros_like(self.parameter, device="cpu", requires_grad=False)
        values[: places.numel()] = self._theta.index_select(0, places)
        return values

    def _settle(self) -> None:
        if self._pending is None:
            return
        writes, self._tiers, self._packing = self._pending
        for tensor, content in writes:
            tensor.copy_(content)
        self._pending = None

    def note_first_reservoir(self) -> None:
        """Remember C as it is now, of which `dormant_entries` counts what has not been active since."""
        self._dormant = self._tiers == 0
        self.first_reservoir = int(torch.count_nonzero(self._dormant))

    def match_layout(self) -> None:
        """Follow the parameter to the device and dtype that the model was moved to."""
        self._packing = self._packing.to(self.parameter.device)
        self._theta = self._theta.to(self.parameter.dtype)

    def _places(self) -> Tensor:
        return self._packing.indices().cpu().long()

    def _values(self) -> Tensor:
        self.match_layout()
        return self.parameter.detach()[: self._packing.updated_count].to(self._theta)

    # --- around the optimizer's step ------------------------------------------------------------------------------

    def mask_gradient(self) -> None:
        """Nothing to do: there is no gradient outside B."""

    def open(self) -> None:
        """Nothing to do: the parameter is θ on B."""
        self.is_open = True

    def close(self, penalty: Penalty, lr: float | Tensor) -> None:
        """Apply the penalty on B."""
        values, packing = self.parameter.detach(), self._packing
        if self.strength != 0 and not (isinstance(lr, float | int) and lr == 0):
            shrink_(values[: packing.active_count], penalty, lr * self.strength)
            exploring = values[packing.active_count : packing.updated_count]
            if exploring.numel():
                shrink_(exploring, penalty, lr * (self.strength / self.forward_density_target))
        values[packing.updated_count :].zero_()
        self.is_open = False

    def recover(self) -> None:
        """End an interrupted step or refresh; a penalty that was not applied is left out."""
        self._settle()
        self.is_open = False

    def penalty(self, penalty: Penalty) -> Tensor:
        """The exploration penalty's value, a scalar tensor."""
        values, packing = self.parameter.detach(), self._packing
        exploring = values[packing.active_count : packing.updated_count]
        on_active = penalty_of(values[: packing.active_count], penalty, self.strength)
        return on_active + penalty_of(exploring, penalty, self.strength / self.forward_density_target)

    @property
    def is_sparse(self) -> bool:
        """Always: the network has nothing but A to compute with."""
        return True

    def restore_sparsity(self) -> None:
        """Nothing to do."""

    def follow(self, other: "PackedWeight") -> None:
        """Make this one, whose values are a running average of the other's α, hold the other's sets.

        Entries that were active before keep their average, all others begin anew at θ.
        """
        if self._packing is not other._packing:
            average = self.theta().view(-1)
            stayed = ((self._tiers == ACTIVE) & (other._tiers == ACTIVE)).view(-1)
            theta = other.theta().view(-1)
            self._theta = torch.where(stayed, average, theta)
            self._tiers, self._packing = other._tiers, other._packing
            self.parameter.detach().copy_(other.parameter.detach())
            count = self._packing.updated_count
            self.parameter.detach()[:count] = self._theta[self._places()].to(self.parameter)

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tiers and reserve (dense, contiguous), on CPU: tensors and primitives only."""
        return {
            "tiers": self.tiers,
            "reserve": self.theta().masked_fill_(self._tiers == ACTIVE, 0),
            "dormant": self._dormant.clone(),
        } | self._counts()

    def adopt(self, value: Tensor) -> Tensor:
        """A dense one is gathered on B."""
        if value.shape == self.parameter.shape or value.shape != self.shape:
            return value
        order = self._order().to(value.device)
        packed = value.new_zeros(self.parameter.shape)
        packed[: order.numel()] = value.reshape(-1)[order]
        return packed

    def _in_model(self) -> Tensor:
        return self.alpha()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `check_state` has accepted; the model already holds the saved α."""
        self._take_over(self.alpha() + state["reserve"].cpu(), state["tiers"].cpu().clone())
        self._dormant = state["dormant"].cpu().clone()
        self._load_counts(state)
        self.is_open = False

    def load_alpha(self, alpha: Tensor) -> None:
        """Take over dense weights from a state dict: the largest become A, as at the start.

        Raises:
            NonFiniteScoresError: they hold NaN or infinity.
        """
        updated = self.updated_count if self.is_exploring else self.active_count
        tiers = nested_top_k(alpha.detach().cpu().abs(), (updated, self.active_count))
        self._take_over(alpha.detach().cpu(), tiers)
        self.note_first_reservoir()

    def _take_over(self, theta: Tensor, tiers: Tensor) -> None:
        self._theta = theta.to(self._theta.dtype).contiguous().clone().view(-1)
        packing = Packing.of(tiers, self.execution == "packed")
        values = self._values_at(packing.indices().long())
        self._pending = ([(self.parameter.detach(), values)], tiers, packing)
        self._settle()
