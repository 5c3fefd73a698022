"""`topkast-train`: train and test the run that Hydra composes from the configuration and the overrides."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_topkast.app.commands.common import console_script
from lightning_topkast.app.errors import CONFIG_MODULE, CONFIG_NAME, AppError
from lightning_topkast.app.report import leave_report
from lightning_topkast.app.run.multirun import in_sweep
from lightning_topkast.app.run.resume import kept_if_refused, resumed
from lightning_topkast.app.run.train import set_up_process, train
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.run_folder.result import DIVERGED
from lightning_topkast.app.terminal import say

PROGRAM = "topkast-train"


@hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)
def _run(cfg: DictConfig) -> float:
    with console_script(PROGRAM):  # here too, since Hydra reports every error that leaves its job
        score = train(cfg)
        # Not in train(), which sweeps call: a report takes as long as a small run.
        if cfg.get("report") and not cfg.trainer.get("fast_dev_run"):
            leave_report(Path(cfg.paths.output_dir))
        if RunFolder(cfg.paths.output_dir).status == DIVERGED:
            _say_diverged(in_sweep())
        return score


@rank_zero_only
def _say_diverged(goes_on: bool) -> None:
    """End as where training itself finds a weight that is not finite; the other jobs of a sweep still run."""
    message = "the run diverged: a weight or a loss is NaN or infinite; lower the learning rate"
    if not goes_on:
        raise AppError(message)
    say(f"{PROGRAM}: {message}", error=True)


def main() -> None:
    """Run the command."""
    set_up_process()
    with console_script(PROGRAM):
        arguments = sys.argv[1:]
        sys.argv[1:] = resumed(arguments)  # the processes that Lightning starts read them, too
        with kept_if_refused(arguments):
            _run()


if __name__ == "__main__":
    main()
