"""Run what is missing of a sweep, and write the tables and the plot of all its runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.overrides import quoted
from lightning_topkast.app.run_folder.folder import only_run_in
from lightning_topkast.app.sweep.collect import Collected
from lightning_topkast.app.sweep.expand import Sweep, expand, read_sweep
from lightning_topkast.app.sweep.launch import Launcher, hydra_configs, missing
from lightning_topkast.app.sweep.plot import plot
from lightning_topkast.app.sweep.progress import show_progress
from lightning_topkast.app.sweep.tables import print_tables, to_csv, to_json, to_markdown
from lightning_topkast.app.sweep.wandb_tables import log_to_wandb
from lightning_topkast.app.terminal import say
from lightning_topkast.files import atomic_file

NAME = "comparison"


def run_sweep(
    folder: Path, overrides: Sequence[str], sweep: str | None, jobs: int | None, config_dir: Path | None = None
) -> str | None:
    """Run what is missing of a sweep in `folder`, and return the W&B project that the runs log to, if there is one.

    Args:
        folder: Folder of the sweep.
        overrides: Overrides of the command line, of runs and of Hydra's own settings.
        sweep: Name of a sweep, or path of its file.
        jobs: Number of parallel runs, with joblib; None leaves it to `overrides`.
        config_dir: A folder of the user's own configurations.

    Raises:
        AppError: The sweep or an override is not valid, or the runs cannot be launched.
    """
    own = [override for override in overrides if override.lstrip("+~").startswith(("hydra.", "hydra/"))]
    rest = [override for override in overrides if override not in own]
    if config_dir is not None:
        own = [f"hydra.searchpath=[{quoted(f'file://{config_dir.absolute()}')}]", *own]
    grids = read_sweep(sweep) if sweep else Sweep([[]])
    with hydra_configs(), only_run_in(folder, "topkast-compare"):
        launcher = Launcher(folder, own, jobs)
        runs = expand(grids, rest, launcher.loader)
        left = missing(runs, launcher, folder)
        done = len(runs) - len(left)
        say(f"{len(runs)} runs in {folder}" + (f", {done} of them completed before" if done else ""))
        if left:
            with _interruptible(), show_progress(folder, left, done):
                launcher.launch(left)
        return launcher.wandb_project(runs[0])


@contextmanager
def _interruptible() -> Iterator[None]:
    """End the runs on Ctrl-C or SIGTERM, and tell the user how to continue."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        say(
            "\ntopkast-compare: interrupted; the same command continues, from the last checkpoint of each started run",
            error=True,
        )
        sys.exit(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)


def write_tables(collected: Collected, folder: Path, project: str | None = None) -> None:
    """Print the tables and write them to `folder`, and to W&B if a project is given.

    Raises:
        AppError: There is nothing to compare, for another reason than that all runs failed.
    """
    for broken in collected.broken:
        _say(f"skipped: {broken}")
    if not collected.comparisons:
        started = len(collected.failed) + len(collected.unfinished)
        first = [f"{name} failed: {error}" for name, error in collected.failed.items()]
        first += [f"{name} is not finished" for name in collected.unfinished]
        nothing = f"there is no finished run below {folder}"
        if collected.failed:
            return _say(f"{nothing}, of {started} started: {first[0]}")
        raise AppError(nothing + (f", of {started} started: {first[0]}" if started else ""))
    texts = {"md": to_markdown(collected), "csv": to_csv(collected), "json": to_json(collected)}
    for suffix, text in texts.items():
        with atomic_file(folder / f"{NAME}.{suffix}", "table") as partial:
            partial.write_text(text, encoding="utf-8")
    print_tables(collected)
    picture: Path | None = folder / f"{NAME}.png"
    try:
        picture = picture if plot(collected.comparisons, folder / f"{NAME}.png") else None
    except AppError as error:  # the tables are written all the same
        picture = None
        _say(str(error))
    say(f"wrote {folder / NAME}." + ", .".join([*texts, *(["png"] if picture else [])]))
    if project is not None:
        waiting = log_to_wandb(collected.comparisons, folder, project, picture)
        say(f"W&B offline: wandb sync {waiting}" if waiting else f"logged to the W&B project {project}")
    if collected.failed:
        _say(
            f"{len(collected.failed)} of the runs failed, see run.log in their folders; the same command repeats them. "
            f"The first error: {next(iter(collected.failed.values()))}"
        )


def _say(text: str) -> None:
    say(f"topkast-compare: {text}", error=True)
