"""Launch runs with Hydra's launchers: one by one, in parallel with joblib, or on a cluster with submitit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import initialize_config_module
from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_topkast.app.errors import CONFIG_MODULE, CONFIG_NAME, AppError, is_full_disk
from lightning_topkast.app.overrides import quoted
from lightning_topkast.app.run.settings import settings_of
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.run_folder.result import COMPLETED, RUNNING
from lightning_topkast.app.sweep.expand import Run
from lightning_topkast.app.sweep.run_process import SWEEP_PID, run_in_folder
from lightning_topkast.app.terminal import say

_ATTEMPTS = 3


class Launcher:
    """Launch the runs of a sweep, each in its own folder.

    Args:
        folder: Folder of the sweep.
        overrides: Overrides of Hydra's own settings, which choose and configure the launcher.
        jobs: Number of parallel runs, with joblib; None leaves it to `overrides`.

    Raises:
        AppError: `jobs` is given and joblib's launcher is not installed.
    """

    def __init__(self, folder: Path, overrides: Sequence[str], jobs: int | None) -> None:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        self.loader: ConfigLoader = hydra.config_loader
        self._folder = folder
        if jobs is not None:
            if "joblib" not in self.loader.get_group_options("hydra/launcher"):
                raise AppError(
                    f"--jobs {jobs} needs Hydra's joblib launcher: pip install 'lightning-topkast[sweep]', or "
                    "leave out --jobs for one run at a time"
                )
            overrides = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}", *overrides]
        self.config: DictConfig = hydra.compose_config(
            config_name=CONFIG_NAME,
            # Hydra's lines about each job would break the progress bar.
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
        """Return the settings that determine what a run computes.

        Raises:
            HydraException: The overrides are not valid.
        """
        config = self._compose(run)
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)  # the configuration may refer to it
        try:
            return settings_of(config)
        finally:
            HydraConfig.instance().cfg = before

    def wandb_project(self, run: Run) -> str | None:
        """Return the W&B project that a run logs to, or None if it does not log to W&B."""
        config = self._compose(run)
        project = OmegaConf.select(config, "logger.wandb.project")
        return None if project is None else str(project)

    def launch(self, runs: Sequence[Run]) -> None:
        """Launch the runs; the outcome of each is in its folder.

        Raises:
            AppError: The launcher failed several times.
            OSError: The disk is full.
        """
        context = HydraContext(config_loader=self.loader, callbacks=Callbacks(self.config))
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=run_in_folder, config=self.config
        )
        os.environ[SWEEP_PID] = str(os.getpid())
        for attempt in range(_ATTEMPTS):
            if attempt > 0:
                runs = [run for run in runs if RunFolder(self._folder / run.name).status == RUNNING]
            try:
                jobs = launcher.launch([self._overrides(run) for run in runs], initial_job_idx=0)
                for job in jobs:
                    self._stop_if_full(getattr(job, "_return_value", None))  # the property would raise any error
                return
            except Exception as error:
                self._stop_if_full(error)
                reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
                say(f"topkast-compare: the launcher failed ({reason})", error=True)
        raise AppError(f"the launcher failed {_ATTEMPTS} times; the same command continues with the runs that are left")

    def _stop_if_full(self, error: object) -> None:
        if isinstance(error, OSError) and is_full_disk(error):
            raise OSError(error.errno, error.strerror, str(error.filename or self._folder)) from error

    def _compose(self, run: Run) -> DictConfig:
        return self.loader.load_sweep_config(self.config, self._overrides(run))

    def _overrides(self, run: Run) -> list[str]:
        given = [override for override in run.overrides if override.startswith("ckpt_path=")]
        return [*run.overrides, *([] if given else ["ckpt_path=auto"]), f"hydra.sweep.subdir={run.name}"]


@contextmanager
def hydra_configs() -> Iterator[None]:
    """Initialize Hydra with the configuration of the application."""
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG_MODULE, job_name="topkast-compare", version_base="1.3"):
        yield


def missing(runs: Sequence[Run], launcher: Launcher, folder: Path) -> list[Run]:
    """Return the runs that are not completed.

    Raises:
        AppError: A run in the folder was started with another configuration.
    """
    left = []
    for run in runs:
        settings = launcher.settings(run)
        try:
            result = RunFolder(folder / run.name).result()
        except AppError:  # reported when the results are collected
            result = None
        if result is not None and (changed := differences(result.config, settings)):
            key, before, now = changed[0]
            raise AppError(
                f"the run {folder / run.name} was started with {key}={before}, which is {now} now "
                f"({len(changed)} keys differ): choose another folder, or remove that run to repeat it"
            )
        if result is None or result.status not in COMPLETED:
            left.append(run)
    return left


def differences(before: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return the keys in which two configurations differ, with both values of each."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [(prefix, before, now)]
    found = []
    for key in [*before, *(key for key in now if key not in before)]:
        found += differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else str(key))
    return found
