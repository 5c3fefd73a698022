"""The curves of a run, read from the files of its loggers."""

from __future__ import annotations

import csv
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from lightning_topkast.app.errors import explain
from lightning_topkast.app.limits import LARGEST, LONGEST_NAME
from lightning_topkast.errors import TopKastError
from lightning_topkast.files import regular_file

# Below a folder of topkast-train; in the folder of one of Lightning's loggers.
_CSV = ("csv*/metrics.csv", "metrics.csv")
_EVENTS = ("tensorboard*/events.out.tfevents.*", "events.out.tfevents.*")

_MOST_BYTES = 1 << 30  # of a log
_LONGEST_LINE = 1 << 20  # characters of a line; in it a field has at most 131,072, which is a limit of `csv`
_LAST_STEP = 1 << 53  # which a float64 tells from the one before

Curve = tuple[np.ndarray, np.ndarray]
"""Increasing steps, and the finite value logged at each: two float64 arrays of the same length."""


def read_curves(folder: Path, skip: Callable[[str], None] = lambda reason: None) -> dict[str, Curve]:
    """Return the curves of the run in `folder` by name, from its CSV logs or else from its TensorBoard files.

    A resumed run has several logs. From its first step on, a later log replaces the earlier ones.

    Args:
        folder: The folder.
        skip: Called with what is left out, and why: logs that cannot be read, and what is no log of a run.
    """
    joined: dict[str, Curve] = {}
    for read, patterns in ((_read_csv, _CSV), (_read_events, _EVENTS)):
        for path in _in_order(folder, patterns):
            points = _Points()
            try:
                read(path, points)
            except (TopKastError, OSError) as error:
                skip(f"A log is left out: {explain(error) or error}.")
            for reason in points.left_out():
                skip(f"{folder.resolve().name}/{path.relative_to(folder)}: {reason}.")
            for name, (steps, values) in points.curves():
                if name in joined:
                    before = joined[name][0] < steps[0]
                    steps, values = (
                        np.concatenate([old[before], new])
                        for old, new in zip(joined[name], (steps, values), strict=True)
                    )
                joined[name] = steps, values
        if joined:
            break
    return joined


def has_log(folder: Path) -> bool:
    """Return whether the run in `folder` has logged curves to disk."""
    return any(any(folder.glob(pattern)) for pattern in (*_CSV, *_EVENTS))


def _in_order(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files in the order in which they were begun, which their names tell and a copy's dates do not.

    These are `csv`, `csv-2`, ..., `csv-10`; and TensorBoard's names have the second, and then the number of the writer.
    """

    def begun(path: Path) -> tuple[list[int], str]:
        return [int(number) for number in re.findall(r"\d+", str(path.relative_to(folder)))], str(path)

    return sorted((path for pattern in patterns for path in folder.glob(pattern)), key=begun)


class _Points:
    """The points of a log. Of several at the same step the last counts."""

    def __init__(self) -> None:
        self.damage = ""  # why the rest of the log is left out
        self._points: dict[str, tuple[array[float], array[float]]] = {}
        self._implausible: Counter[str] = Counter()

    def add(self, name: str, step: float, value: float) -> None:
        """Add a point, unless its value is NaN or infinite, as those of a run that has diverged."""
        if not math.isfinite(value):
            return
        if len(name) > LONGEST_NAME:
            self._implausible[f"name of more than {LONGEST_NAME:,} characters"] += 1
        elif abs(step) > _LAST_STEP:
            self._implausible[f"step beyond ±{_LAST_STEP:,}"] += 1
        elif abs(value) > LARGEST:
            self._implausible[f"value beyond ±{LARGEST:g}"] += 1
        else:
            if name not in self._points:
                self._points[name] = array("d"), array("d")
            steps, values = self._points[name]
            steps.append(step)
            values.append(value)

    def left_out(self) -> Iterator[str]:
        """Yield what is left out, and why."""
        for what, count in self._implausible.items():
            yield f"{count:,} point{'s' if count > 1 else ''} with a {what} left out"
        if self.damage:
            yield f"the rest is left out, since it is damaged: {self.damage}"

    def curves(self) -> Iterator[tuple[str, Curve]]:
        """Yield the names and the curves."""
        for name, points in self._points.items():
            steps, values = map(np.array, points)
            increasing, last = np.unique(steps[::-1], return_index=True)
            yield name, (increasing, values[::-1][last])


def _read_csv(path: Path, points: _Points) -> None:
    with open(path, encoding="utf-8", errors="replace", newline="", opener=regular_file) as file:
        rows = csv.DictReader(_lines(file))
        try:
            for row in rows:
                step = _number(row.pop("step", None))
                if not math.isfinite(step):
                    continue  # a truncated line
                for name, text in row.items():
                    if name:  # cells beyond the header have no name
                        points.add(name, step, _number(text))
        except csv.Error as error:  # an unterminated field, or a null byte in Python 3.10
            points.damage = str(error)


def _lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of a log, also of one that has no line ends, or no end."""
    left = _MOST_BYTES
    while line := file.readline(_LONGEST_LINE):
        left -= len(line)
        if len(line) == _LONGEST_LINE or left < 0:
            raise csv.Error(f"a line has more than {_LONGEST_LINE:,} characters, or all more than {_MOST_BYTES:,}")
        yield line


def _read_events(path: Path, points: _Points) -> None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return
    with open(path, "rb", opener=regular_file) as file:
        size = file.seek(0, os.SEEK_END)
    if size > _MOST_BYTES:
        raise TopKastError(f"{path} has {size:,} bytes, more than {_MOST_BYTES:,}")
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    try:
        events.Reload()
    except OSError:
        raise
    except Exception as error:  # garbage can raise anything
        points.damage = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            points.add(name, float(event.step), event.value)


def _number(text: object) -> float:
    """Return the number in a cell, or NaN."""
    try:
        return float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return math.nan
