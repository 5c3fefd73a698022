"""Other methods of sparse training, as rules beside Top-KAST's: `TopKastCallback(0.9, 0.9, rule=RigL())`."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_topkast.checks import check, is_number
from lightning_topkast.method.rule import Candidates, Rule
from lightning_topkast.method.selection import ACTIVE, drop_and_grow


@dataclass(frozen=True)
class Static(Rule):
    """A random sparse network: active entries are drawn before training and kept; all others stay zero.

    The baseline of the literature on dynamic sparse training (Evci et al. 2020, section 4); with distribution="erk" its
    stronger form.
    """

    explores: ClassVar[bool] = False
    changes_sets: ClassVar[bool] = False
    clears_dropped: ClassVar[bool] = True

    def first(self, candidates: Candidates) -> Tensor:
        """Draw A at random; zeros only if there are too few other entries, so that a sparse network keeps its own.

        The network of a checkpoint is sparse already, by the sets of the step at which it was saved.
        """
        # a NaN or infinite score must reach the selection, which refuses it
        drawn = candidates.draw() + 0 * candidates.scores
        # numbers drawn are multiples of 2^-24 or finer; none below 0, whose bits would not order
        lottery = torch.where(candidates.scores == 0, drawn * 2**-25, drawn.clamp_min(2**-24))
        return candidates.select(lottery, (candidates.active_count,)) * ACTIVE

    def choose(self, candidates: Candidates) -> Tensor:
        """Keep the present A."""
        return candidates.active().to(torch.uint8) * ACTIVE


@dataclass(frozen=True)
class SET(Static):
    """Sparse evolutionary training: drop a share of A by magnitude, grow as many at random (Mocanu et al. 2018).

    Growth is among all entries that were not kept, so that one just dropped may come back, with its value. Grown
    entries start from zero, as in the comparisons of Evci et al. 2020 (the original draws them again). Stop refreshing
    before the run ends (Schedule(stop_updating_at=0.75)), or what its last refresh has grown is still zero.

    Args:
        drop_fraction: share of A that is dropped at a refresh, in (0, 1); ζ of the paper.

    Raises:
        TopKastError: a value out of range.
    """

    changes_sets: ClassVar[bool] = True
    grows_from_zero: ClassVar[bool] = True

    drop_fraction: float = 0.3

    def __post_init__(self) -> None:
        valid = is_number(self.drop_fraction) and 0 < self.drop_fraction < 1
        check(valid, "drop_fraction", self.drop_fraction, "a number in (0, 1)")

    def choose(self, candidates: Candidates) -> Tensor:
        """Drop the smallest, grow those with the largest growth scores."""
        growth = self.growth(candidates)
        dropped = 0 if growth is None else int(self.fraction(candidates.progress) * candidates.active_count)
        if growth is None or dropped == 0:  # in a ramp there may be fewer entries than before
            return candidates.select(candidates.scores, (candidates.active_count,), among=candidates.active()) * ACTIVE
        kept = candidates.active_count - dropped
        return drop_and_grow(candidates.scores, candidates.active(), growth, kept, dropped, candidates.select) * ACTIVE

    def growth(self, candidates: Candidates) -> Tensor | None:
        """Return the scores of which the largest grow: random ones."""
        return candidates.draw()

    def fraction(self, progress: float | None) -> float:
        """Return the share of A that is dropped: a constant.

        Args:
            progress: share of the time in which sets change that has passed.
        """
        return self.drop_fraction


@dataclass(frozen=True)
class RigL(SET):
    """The rigged lottery: grow where the loss' gradient is largest, ever fewer entries (Evci et al. 2020, section 3).

    The gradient of every entry is computed in the step before a refresh only. That step updates the weights as any
    other does; the paper leaves it out. Stop refreshing at three quarters of the run, as the paper does:
    Schedule(stop_updating_at=0.75).

    Args:
        drop_fraction: share of A that is dropped at first, in (0, 1); α of the paper. It falls to zero as a cosine, at
            the step where refreshes stop or the run ends.
    """

    needs_gradient: ClassVar[bool] = True
    needs_length: ClassVar[bool] = True

    def growth(self, candidates: Candidates) -> Tensor | None:
        """Return the magnitudes of the gradient."""
        return candidates.gradient

    def fraction(self, progress: float | None) -> float:
        """Return α / 2 · (1 + cos(π t / T_end))."""
        assert progress is not None
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * progress))
