"""Write the report of a run, or of a folder of runs."""

from __future__ import annotations

from pathlib import Path

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.report.run_page import write_run_report
from lightning_topkast.app.report.sweep_page import write_sweep_report
from lightning_topkast.app.run_folder.folder import RunFolder, runs_in


def write_reports(folder: Path, each: bool = False) -> list[Path]:
    """Write the report of a run, or of a folder of runs.

    Args:
        folder: The folder.
        each: Whether to write a page for each run in it, too.

    Returns:
        The pages, that of `folder` last.

    Raises:
        AppError: There is no run.
    """
    if RunFolder(folder).is_run:
        return [write_run_report(folder)]
    runs = runs_in(folder)
    if not runs:
        raise AppError(f"there is no run in {folder.absolute()}: it has no result.json, metrics.csv or checkpoints")
    pages = [write_run_report(run) for run in runs] if each else []
    return [*pages, write_sweep_report(folder, runs)]  # last, since it links to the others
