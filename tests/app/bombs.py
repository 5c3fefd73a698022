"""What ruins a run: callbacks, and values."""

import os
import signal
from pathlib import Path

import torch
from lightning import Callback


class KillOnce(Callback):
    """Kills the process at the start of the second epoch, the first time that it gets there.

    Args:
        marker: the file that says it has.
    """

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Poison(Callback):
    """Makes every weight NaN at the start of the second epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.fill_(float("nan"))


def doubled(levels: int = 40):
    """A few lists, each of which holds the next one twice: too many values for anything that walks over them."""
    value: list = [0.0]
    for _ in range(levels):
        value = [value, value]
    return value
