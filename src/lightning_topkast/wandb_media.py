"""Histograms, pictures and a table for Weights & Biases, and the sparse checkpoint with its densities."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_topkast.media import Lines, Picture, Table

_STEP = "trainer/global_step"  # WandbLogger's own name for the x axis
_SUMMARISED = ("forward_sparsity", "backward_sparsity", "model_sparsity", "reservoir_activated", "mask_change")


class WandbMedia:
    """Shows media in one `WandbLogger`'s run.

    Args:
        logger: a logger that `serves` accepts.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = cast(WandbLogger, logger)
        self._run: Any = self._logger.experiment
        self._run.define_metric(_STEP)
        self._run.define_metric("topkast/*", step_metric=_STEP)
        for name in _SUMMARISED:
            self._run.define_metric(f"topkast/{name}", step_metric=_STEP, summary="last")

    @staticmethod
    def serves(logger: Logger) -> bool:
        """Whether `logger` can take media."""
        return isinstance(logger, WandbLogger)

    def show(self, media: Mapping[str, Any], step: int) -> None:
        """Log histograms, pictures, lines and tables by their names."""
        self._run.log({name: _wandb_form(name, value) for name, value in media.items()} | {_STEP: step})

    def hand_over(self, checkpoint: Path, metadata: Mapping[str, Any]) -> None:
        """Log the checkpoint as an artifact, if the logger logs models at all."""
        import wandb

        if not self._logger._log_model:
            return
        artifact = wandb.Artifact(f"sparse-model-{self._run.id}", "model", metadata=dict(metadata))
        artifact.add_file(str(checkpoint), name="model.ckpt")  # the name of WandbLogger's own artifacts
        self._run.log_artifact(artifact)


def _wandb_form(name: str, value: Any) -> Any:
    import wandb

    if isinstance(value, Picture):
        return wandb.Image(value.image, caption=value.caption)
    if isinstance(value, Table):
        return wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
    if isinstance(value, Lines):
        title = name.partition("/")[2].replace("_", " ")
        return wandb.plot.line_series(value.steps, list(value.values.values()), list(value.values), title, "step")
    counts, edges = value
    return wandb.Histogram(np_histogram=(np.asarray(counts), np.asarray(edges)))
