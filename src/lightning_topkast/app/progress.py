"""A progress bar that shows how sparse the network is."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class SparsityProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the realised forward sparsity of the sparse weights."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Add `sparsity` to what the bar shows, without the version number of the logger."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        sparsity = trainer.callback_metrics.get("topkast/forward_sparsity")
        if sparsity is not None:
            metrics["sparsity"] = f"{float(sparsity):.3f}"
        return metrics
