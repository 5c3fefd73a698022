"""Comparisons as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from lightning_topkast.app import formatting
from lightning_topkast.app.sweep.collect import Collected, Comparison, Figure, Row
from lightning_topkast.app.terminal import Terminal
from lightning_topkast.text import markdown


def to_markdown(collected: Collected) -> str:
    """Return one aligned table per comparison, and notes on how to read them."""
    parts = []
    for comparison in collected.comparisons:
        parts.append(f"## {markdown(comparison.data)}, {markdown(comparison.model)}")
        lines = [header(comparison), *(cells(row, comparison) for row in comparison.rows)]
        head, *rows = ([markdown(cell) for cell in line] for line in lines)
        parts.append(_table(head, rows))
    parts.append("\n".join(f"- {markdown(note)}" for note in notes(collected)))
    return "\n\n".join(part for part in parts if part) + "\n"


def print_tables(collected: Collected) -> None:
    """Print the columns that decide, within 80 columns where there is no terminal; the files have all of them."""
    console = Terminal()
    for comparison in collected.comparisons:
        head = header(comparison)
        kept = [0, 1, 2, *(head.index(name) for name in ("sparsity", "inference FLOPs", "training FLOPs", "runs"))]
        table = Table(
            title=f"\n{comparison.data}, {comparison.model}", title_justify="left", box=box.SIMPLE_HEAD, padding=0
        )
        for number in kept:
            name = head[number].replace(" / ", " /\n").replace(" FLOPs", "\nFLOPs")
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in comparison.rows:
            line = cells(row, comparison)
            table.add_row(*(line[number] for number in kept))
        console.print(table)
    for note in notes(collected):
        console.print(f"• {note}")


def to_csv(collected: Collected) -> str:
    """Return one row of raw numbers per configuration, of all comparisons."""
    names = sorted({name for c in collected.comparisons for row in c.rows for name in row.figures}, key=_COLUMNS.index)
    text = io.StringIO()
    columns = [f"{name}_{part}" for name in names for part in ("mean", "std")]
    head = ["data", "model", "method", "settings", "forward_sparsity", "backward_sparsity", "test_metric"]
    head += ["validation_metric", *columns, "runs", "diverged", "seeds"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for comparison in collected.comparisons:
        for row in comparison.rows:
            figures = [row.figures.get(name) for name in names]
            cells_of_row = (
                [comparison.data, comparison.model, row.method, " ".join(row.settings), row.forward_sparsity]
                + [row.backward_sparsity, comparison.test, comparison.validation]
                + [value for figure in figures for value in ((figure.mean, figure.std) if figure else ("", ""))]
                + [len(row.seeds), row.diverged, " ".join(map(str, row.seeds))]
            )
            writer.writerow(map(formatting.csv_cell, cells_of_row))
    return text.getvalue()


def to_json(collected: Collected) -> str:
    """Return everything, including the value of each run."""
    return json.dumps(collected.to_dict(), indent=1) + "\n"


_SLACK = 0.005  # tolerated shortfall of the sparsity, since counts are integers and densities differ by layer
_COLUMNS = [
    "test", "validation", "sparsity", "model_sparsity", "nonzero_parameters", "inference_flops_ratio",
    "training_flops_ratio", "seconds",
]  # fmt: skip


def header(comparison: Comparison) -> list[str]:
    """Return the names of the columns."""
    arrow = "↓" if comparison.lower_is_better else "↑"
    metrics = [f"{name} {arrow}" for name in (comparison.test, comparison.validation) if name]
    return [
        "method", "forward / backward", *metrics, "sparsity", "parameters", "inference FLOPs", "training FLOPs",
        "time", "runs",
    ]  # fmt: skip


def cells(row: Row, comparison: Comparison) -> list[str]:
    """Return the text of a row, one cell per column."""
    levels = [
        formatting.level(row.forward_sparsity),
        *([] if row.backward_sparsity is None else [formatting.level(row.backward_sparsity)]),
    ]
    figures, seconds = row.figures, row.figures.get("seconds")
    metrics = ["test", "validation"] if comparison.test else ["validation"]
    return [
        row.name,
        " / ".join(levels) + " %",
        *(_spread(figures.get(name), "{:.4f}") for name in metrics),
        _spread(figures.get("model_sparsity"), "{:.1%}", spread=False),
        _spread(figures.get("nonzero_parameters"), "{:,.0f}", spread=False),
        _spread(figures.get("inference_flops_ratio"), "{:.3f}×", spread=False),
        _spread(figures.get("training_flops_ratio"), "{:.3f}×", spread=False),
        "-" if seconds is None else formatting.duration(seconds.mean, seconds.std),
        f"{len(row.seeds)}" + (f" + {row.diverged} diverged" if row.diverged else ""),
    ]


def numbers(row: Row, comparison: Comparison) -> list[float | None]:
    """Return what the cells of a row after the first are sorted by, None for what is not known."""
    metrics = ["test", "validation"] if comparison.test else ["validation"]
    names = [*metrics, *_COLUMNS[_COLUMNS.index("model_sparsity") :]]
    means = [row.figures[name].mean if name in row.figures else None for name in names]
    return [row.forward_sparsity, *means, len(row.seeds)]


def _spread(figure: Figure | None, form: str, spread: bool = True) -> str:
    if figure is None:
        return "-"
    text = form.format(figure.mean)
    return f"{text} ± {form.format(figure.std)}" if spread and figure.std is not None else text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = [
        f"{':' if left else '-'}{'-' * (width - 2)}{'-' if left else ':'}"
        for width, left in zip(widths, _left(widths), strict=True)
    ]
    lines = [list(header), rule, *rows]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, _left(widths), strict=True)
        )
        + " |"
        for line in lines
    )


def _left(columns: Sequence[Any]) -> list[bool]:
    return [index == 0 for index in range(len(columns))]


def notes(collected: Collected) -> list[str]:
    """Return notes on how to read the tables."""
    found = []
    if any(len(row.seeds) > 1 for c in collected.comparisons for row in c.rows):
        found.append("mean ± sample standard deviation over runs that differ in their seeds")
    if collected.comparisons:
        found.append(
            "sparsity: fraction of zeros among all parameters. FLOPs: what the sparsity makes possible, relative to a "
            "dense run, in training over all examples (masked weights are computed dense and save no FLOPs). time: of "
            "training, on the machine of the run"
        )
    if any(not c.dense_row for c in collected.comparisons):
        found.append("in a table without a dense run, FLOPs are relative to a dense run of the same network and length")
    for comparison in collected.comparisons:
        found += [
            f"{row.name} at {formatting.level(row.forward_sparsity)} %: only {realised.mean:.1%} of the tested weights "
            "are zero, so that inference takes more FLOPs than the table says; callbacks.checkpoint.monitor=null tests "
            "the last weights instead of those of the best epoch"
            for row in comparison.rows
            if (realised := row.figures.get("sparsity")) and realised.mean < row.forward_sparsity - _SLACK
        ]
        found += [
            f"the runs of {comparison.data}, {comparison.model} used different versions of {name}: "
            + ", ".join(versions)
            for name, versions in comparison.versions.items()
        ]
    if collected.unfinished:
        found.append(f"not finished: {', '.join(collected.unfinished)}")
    found += [f"failed: {name}: {error}" for name, error in collected.failed.items()]
    return found
