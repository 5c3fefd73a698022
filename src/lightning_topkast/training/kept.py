"""What outlives a `fit`: engines that a module keeps, and the state that a launched process leaves behind."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_topkast.loading import load
from lightning_topkast.method.targets import find_targets
from lightning_topkast.settings import Settings
from lightning_topkast.topkast import TopKast

_ATTRIBUTE = "_topkast_engines"


class _Engines(list[TopKast]):
    """The engines of a module; a copy or pickle of the module has none, and does not need this package."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, ()


def keep(pl_module: LightningModule, topkast: TopKast) -> None:
    """Keep an engine with its module, where another callback finds it; `configure_callbacks` makes one for each fit.

    It lives as long as its layers, so that θ is not lost with the callback; another module may have the same layers.
    """
    for module in (pl_module, *topkast.owners):
        others = [each for each in _engines_of(module) if each is not topkast and not each.is_released]
        module.__dict__[_ATTRIBUTE] = _Engines([*others, topkast])


def kept_engine(pl_module: LightningModule, settings: Settings, others: Collection[Settings]) -> TopKast | None:
    """Return the engine of an earlier `fit` with the same settings, if the model is still as that `fit` left it.

    An engine whose weights the callback is to make sparse with other settings is left to the new engine, which takes
    over θ. Weights of other engines stay as they are; if they are trained without a callback, a warning says that they
    become dense.

    Args:
        pl_module: the module to be trained.
        settings: of the callback that asks.
        others: settings of the Trainer's other Top-KAST callbacks.
    """
    found = None
    for topkast in list(_engines_of(pl_module)):
        if topkast.is_attached or any(vars(topkast.settings) == vars(other) for other in others):
            continue
        intact = topkast.model is pl_module and topkast.is_intact
        if intact and found is None and vars(topkast.settings) == vars(settings):
            found = topkast
        elif not intact:
            _engines_of(pl_module).remove(topkast)
        elif not _targets_of(pl_module, settings).isdisjoint(topkast.weights):
            _engines_of(pl_module).remove(topkast)  # the next engine of these weights takes over θ
        elif trained := [name for name, weight in topkast.weights.items() if weight.parameter.requires_grad]:
            rank_zero_warn(
                f"the weights {', '.join(trained[:5])} were kept sparse in an earlier fit, and no callback of this one "
                "keeps them so: they become dense. Add a callback for them, or freeze them (requires_grad_(False))"
            )
            _engines_of(pl_module).remove(topkast)
    return found


def _targets_of(pl_module: LightningModule, settings: Settings) -> set[str]:
    return {target.name for target in find_targets(pl_module, settings.targets) if target.sparse}


def _engines_of(module: nn.Module) -> list[TopKast]:
    engines: list[TopKast] = module.__dict__.get(_ATTRIBUTE, [])
    return engines


class Handover:
    """The state that a process that the Trainer has spawned or forked leaves to the process that launched it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir(), f"topkast-{uuid.uuid4().hex}")
        self._launcher = os.getpid()

    def leave(self, trainer: Trainer, state: Callable[[], dict[str, Any]]) -> None:
        """Write the state of the process with rank 0, if the Trainer has launched it; `state` may be a collective."""
        if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            return
        left = state()
        if trainer.is_global_zero:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            torch.save(left, self._folder / "new.pt")
            os.replace(self._folder / "new.pt", self._folder / "state.pt")

    def fetch(self, begins: bool = False) -> dict[str, Any] | None:
        """Return the state that was left, once, or None.

        Args:
            begins: whether a fit begins. Only then a launched process may read what the one before it has left, if the
                launching process has not taken it; later it would find what its own run leaves.
        """
        is_launcher = os.getpid() == self._launcher
        if not self._folder.is_dir() or not (is_launcher or begins):
            return None
        state: dict[str, Any] = load(self._folder / "state.pt")
        if is_launcher:
            shutil.rmtree(self._folder)
        return state

    def __deepcopy__(self, memo: Any) -> "Handover":
        return Handover()  # of a callback of its own
