"""Which entries the sets hold: the one part in which Top-KAST and its baselines differ."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_topkast.checks import check_choice
from lightning_topkast.method.selection import TopK, nested_top_k, top_k_then_random


@dataclass(frozen=True)
class Candidates:
    """The units (entries, or blocks of them) of which sets are chosen: of a weight, or of several that compete.

    Each matrix of a stack, such as an expert, is a weight of its own here.

    Every tensor has one shape; of sharded weights it is this process' part.

    Attributes:
        scores: |θ|, finite; of a block the norm of its entries.
        active_count: number of units to be active.
        updated_count: number of units to be updated, at least `active_count`.
        active: returns the present A (bool).
        draw: returns random numbers, uniform in [0, 1), the same on every rank and in a resumed run.
        gradient: magnitudes of the loss' gradient everywhere, if the rule needs them and there were any.
        progress: share of the time in which sets change that has passed, in [0, 1]; None if no end is known.
        select: finds the largest units. Which of those whose score is zero enter is drawn, where not all of them do.
    """

    scores: Tensor
    active_count: int
    updated_count: int
    active: Callable[[], Tensor]
    draw: Callable[[], Tensor]
    gradient: Tensor | None = None
    progress: float | None = None
    select: TopK = nested_top_k


class Rule(ABC):
    """Chooses the sets of a weight.

    A rule of your own overrides `choose`; what it holds must be the same on every rank. A rule knows no schedule:
    `Schedule` says when it is asked, and `Ramp` how many entries it chooses.
    """

    # whether B may be larger than A, and the exploration penalty applies
    explores: ClassVar[bool] = True
    # whether a refresh may choose other sets
    changes_sets: ClassVar[bool] = True
    # whether entries that leave B lose their values, so that those which come back start from zero
    clears_dropped: ClassVar[bool] = False
    # whether entries enter A at zero and have to learn from there
    grows_from_zero: ClassVar[bool] = False
    # whether `choose` needs the gradient of every entry, which exists in masked mode only
    needs_gradient: ClassVar[bool] = False
    # whether `choose` needs `Candidates.progress`
    needs_length: ClassVar[bool] = False

    def first(self, candidates: Candidates) -> Tensor:
        """Return the sets to start with, as uint8 tiers.

        The network may be that of a checkpoint whose sets are loaded later: if it is as sparse already, its non-zero
        entries must be the active ones.
        """
        return self.choose(candidates)

    @abstractmethod
    def choose(self, candidates: Candidates) -> Tensor:
        """Return the next sets, as uint8 tiers in the candidates' shape: 0 reservoir, 1 exploring, 2 active.

        Raises:
            NonFiniteScoresError: a score is NaN or infinite.
        """


@dataclass(frozen=True)
class Magnitude(Rule):
    r"""Top-KAST's rule: A has the largest entries, B the next largest or random ones (paper sections 2.1 and 3.2).

    Args:
        exploration: how B\A is chosen: the next largest entries ("magnitude") or random ones ("random", an ablation).
    """

    exploration: Literal["magnitude", "random"] = "magnitude"

    def __post_init__(self) -> None:
        check_choice("exploration", self.exploration, Literal["magnitude", "random"])

    def choose(self, candidates: Candidates) -> Tensor:
        """Return the largest entries as A, and B by `exploration`."""
        active, updated = candidates.active_count, candidates.updated_count
        if self.exploration == "random":
            return top_k_then_random(candidates.scores, active, updated, candidates.draw(), candidates.select)
        return candidates.select(candidates.scores, (updated, active))
