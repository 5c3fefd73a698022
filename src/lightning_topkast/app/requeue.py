"""A job whose time under SLURM runs out saves itself between two steps and asks for its place in the queue again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


class Requeue(Callback):
    """Answers SIGUSR1, which `#SBATCH --signal=SIGUSR1@90` sends 90 s before the end of a job's time.

    Lightning's own answer saves where the signal happens to find each rank. Ranks that are not in the same place then
    wait for each other in different collectives until they time out. Here they agree on a step first.

    Args:
        folder: Where `requeue.ckpt` is written, which `ckpt_path=auto` goes on from.
        every: Optimizer steps between two moments in which the ranks ask each other, at least 1.
    """

    def __init__(self, folder: str, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"every={every} is out of range: expected at least 1 step")
        self.path = Path(folder) / "requeue.ckpt"
        self.every = every
        self._asked = False
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the signal before Lightning does, which leaves it to a handler that is there."""
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._ask)  # for good: during the test, too, it must not end the process

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, requeue and stop, once any rank has been asked to."""
        step = trainer.global_step
        if step == self._last_step or step % self.every:  # accumulating, or not yet
            return
        self._last_step = step
        if not trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            return
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            print(
                f"topkast-train: asked to stop: saved {self.path}, {requeue(os.environ)}", file=sys.stderr, flush=True
            )
        raise SIGTERMException

    def _ask(self, *_: Any) -> None:
        self._asked = True


def requeue(environment: Mapping[str, str]) -> str:
    """Ask SLURM to start this job again; return what came of it, for the user."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    elif "SLURM_JOB_ID" in environment:
        job = environment["SLURM_JOB_ID"]
    else:
        return "no SLURM job to requeue"
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"could not requeue job {job} ({error}): submit it again"
    if result.returncode:
        return f"could not requeue job {job} ({result.stderr.strip()}): submit it again"
    return f"requeued job {job}"
