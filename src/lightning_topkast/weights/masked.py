"""A sparse weight kept as the module's own dense parameter with zeros in it.

The parameter is α (zero outside A) at all times but during the optimizer's step. Beside it lie, per entry, the
*reserve* (θ outside A), a byte that says whether it is in B, a byte of telemetry; per exploring entry its index.

Of a parameter that is sharded (a DTensor) all of this is this process' part; what others read has its sharding.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_topkast.distributed import Sharding, own_part
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.penalty import Penalty, Total, penalty_of, shrink_
from lightning_topkast.method.selection import ACTIVE, EXPLORING, RESERVOIR
from lightning_topkast.ops.flat import copied, flat, indices, mask_outside_, merged, where
from lightning_topkast.weights.base import SparseWeight


class MaskedWeight(SparseWeight):
    """One weight θ, its active set A and its updated set B, in masked mode.

    Between steps the parameter is α. `open` puts the exploring entries' θ into it, so that the optimizer's update and
    weight decay act on θ; `close` takes them out again.

    Args:
        name: the parameter's name in the model.
        parameter: the model's own parameter; it is never replaced, so the optimizer and the model keep sharing it.
        active_count: |A|.
        updated_count: |B| while exploring, at least `active_count`.
    """

    execution = "masked"

    def __init__(self, name: str, parameter: nn.Parameter, active_count: int, updated_count: int) -> None:
        super().__init__(name, parameter, Sharding(name, parameter), active_count, updated_count)
        self._settled = True  # the parameter is α and no refresh is under way
        # At first everything is active: θ is the parameter as it is. Only `apply` makes it sparse.
        # B, all bits set on it: as fast on CPU as multiplying by a byte, 2.5 times as fast as by bool
        self._mask = torch.full_like(self._alpha, -1, dtype=torch.int8)
        self._reserve = torch.zeros_like(self._alpha)
        self._exploring = torch.empty(0, dtype=torch.int64, device=parameter.device)
        # new exploring indices, where the mask changes, and to what, while a refresh is under way
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None
        # C as it was first chosen, less what has been active since: telemetry of how far exploration reaches
        self._dormant = torch.zeros_like(self._alpha, dtype=torch.bool)
        # B, B\A and what is dormant of it, counted over all parts of a weight that is cut into such
        self._counted = [self.size, 0, 0]
        if self._reserve.stride() != self._alpha.stride():
            raise TopKastError(f"'{name}': its entries overlap or have gaps in memory; make the parameter contiguous")

    # --- the sets -------------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tensor:
        """uint8 in the weight's shape: 0 reservoir, 1 exploring, 2 active."""
        return self.sharding.join(self._tiers)

    @property
    def updated(self) -> Tensor:
        """B: bool in the weight's shape."""
        return self.sharding.join(self._mask.bool())

    @property
    def active_entries(self) -> Tensor:
        """Realised |A|, a scalar tensor."""
        exploring = self._counted[1] if self.sharding.is_cut else self._exploring.numel()
        return self.updated_entries - exploring

    @property
    def updated_entries(self) -> Tensor:
        """Realised |B|, a scalar tensor."""
        return torch.tensor(self._counted[0]) if self.sharding.is_cut else torch.count_nonzero(self._mask)

    @property
    def dormant_entries(self) -> Tensor:
        """Entries of the first reservoir that have never been active, a scalar tensor."""
        return torch.tensor(self._counted[2]) if self.sharding.is_cut else torch.count_nonzero(self._dormant)

    @property
    def _total(self) -> Total:
        return self.sharding.sum if self.sharding.is_cut else None

    @property
    def _alpha(self) -> Tensor:
        """This process' part of the parameter, whose memory it shares."""
        return own_part(self.parameter.detach())

    @property
    def _tiers(self) -> Tensor:
        tiers = (self._mask * -ACTIVE).view(torch.uint8)
        flat(tiers).index_fill_(0, self._exploring, EXPLORING)
        return tiers

    @property
    def _theta(self) -> Tensor:
        if self.is_open:
            return torch.where(self._mask.bool(), self._as_theta(self._alpha), self._reserve)
        return self._alpha + self._reserve  # no entry is in both

    def alpha(self) -> Tensor:
        """What the network computes with, θ on A and zero elsewhere, also in the middle of a step; dense, a copy."""
        settled = self._as_settled()
        return self.sharding.join(settled._alpha.masked_fill(settled._tiers != ACTIVE, 0))

    def theta(self) -> Tensor:
        """The stored θ, dense, a copy."""
        return self.sharding.join(self._theta)

    def magnitudes(self) -> Tensor:
        """|θ|, contiguous: the scores of the selection; of a sharded weight this process' part."""
        alpha = self._alpha
        if alpha.device.type != "cpu" or not alpha.is_contiguous() or alpha.dtype != torch.float32:
            return self._theta.abs_().contiguous()
        # numpy asks for huge pages, torch does not: filling new memory takes half the time
        magnitudes = torch.from_numpy(np.empty(alpha.shape, dtype=np.float32))
        return torch.add(alpha, self._reserve, out=magnitudes).abs_()

    def apply(self, tiers: Tensor, state: Sequence[Tensor] = ()) -> None:
        """Take over new sets; few entries change theirs, so those are found and moved one by one."""
        self.match_layout()
        # in the parameter's memory order, so that flat indices of it and of its companions agree
        new = flat(torch.empty_like(self._mask, dtype=torch.uint8).copy_(own_part(tiers)))
        old = flat(self._tiers)
        changed = indices(new != old)
        before, after = old.index_select(0, changed), new.index_select(0, changed)
        promoted, demoted = where(changed, after == ACTIVE), where(changed, before == ACTIVE)
        if new.device.type == "cpu":
            stayed = where(self._exploring, new.index_select(0, self._exploring) == EXPLORING)
            exploring = merged(stayed, where(changed, after == EXPLORING))
        else:
            exploring = indices(new == EXPLORING)
        mask = -(after != RESERVOIR).to(torch.int8)
        alpha, reserve = flat(self._alpha), flat(self._reserve)

        # First copy, then switch the sets, then clear: wherever an interruption falls, `recover` finds every value.
        self._settled = False
        alpha.index_copy_(0, promoted, reserve.index_select(0, promoted))
        reserve.index_copy_(0, demoted, alpha.index_select(0, demoted))
        self._pending = (exploring, changed, mask)
        self._switch()
        reserve.index_fill_(0, promoted, 0)
        alpha.index_fill_(0, demoted, 0)
        self._forget()
        self._settled = True

        flat(self._dormant).index_fill_(0, promoted, False)
        self.promoted = self._count(promoted.numel())
        self.gradient_magnitudes = None
        for tensor in state:  # it would pull at entries that come back, and decay into denormals
            mask_outside_(own_part(tensor), self._mask)

    def _forget(self) -> None:
        if self.forgets:
            mask_outside_(self._reserve, self._mask)

    def _switch(self) -> None:
        """Make the pending sets those of the weight; harmless when done twice."""
        if self._pending is not None:
            self._exploring, changed, mask = self._pending
            flat(self._mask).index_copy_(0, changed, mask)
            self.changes += 1
            self._pending = None

    def _count(self, promoted: int = 0) -> int:
        """Count the sets over all parts, once, so that to read the counts is no collective; also what was promoted."""
        if not self.sharding.is_cut:
            return promoted
        counts = [
            torch.count_nonzero(self._mask),
            self._exploring.numel(),
            torch.count_nonzero(self._dormant),
            promoted,
        ]
        *self._counted, promoted = self.sharding.sum(torch.tensor(counts, device=self._mask.device)).tolist()
        return promoted

    def note_first_reservoir(self) -> None:
        """Remember C as it is now, of which `dormant_entries` counts what has not been active since."""
        torch.eq(self._mask, 0, out=self._dormant)
        self._count()
        self.first_reservoir = int(self.dormant_entries)

    def match_layout(self) -> None:
        """Follow the parameter to the device, dtype and memory format that the model was moved to."""
        alpha, reserve = self._alpha, self._reserve
        if (reserve.device, reserve.dtype, reserve.stride()) == (alpha.device, alpha.dtype, alpha.stride()):
            return
        tiers = self._tiers
        self._reserve = torch.empty_like(alpha).copy_(reserve)
        self._mask = torch.empty_like(alpha, dtype=torch.int8).copy_(self._mask)
        tiers = torch.empty_like(self._mask, dtype=torch.uint8).copy_(tiers)
        self._exploring = indices(flat(tiers) == EXPLORING)
        self._dormant = torch.empty_like(self._mask, dtype=torch.bool).copy_(self._dormant)
        self.changes += 1

    # --- around the optimizer's step ------------------------------------------------------------------------------

    def mask_gradient(self) -> None:
        """Zero the gradient outside B; also what is infinite or NaN there."""
        gradient = self._gradient()
        if gradient is not None:
            mask_outside_(gradient, self._mask)

    def note_gradient(self) -> None:
        """Remember the gradient's magnitudes, contiguous; not those of one that was masked since they were noted."""
        gradient = self._gradient()
        if gradient is None:
            return
        outside = gradient.clone()
        mask_outside_(outside, ~self._mask)
        if self.gradient_magnitudes is None or int(self.sharding.sum(torch.count_nonzero(outside))):
            self.gradient_magnitudes = gradient.abs().contiguous()

    def _gradient(self) -> Tensor | None:
        """This process' part of the gradient, sharded as the parameter is."""
        gradient = self.parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements != self.parameter.placements:  # type: ignore[attr-defined]
            gradient = gradient.redistribute(placements=self.parameter.placements)  # type: ignore[attr-defined]
            self.parameter.grad = gradient
        return None if gradient is None else own_part(gradient)

    def open(self) -> None:
        r"""Put θ on B\A into the parameter, for the optimizer to update."""
        self.match_layout()
        self._settled = False
        entries = flat(self._alpha)
        entries.index_copy_(0, self._exploring, flat(self._reserve).index_select(0, self._exploring))
        self.is_open = True
        self._put_phi(self._alpha, self._gradient())

    def recover(self) -> None:
        """Make the parameter α after an interruption in the middle of a step or a refresh, with every θ kept."""
        if self._settled:
            return
        self._switch()
        if self.is_open:
            self._put_theta(self._alpha)
            flat(self._reserve).index_copy_(0, self._exploring, flat(self._alpha).index_select(0, self._exploring))
            self.is_open = False
        self.restore_sparsity()
        self._forget()
        self._settled = True

    @property
    def is_settled(self) -> bool:
        """Whether no step or refresh is under way."""
        return self._settled

    def _as_settled(self) -> "MaskedWeight":
        """This weight or, while a step or refresh is under way, a copy as `recover` would make it.

        A signal handler may save in between, but must change nothing that is going to be continued.
        """
        if self._settled:
            return self
        settled = copy.deepcopy(self)
        settled.recover()
        return settled

    def release(self) -> None:
        """Make the parameter θ."""
        self._alpha.copy_(self._theta)

    def close(self, penalty: Penalty, lr: float | Tensor) -> None:
        r"""Apply the penalty on B, store θ on B\A and make the parameter α again.

        Args:
            penalty: form of the penalty.
            lr: the current learning rate; 0 leaves the values as they are.
        """
        self._put_theta(self._alpha)
        alpha = self._alpha
        entries = flat(alpha)
        penalised = self.strength != 0 and not (isinstance(lr, float | int) and lr == 0)
        exploring = entries.index_select(0, self._exploring)
        if penalised and self.is_exploring:
            shrink_(exploring, penalty, lr * (self.strength / self.forward_density_target), self._total)
        flat(self._reserve).index_copy_(0, self._exploring, exploring)
        self.is_open = False  # already here: what an interruption leaves undone from now on, `recover` can do
        entries.index_fill_(0, self._exploring, 0)
        mask_outside_(alpha, self._mask)
        if penalised:
            shrink_(alpha, penalty, lr * self.strength, self._total)
        self._settled = True

    def penalty(self, penalty: Penalty) -> Tensor:
        """The exploration penalty's value, a scalar tensor; of a weight that is cut, a collective."""
        exploring = flat(self._reserve).index_select(0, self._exploring)
        on_active = penalty_of(self._alpha, penalty, self.strength, self._total)
        return on_active + penalty_of(exploring, penalty, self.strength / self.forward_density_target, self._total)

    @property
    def is_sparse(self) -> bool:
        """Whether the parameter is zero outside A, as it is between steps unless somebody else wrote to it."""
        return not int(self.sharding.sum(torch.count_nonzero(self._alpha.masked_fill(self._tiers == ACTIVE, 0))))

    def restore_sparsity(self) -> None:
        """Zero the parameter outside A where somebody else (an average copied into the model) wrote to it."""
        active = -(self._tiers == ACTIVE).to(torch.int8)
        mask_outside_(self._alpha, active)
        mask_outside_(self._reserve, ~active)

    @property
    def is_exploring(self) -> bool:
        r"""Whether B\A has entries at present."""
        return (self._counted[1] if self.sharding.is_cut else self._exploring.numel()) > 0

    def sparsify_average_(self, average: Tensor, active_before: Tensor) -> None:
        """Make a running average of α zero outside A, and begin it anew at α where an entry has entered A.

        Args:
            average: the average, in the weight's shape.
            active_before: A when this was last done.
        """
        active = self.active
        average.mul_(active.to(average.device))
        entered = active & ~active_before
        average[entered.to(average.device)] = self.parameter.detach()[entered].to(average)

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, gathered: bool = False) -> dict[str, Any]:
        """Tiers and reserve (dense, contiguous), on CPU: tensors and primitives only."""
        settled = self._as_settled()
        parts = {"tiers": settled._tiers, "reserve": settled._reserve, "dormant": settled._dormant}
        if not self.sharding.is_distributed:
            whole = {key: copied(part) for key, part in parts.items()}
        elif gathered:
            whole = {key: self.sharding.gather(part) for key, part in parts.items()}
        else:
            whole = {key: self.sharding.join(part.clone()).cpu() for key, part in parts.items()}
        return whole | self._counts()

    def adopt(self, value: Tensor) -> Tensor:
        """A packed one is spread out, with zeros outside B."""
        if value.shape == self.shape or value.shape != (self.updated_count,):
            return value
        order = self.granularity.order(self.tiers)
        dense = value.new_zeros(self.size)
        dense[order] = value[: order.numel()]
        # in the parameter's memory format, by which fused optimizers go
        return torch.empty_like(self._alpha, dtype=value.dtype, device=value.device).copy_(dense.view(self.shape))

    def _in_model(self) -> Tensor:
        return self._alpha

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `check_state` has accepted; the parameter already holds the saved α."""
        saved_tiers, reserve, dormant = (self.sharding.part_of(state[key]) for key in ("tiers", "reserve", "dormant"))
        tiers = torch.empty_like(self._mask, dtype=torch.uint8).copy_(saved_tiers)
        self._reserve.copy_(reserve)
        torch.ne(tiers, 0, out=self._mask).neg_()
        self._exploring = indices(flat(tiers) == EXPLORING)
        self._dormant = torch.empty_like(self._mask, dtype=torch.bool).copy_(dormant)
        self._count()
        self._load_counts(state)
        self.changes += 1
        self.is_open = False
