"""`StepBoundaryCheckpoint`, which saves checkpoints only between steps, so that training resumes from them exactly."""

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
from lightning_topkast.training.saved_paths import own_state


class StepBoundaryCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that saves only between steps; it has the same arguments.

    In these cases Lightning saves checkpoints from which a resumed run differs from an uninterrupted one:

    - `ModelCheckpoint` saves by steps or time even while gradients are accumulated, which a checkpoint does not
      contain: with `every_n_train_steps`, right after resuming, and after a validation. This class waits for the end of
      the step.
    - It saves by steps or time at the last batch of an epoch, from which a resumed run counts epochs wrongly, so that
      the next resume trains other batches. This class waits for the end of the epoch, unless it monitors a metric.
      Lightning also treats an epoch that `max_steps` cuts short as complete; this class saves at the last step.
    - Lightning handles the signal with which SLURM announces the end of a job, and SIGTERM with several ranks, as soon
      as it arrives, perhaps in the middle of the optimizer's step, and each rank at a different place, so that ranks
      may wait for each other forever. This class waits for the end of a step or epoch, on which the ranks agree with a
      small all-reduce. So SLURM's notice (`--signal=USR1@90`: 90 seconds) must be long enough for a step or a
      validation.
    - Ctrl-C interrupts Python at any place: when half of the weights are updated, or inside PyTorch's C++ code, which
      may abort the process. On a single rank, this class waits for the end of the step, or of a validation batch; a
      second Ctrl-C stops at once.

    Args:
        args: arguments of `ModelCheckpoint`.
        save_on_interrupt: also save when Ctrl-C ends the run between two steps; needs a checkpoint without `monitor`,
            and, to resume exactly, a loader with `state_dict` and `load_state_dict`.
        options: keyword arguments of `ModelCheckpoint`.

    Raises:
        TopKastError: `save_on_interrupt` is combined with `monitor`.
    """

    def __init__(self, *args: Any, save_on_interrupt: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        if save_on_interrupt and self.monitor is not None:
            raise TopKastError(
                f"save_on_interrupt does not support monitor='{self.monitor}'; use it in a checkpoint without monitor"
            )
        self.save_on_interrupt = save_on_interrupt

    _signals: "_Signals | None" = None
    _validated = False  # whether the checkpoint that is due after a validation is not saved yet

    @property
    def state_key(self) -> str:
        """Key of the state, which includes the file name, so that two callbacks with the same triggers differ."""
        return f"{super().state_key}[{self.filename!r}]"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, without paths of files that are not this callback's own."""
        super().load_state_dict(own_state(self, state_dict))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers, which have just been registered."""
        super().on_train_start(trainer, pl_module)
        self._signals, self._validated = _Signals(trainer), False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the checkpoints that are due, if a step ends here but not the epoch."""
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
        """Let Ctrl-C stop a validation."""
        if self._signals is not None:
            self._signals.interrupt()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the checkpoint that is due after a validation; in the middle of a step, wait for its end."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.fit_loop.epoch_loop._should_accumulate():
            self._validated = True
        else:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the checkpoints that are due by epochs or were due at the last batch."""
        self._save_after_validation(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)
        if self.monitor is None:
            super().on_train_batch_end(trainer, pl_module, None, None, -1)
        self._answer_signals()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore Python's handler of Ctrl-C."""
        super().on_train_end(trainer, pl_module)
        self._close_signals()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore Python's handler of Ctrl-C; save if Ctrl-C ended the run between two steps."""
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
    """Raised for Ctrl-C when no step is in progress."""


class _Signals:
    """Lightning's signal handlers, deferred until the ranks agree that one of them received a signal.

    Args:
        trainer: has registered its handlers; after the run it restores the handlers before its own.
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
        """Restore Python's handler of Ctrl-C, which not all versions of Lightning restore."""
        if signal.SIGINT in self._answers and signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _take(self, signum: int) -> _HandlersCompose | None:
        """Record the signal from now on; return Lightning's handler, or None if it is a user's or already replaced."""
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
        """Raise KeyboardInterrupt for a recorded Ctrl-C, during a step or a validation."""
        if signal.SIGINT in self._noted & self._answers.keys():
            raise KeyboardInterrupt

    def answer(self) -> None:
        """Call the handlers of recorded signals on all ranks; a collective if there are several ranks and handlers."""
        any_rank = partial(self._trainer.strategy.reduce_boolean_decision, all=False)
        if not self._answers or not any_rank(bool(self._noted)):
            return
        for signum in sorted(self._answers):
            if any_rank(signum in self._noted):
                self._answers.pop(signum)()  # once: the signal may reach other ranks later

    def _stop(self, handler: _HandlersCompose) -> None:
        # Lightning raises its SIGTERMException when it sees this next, now at the same place on every rank. Its own
        # handler would also broadcast.
        connector = self._trainer._signal_connector
        connector.received_sigterm = True
        for each in handler.signal_handlers:
            if getattr(each, "__self__", None) is not connector and callable(each):
                each(signal.SIGTERM, None)  # type: ignore[arg-type]


def _interrupt() -> None:
    raise _StepInterrupt
