"""Warnings of weights that are not trained as a user may think, each once per run."""

import warnings
from collections.abc import Mapping, Sequence

from lightning_topkast.engine.summary import without_reservoir
from lightning_topkast.method.targets import Target, find_thawed
from lightning_topkast.settings import Settings
from lightning_topkast.weights import SparseWeight


class Notices:
    """Looks for what is odd about the weights as training goes on.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._warned_of_thawed = False
        self.looks_for_reservoir = True  # until a step was taken, or a state loaded, whatever it holds

    def warn_of_lost_reservoir(self, weights: Mapping[str, SparseWeight], zeros: Mapping[str, tuple[int, int]]) -> None:
        """Warn if training begins with weights that an earlier run has left, but without its θ outside B.

        Args:
            weights: by name.
            zeros: weight name → the number of zeros in θ, and of those outside B, as training began.
        """
        if not self.looks_for_reservoir:
            return
        self.looks_for_reservoir = False
        if lost := without_reservoir(weights, zeros, self._settings):
            warnings.warn(
                f"{', '.join(lost[:5])} {'was' if len(lost) == 1 else 'were'} sparse already, and zero outside B, when "
                "training began: exploration draws at random until entries have values. To go on with an earlier run, "
                "keep its TopKast and attach that, or load its state: topkast.load_state_dict(state)",
                stacklevel=3,
            )

    def warn_of_left_out(self, unattached: Sequence[str], targets: Sequence[Target]) -> None:
        """Warn of weights that were to be sparse and are trained otherwise.

        Args:
            unattached: names of sparse weights that no optimizer holds, at the first refresh.
            targets: all parameters.
        """
        if unattached:
            warnings.warn(
                f"no attached optimizer holds {', '.join(unattached[:5])}, so training does not keep them sparse; "
                "attach their optimizer too, or exclude them",
                stacklevel=3,
            )
        thawed = [] if self._warned_of_thawed else find_thawed(targets, self._settings.targets)
        if thawed:
            self._warned_of_thawed = True
            warnings.warn(
                f"{', '.join(thawed[:5])} {'was' if len(thawed) == 1 else 'were'} frozen when training began and "
                "trained now, so dense for good; unfreeze what should be sparse before training begins (its learning "
                "rate may be 0), or exclude what should be dense",
                stacklevel=3,
            )
