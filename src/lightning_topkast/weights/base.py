"""The base class of sparse weights, independent of their storage."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_topkast.distributed import Sharding, to_local
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.penalty import Penalty
from lightning_topkast.method.powerpropagation import Powerpropagation
from lightning_topkast.method.selection import ACTIVE
from lightning_topkast.method.structure import Structure, Unstructured
from lightning_topkast.ops.step import Update
from lightning_topkast.weights.orders import Orders, Sets
from lightning_topkast.weights.shrinkage import Shrinkage
from lightning_topkast.weights.state import problem_with
from lightning_topkast.weights.writes import WriteWatch


@dataclass(frozen=True)
class Traits:
    """Properties that all sparse weights of a run share.

    Args:
        structure: what the sets consist of.
        penalty: the exploration penalty, if any.
        clears_dropped: whether entries that leave B lose their values and return as zeros.
        sizes_change: whether |A| and |B| change during the run.
        exponent: the exponent of powerpropagation; 1 without it.
        seed: of the run.
        resets_state: whether entries outside B lose their optimizer state; packed ones always do.
    """

    structure: Structure = field(default_factory=Unstructured)
    penalty: Penalty | None = None
    clears_dropped: bool = False
    sizes_change: bool = False
    exponent: float = 1.0
    seed: int = 0
    resets_state: bool = True


class EntryState(NamedTuple):
    """A tensor of an optimizer's state with a value for each entry of the parameter.

    Args:
        values: in the parameter's shape.
        start: the value of an entry that was never updated.
    """

    values: Tensor
    start: float = 0.0


_KEPT = 3  # replaced values between two steps that can be put back


class Before(NamedTuple):
    """A weight before other values were written or loaded into it, so that they can be put back.

    Args:
        theta: θ; for a sharded weight this process' part.
        tiers: the entries' tiers, likewise.
        never_active: as the weight stores it.
        first_reservoir: as in `SparseWeight`.
        order: the present one of `Orders`.
        load_count: as in `SparseWeight`.
    """

    theta: Tensor
    tiers: Tensor
    never_active: Tensor
    first_reservoir: int
    order: int
    load_count: int


class SparseWeight(ABC):
    """One weight θ, its active set A and its updated set B.

    Between steps the network computes with α: θ on A and zero elsewhere. `open` and `close` surround the optimizer's
    update of θ on B; `apply` changes the sets.

    Args:
        name: the parameter's name in the model.
        parameter: the parameter that the model and the optimizer share.
        sharding: the weight's own shape, and how it is sharded over devices.
        active_count: |A|; at the end of the run if sizes vary.
        updated_count: |B| while exploring, at least `active_count`; at the end of the run if sizes vary.
        traits: properties that all weights of the run share.
    """

    storage: str  # masked, packed or compact
    storage_reason = ""  # why it is that one, if it was chosen
    parameter: nn.Parameter

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        sharding: Sharding,
        active_count: int,
        updated_count: int,
        traits: Traits,
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.sharding = sharding
        self.active_count = active_count
        self.updated_count = updated_count
        self.is_open = False
        self.is_trained = False  # whether an engine is attached to an optimizer
        self.was_trained = False  # whether it has ever been, or a saved state was loaded
        self.structure = traits.structure
        self.seed = traits.seed
        self.clears_dropped = traits.clears_dropped
        self.exponent = traits.exponent
        self.shrinkage = Shrinkage(traits.penalty, self.forward_density_target)
        # whether |A| and |B| differ from the counts above during the run
        self.sizes_change = traits.sizes_change or not self.structure.divides(sharding.shape)
        self._powerpropagation: Powerpropagation | None = None  # while the optimizer steps
        # |gradient| of the loss, also outside B, before the last step; only if the rule uses it
        self.gradient_magnitudes: Tensor | None = None
        # entries that the last refresh promoted into A
        self.promoted = 0
        self.first_reservoir = 0
        # number of times that the sets were chosen again for values that other code has written or loaded
        self.load_count = 0
        # changes whenever the sets or their order in memory change; key of results computed from them
        self.version = 0
        self.orders = Orders()
        # what was replaced by other values since the last step or refresh, the earliest first
        self.replaced: list[Before] = []
        self._writes = WriteWatch()
        self._note_own_write()

    @property
    def strength(self) -> float:
        """λ of this weight's penalty; see `Shrinkage`."""
        return self.shrinkage.strength

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
    def is_dtensor(self) -> bool:
        """Whether the parameter is a DTensor, so that `theta()`, `alpha()`, `tiers`, `active` and `updated` are."""
        return isinstance(self.parameter, DTensor)

    @property
    @abstractmethod
    def tiers(self) -> Tensor:
        """uint8 in the weight's shape: 0 reservoir, 1 exploring, 2 active."""

    @property
    @abstractmethod
    def own_tiers(self) -> Tensor:
        """`tiers` of this process' part, as `own_theta`."""

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
    def never_active_entries(self) -> Tensor:
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
        """D: the allocated |A| / n; at the end of the run if sizes vary."""
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
        """Return α, θ on A and zero elsewhere, even in the middle of a step; dense, a copy."""

    @abstractmethod
    def theta(self) -> Tensor:
        """Return the stored θ, dense, a copy."""

    def own_theta(self) -> Tensor:
        """Return θ of this process' part of the weight, all of it unless `sharding` says otherwise; a copy."""
        return to_local(self.theta())

    @abstractmethod
    def magnitudes(self) -> Tensor:
        """Return |θ|, contiguous, a copy; for a sharded weight this process' part."""

    @torch.no_grad()
    def count_zeros(self) -> tuple[int, int]:
        """Return the number of zeros in θ, and of those outside B; a collective for a sharded weight."""
        zero = self.own_theta() == 0
        outside = zero & (self.own_tiers == 0).to(zero.device)
        counts = torch.stack([torch.count_nonzero(zero), torch.count_nonzero(outside)])
        whole, reservoir = self.sharding.sum(counts).tolist()
        return whole, reservoir

    def scores(self) -> Tensor:
        """Return the units' scores, on which the selection is based; see `Structure.scores`."""
        return self.structure.scores(self.magnitudes(), self.sharding)

    def snapshot(self) -> Callable[[], Tensor]:
        """Return a function that gives the present `scores`, even later and in another thread."""
        magnitudes = self.magnitudes()
        return lambda: self.structure.scores(magnitudes, self.sharding)

    def prepare(self, tiers: Tensor) -> None:  # noqa: B027  most need not
        """Do the work of `apply` for these sets that another thread can do in advance."""

    def check_release(self) -> None:  # noqa: B027  masked weights always can
        """Refuse to put θ back into the layers as an ordinary dense weight, if that cannot be.

        Raises:
            TopKastError: the weight is packed and sharded by FSDP2.
        """

    def compared(self, tiers: Tensor) -> tuple[Tensor, Sharding]:
        """Return integers that all processes must have alike before these sets are applied, and their sharding."""
        return tiers, self.sharding

    @abstractmethod
    def apply(self, tiers: Tensor, state: Sequence[EntryState] = ()) -> None:
        """Change the sets: promoted entries enter A with their stored values, demoted entries keep their values.

        Args:
            tiers: uint8 in the weight's shape, or this process' part of them.
            state: the optimizer's state. Entries outside the new B lose theirs, and that of entries that enter B
                begins anew.
        """

    @abstractmethod
    def record_first_reservoir(self) -> None:
        """Record the present C; `never_active_entries` counts its entries that have not been active since."""

    @abstractmethod
    def match_layout(self) -> None:
        """Move the other tensors to the parameter's device, dtype and memory format after the model was moved."""

    # --- around the optimizer's step ------------------------------------------------------------------------------

    @abstractmethod
    def mask_gradient(self) -> None:
        """Zero the gradient outside B, including infinite and NaN values."""

    def record_gradient(self) -> None:
        """Record the gradient's magnitudes, also outside B, for the next refresh."""
        raise NotImplementedError(f"{self.storage} weights have no gradient outside the updated set")

    @abstractmethod
    def open(self) -> None:
        """Expose θ on B to the optimizer."""

    @abstractmethod
    def close(self, lr: float | Tensor) -> None:
        """Apply the penalty on B and let the network compute with α again.

        Args:
            lr: the current learning rate; 0 leaves the values unchanged.
        """

    def step(self, update: Update, lr: float | Tensor, masks: bool) -> bool:
        """Do at once what masking the gradient, `open`, the optimizer's update and `close` do, if that can be.

        Args:
            update: the optimizer's, which it must then leave out; its state changes.
            lr: the current learning rate.
            masks: whether the gradient was not masked yet.

        Returns:
            whether the step was taken; if not, nothing has changed.
        """
        return False

    def end_step(self) -> None:
        """Note that a step was taken, of this process or by a captured graph; `close` calls it."""
        self.orders.step()
        self.replaced.clear()
        self._note_own_write()

    def abandon_step(self) -> None:
        """Close the weight without a change of values, after a step that was recorded and has computed nothing."""
        self.is_open = False
        self._powerpropagation = None

    @property
    def fixed(self) -> tuple[Any, ...]:
        """What a captured step holds fixed: λ, and where the tensors are that say which entries it reads."""
        return self.shrinkage.fixed, *((each.data_ptr(), each.numel()) for each in self._places())

    @abstractmethod
    def _places(self) -> Iterable[Tensor]:
        """Return the tensors that say which entries a step reads."""

    @abstractmethod
    def recover(self) -> None:
        """Finish an interrupted step or refresh and keep every θ."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """Return the value of the exploration penalty, a scalar tensor."""

    @property
    def is_settled(self) -> bool:
        """Whether the parameter is α, since no step or refresh is in progress."""
        return True

    @property
    def is_sparse(self) -> bool:
        """Whether the network computes with α, as it does between steps unless other code wrote to the weight."""
        return not self.stray_entries

    @property
    @abstractmethod
    def nonzero_entries(self) -> Tensor:
        """Entries of the weight that the network computes with which are not zero, counted now; a scalar tensor."""

    @property
    def was_written(self) -> bool:
        """Whether other code has written to the parameter since we last did; see `WriteWatch`."""
        return self.is_settled and self._writes.differs(self.parameter)

    @property
    def was_loaded(self) -> bool:
        """Whether `load_state_dict` of the model has loaded other values that were not taken over yet."""
        return False

    def _note_own_write(self) -> None:
        """Remember that the parameter is what we wrote."""
        self._writes.note(self.parameter)

    @property
    def stray_entries(self) -> int:
        """Entries outside A that are not zero in the weight that the network computes with; a collective if sharded."""
        if not self.sharding.is_sharded:
            return self.own_strays
        return int(self.sharding.sum(torch.tensor(self.own_strays, device=to_local(self.parameter).device)))

    @property
    def own_strays(self) -> int:
        """`stray_entries` of this process' part, which need no other process."""
        return 0

    @property
    def is_as_sparse(self) -> bool:
        """Whether what other code wrote has no more entries than A; not known, so False, for a sharded weight."""
        return not self.sharding.is_sharded and int(self.nonzero_entries) <= int(self.active_entries)

    def take_over(self) -> int:
        """Accept what other code wrote: the weight is α again.

        A sparse weight becomes α: its non-zero entries are the active ones, and θ is kept where it is zero. So does a
        dense one that `load_state_dict` of the model has loaded, after the sets are chosen again. Otherwise what was
        written outside A is zeroed, and θ is kept there; so too in a sharded weight, since other processes may
        not take part.

        Returns:
            the number of entries outside A that were zeroed.

        Raises:
            NonFiniteScoresError: a sparse weight with other entries holds NaN or infinity.
        """
        self._note_own_write()
        return 0

    def restore_sparsity(self) -> None:  # noqa: B027  packed weights are always sparse
        """Make the weight zero outside A after other code wrote to it; θ outside A is kept."""

    def _put_phi(self, values: Tensor, gradient: Tensor | None) -> None:
        """Under powerpropagation, replace θ and its gradient with φ and its gradient for the optimizer."""
        if self.exponent != 1:
            self._powerpropagation = Powerpropagation(values, self.exponent)
            values.copy_(self._powerpropagation.phi)
            if gradient is not None:
                self._powerpropagation.gradient_(gradient)

    def _put_theta(self, values: Tensor) -> None:
        """Put θ back."""
        if self._powerpropagation is not None:
            self._powerpropagation.leave_(values)
            self._powerpropagation = None

    def _as_theta(self, values: Tensor) -> Tensor:
        """Return θ for `values`, which are φ while the optimizer steps."""
        return values if self._powerpropagation is None else self._powerpropagation.theta_of(values)

    # --- other values ---------------------------------------------------------------------------------------------

    @abstractmethod
    def before(self) -> Before:
        """Return what is needed to put back the present values, a copy."""

    @abstractmethod
    def _put(self, theta: Tensor, tiers: Tensor) -> None:
        """Replace θ and the sets."""

    def replace(
        self, theta: Tensor, tiers: Tensor, before: Before, like: Before | None, was_written: bool = False
    ) -> None:
        """Replace θ and the sets by those of other values; the optimizer's state is moved before it is used.

        Args:
            theta: for a sharded weight this process' part.
            tiers: the entries' tiers, likewise.
            before: what `before` has returned before the other values were loaded, or after they were written.
            like: `before` or one of `replaced`, if the sets and θ outside A are those of it, so that all else is too.
            was_written: whether `before` has their α.
        """
        self.orders.replace(self.sets)
        if like is not None:
            self._never_active = like.never_active.clone()
        self._put(theta, tiers)
        if like is None:
            self.load_count = (self.replaced or [before])[0].load_count + 1
            self.record_first_reservoir()
        else:
            self.orders.present, self.load_count = like.order, like.load_count
            self.first_reservoir = like.first_reservoir
        if like is before or not self.was_trained:
            return
        self._remember(before, was_written)

    def _remember(self, before: Before, was_written: bool) -> None:
        """Keep what was replaced: what the last step has left first, which is put back most often, and the latest."""
        known = [each for each in self.replaced if each.order == before.order]  # at most one
        kept = known[0] if known and was_written else before
        if known and known[0] is self.replaced[0]:
            self.replaced[0] = kept
        else:
            self.replaced = [*(each for each in self.replaced if each.order != before.order), kept]
        del self.replaced[1 : 1 - _KEPT]

    # --- state ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def state_dict(self, gathered: bool = False) -> dict[str, Any]:
        """Return tiers and latent values (dense, contiguous), on CPU: tensors and primitives, alike for every storage.

        Args:
            gathered: return whole tensors of a sharded weight, on rank 0 only, rather than DTensors; a collective.
        """

    def check_state(self, state: Any) -> None:
        """Refuse a state that does not fit this weight, before anything is overwritten.

        Raises:
            TopKastError: the state does not fit; the message says what differs.
        """
        problem = problem_with(
            state, self._in_model(), self.active_count, self.updated_count, self.sharding, self.sizes_change
        )
        if not problem:
            tiers = self.sharding.to_local(state["tiers"]).to(to_local(self.parameter).device)
            if not self.structure.are_whole(tiers, self.sharding):
                problem = f"its sets do not consist of whole {self.structure}s; the file is damaged"
        if problem:
            raise TopKastError(f"the saved Top-KAST state does not fit weight '{self.name}': {problem}")
        saved = state["storage"]
        alike = (saved == "masked") == (self.storage == "masked")
        if not alike and self.shape == (self.updated_count,):  # both orders of the optimizer's state have one shape
            raise TopKastError(
                f"'{self.name}' is 1-D and all of it is updated, so its optimizer state cannot be converted from "
                f"'{saved}' to '{self.storage}'; resume with storage='{saved}'"
            )

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `check_state` has accepted; the model already holds the saved α."""

    @property
    def is_packed(self) -> bool:
        """Whether the parameter holds only the values of B."""
        return self.storage != "masked"

    # --- the optimizer's state ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def sets(self) -> Sets:
        """The present sets, of which the optimizer's state depends; see `Orders`."""

    @abstractmethod
    def adopt(self, value: Tensor, sets: Any, start: float = 0.0) -> Tensor:
        """Return a tensor of the optimizer's state in the parameter's shape, converted if another storage saved it.

        Args:
            value: of any shape; others than those of a storage are left alone.
            sets: those that it belongs to; None: not known, and `start` is returned if it is packed.
            start: the value of an entry that was never updated.
        """

    @abstractmethod
    def realign(self, state: Sequence[EntryState], sets: Any) -> None:
        """Move the optimizer's state from other sets to the present ones.

        Args:
            state: in the parameter's shape.
            sets: those that it belongs to.
        """

    @abstractmethod
    def sparsify_average(self, average: Any, active_before: Tensor | None) -> None:
        """Make a running average of α zero outside A, and restart it at θ for entries that have entered A.

        Args:
            average: the average in its own model: a `Tensor` in the weight's shape, or the `SparseWeight` of a packed
                layer.
            active_before: A at the previous call; not needed for packed weights.
        """

    @abstractmethod
    def _in_model(self) -> Tensor:
        """Return the weight that the model holds, dense; for a sharded weight this process' part."""

    def _counts(self) -> dict[str, Any]:
        return {
            "storage": self.storage,
            "first_reservoir": self.first_reservoir,
            "promoted": self.promoted,
            "active_count": self.active_count,
            "updated_count": self.updated_count,
            "strength": self.strength,
        }

    def _load_counts(self, state: dict[str, Any]) -> None:
        self.was_trained = True
        self.first_reservoir = state["first_reservoir"]
        self.promoted = state["promoted"]
        self.shrinkage.strength = state["strength"]
