"""Compare an exported file with the run that it was exported from."""

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
from lightning_topkast.app.export.rebuild import load_network
from lightning_topkast.export.state import same_bits


def check_weights(console: Console, state: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Compare exported tensors with those of the checkpoint, bit for bit.

    Raises:
        AppError: They differ.
    """
    for name, tensor in state.items():
        again = read.get(name)
        if again is not None and again.layout is torch.sparse_csr:  # does not store the sign of a zero
            tensor, again = torch.where(tensor == 0, torch.zeros_like(tensor), tensor), again.to_dense()
        if again is None or not same_bits(tensor, again):
            raise AppError(f"'{name}' differs between the exported file and the checkpoint; is the disk damaged?")
    console.print(f"Compared: all {len(state)} tensors equal those of the checkpoint, bit for bit")


def run_on(network: nn.Module, prefix: str, read: Mapping[str, Tensor], file: Path) -> nn.Module:
    """Return a copy of a network with exported weights, and with CSR layers for CSR tensors.

    Args:
        network: Network of the run.
        prefix: Prefix of its names in the file.
        read: Contents of the file.
        file: The file, for error messages.
    """
    copied = copy.deepcopy(network)
    compressed = [name for name, tensor in read.items() if tensor.layout is torch.sparse_csr]
    load_network(copied, prefix, {n: t.to_dense() if n in compressed else t for n, t in read.items()}, file)
    return to_csr(copied) if compressed else copied


def check_outputs(
    console: Console, network: nn.Module, exported: Callable[[Tensor], Tensor], data: LightningDataModule
) -> None:
    """Print the largest difference in outputs on the test data, and the accuracy of both networks.

    Raises:
        AppError: A batch is not a pair of inputs and targets.
    """
    apart, sizes = [torch.zeros(())], [torch.zeros(())]  # as tensors, so that their maximum is NaN if one of them is
    right, own_right, total = 0, 0, 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        for batch in data.test_dataloader():
            inputs, targets = _pair(batch)
            outputs, own = exported(inputs), network(inputs)
            apart.append((outputs - own).abs().max().float())
            sizes.append(own.abs().max().float())
            if own.shape[:-1] == targets.shape and not targets.is_floating_point():  # otherwise no classes
                judged = targets != IGNORED
                right += _right(outputs, targets, judged)
                own_right += _right(own, targets, judged)
                total += int(judged.sum())
    farthest, largest = (float(torch.stack(found).max()) for found in (apart, sizes))
    console.print(f"Outputs: differ by at most {farthest:.1e}, the largest output is {largest:.3g}")
    if total:
        console.print(
            f"Test accuracy: {right / total:.4f}, the checkpoint's {own_right / total:.4f} ({total:,} targets)",
        )


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise AppError(f"expected batches of inputs and targets, got {type(batch).__name__}")


def _right(outputs: Tensor, targets: Tensor, judged: Tensor) -> int:
    return int(((outputs.argmax(-1) == targets) & judged).sum())
