"""`WholeStepCheckpoint`: checkpoints that training goes on from exactly, since no step is under way in them."""

import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose


class WholeStepCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that saves where nothing is under way; it has the same arguments.

    On three occasions Lightning saves where a run that is resumed will differ from an uninterrupted one:

    - `ModelCheckpoint` saves by steps or time also where gradients are still accumulated, which no checkpoint holds:
      with `every_n_train_steps`, right after having been resumed. Here it waits for the end of the step.
    - It saves by steps or time at an epoch's last batch, from where a resumed run counts its epochs wrongly, so that
      the next resume trains other batches. Here it waits for the end of the epoch, unless it follows a metric.
    - The signal by which SLURM announces the end of a job is answered wherever it hits, perhaps in the middle of the
      optimizer's step, and by every rank where that is just then, so that they may wait for each other for ever.
      Here it waits for one of the two, at which the ranks agree; so the notice that SLURM gives (`--signal=USR1@90`:
      90 seconds) must be long enough for a step, or for a validation.
    """

    _requeue: Callable[[], Any] | None = None  # Lightning's answer to the signal, until it is given
    _asked_to_requeue = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Come before Lightning's answer to SLURM's signal, which has just been registered."""
        super().on_train_start(trainer, pl_module)
        self._requeue, self._asked_to_requeue = None, False
        environment = trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        signum = environment.requeue_signal
        if signum is None or threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signum)
        if isinstance(handler, _HandlersCompose):  # not the user's own, nor that of another checkpoint callback
            self._requeue = partial(handler, signum, None)  # type: ignore[arg-type]
            signal.signal(signum, self._note)  # after the run, Lightning puts back what was there before it

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what is due, if a step ends here and the epoch does not."""
        epoch = trainer.fit_loop.epoch_loop
        if epoch._num_ready_batches_reached():
            if self.monitor is not None:  # Lightning waits for the metric
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif not epoch._should_accumulate():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._requeue_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due by epochs, and what was due at the last batch."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.monitor is None:
            super().on_train_batch_end(trainer, pl_module, None, None, -1)
        self._requeue_if_asked(trainer)

    def _note(self, signum: int, frame: Any) -> None:
        self._asked_to_requeue = True

    def _requeue_if_asked(self, trainer: Trainer) -> None:
        requeue = self._requeue
        if requeue is not None and trainer.strategy.reduce_boolean_decision(self._asked_to_requeue, all=False):
            self._requeue = None  # once: the signal may reach other ranks later
            requeue()
