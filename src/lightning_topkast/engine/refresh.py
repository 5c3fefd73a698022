"""When and how the sets of weights are chosen again, at once or in the background."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_topkast.distributed import check_ranks_agree, own_part
from lightning_topkast.errors import NonFiniteWeightError, TopKastError
from lightning_topkast.method.course import Course
from lightning_topkast.method.density import overridden_densities
from lightning_topkast.method.rule import Candidates
from lightning_topkast.method.selection import ACTIVE, EXPLORING, NonFiniteScoresError
from lightning_topkast.settings import Settings
from lightning_topkast.weights import SparseWeight
from lightning_topkast.weights.state import holds_values

# One thread for all: selection is bound by memory, and the training goes on beside it.
_background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="topkast-refresh")


@dataclass(frozen=True)
class Choice:
    """What sets are chosen by, besides the weights.

    Args:
        settings: of the run.
        step: optimizer steps done; with the seed it decides what is drawn at random.
        counts: weight name → sizes of A and B.
        passed: share of the time in which sets change that has passed, or None if no end is known.
        is_first: whether there are no sets yet.
    """

    settings: Settings
    step: int
    counts: Mapping[str, tuple[int, int]]
    passed: float | None = None
    is_first: bool = False


def choose(
    weights: Sequence[SparseWeight], choice: Choice, scores: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """The next sets of weights that compete for their places, mostly of a single one.

    Args:
        weights: whose sets are chosen.
        choice: what by.
        scores: of each one's units; None for the present ones.

    Returns:
        weight name → tiers; of a sharded weight this process' part of them, by a collective.

    Raises:
        NonFiniteWeightError: a weight or the gradient looked at holds NaN or infinity.
    """
    rule, settings, join = choice.settings.chosen_rule, choice.settings, _joined
    units = settings.chosen_granularity
    scores = [weight.scores() for weight in weights] if scores is None else scores
    gradients = [weight.gradient_magnitudes for weight in weights if weight.gradient_magnitudes is not None]
    shardings = [weight.sharding for weight in weights]
    counts = [[units.units(count, weight.shape) for count in choice.counts[weight.name]] for weight in weights]
    candidates = Candidates(
        scores=join(scores),
        active_count=sum(active for active, _ in counts),
        updated_count=sum(updated for _, updated in counts),
        active=lambda: join([units.members(weight.active, weight.sharding) for weight in weights]),
        draw=lambda: join([_drawn(weight, choice) for weight in weights]),
        gradient=join([units.scores(values, at) for values, at in zip(gradients, shardings, strict=True)])
        if len(gradients) == len(weights)
        else None,
        passed=choice.passed,
        select=units.selection(shardings[0]),
    )
    try:
        tiers = (rule.first if choice.is_first else rule.choose)(candidates, settings.exploration)
    except NonFiniteScoresError:
        broken = [w.name for w, values in zip(weights, scores, strict=True) if not bool(torch.isfinite(values).all())]
        # of a sharded weight another process may hold it
        named = broken or [weight.name for weight in weights]
        what = f"weight '{named[0]}'" + (" or its gradient" if gradients and not broken else "")
        raise NonFiniteWeightError(
            f"{what} holds NaN or infinity at step {choice.step}; its sets were left as they were. "
            "Lower the learning rate, clip gradients, or resume from the last checkpoint"
        ) from None
    if len(weights) == 1:
        return {weights[0].name: units.tiers(tiers, shardings[0])}
    grids = [units.grid(weight.shape) for weight in weights]
    parts = zip(weights, tiers.split([grid.numel() for grid in grids]), grids, strict=True)
    return {weight.name: units.tiers(part.view(grid), weight.sharding) for weight, part, grid in parts}


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The entries of all, of a single one in its own shape."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([tensor.reshape(-1).to(tensors[0].device) for tensor in tensors])


def _drawn(weight: SparseWeight, choice: Choice) -> Tensor:
    """Numbers in [0, 1), seeded by what all ranks and a resumed run know, so that no generator state need be kept."""
    seed = zlib.crc32(f"{choice.settings.seed}/{choice.step}/{weight.name}".encode())
    units = choice.settings.chosen_granularity
    drawn = torch.rand(units.grid(weight.shape), generator=torch.Generator().manual_seed(seed))
    return units.part_of(drawn, weight.sharding).to(own_part(weight.parameter).device)


class Selection:
    """The next sets of some weights, by their values of now, chosen in the background.

    Args:
        weights: whose sets are chosen.
        choice: what by.
    """

    def __init__(self, weights: Sequence[SparseWeight], choice: Choice) -> None:
        self.step = choice.step
        self._loads = {weight: weight.loads for weight in weights}
        snapshots = [(weight, weight.snapshot()) for weight in weights]

        def work() -> dict[str, Tensor]:
            chosen: dict[str, Tensor] = {}
            for weight, scores in snapshots:
                chosen |= choose([weight], choice, [scores()])
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
            fits = fits and weight.granularity.are_whole(chosen, weight.sharding)
            sizes = tuple(int((chosen == tier).sum()) for tier in (EXPLORING, ACTIVE)) if fits else ()
            if not fits or (sizes != counts and not weight.sizes_vary):
                raise TopKastError(f"the saved Top-KAST state is damaged: the sets to come of '{name}' don't fit it")
        selection = cls.__new__(cls)
        selection.step, selection._chosen = step, {name: chosen.contiguous() for name, chosen in tiers.items()}
        selection._loads = {weights[name]: weights[name].loads if valid else -1 for name in tiers}
        return selection


class Refresher:
    """Chooses the sets of weights again when the schedule says so, at once or in the background.

    Args:
        course: of the run.
        state_of: gives the optimizer's state of a weight, which follows the sets.
    """

    def __init__(self, course: Course, state_of: Callable[[SparseWeight], list[Tensor]]) -> None:
        self.settings = course.settings
        self.course = course
        self.count = 0
        self.follower: Callable[[], None] | None = None  # called after every refresh
        self.selections: list[Selection] = []  # chosen, to take effect `refresh_delay` steps later
        self._state_of = state_of

    def __getstate__(self) -> dict[str, Any]:
        """A copy is followed by nobody."""
        return self.__dict__ | {"follower": None}

    def after_step(self, weights: Sequence[SparseWeight], step: int) -> None:
        """Do what is due once `step` optimizer steps are done with these weights."""
        for begun in [selection for selection in self.selections if selection.concerns(weights)]:
            if not begun.is_valid:  # other weights were loaded since
                self.selections.remove(begun)
                self.refresh(weights, step)
            elif step - begun.step >= self.settings.refresh_delay:
                self.selections.remove(begun)
                self._apply(weights, begun.result())
        if self.course.schedule.refreshes_after(step):
            if self.settings.refresh_delay and self.course.schedule.explores_at(step):
                self.selections.append(Selection(weights, self._choice(step)))
            else:  # exploration stops now, not later
                self.selections = [selection for selection in self.selections if not selection.concerns(weights)]
                self.refresh(weights, step)

    def refresh(self, weights: Sequence[SparseWeight], step: int) -> None:
        """Choose the sets of weights now; all are chosen before any is changed.

        Raises:
            NonFiniteWeightError: a weight holds NaN or infinity; no weight's sets were changed.
            TopKastError: the ranks disagree.
        """
        self._apply(weights, self._choose(weights, self._choice(step)))

    def begin(self, weights: Sequence[SparseWeight]) -> None:
        """Choose the first sets; as `refresh`, but that it counts as none."""
        # None of the run has passed, also where its length is known only later, as in a Trainer's.
        self._apply(weights, self._choose(weights, replace(self._choice(0), is_first=True, passed=0.0)))
        self.count = 0

    def _choice(self, step: int) -> Choice:
        return Choice(self.settings, step, self.course.counts_at(step), self.course.passed(step))

    def _choose(self, weights: Sequence[SparseWeight], choice: Choice) -> dict[str, Tensor]:
        alone, together = list(weights), []
        if self.settings.distribution == "global":
            overridden = overridden_densities(self.course.shapes, self.settings)
            alone = [weight for weight in weights if weight.name in overridden]
            together = [weight for weight in weights if weight.name not in overridden]
        chosen = choose(together, choice) if together else {}
        for weight in alone:
            chosen |= choose([weight], choice)
        return chosen

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
