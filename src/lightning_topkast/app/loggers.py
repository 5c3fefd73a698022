"""W&B without surprises: offline unless the user is logged in, and closed when a run ends, however it ends."""

from __future__ import annotations

import netrc
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_topkast.app.errors import AppError

_WANDB_HOST = "https://api.wandb.ai"


def wandb_logger(save_dir: str, mode: str | None = None, **options: Any) -> WandbLogger:
    """Return a `WandbLogger` that needs neither an account nor a network.

    Args:
        save_dir: W&B writes into its folder `wandb`.
        mode: "online", "offline", "disabled" or "shared"; None follows WANDB_MODE and else is online if the user is
            logged in and offline if not.
        options: Passed on to `WandbLogger` and from there to `wandb.init`.
    """
    import wandb

    check_writable(Path(save_dir))
    if mode is None and "WANDB_MODE" not in os.environ and not logged_in():
        mode = "offline"
    # As an option of wandb.init: `WandbLogger(offline=True)` would set WANDB_MODE for the whole process.
    if mode is not None:
        options["mode"] = mode
    # silent: the application's last lines say where the run is
    options.setdefault("settings", wandb.Settings(silent=True, init_timeout=30))
    logger = WandbLogger(save_dir=save_dir, **options)
    if logger._wandb_init.get("anonymous") is None:
        logger._wandb_init.pop("anonymous", None)  # even None makes wandb.init warn that it is obsolete
    return logger


def csv_logger(save_dir: str, name: str = "csv") -> CSVLogger:
    """Return a `CSVLogger` for the folder `name`, or `name-2`, `name-3`, ... where an earlier run has left its curves.

    Args:
        save_dir: Folder of the run.
        name: Folder in it.
    """
    folder, number = Path(save_dir) / name, 1
    while getattr(rank_zero_only, "rank", 0) == 0:
        try:
            folder.mkdir(parents=True)  # of two runs at the same moment only one can
            break
        except FileExistsError:
            if folder.is_dir() and not any(folder.iterdir()):
                break
            number += 1
            folder = folder.with_name(f"{name}-{number}")
        except OSError:
            break  # refused with a clear message when all loggers are checked
    return CSVLogger(save_dir, name="", version=folder.name)


def log_config(loggers: Iterable[Logger], config: dict[str, Any]) -> None:
    """Hand every logger the configuration; W&B's run begins here.

    Raises:
        AppError: W&B wants a network or a login and finds none.
    """
    for logger in loggers:
        try:
            logger.log_hyperparams(config)
        except Exception as error:
            if not type(error).__module__.startswith("wandb."):
                raise
            raise AppError(
                f"W&B could not begin the run ({str(error).strip()}): log in, keep it on this machine with "
                "logger.wandb.mode=offline, or leave it out with logger=csv"
            ) from error


def follow(loggers: Iterable[Logger], metric: str, mode: str) -> None:
    """Have W&B's table of runs show the best value of a metric, beside its last.

    Args:
        loggers: of the run; only W&B's can.
        metric: its name.
        mode: "min" or "max", whichever is better.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.define_metric(metric, step_metric="trainer/global_step", summary=f"{mode},last")


def log_outcome(loggers: Iterable[Logger], result: Mapping[str, Any], step: int) -> None:
    """Hand every logger what runs are compared by, and the curves don't hold: parameters in use, FLOPs, time.

    Args:
        loggers: of the run.
        result: what `result.json` says.
        step: the last one.
    """
    figures = {f"run/{name}": result.get(name) for name in ("seconds", "examples")}
    figures |= {f"run/parameters_{name}": value for name, value in (result.get("parameters") or {}).items()}
    figures |= {f"run/{name}": value for name, value in (result.get("flops") or {}).items() if name.endswith("_ratio")}
    for logger in loggers:
        logger.log_metrics({name: float(value) for name, value in figures.items() if value is not None}, step=step)
        logger.save()


def logged_in() -> bool:
    """True if W&B would find an API key: in WANDB_API_KEY, or in netrc where `wandb login` writes it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _WANDB_HOST)).netloc
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_writable(folder: Path) -> None:
    """Refuse a folder that can't be written: W&B would quietly take a temporary one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise AppError(
            f"the folder {folder} can't be written ({error.strerror}): name another one with "
            "hydra.run.dir=... or paths.output_dir=..."
        ) from error


def check_all_writable(loggers: Iterable[Logger]) -> None:
    """Refuse the first logger whose folder can't be written, before any training."""
    for logger in loggers:
        if logger.save_dir is not None and "://" not in logger.save_dir:
            check_writable(Path(logger.save_dir))


def wandb_folder(loggers: Iterable[Logger]) -> Path | None:
    """Return the folder that `wandb sync` takes, None where nothing waits to be synced."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            if getattr(run, "offline", False) and getattr(run, "dir", None):
                return Path(run.dir).parent  # .../offline-run-<time>-<id>/files
    return None


def close_wandb(failed: bool) -> None:
    """Finish W&B's run, if there is one, so that the next job of a sweep gets its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=1 if failed else 0)
