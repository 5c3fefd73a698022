"""The histograms and pictures of a run for TensorBoard, and its table as text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_topkast.telemetry.media import Lines, Picture, Table
from lightning_topkast.text import markdown


class TensorBoardMedia:
    """Show metrics and media in the run of a `TensorBoardLogger`.

    Args:
        logger: a logger that `serves` accepts.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = cast(TensorBoardLogger, logger)
        self._writer: Any = self._logger.experiment

    @staticmethod
    def serves(logger: Logger) -> bool:
        """Return whether `logger` supports media."""
        return isinstance(logger, TensorBoardLogger)

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        """Log the settings of the run's engines as text."""
        self._writer.add_text("topkast/settings", f"```\n{json.dumps(settings, indent=2)}\n```")

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics."""
        self._logger.log_metrics(dict(values), step)

    def end_row(self) -> None:
        """Do nothing, since TensorBoard knows no rows."""

    def show(self, media: Mapping[str, Any], step: int) -> None:
        """Log histograms, pictures and tables under their names."""
        for name, value in media.items():
            if isinstance(value, Picture):
                self._writer.add_image(name, np.asarray(value.image), step, dataformats="HWC")
            elif isinstance(value, Table):
                self._writer.add_text(name, _markdown(value), step)
            elif not isinstance(value, Lines):  # TensorBoard already has each line as a metric
                counts, edges = (np.asarray(part, dtype=float) for part in value)
                middles = (edges[:-1] + edges[1:]) / 2  # TensorBoard also needs moments, here of the bins' middles
                self._writer.add_histogram_raw(
                    name, min=edges[0], max=edges[-1], num=counts.sum(), sum=(counts * middles).sum(),
                    sum_squares=(counts * middles**2).sum(), bucket_limits=edges[1:].tolist(),
                    bucket_counts=counts.tolist(), global_step=step,
                )  # fmt: skip

    def hand_over(self, checkpoint: Path, metadata: Mapping[str, Any]) -> None:
        """Do nothing, since TensorBoard does not store models."""


def _markdown(table: Table) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(markdown(str(value)) for value in row) + " |" for row in rows)
