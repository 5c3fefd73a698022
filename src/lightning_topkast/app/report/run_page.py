"""The report of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lightning_topkast.app.report.cards import cards, percent
from lightning_topkast.app.report.masks import SavedWeight, chosen, picture
from lightning_topkast.app.report.page import Inline, inline_png, render, write_page
from lightning_topkast.app.report.run import RunFolder, read_run

_NO_MATPLOTLIB = "Curves and histograms are left out: they need matplotlib, pip install 'lightning-topkast[report]'."


@dataclass(frozen=True)
class WeightRow:
    """A row of the table of weights; None stands for what is not known, or does not apply to a dense weight.

    `reason` says why a weight is dense, as far as it is known.
    """

    name: str
    shape: str
    entries: int
    nonzero: int | None
    active: int | None = None
    updated: int | None = None
    forward_cut: float | None = None
    backward_cut: float | None = None
    reason: str = ""


def write_run_report(folder: Path) -> Path:
    """Write `report.html`, and its pictures as PNG files into `report/`, into a run's folder; return the page."""
    run = read_run(folder)
    notes = list(run.notes)
    curves: list[Inline] = []
    layers: list[Inline] = []
    magnitudes: list[Inline] = []
    pictures: dict[str, bytes] = {}
    weights = chosen(run.saved.weights) if run.saved else []
    try:
        from lightning_topkast.app.report.drawing import to_png, to_svg
        from lightning_topkast.app.report.figures import Drawn, curve_figures, heatmap, histograms
    except ImportError:
        notes.append(_NO_MATPLOTLIB)
    else:
        monitor = (run.result.get("monitor") or {}).get("name")
        changes = heatmap(run.curves)
        found: list[tuple[list[Inline], list[Drawn]]] = [
            (curves, curve_figures(run.curves, monitor)),
            (layers, [changes] if changes else []),
            (magnitudes, histograms(weights)),
        ]
        for inlines, drawn in found:
            for each in drawn:
                pictures[each.name] = to_png(each.figure)
                inlines.append(Inline(each.name, each.label, Markup(to_svg(each.figure, each.name, each.label))))
    masks = []
    for number, weight in enumerate(weights, start=1):
        name = f"mask-{number}"
        pictures[name] = picture(weight)
        label = f"sets of {weight.name}, {_shape(weight.shape)}"
        masks.append(inline_png(name, label, pictures[name], f"{weight.name}  {_shape(weight.shape)}"))
    rows, rest = _rows(run)
    html = render(
        "run.html", run=run, cards=cards(run.result, run.saved), notes=notes, curves=curves, layers=layers,
        masks=masks, magnitudes=magnitudes, rows=rows, rest=rest, percent=percent,
    )  # fmt: skip
    return write_page(folder, html, pictures)


def has_matplotlib() -> bool:
    """Whether curves can be drawn."""
    return find_spec("matplotlib") is not None


@dataclass(frozen=True)
class Rest:
    """Sums over the dense parameters of one dimension."""

    count: int
    entries: int
    nonzero: int


def _rows(run: RunFolder) -> tuple[list[WeightRow], Rest]:
    """Every weight that was counted in the test, in the model's order, and those of the checkpoint."""
    saved = {weight.name: weight for weight in run.saved.weights} if run.saved else {}
    counted: list[dict[str, Any]] = run.result.get("weights") or []
    rest = [each for each in counted if len(each["shape"]) < 2 and each["name"] not in saved]
    rows = [_row(saved.pop(each["name"], None), each) for each in counted if each not in rest]
    rows += [
        _row(weight, {"name": weight.name, "shape": weight.shape, "entries": weight.entries})
        for weight in saved.values()
    ]
    return rows, Rest(len(rest), *(sum(each[key] for each in rest) for key in ("entries", "nonzero")))


def _row(weight: SavedWeight | None, counted: Mapping[str, Any]) -> WeightRow:
    row = WeightRow(counted["name"], _shape(counted["shape"]), counted["entries"], counted.get("nonzero"))
    if weight is None:
        return replace(row, reason=counted.get("kept_dense") or "")
    forward_cut, backward_cut = weight.thresholds()
    return replace(
        row, active=weight.active, updated=weight.updated, forward_cut=forward_cut, backward_cut=backward_cut
    )


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"
