"""`topkast-compare`: run what is missing of a sweep, and compare all finished runs in a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_topkast.app.commands.common import argument_parser, console_script
from lightning_topkast.app.errors import AppError

PROGRAM = "topkast-compare"

_DESCRIPTION = """\
Compares all finished runs below FOLDER in one table: mean and spread over seeds, sparsity, FLOPs relative to dense, and
time. Writes it to FOLDER as comparison.md, .csv, .json and .png. With overrides or --sweep, the runs that are missing
in FOLDER are made first; after an interruption, the same command continues.
"""
_EXAMPLES = """\
  topkast-compare outputs                                               compare existing runs
  topkast-compare runs/lr data=digits sparsity=dense,topkast_90_80 optimizer.lr=1e-3,3e-3 seed=0,1,2
  topkast-compare runs/digits --sweep digits --jobs 2                   several grids from a file, two runs at a time
  topkast-compare runs/big --sweep mine.yaml hydra/launcher=submitit_slurm hydra.launcher.timeout_min=600

Overrides are those of topkast-train; a comma list is a grid. A sweep file has `grids`, lists of overrides, and `common`
overrides. Exit code: 0; 1 if a run failed; 2 for a mistake in the command.
"""


def main() -> None:
    """Run the command."""
    with console_script(PROGRAM):
        given = _arguments()
        folder, runs = given.folder.absolute(), given.overrides or given.sweep
        if given.config_dir and not given.config_dir.is_dir():
            raise AppError(f"--config-dir: there is no folder {given.config_dir}")
        if given.jobs and not runs:
            raise AppError(f"--jobs {given.jobs} needs something to run: give overrides, or --sweep NAME")
        if not runs and not folder.is_dir():
            raise AppError(f"there is no folder {folder}: name a folder with runs, or give overrides or --sweep NAME")
        from lightning_topkast.app.sweep.collect import collect
        from lightning_topkast.app.sweep.compare import run_sweep, write_tables

        project = given.wandb
        if runs:
            project = project or run_sweep(folder, given.overrides, given.sweep, given.jobs, given.config_dir)
        collected = collect(folder)
        write_tables(collected, folder, project)
        sys.exit(1 if collected.failed else 0)


def _arguments() -> argparse.Namespace:
    usage = f"{PROGRAM} FOLDER [KEY=VALUE ...] [--sweep NAME] [--jobs N] [--config-dir DIR] [--wandb PROJECT]"
    parser = argument_parser(PROGRAM, _DESCRIPTION, _EXAMPLES, usage)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the runs and the tables")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a grid of overrides to run")
    parser.add_argument("--sweep", metavar="NAME", help="a YAML file with grids to run, by its path or the name of one "
                        "in the package; overrides apply to all grids")  # fmt: skip
    parser.add_argument("--jobs", type=_count, metavar="N", help="parallel runs on this machine (joblib)")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder of your own configurations, as for "
                        "topkast-train")  # fmt: skip
    parser.add_argument("--wandb", metavar="PROJECT", help="also log the tables to W&B (offline unless logged in); "
                        "the default if the runs log to it")  # fmt: skip
    return parser.parse_intermixed_args()


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an int of at least 1, got {text}")
    return int(text)


if __name__ == "__main__":
    main()
