"""Gradual magnitude pruning: from dense to sparse while it trains."""

from dataclasses import dataclass
from typing import ClassVar

from lightning_topkast.method.rule import Rule
from lightning_topkast.method.schedule import Moment, SparsityRamp


@dataclass(frozen=True)
class GradualPruning(Rule):
    """Start dense and prune the smallest entries, at first fast and then ever more slowly (Zhu & Gupta 2017).

    Pruned entries keep their values and get no gradient; one may come back as long as others shrink below it.

    Args:
        begin: pruning begins; an optimizer step (int) or a fraction of the run (float in [0, 1]).
        end: from then on the network has its final sparsity and the sets stand still; like `begin`.
        power: of the ramp; the paper's is cubic.
    """

    explores: ClassVar[bool] = False

    begin: Moment = 0.0
    end: Moment = 0.75
    power: float = 3.0

    @property
    def ramp(self) -> SparsityRamp:
        """From dense."""
        return SparsityRamp(0.0, 0.0, self.begin, self.end, self.power)

    @property
    def stop_refreshing_at(self) -> Moment:
        """The end of the ramp."""
        return self.end
