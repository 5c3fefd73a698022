"""`topkast-report`: the report of a run, or of the runs of a sweep side by side, from what they have left."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from lightning_topkast.app.errors import AppError, let_errors_through, one_line_errors, quiet_broken_pipe
from lightning_topkast.app.report.run import is_run
from lightning_topkast.app.report.run_page import has_matplotlib, write_run_report
from lightning_topkast.app.report.sweep_page import runs_beneath, write_sweep_report

_DESCRIPTION = """\
Writes FOLDER/report.html, one page that needs no network, and its pictures into FOLDER/report. Of a run: what came
out, curves, how the masks move, the masks themselves, magnitudes, every weight, the configuration. Of a folder with
runs in it, such as a sweep's: the table of topkast-compare and the curves of all runs.
"""
_EXAMPLES = """\
  topkast-report outputs/2026-01-31/12-00-00-000000    a run; topkast-train makes it too, unless report=false
  topkast-report runs/mlp                              a sweep
  topkast-report runs/mlp --each                       and a page for each of its runs
"""


def main() -> None:
    """Run on the command line's arguments."""
    let_errors_through()
    with quiet_broken_pipe(), one_line_errors(program="topkast-report"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        given = _arguments()
        for page in write_reports(given.folder, given.each):
            print(page, flush=True)
        if not has_matplotlib():
            print("topkast-report: without curves, which need matplotlib: pip install 'lightning-topkast[report]'")


def write_reports(folder: Path, each: bool = False) -> list[Path]:
    """Write the report of a run or of a folder with runs in it.

    Args:
        folder: of either.
        each: whether the runs in it get a page each, too.

    Returns:
        the pages, that of `folder` last.

    Raises:
        AppError: there is no run.
    """
    if not folder.is_dir():
        raise AppError(f"there is no folder {folder.absolute()}: name that of a run or of a sweep")
    if is_run(folder):
        return [write_run_report(folder)]
    runs = runs_beneath(folder)
    if not runs:
        raise AppError(f"there is no run in {folder.absolute()}: no result.json, metrics.csv or checkpoints beneath it")
    pages = [write_run_report(run) for run in runs] if each else []
    return [*pages, write_sweep_report(folder, runs)]  # last, since it links to the others


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="topkast-report",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a run, or with runs in it")
    parser.add_argument("--each", action="store_true", help="of a sweep: a page for each run, too; seconds a run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
