r"""A sparse weight stored as the values of its updated set B; a dense tensor is on the device only if a layer needs it.

The parameter is 1-D: θ on A, then θ on B\A, so that gradient and optimizer state have the same small size. The
reservoir, the sets and the telemetry are in host memory and are accessed only at a refresh.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_topkast.distributed import Sharding
from lightning_topkast.method.selection import ACTIVE, RESERVOIR, NonFiniteScoresError
from lightning_topkast.method.structure import Block, units_in_order
from lightning_topkast.ops import CONV_KERNELS, MATRIX_KERNELS
from lightning_topkast.ops.flat import fill_, indices, moved, padded, positions, put_, take, where
from lightning_topkast.ops.memory import empty
from lightning_topkast.weights.base import Before, EntryState, SparseWeight, Traits
from lightning_topkast.weights.layouts import Layout, Product, make_layout
from lightning_topkast.weights.loading import replace
from lightning_topkast.weights.writes import stamp


class PackedWeight(SparseWeight):
    """One weight θ, its active set A and its updated set B, in packed or compact storage.

    Args:
        name: the parameter's name in the model.
        dense: θ, dense; on CPU its memory becomes the host's copy.
        active_count: |A|.
        updated_count: |B| while exploring, at least `active_count`.
        traits: properties that all weights of the run share; the structure divides the weight.
        product: how the layer multiplies by the packed values (`storage` is "packed"); None: by a dense α that exists
            only as long as autograd needs it ("compact").
    """

    def __init__(
        self,
        name: str,
        dense: nn.Parameter,
        active_count: int,
        updated_count: int,
        traits: Traits,
        product: Product | None,
    ) -> None:
        values = nn.Parameter(dense.detach().new_zeros(updated_count), requires_grad=dense.requires_grad)
        values.__dict__.update(dense.__dict__)  # attributes that other code has set, such as "no weight decay"
        super().__init__(name, values, Sharding(name, dense), active_count, updated_count, traits)
        self.storage = "compact" if product is None else "packed"
        self._product = product
        # In host memory. θ is up to date on C; on B the parameter holds it.
        theta = dense.detach().cpu().contiguous().view(-1)
        owns_all = theta.untyped_storage().nbytes() == theta.nbytes  # a slice would keep a larger storage alive
        self._theta = theta if owns_all else theta.clone()
        # Sets are stored per unit. At first all units are active and nothing is packed: only `apply` sets the layout.
        grid = self.structure.grid(dense.shape)
        self._tiers = torch.full(grid, ACTIVE, dtype=torch.uint8)
        self._never_active = torch.zeros(grid, dtype=torch.bool)
        self._layout = make_layout(torch.zeros_like(self._tiers), self.shape, self.structure, product)
        self._unit_size = self.size // max(grid.numel(), 1)
        # Scores of blocks: these are few, and those of C change only at a refresh. They are computed on the host, so
        # that a resumed run has the same bits.
        self._scores = self._scores_of(self._theta)
        # the parameter's stamp since `_theta` is up to date on B too
        self._updated: tuple[int, int, int] | None = None
        # the writes of a refresh in progress: tensors and their new content, the new sets, and the units entering A
        self._pending: tuple[list[tuple[Tensor, Tensor]], Tensor, Layout, Tensor] | None = None
        # sets that the next `apply` is likely to receive, with their layout
        self._prepared: tuple[Tensor, Layout] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the kernels, which a process that only unpickles the weight does not have yet."""
        self.__dict__.update(state)
        if self._product is None or self._product.kernels != "compiled":
            return
        kernels = MATRIX_KERNELS if self._product.groups is None else CONV_KERNELS
        if kernels.choose("auto", torch.device("cpu")) == "compiled":
            return
        self._settle()
        if self._product.groups is None:
            self._product = dataclasses.replace(self._product, kernels="torch")
        else:
            self.storage, self._product = "compact", None
        self._prepared, self._layout = None, self._pack(self._tiers)

    @property
    def layout(self) -> Layout:
        """The places of the parameter's values, on the parameter's device."""
        self.match_layout()
        return self._layout

    # --- the sets -------------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tensor:
        """uint8 in the weight's shape, on CPU: 0 reservoir, 1 exploring, 2 active."""
        return self.structure.tiers(self._tiers.clone(), self.sharding)

    @property
    def active_entries(self) -> Tensor:
        """Realised |A|, a scalar tensor."""
        return torch.tensor(self._layout.active_count)

    @property
    def updated_entries(self) -> Tensor:
        """Realised |B|, a scalar tensor."""
        return torch.tensor(self._layout.updated_count)

    @property
    def never_active_entries(self) -> Tensor:
        """Entries of the first reservoir that have never been active, a scalar tensor."""
        return torch.count_nonzero(self._never_active) * self._unit_size

    @property
    def is_exploring(self) -> bool:
        r"""Whether B\A has entries at present."""
        return self._layout.updated_count > self._layout.active_count

    def alpha(self) -> Tensor:
        """Return α, θ on A and zero elsewhere, dense, on CPU."""
        self.match_layout()
        alpha = torch.zeros_like(self._theta)
        count = self._layout.active_count
        alpha.index_copy_(0, self._places()[:count], self._values()[:count])
        return alpha.view(self.shape)

    def theta(self) -> Tensor:
        """Return the stored θ, dense, a copy on CPU."""
        self.match_layout()
        return _with_values(self._theta, self._places(), self._values()).view(self.shape)

    def magnitudes(self) -> Tensor:
        """Return |θ|, on CPU, in the weight's shape."""
        return self.theta().abs_()

    def scores(self) -> Tensor:
        """Return the units' scores, on CPU, in the shape of their grid."""
        if self._scores is None:
            self.match_layout()
            self._update_theta()
            shape, dtype = self.shape, self._theta.dtype
            magnitudes = torch.abs(self._theta, out=empty(self.size, dtype)).view(shape)
            return self.structure.scores(magnitudes, self.sharding)
        self._update_scores()
        return self._scores.clone()

    def snapshot(self) -> Callable[[], Tensor]:
        """Return a function that gives the present `scores`; only B is copied, since C changes only at a refresh."""
        if self._scores is not None:
            scores = self.scores()
            return lambda: scores
        places, values, theta, shape = self._places(), self._values().clone(), self._theta, self.shape
        return lambda: self.structure.scores(_with_values(theta, places, values).view(shape).abs_(), self.sharding)

    def _update_theta(self) -> None:
        """Update θ on B in the host's copy."""
        put_(self._theta, self._places(), self._values(), _second_run(self._layout))
        self._updated = stamp(self.parameter)

    def _update_scores(self) -> None:
        """Update the scores of B's units."""
        if self._scores is not None:
            assert isinstance(self.structure, Block)
            norms = self.structure.norms(self._values().view(-1, self._unit_size))
            self._scores.view(-1).index_copy_(0, self._units(), norms)

    def _scores_of(self, theta: Tensor) -> Tensor | None:
        if not isinstance(self.structure, Block):
            return None
        return self.structure.scores(theta.view(self.shape), self.sharding)

    def prepare(self, tiers: Tensor) -> None:
        """Make the layout of these sets, which takes longer than choosing them."""
        self._prepared = tiers, self._pack(self._on_grid(tiers))

    def apply(self, tiers: Tensor, state: Sequence[EntryState] = ()) -> None:
        """Change the sets: values of entries that stay in B are moved, others are exchanged with the host's copy."""
        self.match_layout()
        unmoved = self.units if self.was_trained and not state else None  # of an optimizer that is not attached
        prepared, self._prepared = self._prepared, None
        given, tiers = tiers, self._on_grid(tiers)
        layout = prepared[1] if prepared is not None and prepared[0] is given else self._pack(tiers)
        self._update_scores()
        if self._updated != stamp(self.parameter):  # unless for the scores, just before
            self._update_theta()
        places, new_places = self._places(), layout.indices().long()
        if self.clears_dropped:
            forgotten = (tiers == RESERVOIR) & (self._tiers != RESERVOIR)
            self._theta.masked_fill_(self.structure.tiers(forgotten, self.sharding).view(-1), 0)
            if self._scores is not None:
                self._scores.masked_fill_(forgotten, 0)
        units, new_units = _units_of(self._layout, places), _units_of(layout, new_places)
        writes = [(self.parameter.detach(), self._values_at(new_places, layout))]
        writes += self._moved(state, units, new_units)
        active = new_units[: layout.active_count // self._unit_size]
        promoted = where(active, take(self._tiers.view(-1), active) != ACTIVE)
        self.promoted = promoted.numel() * self._unit_size
        # Everything is prepared. Writing it twice does no harm, so an interrupted write is simply repeated.
        self._pending = (writes, tiers, layout, promoted)
        self._settle()
        self.replaced.clear()
        self.orders.refresh(unmoved)

    def _pack(self, tiers: Tensor) -> Layout:
        on_cpu = self.parameter.device.type == "cpu"
        return make_layout(tiers, self.shape, self.structure, self._product, on_cpu)

    def _on_grid(self, tiers: Tensor) -> Tensor:
        """Return the units' tiers."""
        return self.structure.units_of(tiers.cpu()).contiguous()

    def _moved(self, state: Sequence[EntryState], before: Tensor, after: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor of the state and its content for the new units: moved for units that stay, else anew."""
        if not state:
            return []
        sources = positions(before, after, self._tiers.numel())
        writes = []
        for tensor, start in state:
            if self._unit_size == 1:
                content = padded(moved(tensor, sources.to(tensor.device), start), tensor.numel(), start)
            else:
                content = torch.full_like(tensor, start)
                kept = indices(sources >= 0)
                here, there = kept.to(tensor.device), sources.index_select(0, kept).to(tensor.device)
                by_unit = tensor.view(-1, self._unit_size)
                content.view_as(by_unit).index_copy_(0, here, by_unit.index_select(0, there))
            writes.append((tensor, content))
        return writes

    def _values_at(self, places: Tensor, layout: Layout) -> Tensor:
        return padded(take(self._theta, places, _second_run(layout)), self.parameter.numel(), 0)

    def _settle(self) -> None:
        pending = self._pending  # a signal handler may write it at any moment
        if pending is None:
            return
        writes, self._tiers, self._layout, promoted = pending
        self._updated = None
        self.version += 1
        fill_(self._never_active.view(-1), promoted, False)
        for tensor, content in writes:
            tensor.copy_(content)
        self._pending = None
        self._note_own_write()

    def record_first_reservoir(self) -> None:
        """Record the present C; `never_active_entries` counts its entries that have not been active since."""
        self._never_active = self._tiers == RESERVOIR
        self.first_reservoir = int(self.never_active_entries)

    def match_layout(self) -> None:
        """Convert the other tensors to the parameter's device and dtype after the model was moved."""
        self._layout = self._layout.to(self.parameter.device)
        if self._theta.dtype != self.parameter.dtype:
            self._theta = self._theta.to(self.parameter.dtype)
            self._scores = self._scores_of(self._theta)

    def _places(self) -> Tensor:
        self._settle()
        return self._layout.indices().cpu().long()

    def _units(self) -> Tensor:
        self._settle()
        return self._layout.units if self._layout.units is not None else self._places()

    def _values(self) -> Tensor:
        self.match_layout()
        return self._as_theta(self.parameter.detach())[: self._layout.updated_count].to(self._theta)

    # --- around the optimizer's step ------------------------------------------------------------------------------

    def mask_gradient(self) -> None:
        """Do nothing, since there is no gradient outside B."""

    def open(self) -> None:
        """Mark the weight as open; the parameter is already θ on B."""
        self.is_open = True
        self._updated = None
        self._put_phi(self.parameter.detach(), self.parameter.grad)

    def close(self, lr: float | Tensor) -> None:
        """Apply the penalty on B; see `SparseWeight.close`."""
        values, layout = self.parameter.detach(), self._layout
        self._put_theta(values)
        self.shrinkage.apply_(values[: layout.active_count], False, lr)
        exploring = values[layout.active_count : layout.updated_count]
        if exploring.numel():
            self.shrinkage.apply_(exploring, True, lr)
        values[layout.updated_count :].zero_()
        self.is_open = False
        self.orders.step()
        self.replaced.clear()
        self._note_own_write()

    def recover(self) -> None:
        """Finish an interrupted step or refresh; a penalty that was not applied yet is skipped."""
        self._settle()
        self._put_theta(self.parameter.detach())
        self.is_open = False

    def penalty(self) -> Tensor:
        """Return the value of the exploration penalty, a scalar tensor."""
        values, layout = self.parameter.detach(), self._layout
        return self.shrinkage.value(values[: layout.active_count], values[layout.active_count : layout.updated_count])

    @property
    def nonzero_entries(self) -> Tensor:
        """Non-zero values of A, counted now; a scalar tensor."""
        return torch.count_nonzero(self.parameter.detach()[: self._layout.active_count])

    def sparsify_average(self, average: Any, active_before: Tensor) -> None:
        """Give a running average, a `PackedWeight`, the sets of this weight; see `SparseWeight.sparsify_average`."""
        average._copy_sets(self)

    def _copy_sets(self, other: "PackedWeight") -> None:
        """Copy the other's sets and its θ; only entries that are active in both, and were before, keep their values."""
        if self._layout is not other._layout:
            average = self.theta().view(-1)
            stayed = (self.active & other.active).view(-1)
            theta = other.theta().view(-1)
            self._theta = torch.where(stayed, average, theta)
            self._scores = self._scores_of(self._theta)
            self._tiers, self._layout = other._tiers, other._layout
            self.parameter.detach().copy_(other.parameter.detach())
            count = self._layout.updated_count
            self.parameter.detach()[:count] = self._theta[self._places()].to(self.parameter)
        else:
            exploring = slice(self._layout.active_count, self._layout.updated_count)
            self.parameter.detach()[exploring] = other.parameter.detach()[exploring].to(self.parameter)

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, gathered: bool = False) -> dict[str, Any]:
        """Return tiers and latent values (dense, contiguous), on CPU: tensors and primitives only."""
        self._settle()
        return {
            "tiers": self.tiers,
            "latent": self.theta().masked_fill_(self.active, 0),
            "never_active": self.structure.tiers(self._never_active.clone(), self.sharding),
        } | self._counts()

    @property
    def units(self) -> Tensor:
        """The units' tiers, on CPU."""
        self._settle()
        return self._tiers

    def adopt(self, value: Tensor, units: Tensor | None, start: float = 0.0) -> Tensor:
        """Return optimizer state in the parameter's shape; dense state is packed, its values on B."""
        if value.shape == self.parameter.shape or value.shape != self.shape:
            return value
        order = self.structure.order(self.units if units is None else units, self.shape)
        packed = value.new_full(self.parameter.shape, start)
        packed[: order.numel()] = value.reshape(-1)[order.to(value.device)]
        return packed

    def realign(self, state: Sequence[EntryState], units: Tensor) -> None:
        """Move the optimizer's state to the order of the present sets; that of entries that were not in B is new."""
        if units is not self.units:
            for tensor, content in self._moved(state, torch.cat(units_in_order(units)), self._units()):
                tensor.copy_(content)

    def _in_model(self) -> Tensor:
        return self.alpha()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `check_state` has accepted; the model already holds the saved α."""
        self.orders.replace(self.units)
        self._put(self.alpha() + state["latent"].cpu(), state["tiers"].cpu())
        self._never_active = self._on_grid(state["never_active"]).clone()
        self._load_counts(state)
        self.is_open = False
        self.orders.load(self.units)
        self.replaced.clear()

    def load_alpha(self, alpha: Tensor) -> None:
        """Go on from dense weights of a state dict; the network computes with those of them that are in A.

        Raises:
            NonFiniteScoresError: the weights hold NaN or infinity.
        """
        alpha = alpha.detach().cpu().to(self._theta.dtype).contiguous()
        if not bool(torch.isfinite(alpha).all()):
            raise NonFiniteScoresError("weights must be finite")
        replace(self, alpha, self.before())

    def before(self) -> Before:
        """Return what is needed to put back the present values, a copy."""
        never = self._never_active.clone()
        return Before(self.theta(), self.tiers, never, self.first_reservoir, self.orders.present, self.load_count)

    def _put(self, theta: Tensor, tiers: Tensor) -> None:
        """Replace θ and the sets."""
        self._theta = theta.to(self._theta.dtype).contiguous().clone().view(-1)
        self._scores = self._scores_of(self._theta)
        tiers = self._on_grid(tiers).clone()
        layout = self._pack(tiers)
        places = layout.indices().cpu().long()
        active = _units_of(layout, places)[: layout.active_count // self._unit_size]
        self._pending = ([(self.parameter.detach(), self._values_at(places, layout))], tiers, layout, active)
        self._settle()


def _units_of(layout: Layout, places: Tensor) -> Tensor:
    """Return the flat indices of the layout's units in the grid, which are `places` if the units are entries."""
    return places if layout.units is None else layout.units


def _second_run(layout: Layout) -> int:
    r"""Return where the places of B\A begin, if both runs are sorted, and else 0; see `put_`."""
    return layout.active_count if layout.units is None else 0


def _with_values(theta: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Return a copy of the flat `theta` with `values` at `places`."""
    return put_(empty(theta.numel(), theta.dtype).copy_(theta), places, values)
