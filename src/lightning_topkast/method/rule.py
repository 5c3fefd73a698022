"""How the sets of weights are chosen: the one part in which Top-KAST and its baselines differ."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_topkast.method.schedule import Moment, SparsityRamp
from lightning_topkast.method.selection import TopK, nested_top_k, top_k_then_random

Exploration = Literal["magnitude", "random"]


@dataclass(frozen=True)
class Candidates:
    """The entries that sets are to be chosen among: those of one weight, or of several together.

    Every tensor has one shape; of sharded weights it is this process' part.

    Attributes:
        scores: |θ|, finite.
        active_count: how many shall be active.
        updated_count: how many shall be updated, at least `active_count`.
        active: gives the present A (bool).
        draw: gives numbers uniform in [0, 1), the same on every rank and in a resumed run.
        gradient: magnitudes of the loss' gradient everywhere, if the rule asked for them and there were any.
        passed: share of the time in which sets change that has passed, in [0, 1]; None if no end is known.
        select: finds the largest entries.
    """

    scores: Tensor
    active_count: int
    updated_count: int
    active: Callable[[], Tensor]
    draw: Callable[[], Tensor]
    gradient: Tensor | None = None
    passed: float | None = None
    select: TopK = nested_top_k


@dataclass(frozen=True)
class Rule:
    """Top-KAST's rule: A are the largest entries, B the next largest or random ones (paper sections 2.1 and 3.2).

    A rule of your own derives from this one and overrides `choose`; what it holds must be the same on every rank.
    """

    # whether B may be larger than A, and the exploration penalty applies
    explores: ClassVar[bool] = True
    # whether entries that leave B are forgotten, so that those which come back start from zero
    forgets: ClassVar[bool] = False
    # whether entries enter at zero and have to learn from there
    grows_from_zero: ClassVar[bool] = False
    # whether `choose` wants the gradient everywhere, which exists in masked mode only
    needs_gradient: ClassVar[bool] = False
    # whether `choose` wants to know how much of the time in which sets change has passed
    needs_length: ClassVar[bool] = False

    @property
    def ramp(self) -> SparsityRamp | None:
        """The ramp of sparsities that it brings along, instead of the run's."""
        return None

    @property
    def stop_refreshing_at(self) -> Moment | None:
        """When its sets stand still, unless the run says so."""
        return None

    def first(self, candidates: Candidates, exploration: Exploration) -> Tensor:
        """The sets to start with, as uint8 tiers.

        The network may be that of a checkpoint, whose sets are loaded after this: one as sparse already must not lose
        entries that are not zero, which are then the active ones.
        """
        return self.choose(candidates, exploration)

    def choose(self, candidates: Candidates, exploration: Exploration) -> Tensor:
        """The next sets, as uint8 tiers in the candidates' shape: 0 reservoir, 1 exploring, 2 active.

        Raises:
            NonFiniteScoresError: a score is NaN or infinite.
        """
        active, updated = candidates.active_count, candidates.updated_count
        if exploration == "random":
            return top_k_then_random(candidates.scores, active, updated, candidates.draw(), candidates.select)
        return candidates.select(candidates.scores, (updated, active))
