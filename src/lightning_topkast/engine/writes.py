"""What other code writes to sparse weights between the optimizer's steps."""

import warnings
from collections.abc import Iterable, Mapping

from lightning_topkast.errors import NonFiniteWeightError
from lightning_topkast.method.selection import NonFiniteScoresError
from lightning_topkast.weights import SparseWeight


class ForeignWrites:
    """Accepts what other code writes to weights, with one warning per run and kind."""

    def __init__(self) -> None:
        self._warned_of_writes = self._warned_of_dense_pass = False

    def accept(self, weights: Iterable[SparseWeight], closely: bool, averaged: bool) -> None:
        """Make the weights α again; see `TopKast.accept_writes`."""
        strays: dict[str, int] = {}
        for weight in weights:
            if not weight.is_settled:
                continue
            if weight.was_loaded or weight.was_written or (closely and weight.own_strays):
                if averaged and not weight.was_loaded:
                    weight.restore_sparsity()
                    continue
                try:
                    count = weight.take_over()
                except NonFiniteScoresError:
                    raise NonFiniteWeightError(
                        f"other code wrote weights with NaN or infinity into '{weight.name}'; write others"
                    ) from None
                if count:
                    strays[weight.name] = count
        if strays and not self._warned_of_writes:
            self._warned_of_writes = True
            warnings.warn(
                f"other code wrote to sparse weights between optimizer steps, outside their active sets: "
                f"{_listed(strays)}; these entries were zeroed again, here and from now on. Noise, an average or a "
                "perturbation must keep to `topkast.weights[name].active`; to load other weights, use load_state_dict",
                stacklevel=3,
            )

    def warn_if_dense(self, weights: Iterable[SparseWeight]) -> None:
        """Warn if the network computes with entries outside A; see `TopKast.warn_if_dense`."""
        if self._warned_of_dense_pass:
            return
        written = [weight for weight in weights if weight.is_settled and weight.was_written]
        strays = {
            weight.name: count
            for weight in written
            # weights that are as sparse, with other entries, will be taken over
            if not weight.is_as_sparse and (count := weight.own_strays)
        }
        if strays:
            self._warned_of_dense_pass = True
            warnings.warn(
                f"the network has computed with entries outside the active sets: {_listed(strays)}; other code wrote "
                "to the weights since the last optimizer step, such as a perturbation (SAM) or an average that was "
                "swapped in. Call restore_sparsity() of the engine after writing, or keep to "
                "`topkast.weights[name].active`",
                stacklevel=3,
            )


def _listed(counts: Mapping[str, int]) -> str:
    shown = [f"'{name}' ({count})" for name, count in list(counts.items())[:5]]
    return ", ".join(shown) + (f" and {len(counts) - 5} more" if len(counts) > 5 else "")
