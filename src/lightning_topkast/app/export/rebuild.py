"""Rebuild the network and the data of a run from its configuration, without trusting it."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run.instantiate import DATA, MODEL, build, check_reach
from lightning_topkast.app.run.small_dense import narrowed_model
from lightning_topkast.app.run_folder.checkpoint import Checkpoint


def build_network(cfg: DictConfig, checkpoint: Checkpoint, trust: bool) -> tuple[nn.Module, str]:
    """Return the network of a run with the weights of a checkpoint, and the prefix of its names in the checkpoint.

    Args:
        cfg: Configuration of the run.
        checkpoint: Checkpoint of the run.
        trust: Whether to call targets that are not known to be harmless.

    Raises:
        AppError: The configuration has an untrusted target, or the weights do not fit the network.
    """
    kind = None if trust else MODEL
    if not trust:
        for part in (cfg.model, cfg.sparsity):
            check_reach(part)
    model, saved = narrowed_model(cfg, kind), checkpoint.content["state_dict"]
    if not trust:
        try:
            with torch.device("meta"):
                needed = sum(value.numel() for value in build(model, kind).state_dict().values())
        except (NotImplementedError, RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise AppError(
                f"how large the network is cannot be found out before it is built ({reason}): if you trust this run, "
                "add --trust"
            ) from error
        if needed > (held := sum(value.numel() for value in saved.values())):
            raise AppError(
                f"the network of the run's configuration has {needed:,} values, and {checkpoint.path} has {held:,}: "
                "they do not belong together"
            )
    network: nn.Module = build(model, kind)
    prefix = "" if isinstance(network, LightningModule) else "net."
    load_network(network, prefix, saved, checkpoint.path)
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
    data: LightningDataModule = build(cfg.data, None if trust else DATA)
    if not isinstance(data, LightningDataModule):
        raise AppError(f"the run's configuration of data stands for a {type(data).__name__}, not a LightningDataModule")
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
