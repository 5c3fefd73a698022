"""Jobs of a Hydra multirun (`-m`) with several processes, in each of which Lightning would start the whole sweep."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_original_cwd
from lightning import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lightning_topkast.app.errors import CONFIG_MODULE, AppError
from lightning_topkast.app.overrides import quoted
from lightning_topkast.app.run.settings import overrides_given

_END = 60.0  # seconds in which the other processes must end after the first one has


@contextmanager
def one_job(trainer: Trainer) -> Iterator[None]:
    """Make the processes that a job of a sweep starts run this job only, and end them with it.

    Raises:
        AppError: One of them failed, or the job needs several nodes.
    """
    launcher = trainer.strategy.launcher
    if (
        not in_sweep()
        or not isinstance(launcher, _SubprocessScriptLauncher)
        or trainer.world_size == 1
        or launcher.cluster_environment.creates_processes_externally  # each of them runs all jobs in turn
    ):
        yield
        return
    if trainer.num_nodes > 1:
        raise AppError(
            f"a sweep (-m) cannot start processes on trainer.num_nodes={trainer.num_nodes} nodes: "
            "start them with torchrun (trainer=multinode) or SLURM (trainer=slurm)"
        )
    environment = dict(os.environ)
    own = _JobLauncher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
    trainer.strategy._launcher = own
    try:
        yield
        own.join()
    finally:
        for process in own.procs:
            process.kill()
        # The next job must start without a process group and a rank, as this one did.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


class _JobLauncher(_SubprocessScriptLauncher):
    """Start the other processes of a job with the overrides and the folder of the job, instead of `sys.argv`."""

    def join(self) -> None:
        for number, process in enumerate(self.procs, start=1):
            try:
                code = process.wait(_END)
            except subprocess.TimeoutExpired:
                raise AppError(f"process {number} of the job did not end within {_END:.0f} s of the first") from None
            if code:
                raise AppError(f"process {number} of the job ended with code {code}")

    def _call_children_scripts(self) -> None:
        self._check_can_spawn_children()
        os.environ.update(
            MASTER_ADDR=self.cluster_environment.main_address,
            MASTER_PORT=str(self.cluster_environment.main_port),
            NODE_RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE=str(self.num_processes),
        )
        for local_rank in range(1, self.num_processes):
            environment = {**os.environ, "LOCAL_RANK": str(local_rank)}
            self.procs.append(subprocess.Popen(_command(), env=environment, cwd=get_original_cwd()))


def _command() -> list[str]:
    """Return the command line of this job alone."""
    config = HydraConfig.get()
    places = {source.provider: source.path for source in config.runtime.config_sources}  # without file:// and pkg://
    command = [
        sys.executable,
        "-m",
        "lightning_topkast.app.commands.train",
        "--config-name",
        str(config.job.config_name),
    ]
    if places["main"] != CONFIG_MODULE:
        command += ["--config-path", places["main"]]
    if "command-line" in places:
        command += ["--config-dir", places["command-line"]]
    own = ["hydra.mode=RUN", f"hydra.run.dir={quoted(config.runtime.output_dir)}"]
    return [*command, *overrides_given("task"), *overrides_given("hydra"), *own]


def in_sweep() -> bool:
    """Return whether this process runs the jobs of a Hydra multirun (`-m`)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
