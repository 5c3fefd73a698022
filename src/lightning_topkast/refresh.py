"""When and how the sets of weights are chosen again, at once or in the background."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_topkast.distributed import check_ranks_agree
from lightning_topkast.errors import NonFiniteWeightError, TopKastError
from lightning_topkast.schedule import RefreshSchedule, step_of
from lightning_topkast.selection import ACTIVE, EXPLORING, NonFiniteScoresError, TopK, nested_top_k, top_k_then_random
from lightning_topkast.settings import Settings
from lightning_topkast.sharded_selection import nested_top_k_of_shards
from lightning_topkast.weights import Sharding, SparseWeight
from lightning_topkast.weights.state import holds_values

# One thread for all: selection is bound by memory, and the training goes on beside it.
_background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="topkast-refresh")


def choose(weight: SparseWeight, settings: Settings, step: int, explores: bool, scores: Tensor | None = None) -> Tensor:
    """The next sets of one weight, as tiers; of a sharded weight this process' part of them, by a collective.

    Args:
        weight: whose sets are chosen.
        settings: of the run.
        step: optimizer steps done; with the seed it decides random exploration.
        explores: whether B is to be larger than A.
        scores: |θ|; None for the present one.

    Raises:
        NonFiniteWeightError: the weight holds NaN or infinity.
    """
    scores = weight.magnitudes() if scores is None else scores
    active = weight.active_count
    updated = weight.updated_count if explores else active
    select = _selection_of(weight.sharding)
    try:
        if settings.exploration == "magnitude":
            return select(scores, (updated, active))
        # seeded by what every rank and a resumed run know, so that no generator state has to be kept
        seed = zlib.crc32(f"{settings.seed}/{step}/{weight.name}".encode())
        lottery = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
        return top_k_then_random(scores, active, updated, weight.sharding.part_of(lottery), select)
    except NonFiniteScoresError:
        raise NonFiniteWeightError(
            f"weight '{weight.name}' holds NaN or infinity at step {step}; its sets were left as they were. "
            "Lower the learning rate, clip gradients, or resume from the last checkpoint"
        ) from None


def _selection_of(sharding: Sharding) -> TopK:
    """How the largest entries of a weight are found, whose parts may be on several devices."""
    if not sharding.is_cut:
        return nested_top_k
    return partial(
        nested_top_k_of_shards, size=sharding.shape.numel(), total=sharding.sum, indices=sharding.flat_indices
    )


class Selection:
    """The next sets of some weights, by their values of now, chosen in the background.

    Args:
        weights: whose sets are chosen.
        settings: of the run.
        step: optimizer steps done.
    """

    def __init__(self, weights: Sequence[SparseWeight], settings: Settings, step: int) -> None:
        self.step = step
        self._loads = {weight: weight.loads for weight in weights}
        snapshots = [(weight, weight.snapshot()) for weight in weights]

        def work() -> dict[str, Tensor]:
            chosen = {weight.name: choose(weight, settings, step, True, scores()) for weight, scores in snapshots}
            for weight in weights:
                weight.prepare(chosen[weight.name])
            return chosen

        self._chosen: dict[str, Tensor] | Future[dict[str, Tensor]] = _background.submit(work)

    def result(self) -> dict[str, Tensor]:
        """Weight name → tiers, waiting for them if need be.

        Raises:
            NonFiniteWeightError: a weight held NaN or infinity.
        """
        if isinstance(self._chosen, Future):
            self._chosen = self._chosen.result()
        return self._chosen

    def concerns(self, weights: Iterable[SparseWeight]) -> bool:
        """Whether it chose for any of them."""
        return any(weight in self._loads for weight in weights)

    @property
    def is_valid(self) -> bool:
        """Whether the weights are still those it chose by, but for training."""
        return all(weight.loads == loads for weight, loads in self._loads.items())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_chosen": self.result()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only."""
        tiers = {name: tiers.cpu() for name, tiers in self.result().items()}
        return {"step": self.step, "tiers": tiers, "valid": self.is_valid}

    @classmethod
    def from_state(cls, state: Any, weights: Mapping[str, SparseWeight]) -> "Selection":
        """A selection that was saved before it took effect.

        Raises:
            TopKastError: it does not fit the weights.
        """
        state = state if isinstance(state, dict) else {}
        step, tiers, valid = state.get("step"), state.get("tiers"), state.get("valid", True)
        named = isinstance(tiers, dict) and bool(tiers) and not tiers.keys() - weights.keys()
        timed = isinstance(step, int) and step >= 0 and isinstance(valid, bool)
        if not isinstance(tiers, dict) or not named or not timed:
            raise TopKastError("the saved Top-KAST state is damaged: its sets to come name other weights, or no step")
        for name, chosen in tiers.items():
            weight = weights[name]
            counts = (weight.updated_count - weight.active_count, weight.active_count)
            fits = isinstance(chosen, Tensor) and (chosen.dtype, chosen.shape) == (torch.uint8, weight.shape)
            fits = fits and holds_values(chosen) and not bool((chosen > ACTIVE).any())
            if not fits or tuple(int((chosen == tier).sum()) for tier in (EXPLORING, ACTIVE)) != counts:
                raise TopKastError(f"the saved Top-KAST state is damaged: the sets to come of '{name}' don't fit it")
        selection = cls.__new__(cls)
        selection.step, selection._chosen = step, {name: chosen.contiguous() for name, chosen in tiers.items()}
        selection._loads = {weights[name]: weights[name].loads if valid else -1 for name in tiers}
        return selection


class Refresher:
    """Chooses the sets of weights again when the schedule says so, at once or in the background.

    Args:
        settings: of the run.
        state_of: gives the optimizer's state of a weight, which follows the sets.
    """

    def __init__(self, settings: Settings, state_of: Callable[[SparseWeight], list[Tensor]]) -> None:
        self.settings = settings
        self.schedule = RefreshSchedule(settings.update_every)
        self.count = 0
        self.follower: Callable[[], None] | None = None  # called after every refresh
        self.selections: list[Selection] = []  # chosen, to take effect `refresh_delay` steps later
        self._state_of = state_of

    def __getstate__(self) -> dict[str, Any]:
        """A copy is followed by nobody."""
        return self.__dict__ | {"follower": None}

    def plan(self, total_steps: int | float | None) -> None:
        """Set the run's length in optimizer steps, of which `stop_exploration_at` may be a fraction.

        Raises:
            TopKastError: it is, and the length is unknown.
        """
        try:
            stop = step_of(self.settings.stop_exploration_at, total_steps)
        except ValueError as error:
            raise TopKastError(str(error)) from None
        self.schedule = RefreshSchedule(self.settings.update_every, stop)

    @property
    def is_planned(self) -> bool:
        """Whether it is known when exploration stops, which may be a fraction of a run of unknown length."""
        return self.settings.stop_exploration_at is None or self.schedule.stop_exploration_at is not None

    def after_step(self, weights: Sequence[SparseWeight], step: int) -> None:
        """Do what is due once `step` optimizer steps are done with these weights."""
        for begun in [selection for selection in self.selections if selection.concerns(weights)]:
            if not begun.is_valid:  # other weights were loaded since
                self.selections.remove(begun)
                self.refresh(weights, step)
            elif step - begun.step >= self.settings.refresh_delay:
                self.selections.remove(begun)
                self._apply(weights, begun.result())
        if self.schedule.refreshes_after(step):
            if self.settings.refresh_delay and self.schedule.explores_at(step):
                self.selections.append(Selection(weights, self.settings, step))
            else:  # exploration stops now, not later
                self.selections = [selection for selection in self.selections if not selection.concerns(weights)]
                self.refresh(weights, step)

    def refresh(self, weights: Sequence[SparseWeight], step: int) -> None:
        """Choose the sets of weights now; all are chosen before any is changed.

        Raises:
            NonFiniteWeightError: a weight holds NaN or infinity; no weight's sets were changed.
            TopKastError: the ranks disagree.
        """
        explores = self.schedule.explores_at(step)
        self._apply(weights, {weight.name: choose(weight, self.settings, step, explores) for weight in weights})

    @torch.no_grad()
    def _apply(self, weights: Sequence[SparseWeight], chosen: Mapping[str, Tensor]) -> None:
        changed = [weight for weight in weights if weight.name in chosen]
        names = [weight.name for weight in changed]
        check_ranks_agree(names, [chosen[name] for name in names], [weight.sharding for weight in changed])
        states = [self._state_of(weight) if self.settings.reset_optimizer_state else [] for weight in changed]
        for weight, state in zip(changed, states, strict=True):
            weight.apply(chosen[weight.name], state)
        self.count += 1
        if self.follower is not None:
            self.follower()
