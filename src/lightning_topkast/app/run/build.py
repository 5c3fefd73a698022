"""Build the parts of a run from their configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run.global_batch import GlobalBatch
from lightning_topkast.app.run.instantiate import build
from lightning_topkast.app.run.settings import overrides_given, recorded
from lightning_topkast.app.run.small_dense import SmallDense, narrowed_model
from lightning_topkast.app.run.task import ClassificationTask

OF_TASK = ("optimizer", "scheduler", "task")  # parts of the configuration that only a ClassificationTask uses


def build_model(cfg: DictConfig) -> LightningModule:
    """Return the configured model; a plain `nn.Module` becomes a `ClassificationTask`."""
    net: nn.Module = build(narrowed_model(cfg))
    if isinstance(net, LightningModule):
        _refuse_unused(cfg, type(net).__name__)
        return net
    parts = {name: build(cfg[name]) for name in ("optimizer", "scheduler")}
    task: ClassificationTask = build(cfg.task, net=net, **parts)
    return task


def keep_environment_out(module: LightningModule, parts: Mapping[HyperparametersMixin, DictConfig]) -> None:
    """Keep variables of the environment out of the hyper-parameters that loggers and checkpoints store.

    Args:
        module: Trained, which has the last word on what is saved.
        parts: What may have hyper-parameters, and the configuration that it was built from.
    """
    written: dict[str, dict[str, Any]] = {}
    for part, config in parts.items():
        given: Any = OmegaConf.to_container(config, resolve=True)
        changed = {key: value for key, value in recorded(config).items() if key in part.hparams and value != given[key]}
        if changed:
            part._hparams_initial = copy.deepcopy(part.hparams)  # type: ignore[attr-defined]
            part._hparams_initial.update(changed)  # type: ignore[attr-defined]
            written[str(part.CHECKPOINT_HYPER_PARAMS_KEY)] = changed  # type: ignore[attr-defined]
    if written:
        module.on_save_checkpoint = partial(_save_as_written, module.on_save_checkpoint, written)  # type: ignore


def _save_as_written(
    save: Callable[[dict[str, Any]], None], written: Mapping[str, dict[str, Any]], checkpoint: dict[str, Any]
) -> None:
    save(checkpoint)
    for key, changed in written.items():
        if key in checkpoint:
            checkpoint[key] = {**checkpoint[key], **changed}


def _refuse_unused(cfg: DictConfig, module: str) -> None:
    """Refuse overrides of parts that a LightningModule brings itself; a sweep over them would repeat one run."""
    unused = [text for text in overrides_given() if re.split(r"[.@=]", text.lstrip("+"))[0] in OF_TASK]
    if unused:
        raise AppError(
            f"{unused[0]} has no effect: {module} is a LightningModule, which has an optimizer, a scheduler and a loss "
            "of its own; leave it out, or give the module such an argument and set +model.NAME=..."
        )


def build_callbacks(cfg: DictConfig, has_loggers: bool) -> list[Callback]:
    """Return the sparsity callback, followed by those of the group `callbacks`."""
    callbacks: list[Callback] = [build(cfg.sparsity), *build_all(cfg.callbacks)]
    for callback in callbacks:
        if isinstance(callback, SmallDense):
            callback.narrowed = True  # by `build_model`
    if size := OmegaConf.select(cfg, "recipe.global_batch"):
        callbacks.append(GlobalBatch(size))
    if not has_loggers:
        # The only default callback that requires a logger.
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    return callbacks


def build_all(group: DictConfig | None) -> list[Any]:
    """Instantiate every entry of a group, except those that are null."""
    return [build(entry) for entry in (group or {}).values() if entry]
