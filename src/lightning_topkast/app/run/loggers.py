"""Loggers: W&B stays offline unless the user is logged in."""

from __future__ import annotations

import netrc
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run_folder.result import CompletedResult

_WANDB_HOST = "https://api.wandb.ai"


def wandb_logger(save_dir: str, mode: str | None = None, **options: Any) -> WandbLogger:
    """Return a `WandbLogger` that needs neither an account nor a network.

    Args:
        save_dir: Folder in which W&B creates its folder `wandb`.
        mode: "online", "offline", "disabled" or "shared". None takes the value of WANDB_MODE, or without it "online"
            if the user is logged in and "offline" if not.
        options: Passed on to `WandbLogger` and from there to `wandb.init`.
    """
    import wandb

    check_writable(Path(save_dir))
    if mode is None and "WANDB_MODE" not in os.environ and not logged_in():
        mode = "offline"
    # As an option of wandb.init: `WandbLogger(offline=True)` would set WANDB_MODE for the whole process.
    if mode is not None:
        options["mode"] = mode
    # silent, since the summary of the run names its folder
    options.setdefault("settings", wandb.Settings(silent=True, init_timeout=30))
    logger = WandbLogger(save_dir=save_dir, **options)
    if logger._wandb_init.get("anonymous") is None:
        logger._wandb_init.pop("anonymous", None)  # even None makes wandb.init warn about a deprecated argument
    return logger


def csv_logger(save_dir: str, name: str = "csv") -> CSVLogger:
    """Return a `CSVLogger` for the folder `name`, or `name-2`, `name-3`, ... if it is another run's.

    No two runs share a folder, whenever they begin.

    Args:
        save_dir: Folder of the run.
        name: Folder of the log in it.
    """
    folder, number = Path(save_dir) / name, 1
    while getattr(rank_zero_only, "rank", 0) == 0:
        try:
            folder.mkdir(parents=True)  # of two runs that try at the same time, one succeeds
            break
        except FileExistsError:  # also if it is empty, since a run that has just begun has written nothing yet
            number += 1
            folder = folder.with_name(f"{name}-{number}")
        except OSError:
            break  # reported when all loggers are checked
    return CSVLogger(save_dir, name="", version=folder.name)


def log_config(loggers: Iterable[Logger], config: dict[str, Any]) -> None:
    """Log the configuration with every logger, which starts the run of W&B.

    Raises:
        AppError: W&B needs a network or a login and has none.
    """
    for logger in loggers:
        try:
            logger.log_hyperparams(config)
        except Exception as error:
            if not type(error).__module__.startswith("wandb."):
                raise
            raise AppError(
                f"W&B could not start the run ({str(error).strip()}): log in, keep the run on this machine with "
                "logger.wandb.mode=offline, or train without W&B with logger=csv"
            ) from error


def track_best(loggers: Iterable[Logger], metric: str, mode: str) -> None:
    """Show the best value of a metric beside the last one in W&B's table of runs.

    Args:
        loggers: Loggers of the run; others than W&B's are ignored.
        metric: Name of the metric.
        mode: "min" if lower is better, otherwise "max".
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.define_metric(metric, step_metric="trainer/global_step", summary=f"{mode},last")


def log_outcome(loggers: Iterable[Logger], result: CompletedResult, step: int) -> None:
    """Log what runs are compared by and curves do not show: parameters in use, FLOPs and time.

    Args:
        loggers: Loggers of the run.
        result: Result of the run.
        step: The last step.
    """
    figures: dict[str, float | None] = {"run/seconds": result.seconds, "run/examples": result.examples}
    figures |= {f"run/parameters_{name}": value for name, value in result.parameters}
    figures |= {f"run/{name}": value for name, value in result.flops or () if name.endswith("_ratio")}
    for logger in loggers:
        logger.log_metrics({name: float(value) for name, value in figures.items() if value is not None}, step=step)
        logger.save()


def logged_in() -> bool:
    """Return whether W&B has an API key, from WANDB_API_KEY or from netrc, where `wandb login` stores it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _WANDB_HOST)).netloc
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_writable(folder: Path) -> None:
    """Refuse a folder that is not writable; W&B would silently use a temporary one instead."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise AppError(
            f"the folder {folder} is not writable ({error.strerror}): choose another one with "
            "hydra.run.dir=... or paths.output_dir=..."
        ) from error


def check_all_writable(loggers: Iterable[Logger]) -> None:
    """Refuse loggers whose folder is not writable, before any training."""
    for logger in loggers:
        if logger.save_dir is not None and "://" not in logger.save_dir:
            check_writable(Path(logger.save_dir))


def wandb_folder(loggers: Iterable[Logger]) -> Path | None:
    """Return the folder to pass to `wandb sync`, or None if there is nothing to sync."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            if getattr(run, "offline", False) and getattr(run, "dir", None):
                return Path(run.dir).parent  # .../offline-run-<time>-<id>/files
    return None
