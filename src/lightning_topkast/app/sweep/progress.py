"""The progress of a sweep, read from the folders of its runs, so that it works with every launcher."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lightning_topkast.app import formatting
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.run_folder.result import FAILED, FINISHED, RESULT_FILE, RUNNING, Result
from lightning_topkast.app.sweep.expand import Run
from lightning_topkast.app.terminal import Terminal
from lightning_topkast.text import printable

_POLL = 0.5  # seconds between two checks


@contextmanager
def show_progress(folder: Path, runs: Sequence[Run], done: int) -> Iterator[None]:
    """Show a progress bar of the sweep while the block runs, and print a line for each run that ends.

    If the output is not a terminal, there is no bar.

    Args:
        folder: Folder of the sweep.
        runs: The runs that are launched.
        done: Number of runs that were completed before.
    """
    display = _ProgressDisplay(folder, runs, done)
    terminal = display.console.is_terminal
    with Live(display, console=display.console, transient=True) if terminal else nullcontext():
        thread = threading.Thread(target=display.poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            display.stop.set()
            thread.join()


class _ProgressDisplay:
    def __init__(self, folder: Path, runs: Sequence[Run], done: int) -> None:
        self.stop = threading.Event()
        self.console = Terminal()
        self._folder, self._since = folder, time.monotonic()
        self._left = {run.name: self._written(run.name) for run in runs}
        self._running: list[str] = []
        self._before, self._done, self._total = done, done, done + len(runs)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("{task.description}"), console=self.console)
        self._task = self._bar.add_task("", total=self._total, completed=done)

    def __rich__(self) -> Group:
        running = Text(printable(f"running: {', '.join(self._running)}") if self._running else "starting")
        running.truncate(self.console.width, overflow="ellipsis")
        return Group(self._bar, running)

    def poll(self) -> None:
        last = False
        while not last:
            last = self.stop.wait(_POLL)  # check once more after the stop
            running = []
            for name, before in list(self._left.items()):
                result = self._read(name)
                if result is None or self._written(name) == before:
                    continue
                if result.status == RUNNING:
                    running.append(name)
                else:
                    del self._left[name]
                    self._ended(name, result)
            self._running = running

    def _ended(self, name: str, result: Result) -> None:
        self._done += 1
        if result.status == FINISHED and result.monitor is not None:
            said = formatting.metrics(result.metrics or {result.monitor.name: result.monitor.value})
        else:
            said = result.status + (f": {result.error}" if result.status == FAILED else "")
        self.console.print(f"[{self._done}/{self._total}] {name}  {said}", soft_wrap=True)
        # The share of the sweep's time per completed run predicts the rest, however many runs are launched at a time.
        each = (time.monotonic() - self._since) / (self._done - self._before)
        left = timedelta(seconds=round(each * (self._total - self._done)))
        self._bar.update(self._task, completed=self._done, description=f"about {left} left")

    def _written(self, name: str) -> int:
        """Return when the result was written, to tell a new one from that of an earlier sweep."""
        try:
            return (self._folder / name / RESULT_FILE).stat().st_mtime_ns
        except OSError:
            return 0

    def _read(self, name: str) -> Result | None:
        try:
            return RunFolder(self._folder / name).result()
        except (AppError, OSError):  # reported when the results are collected
            return None
