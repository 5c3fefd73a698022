"""What a job of `topkast-train` does with its configuration; apart, since it takes seconds to import."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.report.leave import leave_report
from lightning_topkast.app.run.multirun import in_sweep
from lightning_topkast.app.run.train import set_up_process, train
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.run_folder.result import DIVERGED
from lightning_topkast.app.terminal import say


def train_and_report(cfg: DictConfig, program: str) -> float:
    """Train and test the run that `cfg` describes, write its report, and return the score for sweepers.

    Raises:
        AppError: As `train`, or the run diverged.
    """
    set_up_process()
    score = train(cfg)
    # Not in train(), which sweeps call: a report takes as long as a small run.
    if cfg.get("report") and not cfg.trainer.get("fast_dev_run"):
        leave_report(Path(cfg.paths.output_dir))
    if RunFolder(cfg.paths.output_dir).status == DIVERGED:
        _say_diverged(program, in_sweep())
    return score


@rank_zero_only
def _say_diverged(program: str, goes_on: bool) -> None:
    """End as where training itself finds a weight that is not finite; the other jobs of a sweep still run."""
    message = "the run diverged: a weight or a loss is NaN or infinite; lower the learning rate"
    if not goes_on:
        raise AppError(message)
    say(f"{program}: {message}", error=True)
