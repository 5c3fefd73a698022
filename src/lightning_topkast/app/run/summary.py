"""The summary that a run prints at its end: sparsity of each weight, paths and final metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_topkast.app import formatting
from lightning_topkast.app.terminal import Terminal
from lightning_topkast.layers import packed_weights


class WeightCount(NamedTuple):
    """Number of entries of a parameter, and of those that are not zero."""

    name: str
    shape: tuple[int, ...]
    entries: int
    nonzero: int


def count_weights(model: nn.Module) -> list[WeightCount]:
    """Count the entries of every parameter. All processes must call this, since sharded parameters are gathered."""
    counts = []
    packed = packed_weights(model)
    for name, parameter in model.named_parameters():
        if name in packed:
            weight = packed[name]
            counts.append(WeightCount(name, tuple(weight.shape), weight.size, int(weight.nonzero_entries)))
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        counts.append(WeightCount(name, tuple(whole.shape), whole.numel(), int(whole.count_nonzero())))
    return counts


def print_summary(
    counts: list[WeightCount],
    metrics: Mapping[str, float],
    output_dir: Path,
    wandb_dir: Path | None,
    checkpoint: Path | None,
    incomplete_logs: Sequence[str] = (),
) -> None:
    """Print the table of sparsities, the paths, what the logs lack, and the metrics of the test."""
    console = Terminal(soft_wrap=True)  # do not wrap paths, so that they can be copied
    console.print(sparsity_table(counts))
    console.print(f"Run folder:  {output_dir}")
    if checkpoint is not None:
        console.print(f"Checkpoint:  {checkpoint}")
    if wandb_dir is not None:
        console.print(f"W&B offline: wandb sync {wandb_dir}")
    for lacking in incomplete_logs:
        console.print(f"Log:         incomplete, {lacking}")
    if metrics:
        console.print(f"Final:       {formatting.metrics(metrics)}", style="bold")


def sparsity_table(counts: list[WeightCount]) -> Table:
    """Return a table with the counted sparsity of each weight of two or more dimensions, and of all parameters."""
    table = Table(title="Realised sparsity", title_justify="left")
    table.add_column("weight", overflow="fold")  # do not truncate names
    table.add_column("shape")
    for column in ("entries", "non-zero", "sparsity"):
        table.add_column(column, justify="right")
    for name, shape, entries, nonzero in counts:
        if len(shape) > 1:
            _add_row(table, name, formatting.shape(shape), entries, nonzero)
    table.add_section()
    _add_row(table, "all parameters", "", sum(c.entries for c in counts), sum(c.nonzero for c in counts))
    return table


def _add_row(table: Table, name: str, shape: str, entries: int, nonzero: int) -> None:
    sparsity = formatting.percent(1 - nonzero / entries) if entries else "-"
    table.add_row(name, shape, f"{entries:,}", f"{nonzero:,}", sparsity)
