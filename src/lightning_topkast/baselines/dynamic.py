"""SET and RigL: at a refresh the smallest active entries are dropped and as many others grown, from zero."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_topkast.baselines.static import Static
from lightning_topkast.method.rule import Candidates, Exploration
from lightning_topkast.method.selection import ACTIVE, drop_and_grow


@dataclass(frozen=True)
class SET(Static):
    """Sparse evolutionary training: drop a share of A by magnitude, grow as many at random (Mocanu et al. 2018).

    Growth is among all entries that were not kept, so that one just dropped may come back, with its value. Grown
    entries start from zero, as in the comparisons of Evci et al. 2020 (the original draws them anew). Stop refreshing
    before the run ends (stop_refreshing_at=0.75), or what its last refresh has grown is still zero.

    Args:
        drop_fraction: share of A that is dropped at a refresh, in (0, 1); ζ of the paper.
    """

    grows_from_zero: ClassVar[bool] = True

    drop_fraction: float = 0.3

    def __post_init__(self) -> None:
        fraction = self.drop_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise ValueError(f"drop_fraction={fraction!r} is not valid: expected a number in (0, 1)")

    def choose(self, candidates: Candidates, exploration: Exploration) -> Tensor:
        """Drop the smallest, grow those with the largest growth scores."""
        growth = self.growth(candidates)
        dropped = 0 if growth is None else int(self.fraction(candidates.passed) * candidates.active_count)
        if growth is None or dropped == 0:
            return super().choose(candidates, exploration)
        kept = candidates.active_count - dropped
        return drop_and_grow(candidates.scores, candidates.active(), growth, kept, dropped, candidates.select) * ACTIVE

    def growth(self, candidates: Candidates) -> Tensor | None:
        """Scores of which the largest grow: random ones."""
        return candidates.draw()

    def fraction(self, passed: float | None) -> float:
        """Share of A that is dropped when a share `passed` of the time in which sets change has passed: a constant."""
        return self.drop_fraction


@dataclass(frozen=True)
class RigL(SET):
    """The rigged lottery: grow where the loss' gradient is largest, ever fewer of them (Evci et al. 2020, section 3).

    The gradient everywhere is looked at in the step before a refresh only. That step is taken as any other; the paper
    leaves it out. Stop refreshing at three quarters of the run, as the paper does: stop_refreshing_at=0.75.

    Args:
        drop_fraction: share of A that is dropped at first, in (0, 1); α of the paper. It falls to zero as a cosine, at
            the step where refreshes stop or the run ends.
    """

    needs_gradient: ClassVar[bool] = True
    needs_length: ClassVar[bool] = True

    def growth(self, candidates: Candidates) -> Tensor | None:
        """Magnitudes of the gradient."""
        return candidates.gradient

    def fraction(self, passed: float | None) -> float:
        """α / 2 · (1 + cos(π t / T_end))."""
        assert passed is not None
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * passed))
