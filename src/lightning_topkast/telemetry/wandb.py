"""Histograms, pictures and a table for Weights & Biases, and the sparse checkpoint with its densities."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.fabric.utilities.logger import _add_prefix
from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_topkast.telemetry.media import Lines, Picture, Table

_STEP = "trainer/global_step"  # WandbLogger's own name for the x axis
_LONGEST = 160  # bytes of a part of a name; W&B adds step, digest and suffix to it for a file name
_POINTS = 1000  # per line; W&B truncates a table after 10,000 rows
_SUMMARISED = ("forward_sparsity", "backward_sparsity", "model_sparsity", "reservoir_activated", "mask_change")


class WandbMedia:
    """Show metrics and media in the run of a `WandbLogger`.

    All that is logged at a step is one row, to which Lightning's own metrics of that step are added where there are
    some: W&B counts rows, and drops those that other code logs with `step=` once it has counted further.

    Args:
        logger: a logger that `serves` accepts.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = cast(WandbLogger, logger)
        self._run: Any = self._logger.experiment
        self._is_open = False
        self._run.define_metric(_STEP)
        self._run.define_metric("topkast/*", step_metric=_STEP)
        for name in _SUMMARISED:
            self._run.define_metric(f"topkast/{name}", step_metric=_STEP, summary="last")

    @staticmethod
    def serves(logger: Logger) -> bool:
        """Return whether `logger` supports media."""
        return isinstance(logger, WandbLogger)

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        """Store the settings of the run's engines beside the hyper-parameters."""
        self._run.config.update(dict(settings), allow_val_change=True)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics, in a row that is not ended."""
        self._log(_add_prefix(values, self._logger._prefix, self._logger.LOGGER_JOIN_CHAR), step)

    def show(self, media: Mapping[str, Any], step: int) -> None:
        """Log histograms, pictures, lines and tables under their names, in a row that is not ended."""
        self._log({_short(name): _wandb_form(name, value) for name, value in media.items()}, step)

    def end_row(self) -> None:
        """End the row that was begun, if there is one."""
        if self._is_open:
            self._run.log({}, commit=True)
            self._is_open = False

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log({**values, _STEP: step}, commit=False)
        self._is_open = True

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
