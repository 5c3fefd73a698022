"""`result.json`: what a run leaves for comparisons, in its folder."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.last_lines import WeightCount
from lightning_topkast.app.plan import plan
from lightning_topkast.app.small_dense import is_small_dense
from lightning_topkast.errors import TopKastError
from lightning_topkast.telemetry.media import weight_table

RESULT_FILE = "result.json"
FORMAT = 1

RUNNING, FINISHED, DIVERGED, FAILED = "running", "finished", "diverged", "failed"
DONE = (FINISHED, DIVERGED)  # not run again
ENDED = (*DONE, FAILED)

_ONE_DEVICE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
_DENSE = {"_target_": "lightning.pytorch.callbacks.Callback"}
# Where a run lies, what it goes on from and who is told of it are no part of what it computes.
_PLACES = ("paths", "run_name", "project", "ckpt_path", "logger", "hydra", "report")


class RunMeter(Callback):
    """Counts the seconds, steps and examples of training, also over interruptions: checkpoints keep them."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None
        self._steps = self._examples = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batches of all processes."""
        self._examples += _examples(batch) * trainer.world_size
        self._steps = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds, self._since = self.counts()["seconds"], None

    def counts(self) -> dict[str, float]:
        """Return what was counted up to the step that the run has reached; seconds are those in `fit`."""
        now = 0.0 if self._since is None else time.perf_counter() - self._since
        return {"seconds": self._seconds + now, "steps": self._steps, "examples": self._examples}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return self.counts()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the counts."""
        self._seconds = float(state_dict["seconds"])
        self._steps, self._examples = int(state_dict["steps"]), int(state_dict["examples"])


def describe_start(cfg: DictConfig) -> dict[str, Any]:
    """Return what is known of a run before it has begun: which one it is."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    choices = {} if hydra is None else dict(hydra.runtime.choices)
    return {
        "format": FORMAT,
        "status": RUNNING,
        "choices": {group: choice for group, choice in choices.items() if not group.startswith("hydra/") and choice},
        "overrides": [] if hydra is None else without_places(hydra.overrides.task),
        "seed": cfg.seed,
        "config": settings_of(cfg),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            **{name.replace("-", "_"): version(name) for name in ("lightning-topkast", "torch", "lightning")},
            "python": platform.python_version(),
        },
        "hardware": _hardware(),
    }


@dataclass(frozen=True)
class End:
    """What came out of a run.

    Args:
        diverged: whether a weight or a loss has become NaN or infinite.
        training: what its `RunMeter` has counted when training ended.
        score: of the metric `recipe.monitor`.
        tested: all figures of the test.
        counts: of every parameter, of the weights that were tested; empty if there are none.
        kept_dense: name → why the parameter is dense, "" for a sparse one; empty where nothing was made sparse.
    """

    diverged: bool
    training: Mapping[str, float]
    score: float | None = None
    tested: Mapping[str, float] = field(default_factory=dict)
    counts: Sequence[WeightCount] = ()
    kept_dense: Mapping[str, str] = field(default_factory=dict)


def describe_end(cfg: DictConfig, end: End) -> dict[str, Any]:
    """Return everything of a run at its end."""
    return {
        **describe_start(cfg),
        "status": DIVERGED if end.diverged else FINISHED,
        "monitor": {"name": cfg.recipe.monitor, "mode": cfg.recipe.mode, "value": _finite(end.score)},
        "metrics": {name: _finite(value) for name, value in end.tested.items()},
        "sparsity": {
            "weights": _sparsity([count for count in end.counts if end.kept_dense.get(count.name) == ""]),
            "model": _sparsity(end.counts),
        },
        "parameters": {"total": sum(c.entries for c in end.counts), "nonzero": sum(c.nonzero for c in end.counts)},
        "weights": [
            {**count._asdict(), "shape": list(count.shape), "kept_dense": end.kept_dense.get(count.name)}
            for count in end.counts
        ],
        "flops": _flops(cfg, int(end.training["steps"])),
        "seconds": round(end.training["seconds"], 3),
        "examples": int(end.training["examples"]),
        "steps": int(end.training["steps"]),
    }


def kept_dense(callbacks: Iterable[Callback]) -> dict[str, str]:
    """Return every parameter's name, and why the callbacks have kept it dense: "" for a sparse one."""
    found = [getattr(callback, "topkast", None) for callback in callbacks]
    return {row[0]: row[-1] for row in weight_table([engine for engine in found if engine is not None]).rows}


def leave_result(cfg: DictConfig, end: End) -> dict[str, Any]:
    """Write the result of a run into its folder, and return it."""
    result = describe_end(cfg, end)
    write_result(Path(cfg.paths.output_dir), result)
    return result


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration without names and places: equal for runs that compute the same."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        for key in ("hydra", "logger", "ckpt_path"):
            cfg.pop(key, None)
        cfg.run_name, cfg.paths = "", dict.fromkeys(cfg.paths, "")  # others read them
    settings = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(settings, dict)
    own = {key: value for key, value in settings.items() if key not in _PLACES}
    return json.loads(json.dumps(own, default=str))  # as it is read back


def without_places(overrides: Iterable[str]) -> list[str]:
    """Return the overrides that say what a run computes."""
    return [override for override in overrides if re.split(r"[./@=]", override.lstrip("+~"))[0] not in _PLACES]


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`; whoever reads at any moment finds the old one or the new one, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=f".{RESULT_FILE}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's is for the owner only
        os.replace(name, folder / RESULT_FILE)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what `result.json` in `folder` says, None where there is none.

    Raises:
        AppError: it is not whole, or none that this version can read.
    """
    path = folder / RESULT_FILE
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise AppError(f"{path} can't be read ({error}); remove it to have the run repeated") from error
    wanted = {"status": str, "choices": dict, "overrides": list, "config": dict}
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise AppError(f"{path} is no result of format {FORMAT}; remove it to have the run repeated")
    for key, kind in wanted.items():
        if not isinstance(result.get(key), kind):
            raise AppError(f"{path} lacks its {key}; remove it to have the run repeated")
    return result


def status(folder: Path) -> str:
    """Return what is known of the run in `folder`: "running" also where nothing is."""
    try:
        return str((read_result(folder) or {}).get("status", RUNNING))
    except AppError:
        return RUNNING


def _hardware() -> dict[str, str]:
    """What this process computes on."""
    names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    gpus = {"GPUs": ", ".join(f"{number} × {name}" for name, number in names.items())} if names else {}
    cpus = (
        f"{os.cpu_count()} × {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads a process"
    )
    return {**gpus, "CPUs": cpus, "system": f"{platform.system()} {platform.release()}"}


def _flops(cfg: DictConfig, steps: int) -> dict[str, float] | None:
    """FLOPs of an example, as planned for so many steps; None where the model's input is not known beforehand.

    Nor is it known under distribution="global" which weights get denser, and their entries differ in what they cost.
    Dense is the configured network, also where small-dense has made it narrow.
    """
    if cfg.sparsity.get("distribution") == "global":
        return None
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.trainer.update({**_ONE_DEVICE, "max_steps": max(steps, 1)})
    try:
        totals = plan(cfg).totals()
        if is_small_dense(cfg.sparsity):
            cfg.sparsity = _DENSE
            whole = plan(cfg).totals()
            for part in ("forward", "training"):
                totals[f"dense_{part}_flops"] = dense = whole[f"{part}_flops"]
                totals[f"{part}_flops_ratio"] = totals[f"{part}_flops"] / dense if dense else None
    except (AppError, TopKastError):
        return None
    names = ("forward_flops", "training_flops", "dense_forward_flops", "dense_training_flops")
    return {
        name: float(totals[name])
        for name in (*names, "forward_flops_ratio", "training_flops_ratio")
        if totals.get(name) is not None
    }


def _examples(batch: Any) -> int:
    """The length of a batch's first tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    return next((found for part in parts if not isinstance(part, str) and (found := _examples(part))), 0)


def _sparsity(counts: Sequence[WeightCount]) -> float | None:
    entries = sum(count.entries for count in counts)
    return 1 - sum(count.nonzero for count in counts) / entries if entries else None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def all_finite(figures: Mapping[str, Any]) -> bool:
    """Whether no logged figure is NaN or infinite; accuracies stay finite where the loss does not."""
    return all(bool(torch.as_tensor(value).isfinite().all()) for value in figures.values())
