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
from lightning.pytorch.trainer.states import TrainerFn

from lightning_topkast.errors import TopKastError


class WholeStepCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that saves where nothing is under way; it has the same arguments.

    On these occasions Lightning saves where a run that is resumed will differ from an uninterrupted one:

    - `ModelCheckpoint` saves by steps or time also where gradients are still accumulated, which no checkpoint holds:
      with `every_n_train_steps`, right after having been resumed, and after a validation. Here it waits for the end of
      the step.
    - It saves by steps or time at an epoch's last batch, from where a resumed run counts its epochs wrongly, so that
      the next resume trains other batches. Here it waits for the end of the epoch, unless it follows a metric. And it
      takes an epoch that `max_steps` cuts short for a whole one; here it saves at the last step.
    - The signal by which SLURM announces the end of a job, and SIGTERM where there are several ranks, are answered
      wherever they hit, perhaps in the middle of the optimizer's step, and by every rank where that is just then, so
      that they may wait for each other for ever. Here they wait for one of the two, at which the ranks agree by a tiny
      all-reduce; so the notice that SLURM gives (`--signal=USR1@90`: 90 seconds) must be long enough for a step, or for
      a validation.
    - Ctrl-C stops Python wherever it is: where half of the weights have made a step, or in the midst of torch's C++,
      which may abort the process. Here, where there is one rank, it waits for the end of the step, too, or of a batch
      of a validation; pressed once more, it stops at once.

    Args:
        args: `ModelCheckpoint`'s.
        save_on_interrupt: save where Ctrl-C has ended the run between two steps, too; needs a checkpoint that follows
            no metric, and exact resume a loader with `state_dict` and `load_state_dict`.
        options: `ModelCheckpoint`'s.

    Raises:
        TopKastError: `save_on_interrupt` with a metric to follow.
    """

    def __init__(self, *args: Any, save_on_interrupt: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        if save_on_interrupt and self.monitor is not None:
            raise TopKastError(
                f"save_on_interrupt does not look at monitor='{self.monitor}': give it to a checkpoint without monitor"
            )
        self.save_on_interrupt = save_on_interrupt

    _signals: "_Signals | None" = None
    _validated = False  # what is due after a validation has not been saved yet

    @property
    def state_key(self) -> str:
        """Also by file name, so that a run may have two that save on the same occasions."""
        return f"{super().state_key}[{self.filename!r}]"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Come before Lightning's answers to signals, which have just been registered."""
        super().on_train_start(trainer, pl_module)
        self._signals, self._validated = _Signals(trainer), False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what is due, if a step ends here and the epoch does not."""
        epoch = trainer.fit_loop.epoch_loop
        if epoch._num_ready_batches_reached():
            if self.monitor is not None:  # Lightning waits for the metric
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif not epoch._should_accumulate():
            self._save_after_validation(trainer, pl_module)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if epoch._is_training_done or trainer.should_stop:
                super().on_train_epoch_end(trainer, pl_module)
            self._answer_signals()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Let Ctrl-C end a validation."""
        if self._signals is not None:
            self._signals.interrupt()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due by validations, in the middle of a step at its end."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.fit_loop.epoch_loop._should_accumulate():
            self._validated = True
        else:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due by epochs, and what was due at the last batch."""
        self._save_after_validation(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)
        if self.monitor is None:
            super().on_train_batch_end(trainer, pl_module, None, None, -1)
        self._answer_signals()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Ctrl-C back to Python."""
        super().on_train_end(trainer, pl_module)
        self._close_signals()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back to Python; save if it came between two steps."""
        self._close_signals()
        super().on_exception(trainer, pl_module, exception)
        saved = self._last_global_step_saved == trainer.global_step
        if self.save_on_interrupt and isinstance(exception, _StepInterrupt) and not saved:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_after_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validated:
            self._validated = False
            super().on_validation_end(trainer, pl_module)

    def _answer_signals(self) -> None:
        if self._signals is not None:
            self._signals.answer()

    def _close_signals(self) -> None:
        if self._signals is not None:
            self._signals.close()
            self._signals = None


class _StepInterrupt(KeyboardInterrupt):
    """Ctrl-C, answered where no step is under way."""


class _Signals:
    """Lightning's answers to signals, put off until the ranks agree that one of them was sent one.

    Args:
        trainer: which has registered its handlers; it puts back those before its own after the run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._answers: dict[int, Callable[[], Any]] = {}
        self._noted: set[int] = set()
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            signum = int(environment.requeue_signal)
            handler = self._take(signum)
            if handler is not None:
                self._answers[signum] = partial(handler, signum, None)  # type: ignore[arg-type]
        if trainer.world_size > 1:
            handler = self._take(signal.SIGTERM)
            if handler is not None:
                self._answers[signal.SIGTERM] = partial(self._stop, handler)
        if trainer.world_size == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._answers[signal.SIGINT] = _interrupt

    def close(self) -> None:
        """Put back Python's answer to Ctrl-C, which Lightning does not know of."""
        if signal.SIGINT in self._answers and signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _take(self, signum: int) -> _HandlersCompose | None:
        """Note the signal from now on; returns Lightning's handler, None where it is a user's or taken already."""
        handler = signal.getsignal(signum)
        if not isinstance(handler, _HandlersCompose):
            return None
        signal.signal(signum, self._note)
        return handler

    def _note(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and signum in self._noted:
            signal.default_int_handler(signum, frame)
        self._noted.add(signum)

    def interrupt(self) -> None:
        """Answer Ctrl-C where a step is under way, or a validation."""
        if signal.SIGINT in self._noted & self._answers.keys():
            raise KeyboardInterrupt

    def answer(self) -> None:
        """Give the answers that are due, on all ranks; a collective if there are several and anything was put off."""
        any_rank = partial(self._trainer.strategy.reduce_boolean_decision, all=False)
        if not self._answers or not any_rank(bool(self._noted)):
            return
        for signum in sorted(self._answers):
            if any_rank(signum in self._noted):
                self._answers.pop(signum)()  # once: the signal may reach other ranks later

    def _stop(self, handler: _HandlersCompose) -> None:
        # Lightning raises its SIGTERMException where it sees this next, which is now the same place on every rank. Its
        # own handler would broadcast, too.
        connector = self._trainer._signal_connector
        connector.received_sigterm = True
        for each in handler.signal_handlers:
            if getattr(each, "__self__", None) is not connector and callable(each):
                each(signal.SIGTERM, None)  # type: ignore[arg-type]


def _interrupt() -> None:
    raise _StepInterrupt
