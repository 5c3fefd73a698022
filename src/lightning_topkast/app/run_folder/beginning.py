"""The beginning of a run in its folder, which must be free for it: what it was asked for is written there.

Hydra would write it before anything is checked, also over the files of another run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.files import atomic_file

_RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # of a job that a cluster has started again


def refuse_used(run: RunFolder) -> None:
    """Refuse to begin anew in the folder of another run, whose files would be mixed with those of this one.

    A job that a cluster starts again goes on there: it is the same run.

    Raises:
        AppError: The folder holds the files of a run.
    """
    restarted = any(os.environ.get(name, "0") != "0" for name in _RESTARTS) or any(run.path.glob("hpc_ckpt_*.ckpt"))
    if not restarted and run.is_used:
        raise AppError(
            f"{run.path} holds the files of another run: go on with it by ckpt_path=auto, choose another folder with "
            "hydra.run.dir=... (of a sweep: hydra.sweep.dir=...), or remove it to begin anew"
        )


@contextmanager
def configuration_in(run: RunFolder, cfg: DictConfig) -> Iterator[None]:
    """Write the configuration of a run and its overrides, as Hydra would; restore what was there if it is refused.

    Otherwise what was refused would be repeated by the next `--resume`, and refused again.
    """
    if not HydraConfig.initialized():
        yield
        return
    parts = {"config": cfg, "hydra": HydraConfig.instance().cfg, "overrides": HydraConfig.get().overrides.task}
    files = {run.hydra / f"{name}.yaml": OmegaConf.to_yaml(part).encode() for name, part in parts.items()}
    before = {path: path.read_bytes() for path in files if path.is_file()}
    trained = _written(run)
    _write(files)
    try:
        yield
    except Exception:
        with suppress(OSError):  # the error that refused it is the one to show
            if _written(run) == trained:
                _write(before)
        raise


def _write(files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        with atomic_file(path, "configuration") as partial:
            partial.write_bytes(content)


def _written(run: RunFolder) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in run.checkpoints()}
