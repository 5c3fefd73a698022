"""`RunMeter`: how long a training has taken and what it has seen, across interruptions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_topkast.checks import is_count, is_number


@dataclass(frozen=True)
class Progress:
    """Seconds in `fit`, optimizer steps and training examples of all processes."""

    seconds: float
    steps: int
    examples: int


class RunMeter(Callback):
    """Count the seconds, steps and examples of training; checkpoints keep the counts."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None
        self._steps = self._examples = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batches of all processes."""
        self._examples += _batch_size(batch) * trainer.world_size
        self._steps = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds, self._since = self.progress().seconds, None

    def progress(self) -> Progress:
        """Return the counts up to the current step."""
        now = 0.0 if self._since is None else time.perf_counter() - self._since
        return Progress(self._seconds + now, self._steps, self._examples)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return dict(vars(self.progress()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the counts of a checkpoint."""
        seconds, steps, examples = (state_dict[name] for name in ("seconds", "steps", "examples"))
        if not (is_number(seconds) and seconds >= 0 and is_count(steps, 0) and is_count(examples, 0)):
            raise ValueError(f"expected the seconds, steps and examples of a run, got {state_dict!r:.80}")
        self._seconds, self._steps, self._examples = float(seconds), steps, examples


def _batch_size(batch: Any) -> int:
    """Return the length of a batch's first tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    return next((found for part in parts if not isinstance(part, str) and (found := _batch_size(part))), 0)
