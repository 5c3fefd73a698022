"""A sparse weight stored as the module's own dense parameter with zeros in it.

The parameter is α (zero outside A) except during the optimizer's step. Each entry also has a *latent value* (θ outside
A), a byte that says whether it is in B and a byte for telemetry; each exploring entry has its index, and its θ beside
the dense latent values, since every step reads and writes it.

For a sharded parameter (a DTensor) these tensors are this process' part; public methods return the same sharding.
"""

import copy
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_topkast.distributed import Sharding, to_local
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.penalty import Total
from lightning_topkast.method.selection import ACTIVE, EXPLORING, RESERVOIR
from lightning_topkast.ops.addresses import overwrite
from lightning_topkast.ops.flat import (
    changes,
    count_outside,
    fill_,
    flat,
    indices_of,
    magnitudes,
    mask_outside_,
    put_,
    take,
    tiers_of,
    where,
)
from lightning_topkast.ops.fused import Masked
from lightning_topkast.ops.step import Entries, Update, close_, step_
from lightning_topkast.weights.base import Before, EntryState, SparseWeight, Traits
from lightning_topkast.weights.loading import best_fit, replace


class MaskedWeight(SparseWeight):
    """One weight θ, its active set A and its updated set B, in masked storage.

    Between steps the parameter is α. `open` puts θ of the exploring entries into it, so that the optimizer's update and
    weight decay act on θ; `close` takes them out again.

    Args:
        name: the parameter's name in the model.
        parameter: the model's own parameter; it is never replaced, so the optimizer and the model keep sharing it.
        active_count: |A|.
        updated_count: |B| while exploring, at least `active_count`.
        traits: properties that all weights of the run share.
    """

    storage = "masked"

    def __init__(
        self, name: str, parameter: nn.Parameter, active_count: int, updated_count: int, traits: Traits
    ) -> None:
        self._open = bytearray(1)  # a flag, which `close_` can change together with the values
        super().__init__(name, parameter, Sharding(name, parameter), active_count, updated_count, traits)
        self._settled = True  # the parameter is α and no refresh is in progress
        # At first all entries are active and θ is the parameter itself. Only `apply` makes it sparse.
        # B, with all bits set: as fast on CPU as multiplying by a byte, 2.5 times as fast as by bool
        self._mask = torch.full_like(self._alpha, -1, dtype=torch.int8)
        self._latent = torch.zeros_like(self._alpha)  # as of the last refresh for exploring entries
        self._exploring = torch.empty(0, dtype=torch.int64, device=parameter.device)
        self._explored = self._latent.new_empty(0)  # θ of the exploring entries
        # while a refresh is in progress: new exploring indices and their values, indices at which the mask changes and
        # its new values, and the new tiers in memory order
        self._pending: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None
        # addresses of the optimizer's state that the last refresh has reset, so that the next one need not search it
        self._clean_state: set[int] = set()
        # the first C without the entries that have been active since: telemetry of how far exploration reaches
        self._never_active = torch.zeros_like(self._alpha, dtype=torch.bool)
        # sizes of B, B\A and the never active entries, counted over all parts of a sharded weight
        self._counted = [self.size, 0, 0]
        self._resets_state = traits.resets_state
        self._before_loading: Before | None = None  # until what `load_state_dict` has written is taken over
        # what `load_state_dict` has written, if it has more entries than A and nothing was written since
        self._as_loaded: Tensor | None = None
        if self._latent.stride() != self._alpha.stride():
            raise TopKastError(f"'{name}': its entries overlap or have gaps in memory; make the parameter contiguous")

    @property
    def is_open(self) -> bool:
        r"""Whether the parameter is θ on B, for the optimizer's step."""
        return bool(self._open[0])

    @is_open.setter
    def is_open(self, value: bool) -> None:
        self._open[0] = value

    # --- the sets -------------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tensor:
        """uint8 in the weight's shape: 0 reservoir, 1 exploring, 2 active."""
        return self.sharding.to_dtensor(self.own_tiers)

    @property
    def updated(self) -> Tensor:
        """B: bool in the weight's shape."""
        return self.sharding.to_dtensor(self._mask.bool())

    @property
    def active_entries(self) -> Tensor:
        """Realised |A|, a scalar tensor."""
        exploring = self._counted[1] if self.sharding.is_sharded else self._exploring.numel()
        return self.updated_entries - exploring

    @property
    def updated_entries(self) -> Tensor:
        """Realised |B|, a scalar tensor."""
        return torch.tensor(self._counted[0]) if self.sharding.is_sharded else torch.count_nonzero(self._mask)

    @property
    def never_active_entries(self) -> Tensor:
        """Entries of the first reservoir that have never been active, a scalar tensor."""
        return torch.tensor(self._counted[2]) if self.sharding.is_sharded else torch.count_nonzero(self._never_active)

    @property
    def _total(self) -> Total:
        return self.sharding.sum if self.sharding.is_sharded else None

    @property
    def _alpha(self) -> Tensor:
        """This process' part of the parameter, whose memory it shares."""
        return to_local(self.parameter.detach())

    @property
    def own_tiers(self) -> Tensor:
        """`tiers` of this process' part."""
        return tiers_of(self._mask, self._exploring)

    @property
    def _theta(self) -> Tensor:
        if self.is_open:
            return torch.where(self._mask.bool(), self._as_theta(self._alpha), self._latent)
        return self._with_explored(self._alpha + self._latent)  # no entry is in both

    def _with_explored(self, values: Tensor) -> Tensor:
        """Put θ of the exploring entries into `values`, and return them."""
        put_(flat(values), self._exploring, self._explored)
        return values

    def alpha(self) -> Tensor:
        """Return α, θ on A and zero elsewhere, even in the middle of a step; dense, a copy."""
        settled = self._as_settled()
        return self.sharding.to_dtensor(settled._alpha.masked_fill(settled.own_tiers != ACTIVE, 0))

    def theta(self) -> Tensor:
        """Return the stored θ, dense, a copy."""
        return self.sharding.to_dtensor(self._theta)

    def magnitudes(self) -> Tensor:
        """Return |θ|, contiguous, a copy; for a sharded weight this process' part."""
        alpha = self._alpha
        if alpha.device.type != "cpu" or not alpha.is_contiguous() or alpha.dtype != torch.float32:
            return self._theta.abs_().contiguous()
        return magnitudes(alpha, self._latent, self._exploring, self._explored)

    def apply(self, tiers: Tensor, state: Sequence[EntryState] = ()) -> None:
        """Change the sets; few entries change their set, so only these are found and moved."""
        self.match_layout()
        new = flat(self._in_memory_order(to_local(tiers)))
        alpha, latent = flat(self._alpha), flat(self._latent)
        change = changes(alpha, latent, flat(self._mask), self._exploring, self._explored, new)
        promoted, demoted = (where(change.places, each == ACTIVE) for each in (change.after, change.before))
        crossed = where(change.places, (change.before == RESERVOIR) ^ (change.after == RESERVOIR))
        mask = -(change.after != RESERVOIR).to(torch.int8)
        clean, self._clean_state = self._clean_state, set()  # whatever interrupts this

        # First copy, then switch the sets, then clear, so that `recover` finds every value after any interruption.
        self._settled = False
        put_(alpha, promoted, take(latent, promoted))
        put_(latent, demoted, take(alpha, demoted))
        self._pending = (change.exploring, change.explored, change.places, mask, new)
        self._switch()
        fill_(latent, promoted, 0)
        fill_(alpha, demoted, 0)
        self._forget()
        self._settled = True
        self.replaced.clear()
        self.orders.refresh()
        self._note_own_write()

        fill_(flat(self._never_active), promoted, False)
        self.promoted = self._count(promoted.numel())
        self.gradient_magnitudes = None
        self._reset(state, crossed, clean)
        self._clean_state = {to_local(values).data_ptr() for values, _ in state}

    def _in_memory_order(self, tiers: Tensor) -> Tensor:
        """Return tiers (uint8) in the memory order of the parameter, so that flat indices of all tensors agree."""
        if tiers.device == self._mask.device and tiers.stride() == self._mask.stride() and tiers.is_contiguous():
            return tiers
        return torch.empty_like(self._mask, dtype=torch.uint8).copy_(tiers)

    def _reset(self, state: Sequence[EntryState], crossed: Tensor | None = None, clean: Container[int] = ()) -> None:
        """Reset the optimizer's state outside B, and that of entries that enter B.

        What stayed would act on entries that return to B, and decay into denormals.

        Args:
            state: of the optimizer.
            crossed: the entries that have left or entered B, as flat indices.
            clean: addresses of the state that needs no more than a reset of these, since the last refresh has reset it.
        """
        if not self._resets_state:
            return
        for values, start in state:
            part = to_local(values)
            if crossed is not None and part.stride() == self._mask.stride():
                fill_(flat(part), crossed, start)
                if part.data_ptr() in clean:
                    continue
            mask_outside_(part, self._mask)
            if start:
                part.masked_fill_(self._mask == 0, start)

    def _forget(self) -> None:
        if self.clears_dropped:
            mask_outside_(self._latent, self._mask)

    def _switch(self) -> None:
        """Apply the pending sets; a second call does no harm."""
        if self._pending is not None:
            exploring, explored, changed, mask, tiers = self._pending
            if not overwrite((self._exploring, self._explored), (exploring, explored)):
                self._exploring, self._explored = exploring, explored
            put_(flat(self._mask), changed, mask)
            self.version += 1
            self._pending = None
            self._writes.look_at(tiers)

    def _count(self, promoted: int = 0) -> int:
        """Count the sets over all parts, so that reading the counts needs no collective; return the promoted total."""
        if not self.sharding.is_sharded:
            return promoted
        counts = [
            torch.count_nonzero(self._mask),
            self._exploring.numel(),
            torch.count_nonzero(self._never_active),
            promoted,
        ]
        *self._counted, promoted = self.sharding.sum(torch.tensor(counts, device=self._mask.device)).tolist()
        return promoted

    def record_first_reservoir(self) -> None:
        """Record the present C; `never_active_entries` counts its entries that have not been active since."""
        torch.eq(self._mask, 0, out=self._never_active)
        self._count()
        self.first_reservoir = int(self.never_active_entries)

    def match_layout(self) -> None:
        """Move the other tensors to the parameter's device, dtype and memory format after the model was moved."""
        alpha, latent = self._alpha, self._latent
        if (latent.device, latent.dtype, latent.stride()) == (alpha.device, alpha.dtype, alpha.stride()):
            return
        tiers = self.own_tiers
        self._latent = torch.empty_like(alpha).copy_(self._with_explored(latent))
        self._mask = torch.empty_like(alpha, dtype=torch.int8).copy_(self._mask)
        tiers = torch.empty_like(self._mask, dtype=torch.uint8).copy_(tiers)
        self._find_exploring(tiers)
        self._never_active = torch.empty_like(self._mask, dtype=torch.bool).copy_(self._never_active)
        self.version += 1
        if self._latent.stride() != alpha.stride():
            raise TopKastError(f"'{self.name}': other code gave its parameter memory with gaps; make it contiguous")
        self._writes.look_at(self.own_tiers)

    def _find_exploring(self, tiers: Tensor) -> None:
        """Take the exploring entries from their tiers, and their values from the latent ones."""
        self._exploring = indices_of(flat(tiers), EXPLORING)
        self._explored = take(flat(self._latent), self._exploring)

    # --- around the optimizer's step ------------------------------------------------------------------------------

    def mask_gradient(self) -> None:
        """Zero the gradient outside B, including infinite and NaN values."""
        masked = self.masked_gradient()
        if masked is not None:
            mask_outside_(*masked)

    def masked_gradient(self) -> Masked | None:
        """Return the gradient, if there is one, with B, outside of which it is to be zeroed."""
        gradient = self._gradient()
        return None if gradient is None else Masked(gradient, self._mask)

    def record_gradient(self) -> None:
        """Record the gradient's magnitudes, contiguous, unless the gradient was masked since they were recorded."""
        gradient = self._gradient()
        if gradient is None:
            return
        outside = gradient.clone()
        mask_outside_(outside, ~self._mask)
        if self.gradient_magnitudes is None or int(self.sharding.sum(torch.count_nonzero(outside))):
            self.gradient_magnitudes = gradient.abs().contiguous()

    def _gradient(self) -> Tensor | None:
        """Return this process' part of the gradient, in the sharding of the parameter."""
        gradient = self.parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements != self.parameter.placements:  # type: ignore[attr-defined]
            gradient = gradient.redistribute(placements=self.parameter.placements)  # type: ignore[attr-defined]
            self.parameter.grad = gradient
        return None if gradient is None else to_local(gradient)

    def open(self) -> None:
        r"""Put θ on B\A into the parameter, so that the optimizer updates it."""
        self.begin_step()
        put_(flat(self._alpha), self._exploring, self._explored)
        self.is_open = True
        self._put_phi(self._alpha, self._gradient())

    def begin_step(self) -> None:
        r"""Note that θ on B\A is about to be put into the parameter."""
        self.match_layout()
        self._settled = False

    def recover(self) -> None:
        """Make the parameter α after an interrupted step or refresh and keep every θ."""
        if self._settled:
            return
        self._switch()
        if self.is_open:
            self._put_theta(self._alpha)
            explored = take(flat(self._alpha), self._exploring)
            if bool(explored.any()):  # else `fused.close_` has taken them out, and nobody could note it at once
                self._explored = explored
            self.is_open = False
        self.restore_sparsity()
        self._forget()
        self._settled = True

    def _note_own_write(self) -> None:
        """Remember that the parameter is α now."""
        super()._note_own_write()
        self._as_loaded = None

    @property
    def is_settled(self) -> bool:
        """Whether no step or refresh is in progress."""
        return self._settled

    def _as_settled(self) -> "MaskedWeight":
        """Return this weight or, while a step or refresh is in progress, a copy after `recover`.

        A signal handler may save in between, but must not change a step that continues afterwards.
        """
        if self._settled:
            return self
        settled = copy.deepcopy(self)
        settled.recover()
        return settled

    def release(self) -> None:
        """Make the parameter θ."""
        self._alpha.copy_(self._theta)

    def close(self, lr: float | Tensor) -> None:
        r"""Apply the penalty on B, store θ on B\A and make the parameter α again; see `SparseWeight.close`."""
        alpha, parts = self._alpha, self.entries(lr)
        self._put_theta(alpha)
        if parts is None or not close_(parts, self._open):
            entries = flat(alpha)
            take(entries, self._exploring, out=self._explored)
            if self.is_exploring:
                self.shrinkage.apply_(self._explored, True, lr, self._total)
            self.is_open = False  # set here already, since `recover` can do the rest after an interruption
            fill_(entries, self._exploring, 0)
            mask_outside_(alpha, self._mask)
            self.shrinkage.apply_(alpha, False, lr, self._total)
        self.end_step()

    def step(self, update: Update, lr: float | Tensor, masks: bool) -> bool:
        """Take a whole step in one pass over memory, if that can be; see `SparseWeight.step`."""
        self.match_layout()
        gradient, parts = self._gradient(), self.entries(lr)
        if gradient is None or parts is None or self.exponent != 1 or not step_(parts, gradient, masks, update):
            return False
        self.end_step()
        return True

    def entries(self, lr: float | Tensor) -> Entries | None:
        """Return what passes around the step need; see `SparseWeight.entries`."""
        factors = self.shrinkage.factors(lr)
        return None if factors is None else Entries(self._alpha, self._mask, self._exploring, self._explored, factors)

    def end_step(self) -> None:
        """Note that a step was taken."""
        self._settled = True
        super().end_step()

    def abandon_step(self) -> None:
        """Close the weight without a change of values."""
        super().abandon_step()
        self._settled = True

    def _places(self) -> Iterable[Tensor]:
        return self._mask, self._exploring, self._explored

    def penalty(self) -> Tensor:
        """Return the value of the exploration penalty, a scalar tensor; a collective for a sharded weight."""
        return self.shrinkage.value(self._alpha, self._explored, self._total)

    @property
    def nonzero_entries(self) -> Tensor:
        """Entries of the parameter that are not zero, counted now; a scalar tensor; a collective if it is sharded."""
        return self.sharding.sum(torch.count_nonzero(self._alpha))

    @property
    def own_strays(self) -> int:
        """Entries of this process' part of the parameter outside A that are not zero, counted now."""
        alpha = self._alpha
        exploring = torch.count_nonzero(flat(alpha).index_select(0, self._exploring))
        return int(exploring + count_outside(alpha, self._mask))

    @property
    def was_loaded(self) -> bool:
        """Whether `load_state_dict` of the model has loaded other values that were not taken over yet."""
        return self._before_loading is not None

    def begin_loading(self) -> None:
        """Keep what `load_state_dict` is about to overwrite."""
        if self._settled and self._before_loading is None:
            self._before_loading = self.before()

    def finish_loading(self) -> None:
        """Go on from what `load_state_dict` has written, once an optimizer trains the weight."""
        if self.was_loaded and self.is_trained:
            self.take_over()

    def take_over(self) -> int:
        """Accept what other code wrote: the parameter is α again; see `SparseWeight.take_over`."""
        self.match_layout()
        before, self._before_loading = self._before_loading, None
        if before is not None:
            loaded = self._alpha.clone()
            replace(self, loaded, before)
            if not torch.equal(self._alpha, loaded):
                self._as_loaded = loaded
            return 0
        # of this process' part, since one process may write alone
        strays = self.own_strays
        if (strays or self._are_put_back) and self.is_as_sparse:
            replace(self, self._alpha.clone(), self.before(), was_written=True)
            return 0
        if strays:
            self.restore_sparsity()
        self._note_own_write()
        return strays

    @property
    def _are_put_back(self) -> bool:
        """Whether what other code wrote within A are values of before, which had another A."""
        if not self.replaced or self.sharding.is_sharded or not bool(self._alpha.any()):
            return False
        like = best_fit(self, self._alpha, self.replaced)
        return like is not None and not torch.equal(like.tiers == ACTIVE, self.own_tiers == ACTIVE)

    def before(self) -> Before:
        """Return what is needed to put back the present values, a copy."""
        tiers = self.own_tiers
        theta = self._with_explored(torch.where(tiers == ACTIVE, self._alpha, self._latent))
        return Before(
            theta, tiers, self._never_active.clone(), self.first_reservoir, self.orders.present, self.load_count
        )

    def _put(self, theta: Tensor, tiers: Tensor) -> None:
        """Replace θ and the sets; the parameter is α."""
        self._alpha.copy_(theta.masked_fill(tiers != ACTIVE, 0))
        self._put_sets(tiers, theta.masked_fill(tiers == ACTIVE, 0))

    def restore_sparsity(self) -> None:
        """Zero the parameter outside A after other code (an average copied into the model) wrote to it."""
        active = -(self.own_tiers == ACTIVE).to(torch.int8)
        mask_outside_(self._alpha, active)
        mask_outside_(self._latent, ~active)
        self._note_own_write()

    @property
    def is_exploring(self) -> bool:
        r"""Whether B\A has entries at present."""
        return (self._counted[1] if self.sharding.is_sharded else self._exploring.numel()) > 0

    def sparsify_average(self, average: Any, active_before: Tensor | None) -> None:
        """Make a running average, a `Tensor`, zero outside A; see `SparseWeight.sparsify_average`."""
        assert active_before is not None
        active = self.active
        average.mul_(active.to(average.device))
        entered = active & ~active_before
        average[entered.to(average.device)] = self.parameter.detach()[entered].to(average)

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, gathered: bool = False) -> dict[str, Any]:
        """Return tiers and latent values (dense, contiguous), on CPU: tensors and primitives only."""
        settled = self._as_settled()
        latent = settled._with_explored(settled._latent.clone())  # a copy: a signal handler may save at any moment
        parts = {"tiers": settled.own_tiers, "latent": latent, "never_active": settled._never_active}
        return {key: self.sharding.to_save(part, gathered) for key, part in parts.items()} | self._counts()

    @property
    def sets(self) -> Tensor:
        """The units' tiers; for a sharded weight this process' part."""
        return self.structure.units_of(self.own_tiers)

    def adopt(self, value: Tensor, sets: Any, start: float = 0.0) -> Tensor:
        """Return optimizer state in the parameter's shape; packed state is unpacked, with `start` outside B."""
        if value.shape == self.shape or value.shape != (self.updated_count,) or self.sharding.is_sharded:
            return value
        dense = value.new_full((self.size,), start)
        if sets is not None:
            order = self.structure.order(sets, self.shape).to(value.device)
            dense[order] = value[: order.numel()]
        # in the parameter's memory format, which fused optimizers expect
        return torch.empty_like(self._alpha, dtype=value.dtype, device=value.device).copy_(dense.view(self.shape))

    def realign(self, state: Sequence[EntryState], sets: Any) -> None:
        """Reset the optimizer's state of entries outside B."""
        self._reset(state)

    def _in_model(self) -> Tensor:
        return self._alpha if self._as_loaded is None or self.was_written else self._as_loaded

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `check_state` has accepted; the parameter already holds the saved α, or was given it."""
        self._alpha.copy_(self._in_model())
        self.orders.replace(self.sets)
        saved_tiers, latent, never_active = (
            self.sharding.to_local(state[key]) for key in ("tiers", "latent", "never_active")
        )
        self._put_sets(saved_tiers, latent)
        self._never_active = torch.empty_like(self._mask, dtype=torch.bool).copy_(never_active)
        self._count()
        self._load_counts(state)
        self.orders.load(self.sets)
        self._before_loading = None
        self.replaced.clear()

    def _put_sets(self, tiers: Tensor, latent: Tensor) -> None:
        """Replace the sets and θ outside A; the parameter is α already."""
        tiers = torch.empty_like(self._mask, dtype=torch.uint8).copy_(tiers)
        self._latent.copy_(latent)
        self._clean_state = set()
        torch.ne(tiers, 0, out=self._mask).neg_()
        self._find_exploring(tiers)
        self._count()
        self.version += 1
        self.is_open = False
        self._settled = True
        self._writes.look_at(self.own_tiers)
        self._note_own_write()
