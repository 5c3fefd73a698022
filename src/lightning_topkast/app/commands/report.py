"""`topkast-report`: write the report of a run or of a sweep."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from lightning_topkast.app.commands.common import argument_parser, console_script
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.report.run_page import has_matplotlib, write_run_report
from lightning_topkast.app.report.sweep_page import write_sweep_report
from lightning_topkast.app.run_folder.folder import RunFolder, runs_in
from lightning_topkast.app.terminal import say

PROGRAM = "topkast-report"

_DESCRIPTION = """\
Writes FOLDER/report.html, one page that needs no network, and its pictures to FOLDER/report. For a run it shows the
results, curves, mask changes, masks, magnitudes, all weights and the configuration; for a folder of runs, such as a
sweep, the table of topkast-compare and the curves of all runs.
"""
_EXAMPLES = """\
  topkast-report outputs/2026-01-31/12-00-00-000000    a run; topkast-train does the same, unless report=false
  topkast-report runs/mlp                              a sweep
  topkast-report runs/mlp --each                       and a page for each of its runs
"""


def main() -> None:
    """Run the command."""
    with console_script(PROGRAM), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        given = _arguments()
        for page in write_reports(given.folder, given.each):
            say(page)
        if not has_matplotlib():
            say(f"{PROGRAM}: without curves, which need matplotlib: pip install 'lightning-topkast[report]'")


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
    if not folder.is_dir():
        raise AppError(f"there is no folder {folder.absolute()}: name the folder of a run or of a sweep")
    if RunFolder(folder).is_run:
        return [write_run_report(folder)]
    runs = runs_in(folder)
    if not runs:
        raise AppError(f"there is no run in {folder.absolute()}: it has no result.json, metrics.csv or checkpoints")
    pages = [write_run_report(run) for run in runs] if each else []
    return [*pages, write_sweep_report(folder, runs)]  # last, since it links to the others


def _arguments() -> argparse.Namespace:
    parser = argument_parser(PROGRAM, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run, or a folder of runs")
    parser.add_argument("--each", action="store_true", help="also write a page for each run of a sweep, which takes "
                        "seconds per run")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    main()
