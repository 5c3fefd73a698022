"""How far a sweep is, read from the runs' folders: the same for every launcher."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.grids import Run
from lightning_topkast.app.result import FAILED, FINISHED, RESULT_FILE, RUNNING, read_result

_EVERY = 0.5  # seconds between two looks


@contextmanager
def watched(folder: Path, runs: Sequence[Run], done: int) -> Iterator[None]:
    """Show a bar over the whole sweep while the block runs, and a line for each run that ends.

    Where the output is no terminal there are the lines only.

    Args:
        folder: of the sweep.
        runs: those that are to be made.
        done: how many others were done before.
    """
    watcher = _Watcher(folder, runs, done)
    terminal = watcher.console.is_terminal
    with Live(watcher, console=watcher.console, transient=True) if terminal else nullcontext():
        thread = threading.Thread(target=watcher.watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            watcher.stop.set()
            thread.join()


class _Watcher:
    def __init__(self, folder: Path, runs: Sequence[Run], done: int) -> None:
        self.stop = threading.Event()
        self.console = Console(highlight=False)
        self._folder, self._since = folder, time.monotonic()
        self._left = {run.name: self._written(run.name) for run in runs}
        self._running: list[str] = []
        self._before, self._done, self._total = done, done, done + len(runs)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("{task.description}"), console=self.console)
        self._task = self._bar.add_task("", total=self._total, completed=done)

    def __rich__(self) -> Group:
        running = Text(f"running: {', '.join(self._running)}" if self._running else "starting")
        running.truncate(self.console.width, overflow="ellipsis")
        return Group(self._bar, running)

    def watch(self) -> None:
        last = False
        while not last:
            last = self.stop.wait(_EVERY)  # what has ended since is seen, too
            running = []
            for name, before in list(self._left.items()):
                result = self._read(name)
                if result is None or self._written(name) == before:
                    continue
                if result["status"] == RUNNING:
                    running.append(name)
                else:
                    del self._left[name]
                    self._ended(name, result)
            self._running = running

    def _ended(self, name: str, result: dict[str, Any]) -> None:
        self._done += 1
        if result["status"] == FINISHED:
            figures = result["metrics"] or {result["monitor"]["name"]: result["monitor"]["value"]}
            said = "  ".join(f"{key} {value:.4f}" for key, value in sorted(figures.items()) if value is not None)
        else:
            said = result["status"] + (f": {result.get('error')}" if result["status"] == FAILED else "")
        self.console.print(f"[{self._done}/{self._total}] {name}  {said}", markup=False, soft_wrap=True)
        # A run at a time or several: what a run has taken of the sweep's own time tells what the others will.
        each = (time.monotonic() - self._since) / (self._done - self._before)
        left = timedelta(seconds=round(each * (self._total - self._done)))
        self._bar.update(self._task, completed=self._done, description=f"about {left} left")

    def _written(self, name: str) -> int:
        """When the run's file was written, to tell this call's from an earlier one's."""
        try:
            return (self._folder / name / RESULT_FILE).stat().st_mtime_ns
        except OSError:
            return 0

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return read_result(self._folder / name)
        except AppError:
            return None
