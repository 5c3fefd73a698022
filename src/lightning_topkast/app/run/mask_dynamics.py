"""Log how much the masks change over windows of many refreshes, as the paper plots it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_topkast import TopKast, TopKastCallback
from lightning_topkast.app.errors import AppError
from lightning_topkast.telemetry.metrics import MaskChange, ReservoirActivation
from lightning_topkast.weights import SparseWeight


class MaskDynamics(Callback):
    """Log the minimum, mean and maximum of two fractions over the sparse weights at the end of each window of steps.

    `masks/change_<min|mean|max>` is the fraction of active entries that were not active at the start of the window,
    `masks/activated_<min|mean|max>` the fraction of the first reservoir that has been active since. The former is not
    the sum of `topkast/mask_change` over the refreshes, since entries may return.

    Args:
        every: Steps per window; the paper has 5,000.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise AppError(f"mask_dynamics: every={every} is not valid: expected a number of steps, at least 1")
        self.every = every
        self._step = 0  # start of the window
        self._active: dict[str, Tensor] = {}  # A at that step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the window; that of a checkpoint is loaded after this hook."""
        if stage == "fit":
            self._active = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the first sets, which the sparsity callback, an earlier one, has selected by now."""
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
        """Return the current window, so that a resumed run logs the same as an uninterrupted one."""
        return {"step": self._step, "active": self._active}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the window of a checkpoint."""
        self._step, self._active = state_dict["step"], state_dict["active"]

    def _begin(self, step: int, weights: Sequence[SparseWeight]) -> None:
        self._step = step
        self._active = {weight.name: weight.active.cpu() for weight in weights}

    def _shares(self, weights: Sequence[SparseWeight]) -> dict[str, float]:
        changes, activations = [], []
        for weight in weights:
            change, activated = (kind(sync_on_compute=False) for kind in (MaskChange, ReservoirActivation))
            change.update(self._active[weight.name], weight.active.cpu())
            activated.count(weight.first_reservoir - weight.never_active_entries.cpu(), weight.first_reservoir)
            changes.append(change.compute())
            activations.append(activated.compute())
        values = {}
        for name, shares in (("change", torch.stack(changes)), ("activated", torch.stack(activations))):
            for of_layers in ("min", "mean", "max"):
                values[f"masks/{name}_{of_layers}"] = float(getattr(shares, of_layers)())
        return values

    @staticmethod
    def _weights(trainer: Trainer) -> list[SparseWeight]:
        weights = [weight for engine in engines_of(trainer) for weight in engine.weights.values()]
        if not weights:
            raise AppError("callbacks=mask_dynamics needs a sparse run: use sparsity=topkast, or other callbacks")
        if any(weight.is_dtensor for weight in weights):
            raise AppError(
                "callbacks=mask_dynamics does not support sharded masks: use a single device, or trainer=ddp"
            )
        return weights


def engines_of(trainer: Trainer) -> list[TopKast]:
    """Return the engines of a run, once training has started; none for a dense run."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [c.topkast for c in callbacks if isinstance(c, TopKastCallback) and c.topkast is not None]
