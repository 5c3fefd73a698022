"""What every way of keeping a sparse weight has in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_topkast.distributed import Sharding, own_part
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.penalty import Penalty
from lightning_topkast.method.powerpropagation import Reparametrised
from lightning_topkast.method.selection import ACTIVE
from lightning_topkast.method.structure import Entries
from lightning_topkast.weights.state import problem_with


class SparseWeight(ABC):
    """One weight θ, its active set A and its updated set B.

    Between steps the network computes with α: θ on A and zero elsewhere. `open` and `close` surround the optimizer's
    update of θ on B; `apply` takes over new sets.

    Args:
        name: the parameter's name in the model.
        parameter: what the model and the optimizer share.
        sharding: the weight's own shape, and how it is cut over devices.
        active_count: |A|, at the end of the run where sizes vary.
        updated_count: |B| while exploring, at least `active_count`; likewise.
    """

    execution: str
    parameter: nn.Parameter

    def __init__(
        self, name: str, parameter: nn.Parameter, sharding: Sharding, active_count: int, updated_count: int
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.sharding = sharding
        self.active_count = active_count
        self.updated_count = updated_count
        self.strength = 0.0  # λ of this weight's penalty; the engine sets it when it knows the learning rate
        self.is_open = False
        # The engine sets these four before the first sets are chosen.
        self.granularity = Entries()  # what the sets are made of
        self.forgets = False  # whether entries that leave B are forgotten: they come back as zeros
        self.sizes_vary = False  # whether |A| and |B| differ from the counts above in the course of the run
        self.exponent = 1.0  # of powerpropagation, 1 without it
        self._reparametrised: Reparametrised | None = None  # while the optimizer steps
        # of the loss everywhere, as it was before the last step, where a rule wants to know
        self.gradient_magnitudes: Tensor | None = None
        # entries that the last refresh promoted into A
        self.promoted = 0
        self.first_reservoir = 0
        # how often other weights were loaded, which choose the sets anew
        self.loads = 0
        # how often the sets or their order in memory changed: whoever keeps something made of them looks here
        self.changes = 0

    # --- the sets -------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """The weight's own shape."""
        return self.sharding.shape

    @property
    def size(self) -> int:
        """n, the number of entries."""
        return self.shape.numel()

    @property
    @abstractmethod
    def tiers(self) -> Tensor:
        """uint8 in the weight's shape: 0 reservoir, 1 exploring, 2 active."""

    @property
    def active(self) -> Tensor:
        """A: bool in the weight's shape."""
        return self.tiers == ACTIVE

    @property
    def updated(self) -> Tensor:
        """B: bool in the weight's shape."""
        return self.tiers != 0

    @property
    @abstractmethod
    def active_entries(self) -> Tensor:
        """Realised |A|, a scalar tensor."""

    @property
    @abstractmethod
    def updated_entries(self) -> Tensor:
        """Realised |B|, a scalar tensor."""

    @property
    @abstractmethod
    def dormant_entries(self) -> Tensor:
        """Entries of the first reservoir that have never been active, a scalar tensor."""

    @property
    def forward_density(self) -> float:
        """Realised |A| / n."""
        return int(self.active_entries) / self.size

    @property
    def backward_density(self) -> float:
        """Realised |B| / n."""
        return int(self.updated_entries) / self.size

    @property
    def forward_density_target(self) -> float:
        """D: |A| / n as it was allocated, for the end of the run where sizes vary."""
        return self.active_count / self.size

    @property
    @abstractmethod
    def is_exploring(self) -> bool:
        r"""Whether B\A has entries at present."""

    @property
    def can_explore(self) -> bool:
        """Whether B is larger than A while exploring."""
        return self.updated_count > self.active_count

    @abstractmethod
    def alpha(self) -> Tensor:
        """What the network computes with, θ on A and zero elsewhere, also in the middle of a step; dense, a copy."""

    @abstractmethod
    def theta(self) -> Tensor:
        """The stored θ, dense, a copy."""

    @abstractmethod
    def magnitudes(self) -> Tensor:
        """|θ|, contiguous, a copy; of a sharded weight this process' part."""

    def scores(self) -> Tensor:
        """The units' scores, which the selection goes by; see `Entries.scores`."""
        return self.granularity.scores(self.magnitudes(), self.sharding)

    def snapshot(self) -> Callable[[], Tensor]:
        """What gives `scores` as they are now, also later and in another thread."""
        magnitudes = self.magnitudes()
        return lambda: self.granularity.scores(magnitudes, self.sharding)

    def prepare(self, tiers: Tensor) -> None:  # noqa: B027  most need not
        """Do what can be done in another thread before `apply` takes over these sets."""

    @abstractmethod
    def apply(self, tiers: Tensor, state: Sequence[Tensor] = ()) -> None:
        """Take over new sets: the promoted enter with their stored values, the demoted keep theirs.

        Args:
            tiers: uint8 in the weight's shape, or this process' part of them.
            state: the optimizer's state, tensors in the parameter's shape: what entries outside the new B have of it
                is lost, and those that enter B begin at zero.
        """

    @abstractmethod
    def note_first_reservoir(self) -> None:
        """Remember C as it is now, of which `dormant_entries` counts what has not been active since."""

    @abstractmethod
    def match_layout(self) -> None:
        """Follow the parameter to the device, dtype and memory format that the model was moved to."""

    # --- around the optimizer's step ------------------------------------------------------------------------------

    @abstractmethod
    def mask_gradient(self) -> None:
        """Zero the gradient outside B; also what is infinite or NaN there."""

    def note_gradient(self) -> None:
        """Remember the gradient's magnitudes everywhere, for the next choice of the sets."""
        raise NotImplementedError(f"{self.execution} weights have no gradient outside the updated set")

    @abstractmethod
    def open(self) -> None:
        """Make θ on B what the optimizer updates."""

    @abstractmethod
    def close(self, penalty: Penalty, lr: float | Tensor) -> None:
        """Apply the penalty on B and make α again what the network computes with.

        Args:
            penalty: form of the penalty.
            lr: the current learning rate; 0 leaves the values as they are.
        """

    @abstractmethod
    def recover(self) -> None:
        """End an interrupted step or refresh, with every θ kept."""

    @abstractmethod
    def penalty(self, penalty: Penalty) -> Tensor:
        """The exploration penalty's value, a scalar tensor."""

    @property
    def is_settled(self) -> bool:
        """Whether the parameter is α as it stands: no step, and no refresh that has to be ended first."""
        return True

    @property
    @abstractmethod
    def is_sparse(self) -> bool:
        """Whether the network computes with α, as it does between steps unless somebody else wrote to the weight."""

    @abstractmethod
    def restore_sparsity(self) -> None:
        """Make the weight α again where somebody else (an average copied into the model) wrote to it."""

    def _put_phi(self, values: Tensor, gradient: Tensor | None) -> None:
        """Under powerpropagation, let the optimizer find φ and its gradient in the place of θ and its own."""
        if self.exponent != 1:
            self._reparametrised = Reparametrised(values, self.exponent)
            values.copy_(self._reparametrised.phi)
            if gradient is not None:
                self._reparametrised.gradient_(gradient)

    def _put_theta(self, values: Tensor) -> None:
        """Put θ back."""
        if self._reparametrised is not None:
            self._reparametrised.leave_(values)
            self._reparametrised = None

    def _as_theta(self, values: Tensor) -> Tensor:
        """θ for `values`, which are φ while the optimizer steps."""
        return values if self._reparametrised is None else self._reparametrised.theta_of(values)

    # --- state ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def state_dict(self, gathered: bool = False) -> dict[str, Any]:
        """Tiers and reserve (dense, contiguous), on CPU: tensors and primitives only, the same for every execution.

        Args:
            gathered: give those of a sharded weight whole, on rank 0 only, rather than as DTensors; a collective.
        """

    def check_state(self, state: Any) -> None:
        """Refuse a state that is not this weight's, before anything is overwritten.

        Raises:
            TopKastError: with what differs.
        """
        problem = problem_with(
            state, self._in_model(), self.active_count, self.updated_count, self.sharding, self.sizes_vary
        )
        if not problem:
            tiers = self.sharding.part_of(state["tiers"]).to(own_part(self.parameter).device)
            if not self.granularity.are_whole(tiers, self.sharding):
                problem = f"its sets do not consist of whole {self.granularity}s; the file is damaged"
        if problem:
            raise TopKastError(f"the saved Top-KAST state does not fit weight '{self.name}': {problem}")
        saved = state.get("execution", self.execution)
        alike = (saved == "masked") == (self.execution == "masked")
        if not alike and self.shape == (self.updated_count,):  # both orders of the optimizer's state have one shape
            raise TopKastError(
                f"'{self.name}' is 1-D and updated as a whole, and can't go on {self.execution} after {saved}: resume "
                f"with execution='{saved}'"
            )

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `check_state` has accepted; the model already holds the saved α."""

    @abstractmethod
    def adopt(self, value: Tensor) -> Tensor:
        """Optimizer state of this weight in the parameter's shape, which it lacks if saved under another execution."""

    @abstractmethod
    def _in_model(self) -> Tensor:
        """The weight as the model holds it, dense; of a sharded one this process' part."""

    def _counts(self) -> dict[str, Any]:
        return {
            "execution": self.execution,
            "first_reservoir": self.first_reservoir,
            "promoted": self.promoted,
            "active_count": self.active_count,
            "updated_count": self.updated_count,
            "strength": self.strength,
        }

    def _load_counts(self, state: dict[str, Any]) -> None:
        self.first_reservoir = state["first_reservoir"]
        self.promoted = state["promoted"]
        self.strength = state["strength"]
