"""Static: a random sparse network whose connections never change."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_topkast.method.rule import Candidates, Exploration, Rule
from lightning_topkast.method.selection import ACTIVE


@dataclass(frozen=True)
class Static(Rule):
    """Active entries are drawn at random before training and kept; all others are zero for good.

    The baseline of the literature on dynamic sparse training (Evci et al. 2020, section 4); with distribution="erk" its
    stronger form.
    """

    explores: ClassVar[bool] = False
    forgets: ClassVar[bool] = True

    def first(self, candidates: Candidates, exploration: Exploration) -> Tensor:
        """Random ones; zeros only if there are too few others, so that a sparse network keeps its connections.

        The network of a checkpoint is sparse already, by the sets of the step at which it was saved.
        """
        # NaN or infinity in the weights is to be found as elsewhere
        drawn = candidates.draw() + 0 * candidates.scores
        # numbers drawn are multiples of 2^-24 or finer; none below 0, whose bits would not order
        lottery = torch.where(candidates.scores == 0, drawn * 2**-25, drawn.clamp_min(2**-24))
        return candidates.select(lottery, (candidates.active_count,)) * ACTIVE

    def choose(self, candidates: Candidates, exploration: Exploration) -> Tensor:
        """The present ones."""
        return candidates.active().to(torch.uint8) * ACTIVE
