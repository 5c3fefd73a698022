"""`topkast-compare`: run what is missing of a sweep, and put every finished run beneath a folder into one table."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_topkast.app.collect import Collected, collect
from lightning_topkast.app.compare_plot import plot
from lightning_topkast.app.compare_tables import to_csv, to_json, to_markdown
from lightning_topkast.app.compare_wandb import log_to_wandb
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
        given = _arguments()
        folder = given.folder.absolute()
        project = given.wandb
        if given.overrides or given.sweep:
            project = project or run(folder, given.overrides, given.sweep, given.jobs)
        elif given.jobs:
            raise AppError(f"--jobs {given.jobs} needs something to run: overrides, or --sweep NAME")
        elif not folder.is_dir():
            raise AppError(f"there is no folder {folder}: name one with runs in it, or say what to run")
        collected = collect(folder)
        report(collected, folder, project)
        sys.exit(1 if collected.failed else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="topkast-compare",
        usage="topkast-compare FOLDER [KEY=VALUE ...] [--sweep NAME] [--jobs N] [--wandb PROJECT]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds the runs, a folder each, and the tables")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what to run: a grid of overrides")
    parser.add_argument("--sweep", metavar="NAME", help="what to run: the grids of a YAML file, the name of one of the "
                        "package's or a path; overrides hold for all of them")  # fmt: skip
    parser.add_argument("--jobs", type=_count, metavar="N", help="runs at a time, on this machine (joblib)")
    parser.add_argument("--wandb", metavar="PROJECT", help="log the tables to W&B, too (offline unless logged in); the "
                        "default where the runs that are made log to it")  # fmt: skip
    return parser.parse_intermixed_args()


def run(folder: Path, overrides: Sequence[str], sweep: str | None, jobs: int | None) -> str | None:
    """Make the runs of a sweep that are missing in `folder`; return the W&B project that they log to, if any.

    Raises:
        AppError: for what the user can mend, with the way to do so.
    """
    own = [override for override in overrides if override.lstrip("+~").startswith(("hydra.", "hydra/"))]
    rest = [override for override in overrides if override not in own]
    grids = read_sweep(sweep) if sweep else Sweep([[]])
    with hydra_configs(), only_one(folder):
        launcher = Launcher(folder, own, jobs)
        runs = expand(grids, rest, launcher.loader)
        left = missing(runs, launcher, folder)
        done = len(runs) - len(left)
        print(f"{len(runs)} runs in {folder}" + (f", {done} of them done before" if done else ""), flush=True)
        if left:
            with _interruptible(), watched(folder, left, done):
                launcher.launch(left)
        return launcher.wandb_project(runs[0])


@contextmanager
def _interruptible() -> Iterator[None]:
    """Answer Ctrl-C, and SIGTERM like it: the runs are ended, and the user is told how to go on."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        print(
            "\ntopkast-compare: interrupted; the same command goes on, from the last checkpoint of each begun run",
            file=sys.stderr,
        )
        sys.exit(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)


def report(collected: Collected, folder: Path, project: str | None = None) -> None:
    """Print the tables and write them into `folder`, and to W&B if a project is given.

    Raises:
        AppError: there is nothing to compare, and not because all runs failed.
    """
    for broken in collected.broken:
        _say(f"passed over: {broken}")
    if not collected.comparisons:
        begun = len(collected.failed) + len(collected.unfinished)
        first = [f"{name} failed: {error}" for name, error in collected.failed.items()]
        first += [f"{name} is not finished" for name in collected.unfinished]
        nothing = f"there is no finished run beneath {folder}"
        if collected.failed:
            return _say(f"{nothing}, of {begun} begun ones: {first[0]}")
        raise AppError(nothing + (f", of {begun} begun ones: {first[0]}" if begun else ""))
    markdown = to_markdown(collected)
    texts = {"md": markdown, "csv": to_csv(collected), "json": to_json(collected)}
    for suffix, text in texts.items():
        (folder / f"{NAME}.{suffix}").write_text(text, encoding="utf-8")
    print(f"\n{markdown}")
    picture: Path | None = folder / f"{NAME}.png"
    try:
        picture = picture if plot(collected.comparisons, folder / f"{NAME}.png") else None
    except AppError as error:  # no reason to be without the tables
        picture = None
        _say(str(error))
    print(f"wrote {folder / NAME}." + ", .".join([*texts, *(["png"] if picture else [])]))
    if project is not None:
        waiting = log_to_wandb(collected.comparisons, folder, project, picture)
        print(f"W&B offline: wandb sync {waiting}" if waiting else f"logged to the W&B project {project}")
    if collected.failed:
        _say(
            f"{len(collected.failed)} of the runs failed, see run.log in their folders; the same command tries them "
            f"again. The first: {next(iter(collected.failed.values()))}"
        )


def _say(text: str) -> None:
    print(f"topkast-compare: {text}", file=sys.stderr, flush=True)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not valid: expected a number of at least 1")
    return int(text)


if __name__ == "__main__":
    main()
