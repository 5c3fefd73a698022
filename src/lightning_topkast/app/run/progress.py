"""A progress bar with the sparsity of the network, or one line per epoch if the output is not a terminal."""

from __future__ import annotations

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_topkast.app.terminal import say


class SparsityProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the realised forward sparsity of the sparse weights.

    If the output is not a terminal (a file, a batch job), one line is printed per epoch instead.

    Args:
        refresh_rate: Batches between two updates of the bar.
        options: Further arguments of `TQDMProgressBar`.
    """

    def __init__(self, refresh_rate: int = 1, **options: Any) -> None:
        self._on_terminal = sys.stdout.isatty()
        super().__init__(refresh_rate=refresh_rate if self._on_terminal else 0, **options)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Add `sparsity` to the metrics of the bar, and remove the version number of the logger."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        sparsity = trainer.callback_metrics.get("topkast/forward_sparsity")
        if sparsity is not None:
            metrics["sparsity"] = f"{float(sparsity):.3f}"
        return metrics

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self._on_terminal and trainer.is_global_zero:
            metrics = self.get_metrics(trainer, pl_module).items()
            shown = (
                f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in metrics
            )
            say(" ".join([f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}:", *shown]))
