"""The report of a sweep: all runs of a folder in one table and in the same pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.report.page import PAGE, Inline, render, write_page
from lightning_topkast.app.run_folder.result import RUNNING, Result, read_result
from lightning_topkast.app.sweep.collect import collect
from lightning_topkast.app.sweep.tables import cells, header, notes, numbers


@dataclass(frozen=True)
class Entry:
    """A run in the list of all.

    Attributes:
        name: Its folder, relative to that of the sweep.
        link: Link to its page, if it has one.
        result: None if there is none that can be read.
    """

    name: str
    link: str | None
    result: Result | None

    @property
    def status(self) -> str:
        """Status of the run."""
        return self.result.status if self.result else RUNNING

    @property
    def metric(self) -> str | None:
        """Name of the monitored metric, from the test if the run was tested."""
        monitor = self.result.monitor if self.result else None
        if self.result is None or monitor is None:
            return None
        tested = f"test/{monitor.name.partition('/')[2]}"
        return tested if tested in (self.result.metrics or {}) else monitor.name

    @property
    def score(self) -> float | None:
        """Value of the metric."""
        monitor = self.result.monitor if self.result else None
        if self.result is None or monitor is None:
            return None
        return (self.result.metrics or {}).get(self.metric or "", monitor.value)


def write_sweep_report(folder: Path, runs: Sequence[Path]) -> Path:
    """Write `report.html` and the PNG files of its pictures in `report/` to `folder`, and return the page."""
    collected = collect(folder)
    remarks = [*collected.broken]
    entries = [_entry(run, folder, remarks) for run in runs]
    pictures: dict[str, bytes] = {}
    overview: list[Inline] = []
    curves: dict[tuple[str, str], list[Inline]] = {}
    try:
        from lightning_topkast.app.report.drawing import Drawn, inlined
        from lightning_topkast.app.report.sweep_figures import overlays
        from lightning_topkast.app.sweep.plot import draw, with_points
    except ImportError:
        remarks.append("Pictures are missing: they need matplotlib, pip install 'lightning-topkast[report]'.")
    else:
        for number, shown in enumerate(with_points(collected.comparisons), start=1):
            label = f"{getattr(shown, shown.score)} against training FLOPs, one point per configuration"
            overview += inlined([Drawn(f"comparison-{number}", label, partial(draw, [shown]))], pictures, remarks)
        for number, (key, members) in enumerate(_by_table(zip(runs, entries, strict=True)).items(), start=1):
            drawn = overlays(members, f"curves-{number}", len(runs), remarks.append)
            curves[key] = inlined(drawn, pictures, remarks)
    html = render(
        "sweep.html", name=folder.resolve().name, entries=entries, remarks=remarks, notes=notes(collected),
        overview=overview, scores=list(dict.fromkeys(getattr(c, c.score) for c in collected.comparisons)),
        tables=[
            (c, header(c), [list(zip(cells(row, c), [None, *numbers(row, c)], strict=True)) for row in c.rows])
            for c in collected.comparisons
        ],
        metrics={each.metric for each in entries if each.metric}, curves=curves,
    )  # fmt: skip
    return write_page(folder, html, pictures)


def _entry(run: Path, folder: Path, remarks: list[str]) -> Entry:
    name = run.relative_to(folder)
    link = "/".join(quote(part) for part in (*name.parts, PAGE)) if (run / PAGE).is_file() else None
    try:
        return Entry(str(name), link, read_result(run))
    except AppError as error:
        if str(error) not in remarks:
            remarks.append(str(error))
        return Entry(str(name), link, None)


def _by_table(runs: Iterable[tuple[Path, Entry]]) -> dict[tuple[str, str], list[tuple[Path, Result | None]]]:
    """Group runs by data set and model, like the tables."""
    tables: dict[tuple[str, str], list[tuple[Path, Result | None]]] = {}
    for run, entry in runs:
        choices = entry.result.choices if entry.result else {}
        tables.setdefault((choices.get("data", ""), choices.get("model", "")), []).append((run, entry.result))
    return tables
