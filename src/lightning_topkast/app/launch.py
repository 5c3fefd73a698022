"""Runs through Hydra's launchers: one after the other, side by side with joblib, or on a cluster with submitit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra import initialize_config_module
from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_topkast.app.errors import CONFIG_MODULE, CONFIG_NAME, AppError
from lightning_topkast.app.grids import Run
from lightning_topkast.app.job import SWEEP_PID, run_job
from lightning_topkast.app.overrides import quoted
from lightning_topkast.app.result import DONE, ENDED, read_result, settings_of, status

_LOCK = ".topkast-compare.lock"
_ATTEMPTS = 3


class Launcher:
    """Runs jobs in folders beneath one folder.

    Args:
        folder: of the sweep.
        overrides: of Hydra's own settings: which launcher, and how.
        jobs: how many runs at a time, with joblib; None leaves it to `overrides`.

    Raises:
        AppError: joblib's launcher is wanted and not installed.
    """

    def __init__(self, folder: Path, overrides: Sequence[str], jobs: int | None) -> None:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        self.loader: ConfigLoader = hydra.config_loader
        self._folder = folder
        if jobs is not None:
            if "joblib" not in self.loader.get_group_options("hydra/launcher"):
                raise AppError(
                    f"--jobs {jobs} needs Hydra's joblib launcher: pip install 'lightning-topkast[sweep]'; without "
                    "--jobs the runs are made one after the other"
                )
            overrides = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}", *overrides]
        self.config: DictConfig = hydra.compose_config(
            config_name=CONFIG_NAME,
            # Lines about each launched job would run through the progress bar.
            overrides=[
                "hydra.mode=MULTIRUN",
                "hydra/hydra_logging=none",
                *overrides,
                f"hydra.sweep.dir={quoted(folder)}",
            ],
            run_mode=RunMode.MULTIRUN,
            with_log_configuration=False,
        )

    def settings(self, run: Run) -> dict[str, Any]:
        """Return what a run would compute.

        Raises:
            HydraException: it can't be composed.
        """
        config = self._compose(run)
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)  # which the configuration may read
        try:
            return settings_of(config)
        finally:
            HydraConfig.instance().cfg = before

    def wandb_project(self, run: Run) -> str | None:
        """Return the W&B project that a run logs to, None where it does not."""
        config = self._compose(run)
        project = OmegaConf.select(config, "logger.wandb.project")
        return None if project is None else str(project)

    def launch(self, runs: Sequence[Run]) -> None:
        """Make the runs; what becomes of each is in its folder.

        Raises:
            AppError: a launcher's own processes were lost again and again, each time with all that they had to do.
        """
        context = HydraContext(config_loader=self.loader, callbacks=Callbacks(self.config))
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=run_job, config=self.config
        )
        os.environ[SWEEP_PID] = str(os.getpid())
        for attempt in range(_ATTEMPTS):
            runs = runs if attempt == 0 else [run for run in runs if status(self._folder / run.name) not in ENDED]
            try:
                launcher.launch([self._overrides(run) for run in runs], initial_job_idx=0)
                return
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
                print(f"topkast-compare: the launcher failed ({reason})", file=sys.stderr, flush=True)
        raise AppError(f"the launcher failed {_ATTEMPTS} times; the same command goes on with the runs that are left")

    def _compose(self, run: Run) -> DictConfig:
        return self.loader.load_sweep_config(self.config, self._overrides(run))

    def _overrides(self, run: Run) -> list[str]:
        given = [override for override in run.overrides if override.startswith("ckpt_path=")]
        return [*run.overrides, *([] if given else ["ckpt_path=auto"]), f"hydra.sweep.subdir={run.name}"]


@contextmanager
def hydra_configs() -> Iterator[None]:
    """Give Hydra the application's configuration."""
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG_MODULE, job_name="topkast-compare", version_base="1.3"):
        yield


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep a second sweep from running in the same folder at the same time.

    Raises:
        AppError: one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise AppError(f"another topkast-compare is running in {folder}: wait for it, or take another folder") from None
    try:
        yield
    finally:
        lock.release()


def missing(runs: Sequence[Run], launcher: Launcher, folder: Path) -> list[Run]:
    """Return the runs that are not done yet.

    Raises:
        AppError: a run of that name was made, or begun, with another configuration.
    """
    left = []
    for run in runs:
        settings = launcher.settings(run)
        try:
            result = read_result(folder / run.name)
        except AppError:  # said when the results are collected, too
            result = None
        if result is not None and (changed := differences(result["config"], settings)):
            key, before, now = changed[0]
            raise AppError(
                f"the run {folder / run.name} was made with {key}={before}, which is {now} now "
                f"({len(changed)} keys differ): take another folder, or remove that run to have it repeated"
            )
        if result is None or result["status"] not in DONE:
            left.append(run)
    return left


def differences(before: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return the keys in which two configurations differ, each with both values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [(prefix, before, now)]
    found = []
    for key in [*before, *(key for key in now if key not in before)]:
        found += differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else str(key))
    return found
