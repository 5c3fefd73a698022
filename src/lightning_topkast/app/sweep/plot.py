"""Plot the score of each configuration against its training FLOPs, with the Pareto front."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from lightning_topkast.app import formatting
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.sweep.collect import Comparison, Row
from lightning_topkast.files import atomic_file
from lightning_topkast.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {  # one size of text; settings may contain a $
    "font.size": 9, "axes.titlesize": "medium", "legend.fontsize": "medium", "text.parse_math": False,
}  # fmt: skip
_MARKERS = "osD^v*PX<>hp"
_MOST_LABELS = 14  # of points; if there are more, only those on the front are labelled


def plot(comparisons: Sequence[Comparison], file: Path) -> bool:
    """Draw one panel per comparison.

    Returns:
        Whether there was anything to draw.

    Raises:
        AppError: matplotlib is not installed, or cannot draw it.
    """
    shown = with_points(comparisons)
    if not shown:
        return False
    picture = io.BytesIO()
    try:
        draw(shown).savefig(picture, dpi=150, format=file.suffix.removeprefix("."))
    except AppError:
        raise
    except Exception as error:  # matplotlib has no class of error for what it cannot draw
        reason = str(error).partition("\n")[0]
        raise AppError(f"the plot is missing, since it cannot be drawn: {type(error).__name__}: {reason}") from error
    with atomic_file(file, "picture") as partial:
        partial.write_bytes(picture.getvalue())
    return True


def with_points(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons of which a row has a score and FLOPs."""
    return [each for each in comparisons if _points(each)]


def draw(comparisons: Sequence[Comparison]) -> Figure:
    """Return a figure with one panel per comparison.

    Args:
        comparisons: At least one; each has points.

    Raises:
        AppError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # needs no display, and none of pyplot's global state
    except ImportError as error:
        raise AppError("the plot needs matplotlib: pip install 'lightning-topkast[sweep]'") from error
    shown = [(each, _points(each)) for each in comparisons]
    figure = Figure(figsize=(7.0 * len(shown), 4.4), layout="constrained")
    methods = sorted({_method(row) for _, points in shown for row in points})
    styles = {name: (f"C{n % 10}", _MARKERS[n % len(_MARKERS)]) for n, name in enumerate(methods)}
    with rc_context(_STYLE):
        for number, (comparison, points) in enumerate(shown, start=1):
            _panel(figure.add_subplot(1, len(shown), number), comparison, points, styles)
    return figure


def pareto_front(comparison: Comparison) -> list[Row]:
    """Return the rows that no other row beats in both score and FLOPs, by increasing FLOPs."""
    sign = 1 if comparison.lower_is_better else -1
    front: list[Row] = []
    for row in sorted(_points(comparison), key=lambda row: (_flops(row), sign * _score(row, comparison))):
        if not front or sign * _score(row, comparison) < sign * _score(front[-1], comparison):
            front.append(row)
    return front


def _panel(axes: Axes, comparison: Comparison, points: Sequence[Row], styles: dict[str, tuple[str, str]]) -> None:
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.12)
    least, most = (bound(_flops(row) for row in points) for bound in (min, max))
    if least == most > 0:  # matplotlib warns about an axis without extent
        axes.set_xlim(least / 2, most * 2)
    low, high = _range([_score(row, comparison) for row in points])
    inside = [row for row in points if low <= _score(row, comparison) <= high]
    front = [row for row in pareto_front(comparison) if row in inside]
    axes.plot(
        [_flops(row) for row in front], [_score(row, comparison) for row in front],
        color="0.85", linewidth=5, solid_capstyle="round", zorder=1, label="Pareto front",
    )  # fmt: skip
    for name in sorted({_method(row) for row in inside}):
        rows = sorted(
            (row for row in inside if _method(row) == name), key=lambda row: (row.forward_sparsity, _flops(row))
        )
        color, marker = styles[name]
        alike = Counter((row.forward_sparsity, row.backward_sparsity) for row in rows)
        scores, flops = ([row.figures[part] for row in rows] for part in (comparison.score, "training_flops_ratio"))
        axes.errorbar(
            [f.mean for f in flops], [f.mean for f in scores],
            xerr=[f.std or 0.0 for f in flops], yerr=[f.std or 0.0 for f in scores],
            color=color, elinewidth=1, label=printable(name),
            linestyle=":" if max(alike.values()) == 1 else "", linewidth=1,  # over the sparsities
            marker=marker, markersize=9 if marker == "*" else 6.5, markeredgecolor="white", markeredgewidth=0.5,
        )  # fmt: skip
    if left_out := len(points) - len(inside):
        axes.text(0.01, 0.01, f"not shown: {left_out} much worse", transform=axes.transAxes, color="0.4")
    if comparison.lower_is_better:
        axes.invert_yaxis()  # better is up in every panel
    _ticks(axes)
    axes.set_xlabel("training FLOPs relative to dense")
    better = "lower" if comparison.lower_is_better else "higher"
    axes.set_ylabel(printable(f"{getattr(comparison, comparison.score)} ({better} is better)"))
    axes.set_title(printable(f"{comparison.data}, {comparison.model}"))
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, comparison, inside if len(inside) <= _MOST_LABELS else front)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _range(scores: Sequence[float]) -> tuple[float, float]:
    """Return the range to draw without far outliers, such as a run at chance level, which would squash the rest."""
    if len(scores) < 4:
        return min(scores), max(scores)
    first, _, third = quantiles(scores, n=4, method="inclusive")
    reach = 4 * (third - first)
    return first - reach, third + reach


def _ticks(axes: Axes) -> None:
    """Label ratios as plain numbers, also between powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    steps = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, comparison: Comparison, points: Sequence[Row]) -> None:
    """Label each point by its sparsities and settings, above or below it to keep labels apart."""
    taken: list[tuple[float, float]] = []
    transform: Any = axes.transData
    alike = Counter((row.method, row.forward_sparsity, row.backward_sparsity) for row in points)
    for row in sorted(points, key=_flops):
        several = alike[row.method, row.forward_sparsity, row.backward_sparsity] > 1
        text = " ".join([*([] if row.method == "dense" else [_levels(row)]), *(row.settings if several else ())])
        at = (_flops(row), _score(row, comparison))
        x, y = transform.transform(at)
        places = [(7, 6), (7, -12), (7, 16), (7, -22), (7, 26)]
        free = [p for p in places if all(abs(x + p[0] - a) > 80 or abs(y + p[1] - b) > 13 for a, b in taken)]
        dx, dy = (free or places)[0]
        taken.append((x + dx, y + dy))
        axes.annotate(printable(text), at, xytext=(dx, dy), textcoords="offset points", color="0.25")


def _levels(row: Row) -> str:
    levels = [row.forward_sparsity] if row.backward_sparsity is None else [row.forward_sparsity, row.backward_sparsity]
    return "/".join(map(formatting.level, levels))


def _method(row: Row) -> str:
    """Return the family of the method; the sparsities of `topkast_90_80` are in the label of the point."""
    words = row.method.split("_")
    while len(words) > 1 and words[-1].isdigit():
        words.pop()
    return "_".join(words)


def _points(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if {comparison.score, "training_flops_ratio"} <= row.figures.keys()]


def _flops(row: Row) -> float:
    return row.figures["training_flops_ratio"].mean


def _score(row: Row, comparison: Comparison) -> float:
    return row.figures[comparison.score].mean
