"""Loggers of a run, none of which fails or delays it: the Trainer's and all callbacks' calls pass a guard."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_topkast.app.limits import LONGEST_TEXT
from lightning_topkast.telemetry.guard import Guard, guard_of, set_guard

_P = ParamSpec("_P")
_R = TypeVar("_R")

PATIENCE = 30.0  # seconds after which W&B is asked whether it is alive, and in which it must answer
_CALLS = {
    "metrics": ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize"),
    "checkpoints": ("after_save_checkpoint",),
    "pictures": ("log_image", "log_table", "log_text"),
}
_of_runs: WeakKeyDictionary[Any, WandbGuard] = WeakKeyDictionary()


class WandbGuard(Guard):
    """A guard that also gives up W&B if it hangs.

    The process of W&B takes what is logged from a socket. If that process is stopped, the socket fills up, and a call
    waits forever; W&B's own time limits are kept by that process, too. A slow upload is not given up: W&B answers in
    the meantime.

    Args:
        logger: The logger of the current run.
    """

    def __init__(self, logger: WandbLogger) -> None:
        super().__init__(logger)
        self._run: Any = logger.experiment

    def _call(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        call = _Call(partial(function, *args, **kwargs))
        while not call.ended.wait(PATIENCE):
            asked = _Call(self._ask)
            answered = asked.ended.wait(PATIENCE) and asked.error is None
            if not (answered or call.ended.is_set()):
                _end_service()
                self._leave_out_all("it hangs")
                raise TimeoutError(f"no answer within {2 * PATIENCE:.0f} s")
        if call.error is not None:
            if _has_ended():
                self._leave_out_all("its process has ended")
            raise call.error
        result: _R = call.result
        return result

    def _ask(self) -> None:
        """Wait for an answer to what `Run.status` asks, which is refused while the run is finished."""
        if self._run._interface is not None:
            self._run._interface.deliver_request_run_status().wait_or(timeout=None)

    def _leave_out_all(self, reason: str) -> None:
        for kind in _CALLS:
            self.failures.setdefault(kind, reason)


class _Call:
    """A call in a thread of its own."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.result: Any = None
        self._function = function
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()


def guard_loggers(loggers: Iterable[Logger]) -> None:
    """Let every later call of the loggers pass their guards."""
    for logger in loggers:
        guard = guard_of_run(logger) if isinstance(logger, WandbLogger) else guard_of(logger)
        for kind, names in _CALLS.items():
            for name in names:
                if hasattr(logger, name):
                    setattr(logger, name, partial(guard.call, kind, getattr(logger, name)))


def guard_of_run(logger: WandbLogger) -> Guard:
    """Return the guard of a logger and of its W&B run, which this process may not have started."""
    run, guard = logger.experiment, WandbGuard(logger)
    if run is not sys.modules["wandb"].run:
        return guard_of(logger)
    set_guard(logger, guard)
    _of_runs[run] = guard
    return guard


def failures_of(loggers: Iterable[Logger]) -> list[str]:
    """Return a line for each logger that has failed."""
    guards = [guard for guard in map(guard_of, loggers) if guard.failures]
    return [
        f"{guard.name} lacks {', '.join(guard.failures)} ({'; '.join(dict.fromkeys(guard.failures.values()))})"[
            :LONGEST_TEXT
        ]
        for guard in guards
    ]


def close_wandb(failed: bool) -> None:
    """Finish the current W&B run, if there is one, so that the next job of a sweep starts its own."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    guard = _of_runs.get(wandb.run)
    finish = partial(wandb.finish, exit_code=1 if failed else 0)
    if guard is None:  # the run has failed before its training
        finish()
    else:
        guard.call("metrics", finish)
        if "metrics" in guard.failures:
            _end_service()


def _has_ended() -> bool:
    process = _service()[1]
    return process is not None and process.poll() is not None


def _end_service() -> None:
    """End the process of W&B, for which the end of this process would wait, and forget its run."""
    import wandb

    connection, process = _service()
    if process is not None:
        connection._cleanup()
        process.kill()
    _Call(wandb.teardown).ended.wait(PATIENCE)
    wandb.run = None


def _service() -> tuple[Any, Any]:
    """Return W&B's connection to its process, and that process; W&B has no public way to end it without waiting."""
    from wandb.sdk import wandb_setup

    connection = getattr(wandb_setup.singleton(), "_connection", None)
    return connection, getattr(getattr(connection, "_proc", None), "_process", None)
