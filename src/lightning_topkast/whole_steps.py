"""`WholeStepCheckpoint`: checkpoints that training goes on from exactly, since no step is under way in them."""

import signal
import threading
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment


class WholeStepCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that saves between two optimizer steps only; it has the same arguments.

    Lightning saves within a step on two occasions, after which a resumed run differs from an uninterrupted one:

    - `ModelCheckpoint` saves by steps (or time) also where gradients are still accumulated, which no checkpoint holds:
      a run with `every_n_train_steps` does so right after it has been resumed.
    - The signal by which SLURM announces the end of a job is answered wherever it hits, perhaps in the middle of the
      optimizer's step, and by every rank where it is just then, so that they may wait for each other for ever.

    Here both wait for the end of the step, which the ranks agree on; the signal waits for the end of a validation too.
    """

    _lightnings_handler: Any = None
    _asked_to_requeue = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Come before Lightning's answer to SLURM's signal, which has just been registered."""
        super().on_train_start(trainer, pl_module)
        self._asked_to_requeue, self._lightnings_handler = False, None
        environment = trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        if environment.requeue_signal is None or threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(environment.requeue_signal)
        if callable(handler) and not isinstance(getattr(handler, "__self__", None), WholeStepCheckpoint):
            self._lightnings_handler = handler
            signal.signal(environment.requeue_signal, self._note)  # Lightning restores what was there before it

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what is due, unless gradients are being accumulated."""
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._requeue_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due."""
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._requeue_if_asked(trainer)

    def _note(self, signum: int, frame: Any) -> None:
        self._asked_to_requeue = True

    def _requeue_if_asked(self, trainer: Trainer) -> None:
        handler = self._lightnings_handler
        if handler is not None and trainer.strategy.reduce_boolean_decision(self._asked_to_requeue, all=False):
            self._lightnings_handler = None  # once: the signal may reach other ranks later
            handler(signal.SIGUSR1, None)
