"""What an exported file is worth, once it has been read again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from rich.console import Console
from torch import Tensor, nn

from lightning_topkast import to_csr
from lightning_topkast.app.data.windows import IGNORED
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run_folder import load_network
from lightning_topkast.export.state import same_bits


def check_weights(console: Console, state: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Compare what was read with what was to be written, bit for bit.

    Raises:
        AppError: they differ.
    """
    for name, tensor in state.items():
        again = read.get(name)
        if again is not None and again.layout is torch.sparse_csr:  # which has no signs of zeros
            tensor, again = torch.where(tensor == 0, torch.zeros_like(tensor), tensor), again.to_dense()
        if again is None or not same_bits(tensor, again):
            raise AppError(f"the file was read again, and its '{name}' is not the checkpoint's; is the disk damaged?")
    console.print(f"Read again: all {len(state)} tensors are the checkpoint's, bit for bit", highlight=False)


def run_on(network: nn.Module, prefix: str, read: Mapping[str, Tensor], file: Path) -> nn.Module:
    """Return a copy of a network with the weights that were read, CSR tensors as compressed layers.

    Args:
        network: of the run.
        prefix: of its names in the file.
        read: what the file holds.
        file: to name in errors.
    """
    copied = copy.deepcopy(network)
    compressed = [name for name, tensor in read.items() if tensor.layout is torch.sparse_csr]
    load_network(copied, prefix, {n: t.to_dense() if n in compressed else t for n, t in read.items()}, file)
    return to_csr(copied) if compressed else copied


def check_outputs(
    console: Console, network: nn.Module, exported: Callable[[Tensor], Tensor], data: LightningDataModule
) -> None:
    """Print how far the outputs on the test data are from the network's, and the accuracy of both.

    Raises:
        AppError: the batches are not inputs and targets.
    """
    apart, sizes = [torch.zeros(())], [torch.zeros(())]  # tensors, whose maximum is NaN if one is
    right, own_right, total = 0, 0, 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        for batch in data.test_dataloader():
            inputs, targets = _pair(batch)
            outputs, own = exported(inputs), network(inputs)
            apart.append((outputs - own).abs().max().float())
            sizes.append(own.abs().max().float())
            if own.shape[:-1] == targets.shape and not targets.is_floating_point():  # else it is no classification
                judged = targets != IGNORED
                right += _right(outputs, targets, judged)
                own_right += _right(own, targets, judged)
                total += int(judged.sum())
    farthest, largest = (float(torch.stack(found).max()) for found in (apart, sizes))
    console.print(f"Outputs: differ by at most {farthest:.1e}, the largest being {largest:.3g}", highlight=False)
    if total:
        console.print(
            f"Test accuracy: {right / total:.4f}, the checkpoint's {own_right / total:.4f} ({total:,} targets)",
            highlight=False,
        )


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise AppError(f"the run's data comes as {type(batch).__name__}, of which no inputs and targets can be taken")


def _right(outputs: Tensor, targets: Tensor, judged: Tensor) -> int:
    return int(((outputs.argmax(-1) == targets) & judged).sum())
