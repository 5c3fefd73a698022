r"""A sparse weight kept as the values of its updated set B: nothing dense is on the device but what operators ask for.

The parameter is 1-D: θ on A, then θ on B\A, so that gradient and optimizer state are as small. The reservoir, the sets
and the telemetry lie in host memory and are touched at a refresh only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_topkast.distributed import Sharding
from lightning_topkast.method.penalty import Penalty, penalty_of, shrink_
from lightning_topkast.method.selection import ACTIVE, RESERVOIR, nested_top_k, ranked
from lightning_topkast.method.structure import Blocks, Entries
from lightning_topkast.ops.flat import indices
from lightning_topkast.weights.base import SparseWeight
from lightning_topkast.weights.layouts import Packing, pack


class PackedWeight(SparseWeight):
    """One weight θ, its active set A and its updated set B, packed.

    Args:
        name: the parameter's name in the model.
        dense: θ, dense; on CPU its memory becomes the host's copy.
        active_count: |A|.
        updated_count: |B| while exploring, at least `active_count`.
        units: what the sets are made of, which divide the weight.
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
        units: Entries,
        products: bool,
        operators: str = "torch",
    ) -> None:
        values = nn.Parameter(dense.detach().new_zeros(updated_count), requires_grad=dense.requires_grad)
        values.__dict__.update(dense.__dict__)  # what others have noted on it, such as "no weight decay"
        super().__init__(name, values, Sharding(name, dense), active_count, updated_count)
        self.execution = "packed" if products else "compact"
        self.operators = operators
        self.granularity = units
        # Host memory. θ is up to date on C; on B the parameter has it.
        theta = dense.detach().cpu().contiguous().view(-1)
        owns_all = theta.untyped_storage().nbytes() == theta.nbytes  # a slice would keep all of a larger memory alive
        self._theta = theta if owns_all else theta.clone()
        # Sets are kept unit by unit. At first everything is active, and nothing is packed: only `apply` chooses.
        grid = units.grid(dense.shape)
        self._tiers = torch.full(grid, ACTIVE, dtype=torch.uint8)
        self._dormant = torch.zeros(grid, dtype=torch.bool)
        self._packing = pack(torch.zeros_like(self._tiers), self.shape, units, products)
        self._unit_size = self.size // max(grid.numel(), 1)
        # The scores of units larger than an entry: few, and those of C stay until a refresh. All are computed on the
        # host, so that a resumed run has the same bits.
        self._scores = self._scores_of(self._theta)
        # what a refresh is about to write: tensors and their new content, and the new sets
        self._pending: tuple[list[tuple[Tensor, Tensor]], Tensor, Packing] | None = None
        # sets that `apply` is likely to take over, with their indices
        self._prepared: tuple[Tensor, Packing] | None = None
        # whether dense state of an optimizer was taken over by the present sets
        self.has_gathered = False
        # units that the optimizer's state belongs to, where weights were loaded since
        self._state_units: Tensor | None = None

    @property
    def packing(self) -> Packing:
        """The places of the parameter's values, on the parameter's device."""
        self.match_layout()
        return self._packing

    # --- the sets -------------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tensor:
        """uint8 in the weight's shape, on CPU: 0 reservoir, 1 exploring, 2 active."""
        return self.granularity.tiers(self._tiers.clone(), self.sharding)

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
        return torch.count_nonzero(self._dormant) * self._unit_size

    @property
    def is_exploring(self) -> bool:
        r"""Whether B\A has entries at present."""
        return self._packing.updated_count > self._packing.active_count

    def alpha(self) -> Tensor:
        """θ on A and zero elsewhere, dense, on CPU."""
        self.match_layout()
        alpha = torch.zeros_like(self._theta)
        count = self._packing.active_count
        alpha.index_copy_(0, self._places()[:count], self._values()[:count])
        return alpha.view(self.shape)

    def theta(self) -> Tensor:
        """The stored θ, dense, a copy on CPU."""
        self.match_layout()
        return _with_values(self._theta, self._places(), self._values()).view(self.shape)

    def magnitudes(self) -> Tensor:
        """|θ|, on CPU in the weight's shape."""
        return self.theta().abs_()

    def scores(self) -> Tensor:
        """The units' scores, on CPU in the shape of their grid."""
        if self._scores is None:
            return super().scores()
        self._note_scores()
        return self._scores.clone()

    def snapshot(self) -> Callable[[], Tensor]:
        """What gives `scores` as they are now; only B's values are copied, for those of C stay until a refresh."""
        if self._scores is not None:
            scores = self.scores()
            return lambda: scores
        places, values, theta, shape = self._places(), self._values().clone(), self._theta, self.shape
        return lambda: _with_values(theta, places, values).view(shape).abs_()

    def _note_scores(self) -> None:
        """Bring the scores of B's units up to date."""
        if self._scores is not None:
            assert isinstance(self.granularity, Blocks)
            norms = self.granularity.norms(self._values().view(-1, self._unit_size))
            self._scores.view(-1).index_copy_(0, self._units(), norms)

    def _scores_of(self, theta: Tensor) -> Tensor | None:
        if not isinstance(self.granularity, Blocks):
            return None
        return self.granularity.scores(theta.view(self.shape), self.sharding)

    def prepare(self, tiers: Tensor) -> None:
        """Make the indices of these sets, which takes longer than choosing them."""
        self._prepared = tiers, self._pack(self._on_grid(tiers))

    def apply(self, tiers: Tensor, state: Sequence[Tensor] = ()) -> None:
        """Take over new sets: values of entries that stay in B are moved, the others come from and go to the host."""
        self.match_layout()
        prepared, self._prepared = self._prepared, None
        given, tiers = tiers, self._on_grid(tiers)
        packing = prepared[1] if prepared is not None and prepared[0] is given else self._pack(tiers)
        self._note_scores()
        places, new_places = self._places(), packing.indices().long()
        units = _units_of(self._packing, places) if self._state_units is None else self._state_units
        self._theta.index_copy_(0, places, self._values())
        if self.forgets:
            forgotten = (tiers == RESERVOIR) & (self._tiers != RESERVOIR)
            self._theta.masked_fill_(self.granularity.tiers(forgotten, self.sharding).view(-1), 0)
            if self._scores is not None:
                self._scores.masked_fill_(forgotten, 0)
        writes = [(self.parameter.detach(), self._values_at(new_places))]
        writes += self._moved(state, units, _units_of(packing, new_places))
        self._state_units = None
        promoted = torch.count_nonzero((tiers == ACTIVE) & (self._tiers != ACTIVE))
        self.promoted = int(promoted) * self._unit_size
        # All is prepared; writing it twice does no harm, so that an interruption is mended by writing it again.
        self._pending = (writes, tiers, packing)
        self._settle()
        self.has_gathered = False

    def _pack(self, tiers: Tensor) -> Packing:
        return pack(tiers, self.shape, self.granularity, self.execution == "packed")

    def _on_grid(self, tiers: Tensor) -> Tensor:
        """The units' tiers."""
        return self.granularity.units_of(tiers.cpu()).contiguous()

    def _moved(self, state: Sequence[Tensor], before: Tensor, after: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every tensor of the state with its content for new units: moved where one stays, zero elsewhere."""
        if not state:
            return []
        # where among the packed units each was
        count = self._tiers.numel()
        position = torch.from_numpy(np.full(count, -1, dtype=np.int32 if count < 2**31 else np.int64))
        position.index_copy_(0, before, torch.arange(before.numel(), dtype=position.dtype))
        source = position.index_select(0, after)
        kept = indices(source >= 0)
        source = source.index_select(0, kept)
        writes = []
        for tensor in state:
            on = tensor.device
            moved = torch.zeros_like(tensor)
            # single entries in one dimension, in which torch selects them four times as fast
            by_unit = tensor.view(-1, self._unit_size) if self._unit_size > 1 else tensor
            moved.view_as(by_unit).index_copy_(0, kept.to(on), by_unit.index_select(0, source.to(on)))
            writes.append((tensor, moved))
        return writes

    def _values_at(self, places: Tensor) -> Tensor:
        values = torch.zeros_like(self.parameter, device="cpu", requires_grad=False)
        values[: places.numel()] = self._theta.index_select(0, places)
        return values

    def _settle(self) -> None:
        pending = self._pending  # a signal handler may settle it at any moment
        if pending is None:
            return
        writes, self._tiers, self._packing = pending
        self._dormant &= self._tiers != ACTIVE
        for tensor, content in writes:
            tensor.copy_(content)
        self._pending = None

    def note_first_reservoir(self) -> None:
        """Remember C as it is now, of which `dormant_entries` counts what has not been active since."""
        self._dormant = self._tiers == RESERVOIR
        self.first_reservoir = int(self.dormant_entries)

    def match_layout(self) -> None:
        """Follow the parameter to the device and dtype that the model was moved to."""
        self._packing = self._packing.to(self.parameter.device)
        if self._theta.dtype != self.parameter.dtype:
            self._theta = self._theta.to(self.parameter.dtype)
            self._scores = self._scores_of(self._theta)

    def _places(self) -> Tensor:
        self._settle()
        return self._packing.indices().cpu().long()

    def _units(self) -> Tensor:
        self._settle()
        return self._packing.units if self._packing.units is not None else self._places()

    def _values(self) -> Tensor:
        self.match_layout()
        return self._as_theta(self.parameter.detach())[: self._packing.updated_count].to(self._theta)

    # --- around the optimizer's step ------------------------------------------------------------------------------

    def mask_gradient(self) -> None:
        """Nothing to do: there is no gradient outside B."""

    def open(self) -> None:
        """The parameter is θ on B already."""
        self.is_open = True
        self._put_phi(self.parameter.detach(), self.parameter.grad)

    def close(self, penalty: Penalty, lr: float | Tensor) -> None:
        """Apply the penalty on B."""
        values, packing = self.parameter.detach(), self._packing
        self._put_theta(values)
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
        self._put_theta(self.parameter.detach())
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
            stayed = (self.active & other.active).view(-1)
            theta = other.theta().view(-1)
            self._theta = torch.where(stayed, average, theta)
            self._scores = self._scores_of(self._theta)
            self._tiers, self._packing = other._tiers, other._packing
            self.parameter.detach().copy_(other.parameter.detach())
            count = self._packing.updated_count
            self.parameter.detach()[:count] = self._theta[self._places()].to(self.parameter)

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, gathered: bool = False) -> dict[str, Any]:
        """Tiers and reserve (dense, contiguous), on CPU: tensors and primitives only."""
        self._settle()
        return {
            "tiers": self.tiers,
            "reserve": self.theta().masked_fill_(self.active, 0),
            "dormant": self.granularity.tiers(self._dormant.clone(), self.sharding),
        } | self._counts()

    def adopt(self, value: Tensor) -> Tensor:
        """A dense one is gathered on B."""
        if value.shape == self.parameter.shape or value.shape != self.shape:
            return value
        order = self._places().to(value.device)
        packed = value.new_zeros(self.parameter.shape)
        packed[: order.numel()] = value.reshape(-1)[order]
        self.has_gathered = True
        return packed

    def _in_model(self) -> Tensor:
        return self.alpha()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `check_state` has accepted; the model already holds the saved α."""
        self._take_over(self.alpha() + state["reserve"].cpu(), state["tiers"].cpu())
        self._dormant = self._on_grid(state["dormant"]).clone()
        self._load_counts(state)
        self.forget_order()
        self.is_open = False

    def load_alpha(self, alpha: Tensor) -> None:
        """Take over dense weights from a state dict, which the network then computes with as far as A holds them.

        Weights that fit the present A change its values only. Others choose the sets anew: A are the largest, and where
        they are zero because they were sparse, not dense, θ stays what it was.

        Raises:
            NonFiniteScoresError: they hold NaN or infinity.
        """
        alpha = alpha.detach().cpu().to(self._theta.dtype).contiguous()
        units, sharding, support = self.granularity, self.sharding, alpha != 0
        select = units.selection(sharding)  # refuses what is not finite, also where the sets stay
        first = select(units.scores(alpha.abs(), sharding), (units.units(self.active_count, self.shape),)).bool()
        if not bool((support & ~self.active).any()):
            count = self._packing.active_count
            values = alpha.view(-1).index_select(0, self._places()[:count])
            self.parameter.detach()[:count] = values.to(self.parameter)
            return
        theta = alpha
        if int(torch.count_nonzero(support)) <= self.active_count:
            active = units.tiers(first.to(torch.uint8), sharding).bool()
            theta = torch.where(support | active, alpha, self.theta())
        exploring = self.updated_count - self.active_count if self.is_exploring else 0
        others = ranked(units.scores(theta.abs(), sharding), ~first)
        chosen = nested_top_k(others, (units.units(exploring, self.shape),)).masked_fill_(first, ACTIVE)
        tiers = units.tiers(chosen, sharding)
        if self._state_units is None:
            self._state_units = self._units()
        self.loads += 1
        self._take_over(theta, tiers)
        self.note_first_reservoir()

    @property
    def was_reordered(self) -> bool:
        """Whether sets were loaded since the optimizer's state was last aligned with them."""
        return self._state_units is not None

    def realign(self, state: Sequence[Tensor]) -> None:
        """Give the optimizer's state the order of the sets that were loaded since it was last aligned."""
        if self._state_units is not None:
            before, self._state_units = self._state_units, None
            for tensor, content in self._moved(state, before, self._units()):
                tensor.copy_(content)

    def forget_order(self) -> None:
        """The optimizer's state, if any, belongs to the present sets."""
        self._state_units = None

    def _take_over(self, theta: Tensor, tiers: Tensor) -> None:
        self._theta = theta.to(self._theta.dtype).contiguous().clone().view(-1)
        self._scores = self._scores_of(self._theta)
        tiers = self._on_grid(tiers).clone()
        packing = self._pack(tiers)
        values = self._values_at(packing.indices().long())
        self._pending = ([(self.parameter.detach(), values)], tiers, packing)
        self._settle()


def _units_of(packing: Packing, places: Tensor) -> Tensor:
    """Where in the grid its units are: its values' places, where entries are the units."""
    return places if packing.units is None else packing.units


def _with_values(theta: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A copy of the flat `theta` with `values` at `places`."""
    # numpy asks for huge pages, torch does not: filling new memory takes half the time
    whole = np.empty(theta.numel(), dtype=np.float32) if theta.dtype == torch.float32 else None
    copy = theta.clone() if whole is None else torch.from_numpy(whole).copy_(theta)
    return copy.index_copy_(0, places, values)
