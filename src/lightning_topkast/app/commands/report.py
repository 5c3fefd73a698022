"""`topkast-report`: write the report of a run or of a sweep."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from lightning_topkast.app.commands.common import argument_parser, console_script
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.terminal import say

PROGRAM = "topkast-report"

_DESCRIPTION = """\
Writes FOLDER/report.html, one page that needs no network, and its pictures to FOLDER/report. For a run it shows the
results, curves, the network by density, mask changes, masks, masks over the run with a slider, magnitudes, all weights
and the configuration; for a folder of runs, such as a sweep, the table of topkast-compare and the curves of all runs.
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
        if not given.folder.is_dir():
            raise AppError(f"there is no folder {given.folder.absolute()}: name the folder of a run or of a sweep")
        from lightning_topkast.app.report.run_page import has_matplotlib
        from lightning_topkast.app.report.write import write_reports

        for page in write_reports(given.folder, given.each):
            say(page)
        if not has_matplotlib():
            say(f"{PROGRAM}: without curves, which need matplotlib: pip install 'lightning-topkast[report]'")


def _arguments() -> argparse.Namespace:
    parser = argument_parser(PROGRAM, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run, or a folder of runs")
    parser.add_argument("--each", action="store_true", help="also write a page for each run of a sweep, which takes "
                        "seconds per run")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    main()
