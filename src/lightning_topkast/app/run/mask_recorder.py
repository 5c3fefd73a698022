"""Record the masks of a few weights over a run, for the slider of its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_topkast import TopKast
from lightning_topkast.app.errors import AppError, explain
from lightning_topkast.app.run.mask_dynamics import engines_of
from lightning_topkast.app.run_folder.mask_history import (
    MOST_BLOCKS,
    MOST_MOMENTS,
    MOST_WEIGHTS,
    DrawnWeight,
    MaskHistory,
    Moment,
    as_bytes,
    read_mask_history,
    write_mask_history,
)
from lightning_topkast.app.run_folder.masks import spread
from lightning_topkast.app.terminal import say
from lightning_topkast.telemetry.pictures import as_matrix, block_shares, block_side
from lightning_topkast.weights import SparseWeight


class MaskRecorder(Callback):
    """Write the masks at the start, at evenly spaced refreshes and at the end to `masks.json`.

    When there are too many moments, every other one is dropped, and from then on only every other refresh is recorded.
    A resumed run continues the record up to its checkpoint. Sharded weights are not recorded, since no process has all
    of their masks.

    Args:
        folder: The folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._engines: list[TopKast] = []
        self._weights: list[SparseWeight] = []
        self._every = 1  # refreshes
        self._moments: list[Moment] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the first masks, which the sparsity callback, an earlier one, has selected by now."""
        self._engines = engines_of(trainer) if trainer.is_global_zero else []
        weights = [weight for engine in self._engines for weight in engine.weights.values()]
        self._weights = spread([weight for weight in weights if not weight.is_dtensor], MOST_WEIGHTS)
        self._every, self._moments = 1, []
        if trainer.global_step:
            self._continue()
        self._record()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Record the masks if they have been refreshed."""
        self._record()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last masks."""
        self._record(is_last=True)

    def _continue(self) -> None:
        """Take over what the run has recorded up to its checkpoint."""
        try:
            history = read_mask_history(self._folder)
        except (AppError, OSError):
            return  # begin anew
        if history is not None and history.weights == list(map(_drawn, self._weights)):
            self._every = history.every
            self._moments = [each for each in history.moments if each.refresh <= self._refresh]
            self._thin()

    def _record(self, is_last: bool = False) -> None:
        refresh = self._refresh
        known = bool(self._moments) and self._moments[-1].refresh == refresh
        if not self._weights or known or not (is_last or refresh % self._every == 0 or not self._moments):
            return
        while len(self._moments) == MOST_MOMENTS:
            self._every *= 2
            self._thin()
        masks = [as_bytes(block_shares(weight.tiers, MOST_BLOCKS).cpu().numpy()) for weight in self._weights]
        step = max(engine.step_count for engine in self._engines)
        self._moments.append(Moment(step=step, refresh=refresh, masks=masks))
        history = MaskHistory(weights=list(map(_drawn, self._weights)), every=self._every, moments=self._moments)
        try:
            write_mask_history(self._folder, history)
        except OSError as error:
            say(f"the masks over the run are not recorded from step {step} on: {explain(error) or error}", error=True)
            self._weights = []

    def _thin(self) -> None:
        self._moments = [each for each in self._moments if each.refresh % self._every == 0]

    @property
    def _refresh(self) -> int:
        """Number of refreshes so far; 0 for the first selection."""
        return sum(engine.refresh_count for engine in self._engines)


def _drawn(weight: SparseWeight) -> DrawnWeight:
    height, width = as_matrix(torch.empty(weight.shape, device="meta")).shape
    rows, columns = (-(-side // block_side(side, MOST_BLOCKS)) for side in (height, width))
    return DrawnWeight(
        name=weight.name, shape=list(weight.shape), height=height, width=width, rows=rows, columns=columns
    )
