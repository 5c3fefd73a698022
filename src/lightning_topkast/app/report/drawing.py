"""matplotlib figures as PNG and as SVG that follows the colours of the page. Imports matplotlib, so import it late."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from markupsafe import Markup, escape
from matplotlib import color_sequences, rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lightning_topkast.app.report.page import Inline
from lightning_topkast.telemetry.pictures import SET_COLOURS, SET_NAMES

# CSS variables of the page, with the values of its light scheme, which PNG files have, too.
COLOURS = {"ink": "#1f2530", "muted": "#5d6777", "line": "#d5dae2", "third": "#2a9d6f"} | {
    name: to_hex(colour[:3] / 255) for name, colour in zip(SET_NAMES, SET_COLOURS, strict=True)
}
METHODS: tuple[str, ...] = tuple(map(to_hex, color_sequences["tab10"]))
# Colours of other figures of the application: black, matplotlib's greys, and its colours for methods.
_ALIASES = {
    "#000000": "ink", "#404040": "muted", "#666666": "muted", "#d9d9d9": "line", "#b0b0b0": "line", "#ffffff": "card",
} | {colour: f"method-{number}" for number, colour in enumerate(METHODS)}  # fmt: skip

_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": "medium", "axes.titleweight": "bold", "axes.titlelocation": "left",
    "legend.fontsize": "medium", "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"], "axes.labelcolor": COLOURS["muted"], "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"], "ytick.color": COLOURS["muted"], "grid.color": COLOURS["line"],
    "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6, "axes.linewidth": 0.6, "lines.linewidth": 1.4,
    "text.parse_math": False,  # names of weights may contain a $
    "svg.fonttype": "none", "svg.hashsalt": "topkast",
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
        name: Name of its file, and prefix of its ids.
        label: Description of the figure.
        draw: Draws it.
        caption: Text below it.
    """

    name: str
    label: str
    draw: Callable[[], Figure]
    caption: str = ""

    @cached_property
    def figure(self) -> Figure:
        """The figure."""
        return self.draw()


def inlined(figures: Iterable[Drawn], pictures: dict[str, bytes], notes: list[str]) -> list[Inline]:
    """Return figures for a page.

    Args:
        figures: The figures.
        pictures: Each is added as a PNG file.
        notes: A figure that cannot be drawn is named here.
    """
    found = []
    for each in figures:
        try:
            pictures[each.name] = to_png(each.figure)
            markup = Markup(to_svg(each.figure, each.name, each.label))
            found.append(Inline(each.name, each.label, markup, each.caption))
        except Exception as error:  # matplotlib has no class of error for what it cannot draw
            pictures.pop(each.name, None)
            reason = str(error).partition("\n")[0]
            notes.append(
                f"A picture is missing ({each.label:.200}), since it cannot be drawn: {type(error).__name__}: {reason}"
            )
    return found


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of the report."""
    with rc_context(_STYLE):
        yield


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file with a white background."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, facecolor="white")
    return file.getvalue()


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an SVG element for an HTML page.

    Args:
        figure: A figure in `COLOURS`.
        name: Prefix of its ids, which must be unique in the page.
        label: Description for screen readers.
    """
    file = io.StringIO()
    with style():
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, end, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    head = f'<svg role="img" aria-label="{escape(label)}" {box[0] if box else ""}'
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    names = {value: key for key, value in COLOURS.items()} | _ALIASES
    body = re.sub(
        r"(?<=[ :])#[0-9a-f]{6}(?=[;\" ])", lambda c: f"var(--{names[c[0]]})" if c[0] in names else c[0], body
    )
    return f"{head}{end}{body}"
