"""The figures of one run. Imports matplotlib, so import this module late."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightning_topkast.app.report.curves import MASK_CHANGE, of_layers, on_grid, part_and_quantity, thinned
from lightning_topkast.app.report.drawing import COLOURS, Drawn, style
from lightning_topkast.app.report.names import natural, slug
from lightning_topkast.app.run_folder.logs import Curve
from lightning_topkast.app.run_folder.masks import ACTIVE, EXPLORING, RESERVOIR, SavedWeight
from lightning_topkast.text import short, short_names

SMALL = (3.7, 2.35)  # inches: as wide as a phone, so that text stays legible there
_CYCLE = [COLOURS[name] for name in ("active", "exploring", "third", "muted")]
_TIERS = {RESERVOIR: "reservoir", EXPLORING: "exploring", ACTIVE: "active"}  # their colours
_PARTS = {
    "train": ("muted", 0.9),
    "val": ("active", 1.6),
    "": ("active", 1.4),
}  # colour and width of each part's curve
# Logged by callbacks=mask_dynamics, over windows of many refreshes.
_WINDOWS = {"change": "share of A that changed in a window", "activated": "reservoir ever active, by layer"}
# What is good, in the words of the documentation.
_PAGE = "docs/curves.md"
_GOOD = {
    "sparsity": "level at what you asked for, unless there is a ramp",
    "mask-change": "high at first, then towards 0",
    "reservoir-activated": "rises early, by a few per cent, then levels off",
    "penalty": "rises while the active entries grow, then levels off",
}
_MOST_METRICS = 9
_LONGEST_TITLE = 42  # characters, which a figure is wide
_FEW = 12  # points up to which each is marked


def curve_figures(curves: Mapping[str, Curve], monitor: str | None) -> list[Drawn]:
    """Draw losses and metrics, sparsities, mask changes, the penalty and the learning rate."""
    drawn = []
    for quantity, parts in _metrics(curves, monitor).items():
        lines = {part: (curves[parts[part]], *look) for part, look in _PARTS.items() if part in parts}
        drawn.append(_lines(f"metric-{slug(quantity)}", quantity, lines))
    sparsities = {
        name: (curves[f"topkast/{name}_sparsity"], colour, 1.4)
        for name, colour in (("forward", "active"), ("backward", "exploring"), ("model", "third"))
        if f"topkast/{name}_sparsity" in curves
    }
    if sparsities:
        drawn.append(_lines("sparsity", "sparsity: share of zeros", sparsities))
    layers = of_layers(curves)
    if layers:
        steps, values = on_grid(layers)
        bounds = values.min(axis=0), values.max(axis=0)
        mean = curves.get(MASK_CHANGE, (steps, values.mean(axis=0)))
        drawn.append(_band("mask-change", "mask change: share of A that is new", steps, bounds, mean, "all weights"))
    for name, title in _WINDOWS.items():
        if all(f"masks/{name}_{of_layers}" in curves for of_layers in ("min", "mean", "max")):
            least, mean, most = (curves[f"masks/{name}_{of_layers}"] for of_layers in ("min", "mean", "max"))
            steps, values = on_grid({"min": least, "max": most})  # a truncated line may lack one of them
            bounds = values[0], values[1]
            drawn.append(_band(f"window-{name}", title, steps, bounds, mean, "mean of the layers"))
    for name, title in (
        ("reservoir_activated", "share of the first reservoir ever active"),
        ("penalty", "exploration penalty"),
    ):
        if f"topkast/{name}" in curves:
            drawn.append(_lines(name.replace("_", "-"), title, {"": (curves[f"topkast/{name}"], "active", 1.4)}))
    rates = {name.removeprefix("lr-"): curve for name, curve in curves.items() if name.startswith("lr-")}
    if rates:
        colours = ("active", "exploring", "third", "muted")
        few = dict(list(rates.items())[: len(colours)])
        lines = {name: (curve, colour, 1.4) for (name, curve), colour in zip(few.items(), colours, strict=False)}
        drawn.append(_lines("learning-rate", "learning rate", lines))
    return [
        replace(each, caption=f"Good: {_GOOD[each.name]} ({_PAGE}).") if each.name in _GOOD else each for each in drawn
    ]


def heatmap(curves: Mapping[str, Curve], order: Sequence[str] = ()) -> Drawn | None:
    """Draw the mask change by layer and step, or return None if it was not logged.

    Args:
        curves: All curves of the run.
        order: Names of weights in the order of the model, as far as it is known; the others follow in natural order.
    """
    layers = of_layers(curves)
    if not layers:
        return None
    place = {name: number for number, name in enumerate(order)}
    ordered = sorted(layers, key=lambda name: (place.get(name, len(place)), natural(name)))
    end = max(steps[-1] for steps, _ in curves.values())
    label = "share of A that is new at each refresh, one row per sparse weight"
    return Drawn("mask-change-heatmap", label, partial(_draw_heatmap, {name: layers[name] for name in ordered}, end))


@style()
def _draw_heatmap(layers: Mapping[str, Curve], end: float) -> Figure:
    steps, values = on_grid(layers)
    figure = Figure(figsize=(7.0, 1.0 + 0.18 * min(len(layers), 90)), layout="constrained")
    axes = figure.add_subplot()
    # A change holds until the next one is logged, or to the end of the run; one at the very end is narrow, but visible.
    edges = np.append(steps, max(end, steps[-1] + ((steps[-1] - steps[0]) / 50 or 1)))
    image = axes.pcolormesh(
        edges, np.arange(len(layers) + 1) - 0.5, values, cmap="viridis", vmin=0, vmax=values.max() or 1,
        rasterized=True,
    )  # fmt: skip
    axes.invert_yaxis()
    size = min(9.0, 9.0 * 60 / len(layers))
    every = -(-len(layers) // 90)
    axes.set_yticks(range(0, len(layers), every), short_names(list(layers), 40)[::every], fontsize=size)
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03).outline.set_visible(False)
    return figure


def histograms(weights: Iterable[SavedWeight]) -> list[Drawn]:
    """Draw the magnitudes of each weight by set, with the thresholds of selection by magnitude."""
    drawn = []
    for number, weight in enumerate(weights, start=1):
        groups = weight.groups()
        finite = {tier: group[np.isfinite(group)] for tier, group in groups.items()}  # a run may have diverged
        if any(map(len, finite.values())):
            counted = "entries" if all(len(finite[tier]) == len(groups[tier]) for tier in groups) else "finite entries"
            draw = partial(_histogram, weight, {tier: group for tier, group in finite.items() if len(group)}, counted)
            drawn.append(Drawn(f"magnitudes-{number}", f"magnitudes of {weight.name} on A, B\\A and C", draw))
    return drawn


@style()
def _histogram(weight: SavedWeight, groups: Mapping[int, np.ndarray], counted: str) -> Figure:
    figure, axes = new_axes(short(weight.name, 36))
    top = max(float(group.max()) for group in groups.values()) or 1.0
    edges = np.linspace(0, top, 49)
    counts = [np.histogram(group, bins=edges)[0] for group in groups.values()]
    axes.stackplot(
        np.repeat(edges, 2)[1:-1], [np.repeat(count, 2) for count in counts],
        colors=[COLOURS[_TIERS[tier]] for tier in groups], linewidth=0,
    )  # fmt: skip
    for cut, colour in zip(weight.thresholds(), ("active", "exploring"), strict=True):
        if cut is not None and np.isfinite(cut):
            axes.axvline(cut, color=COLOURS["ink"], linewidth=1.6)
            axes.axvline(cut, color=COLOURS[colour], linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, max(2, 3 * max(np.sum(counts, axis=0))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(0, top)
    axes.set_xlabel("|θ|")
    axes.set_ylabel(counted)
    axes.minorticks_off()
    return figure  # the page has a key above


def _metrics(curves: Mapping[str, Curve], monitor: str | None) -> dict[str, dict[str, str]]:
    """Return the curve of each part of each quantity: the loss, the monitored one, and first what was validated."""
    found: dict[str, dict[str, str]] = {}
    for name in curves:
        part, quantity = part_and_quantity(name)
        if part == "test" or name in ("epoch", "hp_metric") or name.startswith(("topkast/", "masks/", "lr-", "run/")):
            continue
        if part in found.get(quantity, ()):  # of two names for the same
            part, quantity = "", name
        found.setdefault(quantity, {})[part] = name
    followed = (monitor, part_and_quantity(monitor or "")[1])
    order = sorted(found, key=lambda name: (name != "loss", name not in followed, "val" not in found[name], name))
    return {quantity: found[quantity] for quantity in order[:_MOST_METRICS]}


def _lines(name: str, title: str, lines: Mapping[str, tuple[Curve, str, float]]) -> Drawn:
    return Drawn(name, f"{title}, over the optimizer steps", partial(_draw_lines, title, lines))


@style()
def _draw_lines(title: str, lines: Mapping[str, tuple[Curve, str, float]]) -> Figure:
    figure, axes = new_axes(title)
    for label, (curve, colour, width) in lines.items():
        steps, values = thinned(curve)
        marker = "o" if len(steps) <= _FEW else ""
        axes.plot(
            steps, values, color=COLOURS[colour], linewidth=width, marker=marker, markersize=3, label=short(label, 30)
        )
    finish(axes, [curve for curve, _, _ in lines.values()])
    if any(lines):
        add_legend(figure, *axes.get_legend_handles_labels())
    return figure


def _band(
    name: str, title: str, steps: np.ndarray, bounds: tuple[np.ndarray, np.ndarray], mean: Curve, of: str
) -> Drawn:
    """Draw a curve, and a band from the lowest to the highest layer."""
    return Drawn(name, f"{title}, over the optimizer steps", partial(_draw_band, title, steps, bounds, mean, of))


@style()
def _draw_band(title: str, steps: np.ndarray, bounds: tuple[np.ndarray, np.ndarray], mean: Curve, of: str) -> Figure:
    figure, axes = new_axes(title)
    axes.fill_between(
        steps,
        bounds[0],
        bounds[1],
        step="post",
        color=COLOURS["active"],
        alpha=0.25,
        linewidth=0,
        label="lowest to highest layer",
    )
    axes.plot(*mean, color=COLOURS["active"], drawstyle="steps-post", label=of)
    finish(axes, [(steps, bound) for bound in bounds])
    axes.set_ylim(bottom=0)
    add_legend(figure, *axes.get_legend_handles_labels())
    return figure


def new_axes(title: str) -> tuple[Figure, Axes]:
    """Return a small figure with a title."""
    figure = Figure(figsize=SMALL, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(short(title, _LONGEST_TITLE))
    return figure, axes


def add_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Add a legend below the axes, where it covers nothing, and make room for it."""
    columns = 2 if max(map(len, labels)) > 10 else 4
    figure.set_size_inches(SMALL[0], SMALL[1] + 0.17 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def finish(axes: Axes, curves: Sequence[Curve]) -> None:
    """Set up the axes of curves over optimizer steps."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(
        MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    )  # not by the available space, which depends on the labels
    least, most = (bound(float(getattr(values, bound.__name__)()) for _, values in curves) for bound in (min, max))
    if most - least < 1e-6 * max(abs(most), 1e-12):  # a constant, whose rounding errors would fill the axis
        axes.set_ylim(least - 0.05 * abs(least), most + 0.05 * (abs(most) or 1))
    axes.ticklabel_format(axis="y", useOffset=False)
