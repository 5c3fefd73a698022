"""The figures of a sweep: the curves of all runs. Imports matplotlib, so import this module late."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_topkast.app.report.curves import MASK_CHANGE, over_seeds
from lightning_topkast.app.report.drawing import METHODS, Drawn, style
from lightning_topkast.app.report.figures import add_legend, finish, new_axes
from lightning_topkast.app.report.names import slug
from lightning_topkast.app.run_folder.logs import Curve, read_curves
from lightning_topkast.app.run_folder.result import Result
from lightning_topkast.app.sweep.collect import without_seeds

# Points per curve and per figure, so that a page of many runs stays small.
_MOST_POINTS, _MOST_OF_ALL, _LEAST_POINTS = 150, 15_000, 20
_ALWAYS = ("train/loss", "topkast/forward_sparsity", MASK_CHANGE)


def overlays(
    runs: Sequence[tuple[Path, Result | None]],
    prefix: str,
    of_all: int = 0,
    skip: Callable[[str], None] = lambda reason: None,
) -> list[Drawn]:
    """Draw one figure per quantity, with a line per configuration: the mean over its seeds, in the method's colour.

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
    found: dict[str, dict[tuple[str, str], list[Curve]]] = {}
    for folder, result in runs:
        curves = read_curves(folder, skip)
        for name in dict.fromkeys((monitor, "val/loss", *_ALWAYS)):
            if name in curves:
                lines = found.setdefault(name, {})
                lines.setdefault((_method(result), _configuration(folder, result)), []).append(curves[name])
    return [
        Drawn(
            f"{prefix}-{slug(name)}",
            f"{name} of {sum(map(len, lines.values()))} runs over the optimizer steps: mean and range over the seeds, "
            "coloured by method",
            partial(_draw_overlay, name, [(method, seeds) for (method, _), seeds in lines.items()], colours, points),
        )
        for name, lines in found.items()
    ]


@style()
def _draw_overlay(
    title: str, lines: Sequence[tuple[str, Sequence[Curve]]], colours: Mapping[str, Any], points: int
) -> Figure:
    shown = list(dict.fromkeys(method for method, _ in lines))
    figure, axes = new_axes(title)
    alpha = max(0.35, min(0.9, 6 / len(lines)))
    holds = title.startswith("topkast/")  # until the next refresh
    bounds = []
    for method, seeds in lines:
        steps, least, mean, most = over_seeds(seeds, points)
        bounds += [(steps, least), (steps, most)]
        if len(seeds) > 1:
            axes.fill_between(
                steps, least, most, color=colours[method], alpha=0.25 * alpha, linewidth=0,
                step="post" if holds else None,
            )  # fmt: skip
        axes.plot(
            steps, mean, color=colours[method], linewidth=1.4, alpha=alpha,
            drawstyle="steps-post" if holds else "default",
        )  # fmt: skip
    finish(axes, bounds)
    add_legend(figure, [Line2D([], [], color=colours[method]) for method in shown], shown)
    return figure


def _configuration(folder: Path, result: Result | None) -> str:
    """Return what runs that differ only in their seeds have in common."""
    return json.dumps(without_seeds(result.config), sort_keys=True) if result and result.config else str(folder)


def _method(result: Result | None) -> str:
    return (result.choices.get("sparsity") if result else None) or "?"
