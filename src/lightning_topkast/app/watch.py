"""How far a sweep is, read from the runs' folders: the same for every launcher."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.grids import Run
from lightning_topkast.app.result import FAILED, FINISHED, RESULT_FILE, RUNNING, read_result

_EVERY = 0.5  # seconds between two looks


@contextmanager
def watched(folder: Path, runs: Sequence[Run], done: int) -> Iterator[None]:
    """Show a bar over the whole sweep while the block runs, and a line for each run that ends.

    Args:
        folder: of the sweep.
        runs: those that are to be made.
        done: how many others were done before.
    """
    watcher = _Watcher(folder, runs, done)
    with watcher.bar:
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
        self._folder = folder
        self._left = {run.name: self._seen(run.name) for run in runs}
        console = Console(highlight=False, soft_wrap=True)
        self._done, self._total = done, done + len(runs)
        self.bar = Progress(
            TextColumn("sweep"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"),
            TimeRemainingColumn(), TextColumn("{task.description}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        # Its speed counts the runs of this call only.
        self._task = self.bar.add_task("", total=self._total, completed=done)

    def watch(self) -> None:
        last = False
        while not last:
            last = self.stop.wait(_EVERY)  # what has ended since is seen, too
            running = []
            for name, before in list(self._left.items()):
                result = self._read(name)
                if result is None or self._seen(name) == before:
                    continue
                if result["status"] == RUNNING:
                    running.append(name)
                else:
                    del self._left[name]
                    self._ended(name, result)
            self.bar.update(self._task, description=_some(running))

    def _ended(self, name: str, result: dict[str, Any]) -> None:
        self._done += 1
        if result["status"] == FINISHED:
            figures = result["metrics"] or {result["monitor"]["name"]: result["monitor"]["value"]}
            said = "  ".join(f"{key} {value:.4f}" for key, value in sorted(figures.items()) if value is not None)
        else:
            said = result["status"] + (f": {result.get('error')}" if result["status"] == FAILED else "")
        self.bar.console.print(f"[{self._done}/{self._total}] {name}  {said}", markup=False)
        self.bar.update(self._task, completed=self._done)

    def _seen(self, name: str) -> int:
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


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ("running: " + ", ".join(names[:2]) + more) if names else ""
