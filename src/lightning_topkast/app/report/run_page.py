"""The report of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from lightning_topkast.app import formatting
from lightning_topkast.app.report.contents import RunContents, read_contents
from lightning_topkast.app.report.film import film
from lightning_topkast.app.report.key_figures import headline, key_figures
from lightning_topkast.app.report.mask_pictures import draw_mask
from lightning_topkast.app.report.network import network
from lightning_topkast.app.report.page import Inline, inline_png, render, write_page
from lightning_topkast.app.report.story import story
from lightning_topkast.app.run_folder.masks import SavedWeight, spread
from lightning_topkast.app.run_folder.result import Weight

_NO_MATPLOTLIB = "Curves and histograms are left out: they need matplotlib, pip install 'lightning-topkast[report]'."


@dataclass(frozen=True)
class WeightRow:
    """A row of the table of weights. None stands for a value that is not known or does not apply to a dense weight.

    `reason` is why a weight is dense, if it is known.
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
    """Write `report.html` and the PNG files in `report/` to the folder of a run, and return the page."""
    run = read_contents(folder)
    notes = [*run.notes, *((run.result.unfinished if run.result else None) or [])]
    curves: list[Inline] = []
    layers: list[Inline] = []
    magnitudes: list[Inline] = []
    pictures: dict[str, bytes] = {}
    weights = spread(run.saved.weights) if run.saved else []
    try:
        from lightning_topkast.app.report.drawing import inlined
        from lightning_topkast.app.report.figures import curve_figures, heatmap, histograms
    except ImportError:
        notes.append(_NO_MATPLOTLIB)
    else:
        monitor = run.result.monitor.name if run.result and run.result.monitor else None
        curves = inlined(curve_figures(run.curves, monitor), pictures, notes)
        layers = inlined(filter(None, [heatmap(run.curves, run.order)]), pictures, notes)
        magnitudes = inlined(histograms(weights), pictures, notes)
    masks = []
    for number, weight in enumerate(weights, start=1):
        name = f"mask-{number}"
        pictures[name] = draw_mask(weight)
        label = f"sets of {weight.name}, {_shape(weight.shape)}"
        masks.append(inline_png(name, label, pictures[name], f"{weight.name}  {_shape(weight.shape)}"))
    rows, rest = _rows(run)
    figures = key_figures(run.result, run.saved, run.curves)
    large = headline(figures)
    html = render(
        "run.html", run=run, story=story(run, figures), large=large,
        more=[each for each in figures if each not in large], notes=notes, curves=curves, layers=layers, masks=masks,
        film=film(run.history, pictures) if run.history else None, network=network(rows), magnitudes=magnitudes,
        rows=rows, rest=rest, percent=formatting.percent,
    )  # fmt: skip
    return write_page(folder, html, pictures)


def has_matplotlib() -> bool:
    """Return whether curves can be drawn."""
    return find_spec("matplotlib") is not None


@dataclass(frozen=True)
class Rest:
    """Sums over the dense parameters of one dimension."""

    count: int
    entries: int
    nonzero: int


def _rows(run: RunContents) -> tuple[list[WeightRow], Rest]:
    """Return all counted weights in the order of the model, and then those that only the checkpoint has."""
    saved = {weight.name: weight for weight in run.saved.weights} if run.saved else {}
    counted = (run.result.weights if run.result else None) or []
    rest: list[Weight] = []
    shown: list[Weight] = []
    for each in counted:
        (rest if len(each.shape) < 2 and each.name not in saved else shown).append(each)
    rows = [_counted_row(each, saved.pop(each.name, None)) for each in shown]
    rows += [_with_sets(WeightRow(w.name, _shape(w.shape), w.entries, None), w) for w in saved.values()]
    return rows, Rest(len(rest), sum(each.entries for each in rest), sum(each.nonzero for each in rest))


def _counted_row(counted: Weight, saved: SavedWeight | None) -> WeightRow:
    row = WeightRow(counted.name, _shape(counted.shape), counted.entries, counted.nonzero)
    return replace(row, reason=counted.kept_dense or "") if saved is None else _with_sets(row, saved)


def _with_sets(row: WeightRow, saved: SavedWeight) -> WeightRow:
    forward_cut, backward_cut = saved.thresholds()
    return replace(row, active=saved.active, updated=saved.updated, forward_cut=forward_cut, backward_cut=backward_cut)


def _shape(sizes: Sequence[int]) -> str:
    return formatting.shape(sizes) or "scalar"
