"""A sparse weight kept as the module's own dense parameter with zeros in it.

The parameter is α (zero outside A) at all times but during the optimizer's step. Beside it lie, per entry, the
*reserve* (θ outside A), a byte that says whether it is in B, a byte of telemetry; per exploring entry its index.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_topkast.errors import TopKastError
from lightning_topkast.penalty import Penalty, penalty_of, shrink_
from lightning_topkast.selection import ACTIVE, EXPLORING


class MaskedWeight:
    """One weight θ, its active set A and its updated set B, in masked mode.

    Between steps the parameter is α. `open` puts the exploring entries' θ into it, so that the optimizer's update and
    weight decay act on θ; `close` takes them out again.

    Args:
        name: the parameter's name in the model.
        parameter: the model's own parameter; it is never replaced, so the optimizer and the model keep sharing it.
        active_count: |A|.
        updated_count: |B| while exploring, at least `active_count`.
    """

    def __init__(self, name: str, parameter: nn.Parameter, active_count: int, updated_count: int) -> None:
        self.name = name
        self.parameter = parameter
        self.active_count = active_count
        self.updated_count = updated_count
        self.strength = 0.0  # λ of this weight's penalty; the engine sets it when it knows the learning rate
        self.is_open = False
        # entries that the last refresh promoted into A
        self.promoted = torch.zeros((), dtype=torch.int64, device=parameter.device)
        # At first everything is active: θ is the parameter as it is. Only `apply` makes it sparse.
        # B, all bits set on it: as fast on CPU as multiplying by a byte, 2.5 times as fast as by bool
        self._mask = torch.full_like(parameter, -1, dtype=torch.int8)
        self._reserve = torch.zeros_like(parameter, requires_grad=False)
        self._exploring = torch.empty(0, dtype=torch.int64, device=parameter.device)
        # C as it was first chosen, less what has been active since: telemetry of how far exploration reaches
        self._dormant: Tensor | None = None
        self.first_reservoir = 0
        if self._reserve.stride() != parameter.stride():
            raise ValueError(f"{name}: its entries overlap or have gaps in memory; make the parameter contiguous")

    # --- the sets -------------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tensor:
        """uint8 in the weight's shape: 0 reservoir, 1 exploring, 2 active."""
        tiers = (self._mask * -ACTIVE).view(torch.uint8)
        _flat(tiers).index_fill_(0, self._exploring, EXPLORING)
        return tiers

    @property
    def active(self) -> Tensor:
        """A: bool in the weight's shape."""
        return self.tiers == ACTIVE

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
        if self._dormant is None:
            return torch.zeros((), dtype=torch.int64, device=self.parameter.device)
        return torch.count_nonzero(self._dormant)

    @property
    def forward_density(self) -> float:
        """Realised |A| / n."""
        return int(self.active_entries) / self.parameter.numel()

    @property
    def backward_density(self) -> float:
        """Realised |B| / n."""
        return int(self.updated_entries) / self.parameter.numel()

    def theta(self) -> Tensor:
        """The stored θ, dense, a copy."""
        if self.is_open:
            return torch.where(self.updated, self.parameter.detach(), self._reserve)
        return self.parameter.detach() + self._reserve  # no entry is in both

    def apply(self, tiers: Tensor) -> None:
        """Take over new sets: the promoted enter with their stored values, the demoted keep theirs.

        Args:
            tiers: uint8 in the weight's shape.
        """
        self.match_layout()
        theta = self.theta()
        before = self.active
        # the parameter's memory order, so that flat indices of it and of its companions agree
        tiers = torch.empty_like(self._mask, dtype=torch.uint8).copy_(tiers)
        active = tiers == ACTIVE
        self.promoted = torch.count_nonzero(active & ~before)
        alpha = self.parameter.detach()
        torch.mul(theta, active.to(torch.uint8), out=alpha)
        torch.sub(theta, alpha, out=self._reserve)
        torch.ne(tiers, 0, out=self._mask).neg_()
        self._exploring = torch.nonzero(_flat(tiers) == EXPLORING).flatten()
        if self._dormant is None:
            self._dormant = self._mask == 0
            self.first_reservoir = int(torch.count_nonzero(self._dormant))
        self._dormant &= ~active

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
        self._exploring = torch.nonzero(_flat(tiers) == EXPLORING).flatten()
        self.promoted = self.promoted.to(parameter.device)
        if self._dormant is not None:
            self._dormant = torch.empty_like(self._mask, dtype=torch.bool).copy_(self._dormant)

    # --- around the optimizer's step ------------------------------------------------------------------------------

    def mask_(self, tensor: Tensor) -> None:
        """Zero `tensor`, in the weight's shape, outside B; also what is infinite or NaN there."""
        tensor.view(_BITS[tensor.element_size()]).bitwise_and_(self._mask)

    def open(self) -> None:
        r"""Put θ on B\A into the parameter, for the optimizer to update."""
        self.match_layout()
        flat = _flat(self.parameter.detach())
        flat.index_copy_(0, self._exploring, _flat(self._reserve).index_select(0, self._exploring))
        self.is_open = True

    def close(self, penalty: Penalty, lr: float | Tensor) -> None:
        r"""Apply the penalty on B, store θ on B\A and make the parameter α again.

        Args:
            penalty: form of the penalty.
            lr: the current learning rate; 0 leaves the values as they are.
        """
        alpha = self.parameter.detach()
        flat = _flat(alpha)
        penalised = self.strength != 0 and not (isinstance(lr, float | int) and lr == 0)
        exploring = flat.index_select(0, self._exploring)
        if penalised and exploring.numel():
            shrink_(exploring, penalty, lr * (self.strength / self.forward_density_target))
        _flat(self._reserve).index_copy_(0, self._exploring, exploring)
        flat.index_fill_(0, self._exploring, 0)
        self.mask_(alpha)
        if penalised:
            shrink_(alpha, penalty, lr * self.strength)
        self.is_open = False

    @property
    def forward_density_target(self) -> float:
        """D: |A| / n as it was allocated."""
        return self.active_count / self.parameter.numel()

    def penalty(self, penalty: Penalty) -> Tensor:
        """The exploration penalty's value, a scalar tensor."""
        exploring = _flat(self._reserve).index_select(0, self._exploring)
        on_active = penalty_of(self.parameter.detach(), penalty, self.strength)
        return on_active + penalty_of(exploring, penalty, self.strength / self.forward_density_target)

    @property
    def is_sparse(self) -> bool:
        """Whether the parameter is zero outside A, as it is between steps unless somebody else wrote to it."""
        return not bool((self.parameter.detach() * (self.tiers != ACTIVE)).any())

    def restore_sparsity(self) -> None:
        """Zero the parameter outside A where somebody else (an average copied into the model) wrote to it."""
        self.parameter.detach().mul_(self.active)

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
        return {
            "tiers": self.tiers.cpu().contiguous(),
            "reserve": self._reserve.cpu().contiguous(),
            "dormant": None if self._dormant is None else self._dormant.cpu().contiguous(),
            "first_reservoir": self.first_reservoir,
            "promoted": int(self.promoted),
            "active_count": self.active_count,
            "updated_count": self.updated_count,
            "strength": self.strength,
        }

    def check_state(self, state: Any) -> None:
        """Refuse a state that is not this weight's, before anything is overwritten.

        Raises:
            TopKastError: with what differs.
        """
        problem = self._problem_with(state)
        if problem:
            raise TopKastError(f"the saved Top-KAST state does not fit weight '{self.name}': {problem}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `check_state` has accepted; the parameter already holds the saved α."""
        tiers = torch.empty_like(self._mask, dtype=torch.uint8).copy_(state["tiers"])
        self._reserve.copy_(state["reserve"])
        torch.ne(tiers, 0, out=self._mask).neg_()
        self._exploring = torch.nonzero(_flat(tiers) == EXPLORING).flatten()
        self._dormant = torch.empty_like(self._mask, dtype=torch.bool).copy_(state["dormant"])
        self.first_reservoir = state["first_reservoir"]
        self.promoted = torch.as_tensor(state["promoted"], device=self.parameter.device)
        self.strength = state["strength"]
        self.is_open = False

    def _problem_with(self, state: Any) -> str | None:
        kinds = {"tiers": Tensor, "reserve": Tensor, "dormant": Tensor, "first_reservoir": int, "promoted": int,
                 "active_count": int, "updated_count": int, "strength": float}  # fmt: skip
        if not isinstance(state, dict):
            return f"expected a dict, found {type(state).__name__}"
        for key, kind in kinds.items():
            if not isinstance(state.get(key), kind):
                return f"'{key}' should be a {kind.__name__}, found {type(state.get(key)).__name__}"
        shape = self.parameter.shape
        for key, dtypes in {"tiers": (torch.uint8,), "dormant": (torch.bool,), "reserve": _FLOATING}.items():
            tensor = state[key]
            if tensor.shape != shape or tensor.dtype not in dtypes:
                return f"'{key}' is {tensor.dtype} {tuple(tensor.shape)}, expected {dtypes[0]} {tuple(shape)}"
        if (state["active_count"], state["updated_count"]) != (self.active_count, self.updated_count):
            return (
                f"it was saved with |A| = {state['active_count']} and |B| = {state['updated_count']}, this run "
                "asks for "
                f"{self.active_count} and {self.updated_count}; resume with the sparsities and distribution it had"
            )
        if not (math.isfinite(state["strength"]) and state["strength"] >= 0):
            return f"'strength' is {state['strength']}, expected a number of at least 0; the file is damaged"
        tiers = state["tiers"]
        active, updated = int((tiers == ACTIVE).sum()), int((tiers != 0).sum())
        if int(tiers.max()) > ACTIVE or active != self.active_count or updated not in (active, self.updated_count):
            return f"its tiers hold |A| = {active} and |B| = {updated}; the file is damaged"
        if not bool(torch.isfinite(state["reserve"]).all()) or bool(state["reserve"][tiers == ACTIVE].any()):
            return "its reserve holds NaN, infinity or active entries; the file is damaged"
        if bool((self.parameter.detach().cpu() * (tiers != ACTIVE)).any()):
            return (
                "the model's weight is not zero outside the saved active set; "
                "load the model's own state dict of the same checkpoint first"
            )
        return None


# an integer type for every size of a floating-point entry
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _flat(tensor: Tensor) -> Tensor:
    """The entries in memory order, as a 1-D view; `view(-1)` would refuse channels-last weights."""
    return tensor.as_strided((tensor.numel(),), (1,))
