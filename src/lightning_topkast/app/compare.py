"""`topkast-compare`: run what is missing of a sweep, and put every finished run beneath a folder into one table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_topkast.app.collect import Collected, collect
from lightning_topkast.app.compare_tables import to_csv, to_json, to_markdown
from lightning_topkast.app.errors import AppError, let_errors_through, one_line_errors, quiet_broken_pipe
from lightning_topkast.app.grids import Sweep, expand, read_sweep
from lightning_topkast.app.launch import Launcher, hydra_configs, missing, only_one
from lightning_topkast.app.watch import watched

NAME = "comparison"

_DESCRIPTION = """\
Puts every finished run beneath FOLDER into one table: mean and spread over seeds, sparsity, FLOPs as a ratio to
dense, time. Writes it there as comparison.md, .csv, .json and .png. With overrides or --sweep it makes first what is
missing in FOLDER; started again after whatever interruption, it goes on where it was.
"""
_EXAMPLES = """\
  topkast-compare outputs                                               collect what there is
  topkast-compare runs/lr data=digits sparsity=dense,topkast_90_80 optimizer.lr=1e-3,3e-3 seed=0,1,2
  topkast-compare runs/digits --sweep digits --jobs 2                   several grids, from a file; two at a time
  topkast-compare runs/big --sweep mine.yaml hydra/launcher=submitit_slurm hydra.launcher.timeout_min=600

Overrides are those of topkast-train; a comma list is a grid. A sweep file has `common` overrides and `grids`, lists
of overrides. Exit code: 0; 1 if a run failed; 2 for a mistake in the command.
"""


def main() -> None:
    """Run on the command line's arguments."""
    let_errors_through()
    with quiet_broken_pipe(), one_line_errors(program="topkast-compare"):
        sys.exit(compare(*_arguments()))


def _arguments() -> tuple[Path, list[str], str | None, int | None]:
    parser = argparse.ArgumentParser(
        prog="topkast-compare",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds the runs, a folder each, and the tables")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what to run: a grid of overrides")
    parser.add_argument("--sweep", metavar="NAME", help="what to run: the grids of a YAML file, the name of one of the "
                        "package's or a path; overrides hold for all of them")  # fmt: skip
    parser.add_argument("--jobs", type=_count, metavar="N", help="runs at a time, on this machine (joblib)")
    given = parser.parse_intermixed_args()
    return given.folder, given.overrides, given.sweep, given.jobs


def compare(folder: Path, overrides: Sequence[str], sweep: str | None, jobs: int | None) -> int:
    """Run what is missing, collect, write and print; return the exit code.

    Raises:
        AppError: for what the user can mend, with the way to do so.
    """
    folder = folder.absolute()
    if overrides or sweep:
        run(folder, overrides, sweep, jobs)
    elif not folder.is_dir():
        raise AppError(f"there is no folder {folder}: name one with runs in it, or say what to run")
    collected = collect(folder)
    report(collected, folder)
    if collected.failed:
        print(
            f"topkast-compare: {len(collected.failed)} runs failed, see run.log in their folders; the same command "
            "tries them again",
            file=sys.stderr,
        )
    return 1 if collected.failed else 0


def run(folder: Path, overrides: Sequence[str], sweep: str | None, jobs: int | None) -> None:
    """Make the runs of a sweep that are missing in `folder`.

    Raises:
        AppError: for what the user can mend, with the way to do so.
    """
    own = [override for override in overrides if override.startswith(("hydra.", "hydra/", "+hydra"))]
    rest = [override for override in overrides if override not in own]
    grids = read_sweep(sweep) if sweep else Sweep([[]])
    with hydra_configs(), only_one(folder):
        launcher = Launcher(folder, own, jobs)
        runs = expand(grids, rest, launcher.loader)
        left = missing(runs, launcher, folder)
        done = len(runs) - len(left)
        print(f"{len(runs)} runs in {folder}" + (f", {done} of them done before" if done else ""), flush=True)
        if not left:
            return
        try:
            with watched(folder, left, done):
                launcher.launch(left)
        except KeyboardInterrupt:
            print(
                "\ntopkast-compare: interrupted; the same command goes on, from the last checkpoint of each begun run",
                file=sys.stderr,
            )
            sys.exit(130)


def report(collected: Collected, folder: Path) -> None:
    """Print the tables and write them into `folder`.

    Raises:
        AppError: there is nothing to compare.
    """
    for broken in collected.broken:
        print(f"topkast-compare: passed over: {broken}", file=sys.stderr)
    if not collected.comparisons:
        waiting = [*collected.failed, *collected.unfinished]
        raise AppError(
            f"there is no finished run beneath {folder}"
            + (f", of {len(waiting)} begun ones: {_first(collected)}" if waiting else "")
        )
    markdown = to_markdown(collected)
    for suffix, text in {"md": markdown, "csv": to_csv(collected), "json": to_json(collected)}.items():
        (folder / f"{NAME}.{suffix}").write_text(text, encoding="utf-8")
    print(f"\n{markdown}\nwrote {folder / NAME}.md, .csv, .json")


def _first(collected: Collected) -> str:
    for name, error in collected.failed.items():
        return f"{name} failed ({error})"
    return f"{collected.unfinished[0]} is not finished"


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not valid: expected a number of at least 1")
    return int(text)


if __name__ == "__main__":
    main()
