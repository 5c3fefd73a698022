"""A sparse weight kept as the module's own dense parameter with zeros in it.

The parameter is α (zero outside A) at all times but during the optimizer's step. Beside it lie, per entry, the
*reserve* (θ outside A), a byte that says whether it is in B, a byte of telemetry; per exploring entry its index.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_topkast.errors import TopKastError
from lightning_topkast.penalty import Penalty, penalty_of, shrink_
from lightning_topkast.selection import ACTIVE, EXPLORING, RESERVOIR
from lightning_topkast.weights.base import SparseWeight
from lightning_topkast.weights.entries import copied, flat, indices, mask_outside_, merged, where


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
        super().__init__(name, parameter, parameter.shape, active_count, updated_count)
        self._settled = True  # the parameter is α and no refresh is under way
        # At first everything is active: θ is the parameter as it is. Only `apply` makes it sparse.
        # B, all bits set on it: as fast on CPU as multiplying by a byte, 2.5 times as fast as by bool
        self._mask = torch.full_like(parameter, -1, dtype=torch.int8)
        self._reserve = torch.zeros_like(parameter, requires_grad=False)
        self._exploring = torch.empty(0, dtype=torch.int64, device=parameter.device)
        # new exploring indices, where the mask changes, and to what, while a refresh is under way
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None
        # C as it was first chosen, less what has been active since: telemetry of how far exploration reaches
        self._dormant = torch.zeros_like(parameter, dtype=torch.bool, requires_grad=False)
        if self._reserve.stride() != parameter.stride():
            raise TopKastError(f"'{name}': its entries overlap or have gaps in memory; make the parameter contiguous")

    # --- the sets -------------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tensor:
        """uint8 in the weight's shape: 0 reservoir, 1 exploring, 2 active."""
        tiers = (self._mask * -ACTIVE).view(torch.uint8)
        flat(tiers).index_fill_(0, self._exploring, EXPLORING)
        return tiers

    @property
    def updated(self) -> Tensor:
        """B: bool in the weight's shape."""
        return self._mask.bool()

    @property
    def active_entries(self) -> Tensor:
        """Realised |A|, a scalar tensor."""
        return self.updated_entries - self._exploring.numel()

    @property
    def updated_entries(self) -> Tensor:
        """Realised |B|, a scalar tensor."""
        return torch.count_nonzero(self._mask)

    @property
    def dormant_entries(self) -> Tensor:
        """Entries of the first reservoir that have never been active, a scalar tensor."""
        return torch.count_nonzero(self._dormant)

    def alpha(self) -> Tensor:
        """What the network computes with, θ on A and zero elsewhere, also in the middle of a step; dense, a copy."""
        settled = self._as_settled()
        return settled.parameter.detach().masked_fill(~settled.active, 0)

    def theta(self) -> Tensor:
        """The stored θ, dense, a copy."""
        if self.is_open:
            return torch.where(self.updated, self.parameter.detach(), self._reserve)
        return self.parameter.detach() + self._reserve  # no entry is in both

    def magnitudes(self) -> Tensor:
        """|θ|, contiguous in the weight's shape: the scores of the selection."""
        parameter = self.parameter.detach()
        if parameter.device.type != "cpu" or not parameter.is_contiguous() or parameter.dtype != torch.float32:
            return self.theta().abs_().contiguous()
        # numpy asks for huge pages, torch does not: filling new memory takes half the time
        magnitudes = torch.from_numpy(np.empty(parameter.shape, dtype=np.float32))
        return torch.add(parameter, self._reserve, out=magnitudes).abs_()

    def apply(self, tiers: Tensor, state: Sequence[Tensor] = ()) -> None:
        """Take over new sets; few entries change theirs, so those are found and moved one by one."""
        self.match_layout()
        # in the parameter's memory order, so that flat indices of it and of its companions agree
        new = flat(torch.empty_like(self._mask, dtype=torch.uint8).copy_(tiers))
        old = flat(self.tiers)
        changed = indices(new != old)
        before, after = old.index_select(0, changed), new.index_select(0, changed)
        promoted, demoted = where(changed, after == ACTIVE), where(changed, before == ACTIVE)
        stayed = where(self._exploring, new.index_select(0, self._exploring) == EXPLORING)
        exploring = merged(stayed, where(changed, after == EXPLORING))
        mask = -(after != RESERVOIR).to(torch.int8)
        alpha, reserve = flat(self.parameter.detach()), flat(self._reserve)

        # First copy, then switch the sets, then clear: wherever an interruption falls, `recover` finds every value.
        self._settled = False
        alpha.index_copy_(0, promoted, reserve.index_select(0, promoted))
        reserve.index_copy_(0, demoted, alpha.index_select(0, demoted))
        self._pending = (exploring, changed, mask)
        self._switch()
        reserve.index_fill_(0, promoted, 0)
        alpha.index_fill_(0, demoted, 0)
        self._settled = True

        self.promoted = promoted.numel()
        flat(self._dormant).index_fill_(0, promoted, False)
        for tensor in state:  # it would pull at entries that come back, and decay into denormals
            mask_outside_(tensor, self._mask)

    def _switch(self) -> None:
        """Make the pending sets those of the weight; harmless when done twice."""
        if self._pending is not None:
            self._exploring, changed, mask = self._pending
            flat(self._mask).index_copy_(0, changed, mask)
            self.changes += 1
            self._pending = None

    def note_first_reservoir(self) -> None:
        """Remember C as it is now, of which `dormant_entries` counts what has not been active since."""
        torch.eq(self._mask, 0, out=self._dormant)
        self.first_reservoir = int(torch.count_nonzero(self._dormant))

    def match_layout(self) -> None:
        """Follow the parameter to the device, dtype and memory format that the model was moved to."""
        parameter = self.parameter
        reserve = self._reserve
        if (reserve.device, reserve.dtype, reserve.stride()) == (parameter.device, parameter.dtype, parameter.stride()):
            return
        tiers = self.tiers
        self._reserve = torch.empty_like(parameter, requires_grad=False).copy_(reserve)
        self._mask = torch.empty_like(parameter, dtype=torch.int8, requires_grad=False).copy_(self._mask)
        tiers = torch.empty_like(self._mask, dtype=torch.uint8).copy_(tiers)
        self._exploring = indices(flat(tiers) == EXPLORING)
        self._dormant = torch.empty_like(self._mask, dtype=torch.bool).copy_(self._dormant)
        self.changes += 1

    # --- around the optimizer's step ------------------------------------------------------------------------------

    def mask_gradient(self) -> None:
        """Zero the gradient outside B; also what is infinite or NaN there."""
        if self.parameter.grad is not None:
            mask_outside_(self.parameter.grad, self._mask)

    def open(self) -> None:
        r"""Put θ on B\A into the parameter, for the optimizer to update."""
        self.match_layout()
        self._settled = False
        entries = flat(self.parameter.detach())
        entries.index_copy_(0, self._exploring, flat(self._reserve).index_select(0, self._exploring))
        self.is_open = True

    def recover(self) -> None:
        """Make the parameter α after an interruption in the middle of a step or a refresh, with every θ kept."""
        if self._settled:
            return
        self._switch()
        if self.is_open:
            flat(self._reserve).index_copy_(
                0, self._exploring, flat(self.parameter.detach()).index_select(0, self._exploring)
            )
            self.is_open = False
        self.restore_sparsity()
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
        self.parameter.detach().copy_(self.theta())

    def close(self, penalty: Penalty, lr: float | Tensor) -> None:
        r"""Apply the penalty on B, store θ on B\A and make the parameter α again.

        Args:
            penalty: form of the penalty.
            lr: the current learning rate; 0 leaves the values as they are.
        """
        alpha = self.parameter.detach()
        entries = flat(alpha)
        penalised = self.strength != 0 and not (isinstance(lr, float | int) and lr == 0)
        exploring = entries.index_select(0, self._exploring)
        if penalised and exploring.numel():
            shrink_(exploring, penalty, lr * (self.strength / self.forward_density_target))
        flat(self._reserve).index_copy_(0, self._exploring, exploring)
        self.is_open = False  # already here: what an interruption leaves undone from now on, `recover` can do
        entries.index_fill_(0, self._exploring, 0)
        mask_outside_(alpha, self._mask)
        if penalised:
            shrink_(alpha, penalty, lr * self.strength)
        self._settled = True

    def penalty(self, penalty: Penalty) -> Tensor:
        """The exploration penalty's value, a scalar tensor."""
        exploring = flat(self._reserve).index_select(0, self._exploring)
        on_active = penalty_of(self.parameter.detach(), penalty, self.strength)
        return on_active + penalty_of(exploring, penalty, self.strength / self.forward_density_target)

    @property
    def is_sparse(self) -> bool:
        """Whether the parameter is zero outside A, as it is between steps unless somebody else wrote to it."""
        return not bool(self.parameter.detach().masked_fill(self.active, 0).any())

    def restore_sparsity(self) -> None:
        """Zero the parameter outside A where somebody else (an average copied into the model) wrote to it."""
        active = -(self.tiers == ACTIVE).to(torch.int8)
        mask_outside_(self.parameter.detach(), active)
        mask_outside_(self._reserve, ~active)

    @property
    def is_exploring(self) -> bool:
        r"""Whether B\A has entries at present."""
        return self._exploring.numel() > 0

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

    def state_dict(self) -> dict[str, Any]:
        """Tiers and reserve (dense, contiguous), on CPU: tensors and primitives only."""
        settled = self._as_settled()
        return {
            "tiers": copied(settled.tiers),
            "reserve": copied(settled._reserve),
            "dormant": copied(settled._dormant),
        } | self._counts()

    def adopt(self, value: Tensor) -> Tensor:
        """A packed one is spread out, with zeros outside B."""
        if value.shape == self.shape or value.shape != (self.updated_count,):
            return value
        order = self._order()
        dense = value.new_zeros(self.size)
        dense[order] = value[: order.numel()]
        return dense.view(self.shape)

    def _in_model(self) -> Tensor:
        return self.parameter.detach()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `check_state` has accepted; the parameter already holds the saved α."""
        tiers = torch.empty_like(self._mask, dtype=torch.uint8).copy_(state["tiers"])
        self._reserve.copy_(state["reserve"])
        torch.ne(tiers, 0, out=self._mask).neg_()
        self._exploring = indices(flat(tiers) == EXPLORING)
        self._dormant = torch.empty_like(self._mask, dtype=torch.bool).copy_(state["dormant"])
        self._load_counts(state)
        self.changes += 1
        self.is_open = False
