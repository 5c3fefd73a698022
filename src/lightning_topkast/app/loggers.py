"""W&B without surprises: offline unless the user is logged in, and closed when a run ends, however it ends."""

from __future__ import annotations

import netrc
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, WandbLogger

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
    options.setdefault("settings", wandb.Settings(silent=True))  # the application's last lines say where the run is
    logger = WandbLogger(save_dir=save_dir, **options)
    if logger._wandb_init.get("anonymous") is None:
        logger._wandb_init.pop("anonymous", None)  # even None makes wandb.init warn that it is obsolete
    return logger


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
            f"the logger folder {folder} can't be written ({error.strerror}): name another one with "
            f"paths.output_dir=... or hydra.run.dir=..., or turn logging off with logger=none"
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
