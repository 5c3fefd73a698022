"""Histograms, pictures and a table for Weights & Biases, and the sparse checkpoint with its densities."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_topkast.telemetry.media import Lines, Picture, Table

_STEP = "trainer/global_step"  # WandbLogger's own name for the x axis
_LONGEST = 160  # bytes of a part of a name; W&B adds step, digest and suffix to it for a file name
_POINTS = 1000  # per line; W&B truncates a table after 10,000 rows
_SUMMARISED = ("forward_sparsity", "backward_sparsity", "model_sparsity", "reservoir_activated", "mask_change")


class WandbMedia:
    """Show media in the run of a `WandbLogger`.

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
        """Return whether `logger` supports media."""
        return isinstance(logger, WandbLogger)

    def show(self, media: Mapping[str, Any], step: int) -> None:
        """Log histograms, pictures, lines and tables under their names."""
        shown = {_short(name): _wandb_form(name, value) for name, value in media.items()}
        self._run.log(shown | {_STEP: step})

    def hand_over(self, checkpoint: Path, metadata: Mapping[str, Any]) -> None:
        """Log the checkpoint as an artifact, if the logger logs models."""
        import wandb

        if not self._logger._log_model:
            return
        artifact = wandb.Artifact(f"sparse-model-{self._run.id}", "model", metadata=dict(metadata))
        artifact.add_file(str(checkpoint), name="model.ckpt")  # the name in WandbLogger's own artifacts
        self._run.log_artifact(artifact)


def _short(name: str) -> str:
    """Return `name` with parts between slashes that are too long for a file name shortened, and still unique."""
    parts = name.split("/")
    for index, part in enumerate(parts):
        encoded = part.encode()
        if len(encoded) > _LONGEST:
            digest = hashlib.sha256(encoded).hexdigest()[:8]
            parts[index] = f"{encoded[:_LONGEST].decode(errors='ignore')}-{digest}"
    return "/".join(parts)


def _wandb_form(name: str, value: Any) -> Any:
    import wandb

    if isinstance(value, Picture):
        return wandb.Image(value.image, caption=value.caption)
    if isinstance(value, Table):
        return wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
    if isinstance(value, Lines):
        title = name.partition("/")[2].replace("_", " ")
        every = -(-len(value.steps) // _POINTS) or 1
        lines = [line[::every] for line in value.values.values()]
        return wandb.plot.line_series(value.steps[::every], lines, list(value.values), title, "step")
    counts, edges = value
    return wandb.Histogram(np_histogram=(np.asarray(counts), np.asarray(edges)))
