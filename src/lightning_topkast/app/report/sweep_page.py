"""The report of a folder with runs in it: side by side, each a line of every picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from lightning_topkast.app.collect import collect
from lightning_topkast.app.compare_tables import cells, header, notes
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.report.page import PAGE, Inline, render, write_page
from lightning_topkast.app.report.run import is_run, known_result
from lightning_topkast.app.result import RESULT_FILE, RUNNING


@dataclass(frozen=True)
class Entry:
    """A run in the list of all.

    Attributes:
        name: its folder, beneath the sweep's.
        link: to its page, where it has one.
        result: `result.json`; empty where there is none that can be read.
    """

    name: str
    link: str | None
    result: Mapping[str, Any]

    @property
    def status(self) -> str:
        """What is known of it."""
        return str(self.result.get("status", RUNNING))

    @property
    def score(self) -> float | None:
        """The metric that its checkpoints follow, of the test where it was tested."""
        monitor = self.result.get("monitor") or {}
        test = f"test/{str(monitor.get('name')).partition('/')[2]}"
        return (self.result.get("metrics") or {}).get(test, monitor.get("value"))


def runs_beneath(folder: Path) -> list[Path]:
    """Return the folders of runs beneath `folder`, by name."""
    found = {path.parent for path in folder.rglob(RESULT_FILE)}
    for left in ("metrics.csv", "events.out.tfevents.*", "*.ckpt"):
        found |= {path.parents[1] for path in folder.rglob(left) if is_run(path.parents[1])}
    return sorted(run for run in found if run != folder)


def write_sweep_report(folder: Path, runs: Sequence[Path]) -> Path:
    """Write `report.html`, and its pictures as PNG files into `report/`, into `folder`; return the page."""
    collected = collect(folder)
    remarks = [*collected.broken]
    entries = [_entry(run, folder, remarks) for run in runs]
    pictures: dict[str, bytes] = {}
    overview: list[Inline] = []
    curves: dict[tuple[str, str], list[Inline]] = {}
    try:
        from lightning_topkast.app.compare_plot import draw
        from lightning_topkast.app.report.drawing import to_png, to_svg
        from lightning_topkast.app.report.figures import Drawn
        from lightning_topkast.app.report.sweep_figures import overlays
    except ImportError:
        remarks.append("Pictures are left out: they need matplotlib, pip install 'lightning-topkast[report]'.")
    else:

        def inline(drawn: Drawn) -> Inline:
            pictures[drawn.name] = to_png(drawn.figure)
            return Inline(drawn.name, drawn.label, Markup(to_svg(drawn.figure, drawn.name, drawn.label)))

        figure = draw(collected.comparisons)
        if figure is not None:
            overview.append(
                inline(Drawn("comparison", "score against training FLOPs, a point a configuration", figure))
            )
        for number, (key, members) in enumerate(_by_table(zip(runs, entries, strict=True)).items(), start=1):
            curves[key] = [inline(drawn) for drawn in overlays(members, f"curves-{number}", len(runs))]
    html = render(
        "sweep.html", name=folder.resolve().name, entries=entries, remarks=remarks, notes=notes(collected),
        overview=overview, tables=[(c, header(c), [cells(row, c) for row in c.rows]) for c in collected.comparisons],
        curves=curves,
    )  # fmt: skip
    return write_page(folder, html, pictures)


def _entry(run: Path, folder: Path, remarks: list[str]) -> Entry:
    name = run.relative_to(folder)
    link = "/".join(quote(part) for part in (*name.parts, PAGE)) if (run / PAGE).is_file() else None
    try:
        return Entry(str(name), link, known_result(run))
    except AppError as error:
        if str(error) not in remarks:
            remarks.append(str(error))
        return Entry(str(name), link, {})


def _by_table(runs: Any) -> dict[tuple[str, str], list[tuple[Path, Mapping[str, Any]]]]:
    """Runs by data set and model, as `collect` puts them into tables."""
    tables: dict[tuple[str, str], list[tuple[Path, Mapping[str, Any]]]] = {}
    for run, entry in runs:
        choices = entry.result.get("choices") or {}
        tables.setdefault((str(choices.get("data", "")), str(choices.get("model", ""))), []).append((run, entry.result))
    return tables
