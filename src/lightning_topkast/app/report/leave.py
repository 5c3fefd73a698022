"""Leave the report of a run that has just ended."""

from __future__ import annotations

import warnings
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lightning_topkast.app.terminal import say


@rank_zero_only
def leave_report(folder: Path) -> None:
    """Write the report of the run in `folder` and print its path; a failure does not fail the run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for example about characters that a font lacks
            from lightning_topkast.app.report.run_page import has_matplotlib, write_run_report

            page = write_run_report(folder)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        say(f"Report:      none, since it failed ({reason}); report=false skips it", error=True)
        return
    lacks = "" if has_matplotlib() else "  (without curves: pip install 'lightning-topkast[report]')"
    say(f"Report:      {page}{lacks}")
