"""Static: a random sparse network whose connections never change."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_topkast.rule import Candidates, Exploration, Rule
from lightning_topkast.selection import ACTIVE


@dataclass(frozen=True)
class Static(Rule):
    """Active entries are drawn at random before training and kept; all others are zero for good.

    The baseline of the literature on dynamic sparse training (Evci et al. 2020, section 4); with distribution="erk" its
    stronger form.
    """

    explores: ClassVar[bool] = False
    forgets: ClassVar[bool] = True

    def first(self, candidates: Candidates, exploration: Exploration) -> Tensor:
        """Random ones."""
        # NaN or infinity in the weights is to be found as elsewhere
        return candidates.select(candidates.draw() + 0 * candidates.scores, (candidates.active_count,)) * ACTIVE

    def choose(self, candidates: Candidates, exploration: Exploration) -> Tensor:
        """The present ones."""
        return candidates.active().to(torch.uint8) * ACTIVE
