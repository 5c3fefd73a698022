"""`topkast-plan`: print the memory, FLOPs and communication of a configured run without allocating it."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from lightning_topkast.app.commands.common import console_script, options_first
from lightning_topkast.app.errors import CONFIG_MODULE, AppError, did_you_mean
from lightning_topkast.app.formatting import csv_cell
from lightning_topkast.app.terminal import say

if TYPE_CHECKING:  # it takes seconds to import
    from lightning_topkast.costs import Plan

PROGRAM, CONFIG_NAME = "topkast-plan", "plan"


def write_csv(plan: Plan) -> None:
    """Print one row per layer, and the total as the last row."""
    rows = [layer.to_dict() for layer in plan.layers]
    for row in rows:
        row["shape"] = "x".join(map(str, row["shape"]))
    totals = plan.totals()
    rows.append({name: totals.get(name, "") for name in rows[0]} | {"name": "total"})
    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: csv_cell(value) for name, value in row.items()} for row in rows])


def _print_tables(plan: Plan) -> None:
    from lightning_topkast.app.run.plan_tables import print_tables

    print_tables(plan)


_FORMATS: dict[str, Callable[[Plan], None]] = {
    "table": _print_tables,
    "csv": write_csv,
    "json": lambda plan: say(json.dumps(plan.to_dict(), indent=2)),
}


@hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)
def _run(cfg: DictConfig) -> None:
    with console_script(PROGRAM, CONFIG_NAME):  # here too, since Hydra reports every error that leaves its job
        if cfg.format not in _FORMATS:
            raise AppError(f"format={cfg.format} is not valid: {did_you_mean(str(cfg.format), _FORMATS)}")
        from lightning_topkast.app.run.plan import plan

        _FORMATS[cfg.format](plan(cfg))


def main() -> None:
    """Run the command."""
    with console_script(PROGRAM, CONFIG_NAME):
        if {"-m", "--multirun"} & set(sys.argv):  # Hydra would create a folder for the sweep
            raise AppError("topkast-plan plans a single run: leave out -m, and plan the runs of a sweep one by one")
        options_first()
        _run()


if __name__ == "__main__":
    main()
