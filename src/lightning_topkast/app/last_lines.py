"""The last lines of a run: where everything is, the final figures, and how sparse each weight really is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_topkast.layers import packed_weights


class WeightCount(NamedTuple):
    """How many entries of a parameter there are, and how many aren't zero."""

    name: str
    shape: tuple[int, ...]
    entries: int
    nonzero: int


def count_weights(model: nn.Module) -> list[WeightCount]:
    """Count every parameter's entries; all processes take part, since sharded ones are gathered."""
    counts = []
    packed = packed_weights(model)
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        whole = packed[name].alpha() if name in packed else whole
        counts.append(WeightCount(name, tuple(whole.shape), whole.numel(), int(whole.count_nonzero())))
    return counts


def print_last_lines(
    counts: list[WeightCount],
    metrics: Mapping[str, float],
    output_dir: Path,
    wandb_dir: Path | None,
    checkpoint: Path | None,
) -> None:
    """Print the table, the folders and the figures of the test."""
    console = Console(soft_wrap=True)  # paths must stay whole, to be copied
    console.print(sparsity_table(counts))
    console.print(f"Run folder:  {output_dir}", highlight=False)
    if checkpoint is not None:
        console.print(f"Checkpoint:  {checkpoint}", highlight=False)
    if wandb_dir is not None:
        console.print(f"W&B offline: wandb sync {wandb_dir}", highlight=False)
    figures = "  ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))
    if figures:
        console.print(f"[bold]Final:       {figures}[/bold]", highlight=False)


def sparsity_table(counts: list[WeightCount]) -> Table:
    """One row a weight with two dimensions or more, and one for all parameters; counted, not taken from settings."""
    table = Table(title="Realised sparsity", title_justify="left")
    table.add_column("weight", overflow="fold")  # names must stay whole
    table.add_column("shape")
    for column in ("entries", "non-zero", "sparsity"):
        table.add_column(column, justify="right")
    for name, shape, entries, nonzero in counts:
        if len(shape) > 1:
            table.add_row(name, "×".join(map(str, shape)), f"{entries:,}", f"{nonzero:,}", _percent(nonzero, entries))
    table.add_section()
    entries, nonzero = sum(c.entries for c in counts), sum(c.nonzero for c in counts)
    table.add_row("all parameters", "", f"{entries:,}", f"{nonzero:,}", _percent(nonzero, entries))
    return table


def _percent(nonzero: int, total: int) -> str:
    return f"{100 * (1 - nonzero / total):.2f} %" if total else "-"
