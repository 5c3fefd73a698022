"""The figures of a sweep: the curves of all runs. Imports matplotlib, so import this module late."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_topkast.app.report.curves import MASK_CHANGE, thinned
from lightning_topkast.app.report.drawing import METHODS, Drawn, style
from lightning_topkast.app.report.figures import add_legend, finish, new_axes
from lightning_topkast.app.report.names import slug
from lightning_topkast.app.run_folder.logs import Curve, read_curves
from lightning_topkast.app.run_folder.result import Result

# Points per curve and per figure, so that a page of many runs stays small.
_MOST_POINTS, _MOST_OF_ALL, _LEAST_POINTS = 150, 15_000, 20
_ALWAYS = ("train/loss", "topkast/forward_sparsity", MASK_CHANGE)


def overlays(
    runs: Sequence[tuple[Path, Result | None]],
    prefix: str,
    of_all: int = 0,
    skip: Callable[[str], None] = lambda reason: None,
) -> list[Drawn]:
    """Draw one figure per quantity with one line per run, coloured by method.

    Args:
        runs: Folder and result of each run of one data set and model.
        prefix: Prefix of the names of the figures.
        of_all: Number of runs on the page, by default that of `runs`.
        skip: Called with what is left out of the logs, and why.
    """
    methods = sorted({_method(result) for _, result in runs})
    colours = {method: METHODS[number % len(METHODS)] for number, method in enumerate(methods)}
    monitor = next((result.monitor.name for _, result in runs if result and result.monitor), "val/acc")
    points = max(_LEAST_POINTS, min(_MOST_POINTS, _MOST_OF_ALL // max(of_all, len(runs))))
    lines: dict[str, list[tuple[str, Curve]]] = {name: [] for name in dict.fromkeys((monitor, "val/loss", *_ALWAYS))}
    for folder, result in runs:
        curves = read_curves(folder, skip)
        for name, drawn in lines.items():
            if name in curves:
                drawn.append((_method(result), thinned(curves[name], points)))
    return [
        Drawn(
            f"{prefix}-{slug(name)}",
            f"{name} of {len(drawn)} runs, coloured by method, over the optimizer steps",
            partial(_draw_overlay, name, drawn, colours),
        )
        for name, drawn in lines.items()
        if drawn
    ]


@style()
def _draw_overlay(title: str, lines: Sequence[tuple[str, Curve]], colours: Mapping[str, Any]) -> Figure:
    shown = list(dict.fromkeys(method for method, _ in lines))
    figure, axes = new_axes(title)
    alpha = max(0.35, min(0.9, 6 / len(lines)))
    for method, (steps, values) in lines:
        axes.plot(steps, values, color=colours[method], linewidth=1.1, alpha=alpha)
    finish(axes, [curve for _, curve in lines])
    add_legend(figure, [Line2D([], [], color=colours[method]) for method in shown], shown)
    return figure


def _method(result: Result | None) -> str:
    return (result.choices.get("sparsity") if result else None) or "?"
