"""Comparisons as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from lightning_topkast.app.collect import Collected, Comparison, Figure, Row


def to_markdown(collected: Collected) -> str:
    """Return a table a comparison, aligned to be read as it is, and what must be known to read them."""
    parts = []
    for comparison in collected.comparisons:
        parts.append(f"## {comparison.data}, {comparison.model}")
        parts.append(_table(header(comparison), [cells(row, comparison) for row in comparison.rows]))
    parts.append("\n".join(f"- {note}" for note in notes(collected)))
    return "\n\n".join(part for part in parts if part) + "\n"


def to_csv(collected: Collected) -> str:
    """Return a row a configuration, of all comparisons; raw numbers."""
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
            writer.writerow(
                [comparison.data, comparison.model, row.method, " ".join(row.settings), row.forward_sparsity]
                + [row.backward_sparsity, comparison.test, comparison.validation]
                + [value for figure in figures for value in ((figure.mean, figure.std) if figure else ("", ""))]
                + [len(row.seeds), row.diverged, " ".join(map(str, row.seeds))]
            )
    return text.getvalue()


def to_json(collected: Collected) -> str:
    """Return everything, with the value of each run."""
    return json.dumps(collected.to_dict(), indent=1) + "\n"


_SLACK = 0.005  # by which sparsity may fall short of its setting: counts are whole, densities differ by layer
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
    """Return a row's text, one a column."""
    levels = [
        _percent(row.forward_sparsity),
        *([] if row.backward_sparsity is None else [_percent(row.backward_sparsity)]),
    ]
    figures = row.figures
    metrics = ["test", "validation"] if comparison.test else ["validation"]
    return [
        row.name,
        " / ".join(levels) + " %",
        *(_spread(figures.get(name), "{:.4f}") for name in metrics),
        _spread(figures.get("model_sparsity"), "{:.1%}", spread=False),
        _spread(figures.get("nonzero_parameters"), "{:,.0f}", spread=False),
        _spread(figures.get("inference_flops_ratio"), "{:.3f}×", spread=False),
        _spread(figures.get("training_flops_ratio"), "{:.3f}×", spread=False),
        _time(figures.get("seconds")),
        f"{len(row.seeds)}" + (f" + {row.diverged} diverged" if row.diverged else ""),
    ]


def _spread(figure: Figure | None, form: str, spread: bool = True) -> str:
    if figure is None:
        return "-"
    text = form.format(figure.mean)
    return f"{text} ± {form.format(figure.std)}" if spread and figure.std is not None else text


def _time(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    unit, size = next(((u, s) for u, s in (("h", 3600.0), ("min", 60.0)) if figure.mean >= 2 * s), ("s", 1.0))
    spread = "" if figure.std is None else f" ± {figure.std / size:.1f}"
    return f"{figure.mean / size:.1f}{spread} {unit}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}"


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
    """Return what must be known to read the tables."""
    found = []
    if any(len(row.seeds) > 1 for c in collected.comparisons for row in c.rows):
        found.append("mean ± sample standard deviation over the runs, which differ in their seeds")
    if collected.comparisons:
        found.append(
            "sparsity: zeros among all parameters. FLOPs: the arithmetic that the sparsity allows, as a ratio to a "
            "dense run's, in training of all examples seen (masked weights are computed dense, and save none of it). "
            "time: of training, on the machine it ran on"
        )
    if any(not c.dense_row for c in collected.comparisons):
        found.append("without a dense run in a table, FLOPs are ratios to a dense run of the same network and length")
    for comparison in collected.comparisons:
        found += [
            f"{row.name} at {_percent(row.forward_sparsity)} %: only {realised.mean:.1%} of the tested weights are "
            "zero, so that inference takes more FLOPs than the table says; callbacks.checkpoint.monitor=null tests the "
            "last weights, and not the best epoch's"
            for row in comparison.rows
            if (realised := row.figures.get("sparsity")) and realised.mean < row.forward_sparsity - _SLACK
        ]
        found += [
            f"the runs of {comparison.data}, {comparison.model} were made with different versions of {name}: "
            + ", ".join(versions)
            for name, versions in comparison.versions.items()
        ]
    if collected.unfinished:
        found.append(f"not finished: {', '.join(collected.unfinished)}")
    found += [f"failed: {name}: {error}" for name, error in collected.failed.items()]
    return found
