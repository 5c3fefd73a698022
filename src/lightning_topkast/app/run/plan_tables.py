"""Print a plan as two tables: its layers, and its memory beside that of other ways to train the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

from rich import box
from rich.table import Table

from lightning_topkast.app import formatting
from lightning_topkast.app.terminal import Terminal
from lightning_topkast.costs import Bytes, Layer, Plan

_WIDTH = 100  # if the output is not a terminal
_KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "buckets": "DDP's buckets",
    "optimizer": "optimizer state",
    "masks": "masks",
    "latent": "latent values",
    "indices": "indices",
}


def print_tables(plan: Plan) -> None:
    """Print both tables and notes on how to read them."""
    console = Terminal()
    if not console.is_terminal:
        console = Terminal(width=_WIDTH)
    console.print(layer_table(plan))
    console.print(memory_table(plan))
    for note in plan.notes:
        console.print(f"• {note}")


def layer_table(plan: Plan) -> Table:
    """Return one row per group of similar layers, then the sum of the small parameters, then the model."""
    table = Table(
        title="FLOPs of one example, absolute and relative to a dense run",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("layer", overflow="fold")
    table.add_column("storage")
    for column in ("entries", "D", "D+M", "forward", "%", "training", "%"):
        table.add_column(column, justify="right")
    layers = [layer for layer in plan.layers if layer.name != "buffers"]
    shown = [layer for layer in layers if len(layer.shape) > 1 or layer.dense_forward_flops or layer.storage != "dense"]
    for group in _alike(shown):
        first = group[0]
        densities = [f"{density:.3f}" for density in (first.forward_density, first.backward_density)]
        name = _common_name([layer.name for layer in group]) + (f" ({len(group)}×)" if len(group) > 1 else "")
        table.add_row(name, first.storage, *_figures(group, *(densities if first.storage != "dense" else ("", ""))))
    rest = [layer for layer in layers if layer not in shown]
    if rest:
        table.add_row(f"biases, norms and similar ({len(rest)}×)", "dense", *_figures(rest, "", ""))
    table.add_section()
    entries = sum(layer.size for layer in layers)
    kept = (sum(layer.active for layer in layers), sum(layer.updated for layer in layers))
    densities = [f"{count / max(entries, 1):.3f}" for count in kept]
    table.add_row("whole model", "", *_figures(layers, *densities), style="bold")
    return table


def memory_table(plan: Plan) -> Table:
    """Return one row per kind of memory, and one column per way to train."""
    parallel = plan.parallel
    many = f"each of {parallel.devices} devices" if parallel.devices > 1 else "one device"
    table = Table(
        title=f"Memory and communication of {many}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("")
    columns = {"this run": plan.bytes, **{name.replace("_", ", "): taken for name, taken in plan.strategies.items()}}
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name == "this run" else "")
    for kind, name in _KINDS.items():
        if any(getattr(taken, kind) for taken in columns.values()):
            table.add_row(name, *(_n_bytes(getattr(taken, kind)) for taken in columns.values()))
    table.add_section()
    table.add_row("device", *(_n_bytes(taken.device) for taken in columns.values()))
    table.add_row("host, per process", *(_n_bytes(taken.host) for taken in columns.values()))
    table.add_row("sent per step", *(_n_bytes(taken.sent) for taken in columns.values()))
    return table


def _figures(layers: list[Layer], forward_density: str, backward_density: str) -> Iterator[str]:
    yield formatting.count(sum(layer.size for layer in layers))
    yield from (forward_density, backward_density)
    for pass_ in ("forward", "training"):
        sparse = sum(getattr(layer, f"{pass_}_flops") for layer in layers)
        dense = sum(getattr(layer, f"dense_{pass_}_flops") for layer in layers)
        yield from (formatting.count(sparse), f"{100 * sparse / dense:.1f}" if dense else "")


def _alike(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Group layers that differ only in the numbers in their names, such as the blocks of a transformer."""
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        name = tuple("*" if part.isdigit() else part for part in layer.name.split("."))
        figures = (layer.shape, layer.storage, layer.active, layer.updated, layer.training_flops, layer.forward_flops)
        groups.setdefault((name, figures), []).append(layer)
    return list(groups.values())


def _common_name(names: list[str]) -> str:
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(each[0] if len(set(each)) == 1 else "*" for each in parts)


def _n_bytes(number: float) -> str:
    return formatting.n_bytes(number) if number else "-"


assert set(_KINDS) | {"host", "payload", "sent"} == {field.name for field in fields(Bytes)}
