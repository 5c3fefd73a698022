"""Build the parts of a run from their configuration."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_topkast.app.run.global_batch import GlobalBatch
from lightning_topkast.app.run.instantiate import build
from lightning_topkast.app.run.small_dense import narrowed_model
from lightning_topkast.app.run.task import ClassificationTask


def build_model(cfg: DictConfig) -> LightningModule:
    """Return the configured model; a plain `nn.Module` becomes a `ClassificationTask`."""
    net: nn.Module = build(narrowed_model(cfg))
    if isinstance(net, LightningModule):
        return net
    parts = {name: build(cfg[name]) for name in ("optimizer", "scheduler")}
    task: ClassificationTask = build(cfg.task, net=net, **parts)
    return task


def build_callbacks(cfg: DictConfig, has_loggers: bool) -> list[Callback]:
    """Return the sparsity callback, followed by those of the group `callbacks`."""
    callbacks: list[Callback] = [build(cfg.sparsity), *build_all(cfg.callbacks)]
    if size := OmegaConf.select(cfg, "recipe.global_batch"):
        callbacks.append(GlobalBatch(size))
    if not has_loggers:
        # The only default callback that requires a logger.
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    return callbacks


def build_all(group: DictConfig | None) -> list[Any]:
    """Instantiate every entry of a group, except those that are null."""
    return [build(entry) for entry in (group or {}).values() if entry]
