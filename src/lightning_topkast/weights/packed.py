r"""A sparse weight stored as the values of its updated set B; a dense tensor is on the device only if a layer needs it.

The parameter is 1-D: θ on A, then θ on B\A, so that gradient and optimizer state have the same small size. The
reservoir, the sets and the telemetry are in host memory and are accessed only at a refresh. Processes that train the
same weight share that: each has some of its rows there.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_topkast.distributed import HostGroup, Sharding, to_local
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.selection import ACTIVE, EXPLORING, RESERVOIR, NonFiniteScoresError
from lightning_topkast.method.structure import Block
from lightning_topkast.ops import CONV_KERNELS, MATRIX_KERNELS
from lightning_topkast.ops.flat import fill_, indices, moved, padded, positions, put_, take, where
from lightning_topkast.ops.memory import empty
from lightning_topkast.weights.base import Before, EntryState, SparseWeight, Traits
from lightning_topkast.weights.home import Home, Own, SharedHome, can_share
from lightning_topkast.weights.layouts import Layout, Product, make_layout
from lightning_topkast.weights.loading import replace
from lightning_topkast.weights.writes import stamp


class PackedWeight(SparseWeight):
    """One weight θ, its active set A and its updated set B, in packed or compact storage.

    Args:
        name: the parameter's name in the model.
        dense: θ, dense; on CPU its memory becomes the host's copy. A DTensor: its parts are with the processes.
        active_count: |A|.
        updated_count: |B| while exploring, at least `active_count`.
        traits: properties that all weights of the run share; the structure divides the weight.
        product: how the layer multiplies by the packed values (`storage` is "packed"); None: by a dense α that exists
            only as long as autograd needs it ("compact").
        group: the processes that share the host's copy; None: each has all of it.
    """

    def __init__(
        self,
        name: str,
        dense: nn.Parameter,
        active_count: int,
        updated_count: int,
        traits: Traits,
        product: Product | None,
        group: HostGroup | None = None,
    ) -> None:
        zeros = torch.zeros(updated_count, dtype=dense.dtype, device=dense.device)
        values = nn.Parameter(zeros, requires_grad=dense.requires_grad)
        values.__dict__.update(dense.__dict__)  # attributes that other code has set, such as "no weight decay"
        self._whole = self._home = Home(name, dense.shape, traits.structure)
        if group is not None and can_share(dense.shape):
            self._home = SharedHome(name, dense.shape, traits.structure, group)
        super().__init__(name, values, self._home.sharding, active_count, updated_count, traits)
        self.storage = "compact" if product is None else "packed"
        self._product = product
        # In host memory, of the rows at home here. θ is up to date on C; on B the parameter holds it.
        theta = self.sharding.to_local(dense.detach()).cpu().contiguous().view(-1)
        owns_all = theta.untyped_storage().nbytes() == theta.nbytes  # a slice would keep a larger storage alive
        self._theta = theta if owns_all else theta.clone()
        # Sets are stored per unit. At first all units are active and nothing is packed: only `apply` sets the layout.
        self._tiers = torch.full(self._home.grid, ACTIVE, dtype=torch.uint8)
        self._never_active = torch.zeros(self._home.grid, dtype=torch.bool)
        self._never_count = 0
        nothing = torch.empty(0, dtype=torch.int64)
        # in host memory; the layers compute with the same places on their device
        self._layout = make_layout(nothing, nothing, self.shape, self.structure, product, self.parameter.device)
        self._placed = self._layout.to(self.parameter.device)
        self._unit_size = self._home.unit_size
        # Scores of blocks: these are few, and those of C change only at a refresh. They are computed on the host, so
        # that a resumed run has the same bits.
        self._scores = self._scores_of(self._theta)
        # the parameter's stamp since `_theta` is up to date on B too
        self._updated: tuple[int, int, int] | None = None
        # the writes of a refresh in progress: tensors and their new content, the new sets, and the units entering A
        # with the number of those that have never been active after it
        self._pending: tuple[list[tuple[Tensor, Tensor]], Tensor, Layout, Tensor, int] | None = None
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
        self._prepared = None
        self._lay_out(self._pack(self._tiers))

    @property
    def layout(self) -> Layout:
        """The places of the parameter's values, on the parameter's device."""
        self.match_layout()
        return self._placed

    def layout_for(self, values: Tensor) -> Layout:
        """Return the places of `values`, with which a layer computes, on their device.

        Raises:
            TopKastError: they are sharded, so that the layer computes outside of FSDP2.
        """
        if isinstance(values, DTensor):
            raise TopKastError(
                f"'{self.name}' is sharded by FSDP2, and its layer would compute with a share of the values: call the "
                "module to which fully_shard was applied, not a layer of it"
            )
        self._place(values.device)
        return self._placed

    def _place(self, device: torch.device) -> None:
        if self._placed.device != device:
            self._placed = self._layout.to(device)

    def _lay_out(self, layout: Layout) -> None:
        """Change the places, on the device in the memory of those before."""
        self._layout, self._placed = layout, layout.placed(self.parameter.device, self._placed)

    def follow(self, parameter: Tensor | None) -> None:
        """Go on with the parameter that the layer holds, if FSDP2 has sharded it since.

        Raises:
            TopKastError: it is not sharded over all processes, or θ is not shared by them.
        """
        if parameter is self.parameter or not isinstance(parameter, DTensor):
            return
        if isinstance(self._home, SharedHome):
            self._home = self._home.with_slices(self.name, parameter)
        elif parameter.device_mesh.size() > 1:
            raise TopKastError(
                f"'{self.name}' is sharded over {parameter.device_mesh.size()} processes, but its θ is not: pack the "
                "model after init_process_group, with Packed(theta='sharded'), and exclude weights of one dimension"
            )
        self.parameter = cast(nn.Parameter, parameter)
        self._note_own_write()

    def check_release(self) -> None:
        """Refuse if FSDP2 keeps the parameter; see `SparseWeight.check_release`."""
        if self.is_dtensor:
            raise TopKastError(
                f"'{self.name}' is packed and sharded by FSDP2, which keeps its parameter: it cannot become dense in "
                "this model; save a distributed checkpoint, and load what topkast-consolidate makes of it into a dense "
                "one"
            )

    @property
    def _local(self) -> Tensor:
        """What this process has of the parameter."""
        return to_local(self.parameter.detach())

    def _runs(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return this process' values of A, of B\A, and those that are not used."""
        values, begin = self._local, self._home.values.begin
        active, updated = (max(count - begin, 0) for count in (self._layout.active_count, self._layout.updated_count))
        return values[:active], values[active:updated], values[updated:]

    # --- the sets -------------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tensor:
        """uint8 in the weight's shape, on CPU: 0 reservoir, 1 exploring, 2 active; a DTensor as `theta`."""
        if self.is_dtensor or self._home is self._whole:
            return self._home.shown(self.own_tiers)
        # from the places that every process has, so that no other process is needed
        tiers, units = torch.zeros(self._whole.grid, dtype=torch.uint8), self.sets.units_in_order().cpu()
        active = self._layout.active_count // self._unit_size
        tiers.view(-1)[units[:active]] = ACTIVE
        tiers.view(-1)[units[active:]] = EXPLORING
        return self.structure.tiers(tiers, self._whole.rows)

    @property
    def own_tiers(self) -> Tensor:
        """`tiers` of this process' part."""
        return self._entries_of(self._tiers.clone())

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
        return torch.tensor(self._never_count * self._unit_size)

    @property
    def is_exploring(self) -> bool:
        r"""Whether B\A has entries at present."""
        return self._layout.updated_count > self._layout.active_count

    def alpha(self) -> Tensor:
        """Return α, θ on A and zero elsewhere, dense, on CPU; a DTensor only if the parameter is one."""
        self.match_layout()
        self._settle()
        if self.is_dtensor:
            return self._home.shown(self._own_alpha())
        alpha, count = torch.zeros(self.size, dtype=self._theta.dtype), self._layout.active_count
        alpha.index_copy_(0, self._layout.indices()[:count].cpu().long(), self._values()[:count])
        return alpha.view(self.shape)

    def theta(self) -> Tensor:
        """Return the stored θ, dense, on CPU, a copy; a collective where processes share it."""
        return self._home.shown(self.own_theta())

    def magnitudes(self) -> Tensor:
        """Return |θ|, on CPU; of a shared weight the rows at home here."""
        return self.own_theta().abs_()

    def scores(self) -> Tensor:
        """Return the units' scores, on CPU, in the shape of their grid; see `Structure.scores`."""
        self._update_home(self._own())
        if self._scores is None:
            magnitudes = torch.abs(self._theta, out=empty(self._theta.numel(), self._theta.dtype))
            return self.structure.scores(magnitudes.view(self.sharding.local_shape), self.sharding)
        return self._shared_scores(self._scores)

    def snapshot(self) -> Callable[[], Tensor]:
        """Return a function that gives the present `scores`; only B is copied, since C changes only at a refresh."""
        own = self._own()
        if self._scores is not None:
            self._update_home(own)
            scores = self._scores.clone()
            return lambda: self._shared_scores(scores)
        theta, places, values = self._theta, own.places, self._brought(own).clone()
        shape = self.sharding.local_shape
        return lambda: self.structure.scores(_with_values(theta, places, values).view(shape).abs_(), self.sharding)

    def _own(self) -> Own:
        """Return what is at home here of the present sets."""
        self.match_layout()
        self._settle()
        return self._home.own(self._layout)

    def _brought(self, own: Own) -> Tensor:
        """Return the values of `own`, as θ; a collective if the weight is shared."""
        return self._home.bring(self._values(), self._layout, own)

    def own_theta(self) -> Tensor:
        """Return θ of the rows at home here, a copy."""
        own = self._own()
        return _with_values(self._theta, own.places, self._brought(own)).view(self.sharding.local_shape)

    def _own_alpha(self) -> Tensor:
        """Return α of the rows at home here."""
        return self.own_theta().masked_fill_(self._entries_of(self._tiers) != ACTIVE, 0)

    def _entries_of(self, units: Tensor) -> Tensor:
        """Return for each entry at home here what its unit has."""
        return self.structure.tiers(units, self._home.rows)

    def _update_home(self, own: Own) -> None:
        """Update θ on B in the host's copy, and the scores of B's blocks; a collective if the weight is shared."""
        values = self._brought(own)
        put_(self._theta, own.places, values, own.split)
        if self._scores is not None:
            assert isinstance(self.structure, Block)
            self._scores.view(-1).index_copy_(0, own.units, self.structure.norms(values.view(-1, self._unit_size)))
        self._updated = stamp(self.parameter)

    def _scores_of(self, theta: Tensor) -> Tensor | None:
        if not isinstance(self.structure, Block):
            return None
        return self.structure.scores(theta.view(self.sharding.local_shape), self._home.rows)

    def _shared_scores(self, scores: Tensor) -> Tensor:
        """Return the scores of all blocks, among which every process chooses, from those at home here; a copy."""
        if not self.sharding.is_sharded:
            return scores.clone()
        assert isinstance(self.structure, Block)
        return self.structure.shared(scores, self.sharding)

    def prepare(self, tiers: Tensor) -> None:
        """Make the layout of these sets, which takes longer than choosing them."""
        self._prepared = tiers, self._pack(self._on_grid(tiers))

    def compared(self, tiers: Tensor) -> tuple[Tensor, Sharding]:
        """Return the values that every process has, if each has chosen among some rows only, or else the sets."""
        if not self.sharding.is_sharded:
            return super().compared(tiers)
        values = self._local.view(torch.int32 if self._local.element_size() == 4 else torch.int16)
        return values, self._home.values.sharding or self._whole.sharding

    def apply(self, tiers: Tensor, state: Sequence[EntryState] = ()) -> None:
        """Change the sets: values of entries that stay in B are moved, others are exchanged with the host's copy."""
        own = self._own()
        unmoved = self._layout if self.was_trained and not state else None  # of an optimizer that is not attached
        prepared, self._prepared = self._prepared, None
        given, tiers = tiers, self._on_grid(tiers)
        layout = prepared[1] if prepared is not None and prepared[0] is given else self._pack(tiers)
        if self._updated != stamp(self.parameter):  # unless for the scores, just before
            self._update_home(own)
        new = self._home.own(layout)
        if self.clears_dropped:
            forgotten = (tiers == RESERVOIR) & (self._tiers != RESERVOIR)
            self._theta.masked_fill_(self._entries_of(forgotten).view(-1), 0)
            if self._scores is not None:
                self._scores.masked_fill_(forgotten, 0)
        writes = [(self._local, self._values_at(new, layout))]
        writes += self._moved(state, self._home, (self._layout, own), (layout, new))
        active = new.units[: new.active]
        promoted = where(active, take(self._tiers.view(-1), active) != ACTIVE)
        first = torch.count_nonzero(take(self._never_active.view(-1), promoted))
        moves = self.sharding.sum(torch.stack([torch.tensor(promoted.numel()), first])).tolist()
        self.promoted = moves[0] * self._unit_size
        # Everything is prepared. Writing it twice does no harm, so an interrupted write is simply repeated.
        self._pending = (writes, tiers, layout, promoted, self._never_count - moves[1])
        self._settle()
        self.replaced.clear()
        self.orders.refresh(unmoved)

    def _pack(self, tiers: Tensor) -> Layout:
        units = self._home.units_in_order(tiers)
        return make_layout(*units, self.shape, self.structure, self._product, self.parameter.device)

    def _on_grid(self, tiers: Tensor) -> Tensor:
        """Return the tiers of the units at home here."""
        return self.structure.units_of(to_local(tiers).cpu()).contiguous()

    def _moved(
        self, state: Sequence[EntryState], home: Home, before: tuple[Layout, Own], after: tuple[Layout, Own]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor of the state and its content for other sets: moved for units that stay, else anew.

        Args:
            state: in the order of the sets before.
            home: through which it moves.
            before: the sets before, and what is at home here of them.
            after: likewise.
        """
        if not state:
            return []
        sources = positions(before[1].units, after[1].units, home.grid.numel())
        writes = []
        for each, start in state:
            tensor = to_local(each)
            values = home.bring(tensor, *before)
            if self._unit_size == 1:
                content = moved(values, sources.to(values.device), start)
            else:
                content = values.new_full((after[1].places.numel(),), start)
                kept = indices(sources >= 0)
                here, there = kept.to(values.device), sources.index_select(0, kept).to(values.device)
                taken = values.view(-1, self._unit_size).index_select(0, there)
                content.view(-1, self._unit_size).index_copy_(0, here, taken)
            writes.append((tensor, padded(home.send(content, *after), tensor.numel(), start)))
        return writes

    def _values_at(self, own: Own, layout: Layout) -> Tensor:
        values = self._home.send(take(self._theta, own.places, own.split), layout, own)
        return padded(values, self._local.numel(), 0)

    def _settle(self) -> None:
        pending = self._pending  # a signal handler may write it at any moment
        if pending is None:
            return
        writes, self._tiers, layout, promoted, self._never_count = pending
        self._lay_out(layout)
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
        self._never_count = self._count_never()
        self.first_reservoir = int(self.never_active_entries)

    def _count_never(self) -> int:
        return int(self.sharding.sum(torch.count_nonzero(self._never_active)))

    def match_layout(self) -> None:
        """Convert the other tensors to the parameter's device and dtype after the model was moved."""
        self._place(self.parameter.device)
        if self._theta.dtype != self.parameter.dtype:
            self._theta = self._theta.to(self.parameter.dtype)
            self._scores = self._scores_of(self._theta)

    def _values(self) -> Tensor:
        self.match_layout()
        active, exploring, _ = self._runs()
        return self._as_theta(self._local)[: active.numel() + exploring.numel()].to(self._theta)

    # --- around the optimizer's step ------------------------------------------------------------------------------

    def mask_gradient(self) -> None:
        """Do nothing, since there is no gradient outside B."""

    def open(self) -> None:
        """Mark the weight as open; the parameter is already θ on B."""
        self.is_open = True
        self._updated = None
        gradient = self.parameter.grad
        self._put_phi(self._local, None if gradient is None else to_local(gradient))

    def close(self, lr: float | Tensor) -> None:
        """Apply the penalty on B; see `SparseWeight.close`."""
        self._put_theta(self._local)
        (active, exploring, unused), total = self._runs(), self._home.values.total
        self.shrinkage.apply_(active, False, lr, total)
        if self.is_exploring:
            self.shrinkage.apply_(exploring, True, lr, total)
        unused.zero_()
        self.is_open = False
        self.end_step()

    def end_step(self) -> None:
        """Note that a step was taken, so that the host's θ is of before."""
        self._updated = None
        super().end_step()

    def _places(self) -> Iterable[Tensor]:
        return self._placed.tensors()

    def recover(self) -> None:
        """Finish an interrupted step or refresh; a penalty that was not applied yet is skipped."""
        self._settle()
        self._put_theta(self._local)
        self.is_open = False

    def penalty(self) -> Tensor:
        """Return the value of the exploration penalty, a scalar tensor."""
        active, exploring, _ = self._runs()
        return self.shrinkage.value(active, exploring, self._home.values.total)

    @property
    def nonzero_entries(self) -> Tensor:
        """Non-zero values of A, counted now; a scalar tensor."""
        count, total = torch.count_nonzero(self._runs()[0]), self._home.values.total
        return count if total is None else total(count)

    def sparsify_average(self, average: Any, active_before: Tensor | None) -> None:
        """Give a running average, a `PackedWeight`, the sets of this weight; see `SparseWeight.sparsify_average`."""
        average._copy_sets(self)

    def _copy_sets(self, other: "PackedWeight") -> None:
        """Copy the other's sets and its θ; only entries that are active in both, and were before, keep their values."""
        if self._layout is not other._layout:
            stayed = self._entries_of((self._tiers == ACTIVE) & (other._tiers == ACTIVE))
            self._theta = torch.where(stayed, self.own_theta(), other.own_theta()).view(-1)
            self._scores = self._scores_of(self._theta)
            self._tiers = other._tiers
            self._lay_out(other._layout)
            self.parameter.detach().copy_(other.parameter.detach())
            count = self._layout.updated_count
            self.parameter.detach()[:count] = self._values_at(self._own(), self._layout)[:count].to(self.parameter)
        else:
            exploring = slice(self._layout.active_count, self._layout.updated_count)
            self.parameter.detach()[exploring] = other.parameter.detach()[exploring].to(self.parameter)

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, gathered: bool = False) -> dict[str, Any]:
        """Return tiers and latent values (dense, contiguous), on CPU: tensors and primitives only."""
        latent, tiers = self.own_theta(), self._entries_of(self._tiers)
        latent.masked_fill_(tiers == ACTIVE, 0)
        parts = {"tiers": tiers, "latent": latent, "never_active": self._entries_of(self._never_active)}
        return {key: self.sharding.to_save(part, gathered) for key, part in parts.items()} | self._counts()

    @property
    def sets(self) -> Layout:
        """The layout of the present sets."""
        self._settle()
        return self._layout

    def adopt(self, value: Tensor, sets: Any, start: float = 0.0) -> Tensor:
        """Return optimizer state in the parameter's shape; dense state is packed, its values on B."""
        if value.shape == self.parameter.shape or value.shape != self.shape:
            return value
        order = (self.sets if sets is None else sets).indices()
        packed = value.new_full(self.parameter.shape, start)
        packed[: order.numel()] = value.reshape(-1)[order.long().to(value.device)]
        return packed

    def realign(self, state: Sequence[EntryState], sets: Any) -> None:
        """Move the optimizer's state to the order of the present sets; that of entries that were not in B is new."""
        if sets is not self.sets:
            # without a collective where every process has all values, since one may save alone
            home = self._home if self.is_dtensor else self._whole
            moves = ((each, home.own(each)) for each in (sets, self.sets))
            for tensor, content in self._moved(state, home, *moves):
                tensor.copy_(content)

    def _in_model(self) -> Tensor:
        return self._own_alpha()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `check_state` has accepted; the model already holds the saved α."""
        self.orders.replace(self.sets)
        tiers, latent, never_active = (
            self.sharding.to_local(state[key]).cpu() for key in ("tiers", "latent", "never_active")
        )
        self._put(self._own_alpha() + latent, tiers)
        self._never_active = self._on_grid(never_active).clone()
        self._never_count = self._count_never()
        self._load_counts(state)
        self.is_open = False
        self.orders.load(self.sets)
        self.replaced.clear()

    def load_alpha(self, alpha: Tensor) -> None:
        """Go on from dense weights of a state dict; the network computes with those of them that are in A.

        Raises:
            NonFiniteScoresError: the weights hold NaN or infinity.
        """
        alpha = self.sharding.to_local(alpha.detach()).cpu().to(self._theta.dtype).contiguous()
        if int(self.sharding.sum(torch.count_nonzero(~torch.isfinite(alpha)))):
            raise NonFiniteScoresError("weights must be finite")
        replace(self, alpha, self.before())

    def before(self) -> Before:
        """Return what is needed to put back the present values, a copy."""
        never = self._never_active.clone()
        sets = self.own_theta(), self._entries_of(self._tiers.clone()), never
        return Before(*sets, self.first_reservoir, self.orders.present, self.load_count)

    def _put(self, theta: Tensor, tiers: Tensor) -> None:
        """Replace θ and the sets."""
        self._theta = theta.to(self._theta.dtype).contiguous().clone().view(-1)
        self._scores = self._scores_of(self._theta)
        tiers = self._on_grid(tiers).clone()
        layout = self._pack(tiers)
        active = indices(tiers.view(-1) == ACTIVE)
        values = self._values_at(self._home.own(layout), layout)
        never = torch.count_nonzero(self._never_active & (tiers != ACTIVE))
        writes = [(self._local, values)]
        self._pending = (writes, tiers, layout, active, int(self.sharding.sum(never)))
        self._settle()


def _with_values(theta: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Return a copy of the flat `theta` with `values` at `places`."""
    return put_(empty(theta.numel(), theta.dtype).copy_(theta), places, values)
