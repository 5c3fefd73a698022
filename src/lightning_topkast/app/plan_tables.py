"""A plan as two tables: its layers, and its memory beside that of other ways to train the same model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_topkast.costs import Bytes, Layer, Plan

_WIDTH = 100  # where the output is no terminal
_KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "buckets": "DDP's buckets",
    "optimizer": "optimizer state",
    "masks": "masks",
    "reserve": "reserve",
    "indices": "indices",
}


def print_tables(plan: Plan) -> None:
    """Print both tables and what must be known to read them."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(layer_table(plan))
    console.print(memory_table(plan))
    for note in plan.notes:
        console.print(f"• {note}", markup=False)


def layer_table(plan: Plan) -> Table:
    """One row a group of like layers, then the sum of what is small, then the model."""
    table = Table(
        title="FLOPs of one example, and what they are of a dense run's",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("layer", overflow="fold")
    table.add_column("kept")
    for column in ("entries", "D", "D+M", "forward", "%", "training", "%"):
        table.add_column(column, justify="right")
    layers = [layer for layer in plan.layers if layer.name != "buffers"]
    shown = [
        layer for layer in layers if len(layer.shape) > 1 or layer.dense_forward_flops or layer.execution != "dense"
    ]
    for group in _alike(shown):
        first = group[0]
        densities = [f"{density:.3f}" for density in (first.forward_density, first.backward_density)]
        name = _common_name([layer.name for layer in group]) + (f" ({len(group)}×)" if len(group) > 1 else "")
        table.add_row(name, first.execution, *_figures(group, *(densities if first.execution != "dense" else ("", ""))))
    rest = [layer for layer in layers if layer not in shown]
    if rest:
        table.add_row(f"biases, norms and the like ({len(rest)}×)", "dense", *_figures(rest, "", ""))
    table.add_section()
    entries = sum(layer.size for layer in layers)
    kept = (sum(layer.active for layer in layers), sum(layer.updated for layer in layers))
    densities = [f"{count / max(entries, 1):.3f}" for count in kept]
    table.add_row("whole model", "", *_figures(layers, *densities), style="bold")
    return table


def memory_table(plan: Plan) -> Table:
    """One row a kind of memory, one column a way to train."""
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
            table.add_row(name, *(_bytes(getattr(taken, kind)) for taken in columns.values()))
    table.add_section()
    table.add_row("device", *(_bytes(taken.device) for taken in columns.values()))
    table.add_row("host, a process", *(_bytes(taken.host) for taken in columns.values()))
    table.add_row("sent a step", *(_bytes(taken.sent) for taken in columns.values()))
    return table


def _figures(layers: list[Layer], forward_density: str, backward_density: str) -> Iterator[str]:
    yield _short(sum(layer.size for layer in layers))
    yield from (forward_density, backward_density)
    for pass_ in ("forward", "training"):
        sparse = sum(getattr(layer, f"{pass_}_flops") for layer in layers)
        dense = sum(getattr(layer, f"dense_{pass_}_flops") for layer in layers)
        yield from (_short(sparse), f"{100 * sparse / dense:.1f}" if dense else "")


def _alike(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Layers that differ in nothing but a number in their names, such as a transformer's blocks."""
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        name = tuple("*" if part.isdigit() else part for part in layer.name.split("."))
        figures = (layer.shape, layer.execution, layer.active, layer.updated, layer.training_flops, layer.forward_flops)
        groups.setdefault((name, figures), []).append(layer)
    return list(groups.values())


def _common_name(names: list[str]) -> str:
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(each[0] if len(set(each)) == 1 else "*" for each in parts)


def _short(number: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return f"{number:.3g}" if number else "0"


def _bytes(number: float) -> str:
    if not number:
        return "-"
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << power:
            return f"{number / (1 << power):,.1f} {unit}"
    return f"{number:.0f} B"


assert set(_KINDS) | {"host", "payload", "sent"} == {field.name for field in fields(Bytes)}
