"""What a run has left, read again without trusting it: its checkpoint, and the network that its configuration names."""

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

from lightning_topkast.app.checkpoint import Checkpoint
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.small_dense import SmallDense, narrowed_model

# Hydra calls whatever a configuration names, os.system as well, and whoever hands on a run wrote its configuration.
_TRUSTED = ("lightning_topkast.app.data", "lightning_topkast.app.models", "torch.nn", "torchvision.models")


def find_checkpoint(path: Path) -> Path:
    """Return a run folder's best checkpoint, its last one where there is no best; a file is what it is.

    Raises:
        AppError: there is none.
    """
    if not path.exists():
        raise AppError(f"there is no {path.absolute()}: name a checkpoint or a run's folder")
    if not path.is_dir():
        return path
    if (path / ".metadata").exists() or (path / "meta.pt").exists():
        raise AppError(f"{path} is a distributed checkpoint: make a file of it by topkast-consolidate {path} FILE")
    for pattern in ("best*.ckpt", "last*.ckpt", "*.ckpt"):
        if found := list((path / "checkpoints").glob(pattern)):
            newest = max(found, key=lambda file: file.stat().st_mtime_ns)
            return newest if newest.is_file() else find_checkpoint(newest)
    raise AppError(f"{path} is no run's folder: it has no checkpoints/*.ckpt")


def read_config(checkpoint: Path) -> DictConfig | None:
    """Return the configuration of the run that a checkpoint lies in, None where it lies somewhere else.

    Raises:
        AppError: it can't be read.
    """
    for folder in checkpoint.absolute().parents[:2]:
        path = folder / ".hydra" / "config.yaml"
        if path.is_file():
            try:
                config = OmegaConf.load(path)
            except Exception as error:  # YAML's own, OmegaConf's, and those of text
                raise AppError(f"{path} can't be read: {error}") from error
            parts = ("model", "data", "sparsity")
            if not isinstance(config, DictConfig) or not all(isinstance(config.get(p), DictConfig) for p in parts):
                raise AppError(f"{path} is no configuration of topkast-train: it needs a model, data and sparsity")
            return config
    return None


def build_network(cfg: DictConfig, checkpoint: Checkpoint, trust: bool) -> tuple[nn.Module, str]:
    """Return the network of a run with a checkpoint's weights, and what its names begin with in the checkpoint.

    Args:
        cfg: the run's.
        checkpoint: of the run.
        trust: whether to call what is not known to be harmless.

    Raises:
        AppError: the configuration names what is not trusted, or the weights belong to another network.
    """
    if not trust:
        _check_targets(cfg, "model", nn.Module)
        if str(OmegaConf.select(cfg, "sparsity._target_", default="")).endswith(".SmallDense"):  # which is built, too
            _check_targets(cfg, "sparsity", SmallDense, among=(SmallDense.__module__,))
    network: nn.Module = instantiate(narrowed_model(cfg), _convert_="all")
    prefix = "" if isinstance(network, LightningModule) else "net."
    load_network(network, prefix, checkpoint.content["state_dict"], checkpoint.path)
    return network.eval(), prefix


def load_network(network: nn.Module, prefix: str, state: dict[str, Tensor], path: Path) -> None:
    """Load what was exported into a network.

    Raises:
        AppError: it belongs to another one.
    """
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    try:
        network.load_state_dict(own)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise AppError(f"the weights in {path} don't fit the network of the run's configuration: {reason}") from error


def build_data(cfg: DictConfig, trust: bool) -> LightningDataModule:
    """Return the data of a run, ready to be tested on; raises as `build_network`."""
    if not trust:
        _check_targets(cfg, "data", LightningDataModule)
    data: LightningDataModule = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup("test")
    return data


def example_input(cfg: DictConfig, network: nn.Module) -> Tensor:
    """Return an input for two examples: the network's own example, or zeros of the data's shape.

    Raises:
        AppError: neither is known.
    """
    own = getattr(network, "example_input_array", None)
    if isinstance(own, Tensor):
        return own
    if (length := OmegaConf.select(cfg, "data.sequence_length")) is not None:
        return torch.zeros(2, length, dtype=torch.int64)
    if (shape := OmegaConf.select(cfg, "data.input_shape")) is not None:
        return torch.zeros(2, *shape)
    raise AppError(
        "the network's input is not known: the run's data has neither input_shape nor sequence_length, and the "
        "model no example_input_array"
    )


def _check_targets(cfg: DictConfig, part: str, base: type, among: tuple[str, ...] = _TRUSTED) -> None:
    for key, target in _targets(OmegaConf.to_container(cfg[part], resolve=True), part):
        if not _is_trusted(target, base, among):
            raise AppError(
                f"the run's configuration wants to call {key}={target!s:.80}, which is no {base.__name__} of "
                f"{', '.join(among)}; if you know this run, add --trust"
            )


def _targets(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    for name, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if name == "_target_":
            yield f"{key}.{name}", child
        yield from _targets(child, f"{key}.{name}")


def _is_trusted(target: Any, base: type, among: tuple[str, ...]) -> bool:
    """Whether a target is a class of ours or torch's, or a function that makes a network, by the name it is known by.

    A prefix alone says nothing: every module leads on to those that it imports, `torch.nn.functional.os.system`.
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
