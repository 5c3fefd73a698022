"""The baseline *small-dense*: a narrower dense network with as many parameters as a sparse one has non-zeros."""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import get_class
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run.instantiate import SPARSITY, Kind, build, check_target
from lightning_topkast.method.targets import find_targets
from lightning_topkast.settings import Settings

_HALVINGS = 16  # of the range of factors, as fine as one of 32,000 channels


class SmallDense(Callback):
    """Configure the sparsity for which `topkast-train` narrows the model; refuses to train one that was not narrowed.

    Args:
        forward_sparsity: Forward sparsity of the sparse run to compare with.
        width_factor: Factor of `model.width_factor`; None chooses the widest network that fits.
        distribution: As in `Settings`.
        overrides: As in `Settings`.
        targets: As in `Settings`.
    """

    def __init__(self, forward_sparsity: float, width_factor: float | None = None, **sizes: Any) -> None:
        super().__init__()
        self.settings = Settings(forward_sparsity, backward_sparsity=0.0, **sizes)
        self.width_factor = width_factor
        self.narrowed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model of full width, whose results would be those of the dense network."""
        if stage == "fit" and not self.narrowed:
            raise AppError(
                "sparsity=small_dense narrows no network by itself, and this one has its full width: train it with "
                "topkast-train, or build it with lightning_topkast.app.run.build.build_model(cfg) and set narrowed=True"
            )


def with_width(cfg: DictConfig, kind: Kind | None = None) -> DictConfig:
    """Return `cfg`, or with `sparsity=small_dense` a copy with the chosen `sparsity.width_factor` for the loggers.

    Args:
        cfg: The configuration.
        kind: What its model may be, if the configuration comes from a stranger.

    Raises:
        AppError: The model has no width factor, or is too large even with one channel per layer.
    """
    if not is_small_dense(cfg.sparsity, kind is None):
        return cfg
    if OmegaConf.select(cfg, "model.width_factor") is None:
        raise AppError(
            f"sparsity=small_dense narrows a network by model.width_factor, which {cfg.model.get('_target_')} does not "
            "have: choose another model, or add such an argument to yours and set +model.width_factor=1.0"
        )
    callback: SmallDense = build(cfg.sparsity, SPARSITY if kind else None)
    if callback.width_factor is not None:
        return cfg
    chosen = cfg.copy()
    budget = parameters_left(_on_meta(cfg.model, kind), callback.settings)
    chosen.sparsity.width_factor = widest_factor(cfg, budget, kind)
    return chosen


def narrowed_model(cfg: DictConfig, kind: Kind | None = None) -> DictConfig:
    """Return `cfg.model`, with `sparsity=small_dense` in the width that fits; raises like `with_width`."""
    cfg = with_width(cfg, kind)
    is_narrower = is_small_dense(cfg.sparsity, kind is None)
    return _scaled(cfg, cfg.sparsity.width_factor) if is_narrower else cfg.model


def parameters_left(model: nn.Module, settings: Settings) -> int:
    """Return the number of parameters that Top-KAST would keep non-zero, including those of dense layers."""
    targets = find_targets(model, settings.targets)
    shapes = {target.name: target.shape for target in targets if target.sparse}
    active = settings.allocation.counts(shapes, stacks=[target.name for target in targets if target.is_stack])
    return sum(active[target.name][0] if target.sparse else target.shape.numel() for target in targets)


def widest_factor(cfg: DictConfig, budget: int, kind: Kind | None = None) -> float:
    """Return the largest width factor, at most 1, with which the model has at most `budget` parameters."""

    def size(factor: float) -> int:
        return sum(parameter.numel() for parameter in _on_meta(_scaled(cfg, factor), kind).parameters())

    low, high = 0.0, 1.0
    if size(high) <= budget:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    if low == 0.0:
        raise AppError(
            f"sparsity=small_dense: even the narrowest network has {size(high):,} parameters, more than the {budget:,} "
            "to compare with: use a lower sparsity.forward_sparsity or a larger model"
        )
    return low


def _scaled(cfg: DictConfig, factor: float) -> DictConfig:
    """Return the model of a copy of `cfg`, since it refers to other parts of the configuration."""
    copy = cfg.copy()
    copy.model.width_factor = float(cfg.model.width_factor) * factor
    return copy.model


def _on_meta(model: DictConfig, kind: Kind | None) -> nn.Module:
    with torch.device("meta"):
        net: nn.Module = build(model, kind)
    # patterns match the names in a ClassificationTask, net.*
    return net if isinstance(net, LightningModule) else nn.ModuleDict({"net": net})


def is_small_dense(sparsity: DictConfig, trust: bool = True) -> bool:
    """Return whether the sparsity is small-dense; raises `AppError` for an untrusted class that is called so."""
    target = sparsity.get("_target_")
    if not isinstance(target, str) or not target.endswith(".SmallDense"):
        return False
    if not trust:  # before its module is imported
        check_target("sparsity._target_", target, SPARSITY)
    return issubclass(get_class(target), SmallDense)
