"""What a run records in its `result.json`."""

from __future__ import annotations

import copy
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Callback
from omegaconf import DictConfig, open_dict

from lightning_topkast import TopKast
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.limits import LARGEST
from lightning_topkast.app.run.meter import Progress
from lightning_topkast.app.run.plan import plan
from lightning_topkast.app.run.settings import overrides_given, settings_of, without_places
from lightning_topkast.app.run.small_dense import is_small_dense
from lightning_topkast.app.run.summary import WeightCount
from lightning_topkast.app.run_folder.result import (
    DIVERGED,
    FINISHED,
    FORMAT,
    RUNNING,
    CompletedMonitor,
    CompletedResult,
    Flops,
    Parameters,
    Result,
    Sparsity,
    Weight,
)
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.density import COMPETING
from lightning_topkast.telemetry.media import weight_table

_ONE_DEVICE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
_DENSE = {"_target_": "lightning.pytorch.callbacks.Callback"}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Args:
        diverged: Whether a weight or a loss has become NaN or infinite.
        progress: What the `RunMeter` had counted at the end of training.
        score: Value of the metric `recipe.monitor`.
        tested: All metrics of the test.
        counts: Counts of every parameter, for the weights that were tested; empty if none were.
        unfinished: What the schedule of the sets asks for and the run has not reached, in words.
        kept_dense: Why each parameter is dense, by name, and "" for a sparse one; empty if nothing was made sparse.
    """

    diverged: bool
    progress: Progress
    score: float | None = None
    tested: Mapping[str, float] = field(default_factory=dict)
    counts: Sequence[WeightCount] = ()
    unfinished: Sequence[str] = ()
    kept_dense: Mapping[str, str] = field(default_factory=dict)


def describe_start(cfg: DictConfig) -> Result:
    """Return the result of a run that is about to start, which identifies it."""
    return Result(status=RUNNING, **_identity(cfg))


def describe_end(cfg: DictConfig, outcome: Outcome) -> CompletedResult:
    """Return the result of a run that has ended."""
    counts = outcome.counts
    return CompletedResult(
        status=DIVERGED if outcome.diverged else FINISHED,
        monitor=CompletedMonitor(name=cfg.recipe.monitor, mode=cfg.recipe.mode, value=_finite(outcome.score)),
        metrics={name: _finite(value) for name, value in outcome.tested.items()},
        sparsity=Sparsity(
            weights=_sparsity([count for count in counts if outcome.kept_dense.get(count.name) == ""]),
            model=_sparsity(counts),
        ),
        parameters=Parameters(total=sum(c.entries for c in counts), nonzero=sum(c.nonzero for c in counts)),
        weights=[
            Weight(
                name=count.name, shape=list(count.shape), entries=count.entries, nonzero=count.nonzero,
                kept_dense=outcome.kept_dense.get(count.name),
            )
            for count in counts
        ],
        flops=_flops(cfg, outcome.progress.steps),
        unfinished=list(outcome.unfinished) or None,
        seconds=round(outcome.progress.seconds, 3),
        examples=outcome.progress.examples,
        steps=outcome.progress.steps,
        **_identity(cfg),
    )  # fmt: skip


def kept_dense(callbacks: Iterable[Callback]) -> dict[str, str]:
    """Return the name of every parameter and why the callbacks keep it dense, "" for a sparse one."""
    return {row[0]: row[-1] for row in weight_table(_engines(callbacks)).rows}


def unfinished(callbacks: Iterable[Callback]) -> list[str]:
    """Return what the schedules of the callbacks ask for and the run has not reached, in words."""
    engines = _engines(callbacks)
    short = (engine.too_short(engine.step_count) for engine in engines)
    return [*(text for engine in engines for text in engine.unfinished), *filter(None, short)]


def _engines(callbacks: Iterable[Callback]) -> list[TopKast]:
    found = (getattr(callback, "topkast", None) for callback in callbacks)
    return [engine for engine in found if engine is not None]


def all_finite(values: Mapping[str, Any]) -> bool:
    """Return whether no logged value is NaN or infinite; an accuracy stays finite where the loss does not."""
    return all(bool(torch.as_tensor(value).isfinite().all()) for value in values.values())


def _identity(cfg: DictConfig) -> dict[str, Any]:
    """Return what identifies a run: its configuration, seed, date, software and hardware."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    choices = {} if hydra is None else dict(hydra.runtime.choices)
    return {
        "format": FORMAT,
        "choices": {group: choice for group, choice in choices.items() if not group.startswith("hydra/") and choice},
        "overrides": without_places(overrides_given()),
        "seed": cfg.seed,
        "config": settings_of(cfg),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            **{name.replace("-", "_"): version(name) for name in ("lightning-topkast", "torch", "lightning")},
            "python": platform.python_version(),
        },
        "hardware": _hardware(),
    }


def _hardware() -> dict[str, str]:
    names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    gpus = {"GPUs": ", ".join(f"{number} × {name}" for name, number in names.items())} if names else {}
    cpus = (
        f"{os.cpu_count()} × {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads a process"
    )
    return {**gpus, "CPUs": cpus, "system": f"{platform.system()} {platform.release()}"}


def _flops(cfg: DictConfig, steps: int) -> Flops | None:
    """Return the planned FLOPs of one example in a run of `steps` steps, or None if they are not known.

    They are not known if the input of the model is not, or with a global distribution: training decides then which
    weights become denser, and the entries of different weights differ in cost. The dense network is the configured
    one, also where small-dense has made it narrower.
    """
    if cfg.sparsity.get("distribution") in COMPETING:
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
    known = {name: float(totals[name]) for name in Flops.model_fields if totals.get(name) is not None}
    return Flops.model_validate(known)


def _sparsity(counts: Sequence[WeightCount]) -> float | None:
    entries = sum(count.entries for count in counts)
    return 1 - sum(count.nonzero for count in counts) / entries if entries else None


def _finite(value: float | None) -> float | None:
    """Return a value, or None if it is NaN, infinite, or larger than a result may have it."""
    return float(value) if value is not None and abs(value) <= LARGEST else None
