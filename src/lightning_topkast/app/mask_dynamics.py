"""How the masks move during a run, over windows of many refreshes: what the paper plots of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_topkast import TopKastCallback
from lightning_topkast.app.errors import AppError
from lightning_topkast.telemetry.metrics import MaskChange, ReservoirActivation
from lightning_topkast.weights import SparseWeight


class MaskDynamics(Callback):
    """Logs, at the end of each window of steps, the least, mean and greatest of two shares over the sparse weights.

    `masks/change_<min|mean|max>` is the share of the active entries that were not active at the window's start;
    `masks/activated_<min|mean|max>` the share of the first reservoir's entries that have been active since. The log of
    `topkast/mask_change` at every refresh can't be summed up to the former, since entries come back.

    Args:
        every: Steps of a window; the paper has 5,000.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise AppError(f"mask_dynamics: every={every} is not valid: expected a number of steps, at least 1")
        self.every = every
        self._step = 0  # when the window began
        self._active: dict[str, Tensor] = {}  # A then

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the window of an earlier run; that of a checkpoint is loaded after this."""
        if stage == "fit":
            self._active = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the first sets, once the sparsity callback, which comes before, has chosen them."""
        weights = self._weights(trainer)
        if not self._active:
            self._begin(trainer.global_step, weights)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Log if the window ends with this step."""
        if trainer.global_step < self._step + self.every:
            return
        weights = self._weights(trainer)
        values = self._shares(weights)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._begin(trainer.global_step, weights)

    def state_dict(self) -> dict[str, Any]:
        """The window under way, so that a run that goes on logs what an uninterrupted one does."""
        return {"step": self._step, "active": self._active}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the window of a checkpoint."""
        self._step, self._active = state_dict["step"], state_dict["active"]

    def _begin(self, step: int, weights: Sequence[SparseWeight]) -> None:
        self._step = step
        self._active = {weight.name: weight.active.cpu() for weight in weights}

    def _shares(self, weights: Sequence[SparseWeight]) -> dict[str, float]:
        changes, activations = [], []
        for weight in weights:
            change, activated = (kind(sync_on_compute=False) for kind in (MaskChange, ReservoirActivation))
            change.update(self._active[weight.name], weight.active.cpu())
            activated.count(weight.first_reservoir - weight.dormant_entries.cpu(), weight.first_reservoir)
            changes.append(change.compute())
            activations.append(activated.compute())
        values = {}
        for name, shares in (("change", torch.stack(changes)), ("activated", torch.stack(activations))):
            for of_layers in ("min", "mean", "max"):
                values[f"masks/{name}_{of_layers}"] = float(getattr(shares, of_layers)())
        return values

    @staticmethod
    def _weights(trainer: Trainer) -> list[SparseWeight]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        engines = [c.topkast for c in callbacks if isinstance(c, TopKastCallback) and c.topkast is not None]
        weights = [weight for engine in engines for weight in engine.weights.values()]
        if not weights:
            raise AppError("callbacks=mask_dynamics needs a sparse run: sparsity=topkast, or other callbacks")
        if any(weight.sharding.is_cut for weight in weights):
            raise AppError("callbacks=mask_dynamics does not follow masks that are sharded: trainer=ddp, or one device")
        return weights
