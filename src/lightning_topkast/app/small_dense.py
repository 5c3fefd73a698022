"""The baseline *small-dense*: a dense network, narrower, with as many parameters as a sparse one has non-zero ones."""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import get_class, instantiate
from lightning import Callback, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_topkast.app.errors import AppError
from lightning_topkast.method.density import allocate
from lightning_topkast.method.targets import find_targets
from lightning_topkast.settings import Settings

_HALVINGS = 16  # of the range of factors: as fine as a channel of 32,000


class SmallDense(Callback):
    """Does nothing in training: it says for which sparsity the model is made narrow before that.

    Args:
        forward_sparsity: Of the run to compare with, as that of `sparsity=topkast`.
        width_factor: By which `model.width_factor` is multiplied; None chooses the widest network that fits.
        settings: What else decides how many entries are zero: distribution, overrides, include, ...
    """

    def __init__(self, forward_sparsity: float, width_factor: float | None = None, **settings: Any) -> None:
        super().__init__()
        self.settings = Settings(forward_sparsity, backward_sparsity=0.0, **settings)
        self.width_factor = width_factor


def with_width(cfg: DictConfig) -> DictConfig:
    """Return `cfg`, under `sparsity=small_dense` a copy whose `sparsity.width_factor` is chosen, for loggers to record.

    Raises:
        AppError: the model has no width to scale, or is too large even where each layer is one channel wide.
    """
    if not is_small_dense(cfg.sparsity):
        return cfg
    if OmegaConf.select(cfg, "model.width_factor") is None:
        raise AppError(
            f"sparsity=small_dense narrows a network by model.width_factor, which {cfg.model.get('_target_')} does not "
            "have: take another model, or give yours such an argument and add +model.width_factor=1.0"
        )
    callback: SmallDense = instantiate(cfg.sparsity, _convert_="all")
    if callback.width_factor is not None:
        return cfg
    chosen = cfg.copy()
    chosen.sparsity.width_factor = widest_factor(cfg, parameters_left(_on_meta(cfg.model), callback.settings))
    return chosen


def narrowed_model(cfg: DictConfig) -> DictConfig:
    """Return `cfg.model`, under `sparsity=small_dense` with the width that fits; raises as `with_width`."""
    cfg = with_width(cfg)
    return _scaled(cfg, cfg.sparsity.width_factor) if is_small_dense(cfg.sparsity) else cfg.model


def parameters_left(model: nn.Module, settings: Settings) -> int:
    """Return how many parameters of `model` Top-KAST would leave other than zero, those of dense layers included."""
    targets = find_targets(
        model, settings.include, settings.exclude, settings.include_types, settings.exclude_types,
        settings.keep_first_dense, settings.keep_last_dense,
    )  # fmt: skip
    active = allocate({target.name: target.shape for target in targets if target.sparse}, settings)
    return sum(active[target.name][0] if target.sparse else target.shape.numel() for target in targets)


def widest_factor(cfg: DictConfig, budget: int) -> float:
    """Return the largest factor of the width, at most 1, at which the model has no more than `budget` parameters."""

    def size(factor: float) -> int:
        return sum(parameter.numel() for parameter in _on_meta(_scaled(cfg, factor)).parameters())

    low, high = 0.0, 1.0
    if size(high) <= budget:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    if low == 0.0:
        raise AppError(
            f"sparsity=small_dense: even the narrowest network has {size(high):,} parameters, more than the {budget:,} "
            "to compare with: a lower sparsity.forward_sparsity or a larger model"
        )
    return low


def _scaled(cfg: DictConfig, factor: float) -> DictConfig:
    """The model's part of a copy of `cfg`, whose other parts it refers to."""
    copy = cfg.copy()
    copy.model.width_factor = float(cfg.model.width_factor) * factor
    return copy.model


def _on_meta(model: DictConfig) -> nn.Module:
    with torch.device("meta"):
        net: nn.Module = instantiate(model, _convert_="all")
    # in a ClassificationTask parameters are named net.*, which patterns go by
    return net if isinstance(net, LightningModule) else nn.ModuleDict({"net": net})


def is_small_dense(sparsity: DictConfig) -> bool:
    """Return whether this makes the model narrow."""
    target = sparsity.get("_target_")
    return isinstance(target, str) and target.endswith(".SmallDense") and issubclass(get_class(target), SmallDense)
