"""Print a plan as two tables: its layers, and its memory beside that of other ways to train the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lightning_topkast.app import formatting
from lightning_topkast.app.terminal import Terminal
from lightning_topkast.costs import Bytes, Layer, Plan
from lightning_topkast.text import short_names

_WIDTH = 80  # if the output is not a terminal
_LEAST = 16  # characters of a name
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
    console.print(layer_table(plan, console))
    console.print(memory_table(plan))
    for note in plan.notes:
        console.print(f"• {note}")


def layer_table(plan: Plan, console: Console) -> Table:
    """Return one row per group of similar layers, then the sum of the small parameters, then the model.

    Long names are shortened in the middle, so that each row is one line of the console.
    """
    layers = [layer for layer in plan.layers if layer.name != "buffers"]
    shown = [layer for layer in layers if len(layer.shape) > 1 or layer.dense_forward_flops or layer.storage != "dense"]
    kinds = sorted({layer.storage for layer in layers} - {"dense"})
    rows: list[tuple[str, list[str]]] = []
    for group in _alike(shown):
        first = group[0]
        densities = [f"{density:.3f}" for density in (first.forward_density, first.backward_density)]
        cells = [first.storage, *_figures(group, *(densities if first.storage != "dense" else ("dense", "")))]
        name = _common_name([layer.name for layer in group]).removesuffix(".weight")
        rows.append((f"{name} ({len(group)}×)" if len(group) > 1 else name, cells))
    rest = [layer for layer in layers if layer not in shown]
    if rest:
        rows.append((f"biases, norms, ... ({len(rest)}×)", ["dense", *_figures(rest, "dense", "")]))
    kept = (sum(layer.active for layer in layers), sum(layer.updated for layer in layers))
    densities = [f"{count / max(sum(layer.size for layer in layers), 1):.3f}" for count in kept]
    rows.append(("whole model", ["", *_figures(layers, *densities)]))

    title = "FLOPs of one example, absolute and in % of a dense run" + (
        f"; {kinds[0]} storage" if len(kinds) == 1 else ""
    )

    def table(names: Sequence[str]) -> Table:
        built = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        built.add_column("layer", no_wrap=True)
        if len(kinds) > 1:
            built.add_column("storage", no_wrap=True)
        for column in ("entries", "D", "D+M", "forward", "%", "training", "%"):
            built.add_column(column, justify="right", no_wrap=True)
        for number, (name, (_, cells)) in enumerate(zip(names, rows, strict=True), start=1):
            is_last = number == len(rows)
            if is_last:
                built.add_section()
            built.add_row(name, *cells[len(kinds) <= 1 :], style="bold" if is_last else "")
        return built

    names = [name for name, _ in rows]
    room = console.width - Measurement.get(console, console.options, table([""] * len(rows))).maximum + len("layer")
    return table(short_names(names, max(room, _LEAST)))


def memory_table(plan: Plan) -> Table:
    """Return one row per kind of memory, and one column per way to train."""
    parallel = plan.parallel
    many = f"each of {parallel.devices} devices" if parallel.devices > 1 else "one device"
    table = Table(title=f"Memory and communication of {many}", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("")
    others = {name.replace("_", ", "): taken for name, taken in plan.strategies.items() if taken != plan.bytes}
    columns = {"this run": plan.bytes, **others}
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name == "this run" else "")
    for kind, name in _KINDS.items():
        if any(getattr(taken, kind) for taken in columns.values()):
            table.add_row(name, *(_n_bytes(getattr(taken, kind)) for taken in columns.values()))
    table.add_section()
    table.add_row("device", *(_n_bytes(taken.device) for taken in columns.values()))
    table.add_row("host, per process", *(_n_bytes(taken.host) for taken in columns.values()))
    table.add_row("sent per step", *(_n_bytes(taken.sent) for taken in columns.values()))
    if any(taken.refresh for taken in columns.values()):
        table.add_row("sent per refresh", *(_n_bytes(taken.refresh) for taken in columns.values()))
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


assert set(_KINDS) | {"host", "payload", "sent", "refresh"} == {field.name for field in fields(Bytes)}
