"""Rebuild the network and the data of a run from its configuration, without trusting it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run.small_dense import SmallDense, narrowed_model
from lightning_topkast.app.run_folder.checkpoint import Checkpoint

# Hydra calls everything that a configuration names, even os.system, and a run may come from a stranger.
_TRUSTED = ("lightning_topkast.app.data", "lightning_topkast.app.models", "torch.nn", "torchvision.models")


def build_network(cfg: DictConfig, checkpoint: Checkpoint, trust: bool) -> tuple[nn.Module, str]:
    """Return the network of a run with the weights of a checkpoint, and the prefix of its names in the checkpoint.

    Args:
        cfg: Configuration of the run.
        checkpoint: Checkpoint of the run.
        trust: Whether to call targets that are not known to be harmless.

    Raises:
        AppError: The configuration has an untrusted target, or the weights do not fit the network.
    """
    if not trust:
        _check_targets(cfg, "model", nn.Module)
        if str(OmegaConf.select(cfg, "sparsity._target_", default="")).endswith(".SmallDense"):  # it is built, too
            _check_targets(cfg, "sparsity", SmallDense, among=(SmallDense.__module__,))
    network: nn.Module = instantiate(narrowed_model(cfg), _convert_="all")
    prefix = "" if isinstance(network, LightningModule) else "net."
    load_network(network, prefix, checkpoint.content["state_dict"], checkpoint.path)
    return network.eval(), prefix


def load_network(network: nn.Module, prefix: str, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict into a network.

    Raises:
        AppError: It does not fit the network.
    """
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    try:
        network.load_state_dict(own)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise AppError(f"the weights in {path} do not fit the network of the run's configuration: {reason}") from error


def build_data(cfg: DictConfig, trust: bool) -> LightningDataModule:
    """Return the data of a run, set up for testing; raises like `build_network`."""
    if not trust:
        _check_targets(cfg, "data", LightningDataModule)
    data: LightningDataModule = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup("test")
    return data


def example_input(cfg: DictConfig, network: nn.Module) -> Tensor:
    """Return the `example_input_array` of a network, or else two examples of zeros in the shape of the data.

    Raises:
        AppError: Neither is known.
    """
    own = getattr(network, "example_input_array", None)
    if isinstance(own, Tensor):
        return own
    if (length := OmegaConf.select(cfg, "data.sequence_length")) is not None:
        return torch.zeros(2, length, dtype=torch.int64)
    if (shape := OmegaConf.select(cfg, "data.input_shape")) is not None:
        return torch.zeros(2, *shape)
    raise AppError(
        "the input of the network is not known: the data has neither input_shape nor sequence_length, and the model "
        "has no example_input_array"
    )


def _check_targets(cfg: DictConfig, part: str, base: type, among: tuple[str, ...] = _TRUSTED) -> None:
    for key, target in _targets(OmegaConf.to_container(cfg[part], resolve=True), part):
        if not _is_trusted(target, base, among):
            raise AppError(
                f"the run's configuration has the untrusted target {key}={target!s:.80}: expected a {base.__name__} of "
                f"{', '.join(among)}; if you trust this run, add --trust"
            )


def _targets(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    for name, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if name == "_target_":
            yield f"{key}.{name}", child
        yield from _targets(child, f"{key}.{name}")


def _is_trusted(target: Any, base: type, among: tuple[str, ...]) -> bool:
    """Return whether a target is a class of this package or torch, or a function that builds a network.

    A prefix alone is not enough, since a module leads to all that it imports: `torch.nn.functional.os.system`.
    """
    if not isinstance(target, str) or not target.startswith(tuple(f"{name}." for name in among)):
        return False
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return False
    found = getattr(module, name, None)
    if isinstance(found, type):
        return issubclass(found, base)
    home = str(getattr(found, "__module__", ""))
    return callable(found) and home.startswith(("lightning_topkast.app.models.", "torchvision.models."))
