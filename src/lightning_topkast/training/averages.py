"""Keeping weight averages of a sparse model sparse."""

from collections.abc import Iterator

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from torch import Tensor, nn

from lightning_topkast.layers import packed_weights
from lightning_topkast.topkast import TopKast

# WeightAveraging came with Lightning 2.6
_AVERAGING = tuple(
    getattr(callbacks, name) for name in ("WeightAveraging", "StochasticWeightAveraging") if hasattr(callbacks, name)
)


class SparseAverages:
    """Keep the averages that other callbacks compute of a model zero outside A.

    An average over changing masks is not sparse, but those callbacks validate and save it. `update` is called often
    enough that the callbacks may come before or after the Top-KAST callback in the Trainer.

    Args:
        trainer: its callbacks are searched for averages.
        topkast: the engine of the averaged model.
    """

    def __init__(self, trainer: Trainer, topkast: TopKast) -> None:
        self._trainer = trainer
        self._topkast = topkast
        self._active = self._masks()
        self._refreshes = topkast.refresh_count

    @staticmethod
    def exist_in(trainer: Trainer) -> bool:
        """Return whether a callback of the Trainer averages the model."""
        return any(isinstance(callback, _AVERAGING) for callback in callbacks_of(trainer))

    def update(self) -> None:
        """Make all averages zero outside the current sets."""
        for average in _averages(self._trainer):
            parameters = {
                name.replace("_orig_mod.", ""): parameter.detach()
                for name, parameter in average.named_parameters(remove_duplicate=False)
            }
            packed = packed_weights(average)
            for name, weight in self._topkast.weights.items():
                weight.sparsify_average(packed.get(name, parameters[name]), self._active.get(name))
        if self._refreshes != self._topkast.refresh_count:
            self._refreshes = self._topkast.refresh_count
            self._active = self._masks()

    def _masks(self) -> dict[str, Tensor]:
        return {name: weight.active for name, weight in self._topkast.weights.items() if not weight.is_packed}


def copy_again(trainer: Trainer, pl_module: LightningModule) -> None:
    """Restart averages from the packed model if their callbacks were set up before ours."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, _AVERAGING) and getattr(callback, "_average_model", None) is not None:
            callback.setup(trainer, pl_module, "fit")


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's callbacks, an attribute that type checkers do not find."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    for callback in callbacks_of(trainer):
        if isinstance(callback, _AVERAGING):
            model = getattr(callback, "_average_model", None)
            if model is not None:
                yield getattr(model, "module", model)  # AveragedModel wraps, StochasticWeightAveraging copies
