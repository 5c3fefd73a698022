"""The curves of a run, read from the files of its loggers."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

# Below a folder of topkast-train; in the folder of one of Lightning's loggers.
_CSV = ("csv*/metrics.csv", "metrics.csv")
_EVENTS = ("tensorboard*/events.out.tfevents.*", "events.out.tfevents.*")

Curve = tuple[np.ndarray, np.ndarray]
"""Increasing steps, and the finite value logged at each: two float64 arrays of the same length."""


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return the curves of the run in `folder` by name, from its CSV logs or else from its TensorBoard files.

    A resumed run has several logs. From its first step on, a later log replaces the earlier ones.
    """
    parts = [_read_csv(path) for path in _in_order(folder, _CSV)]
    if not any(parts):
        parts = [_read_events(path) for path in _in_order(folder, _EVENTS)]
    joined: dict[str, dict[float, float]] = {}
    for part in parts:
        for name, points in part.items():
            before = {step: value for step, value in joined.get(name, {}).items() if step < min(points)}
            joined[name] = before | points
    return {name: _curve(points) for name, points in joined.items()}


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


def _read_csv(path: Path) -> dict[str, dict[float, float]]:
    found: dict[str, dict[float, float]] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.DictReader(file)
        with suppress(csv.Error):  # the rest is damaged: an unterminated field, or a null byte in Python 3.10
            for row in rows:
                step = _number(row.pop("step", None))
                if step is None:
                    continue  # a truncated line
                for name, text in row.items():
                    value = _number(text) if name else None  # cells beyond the header have no name
                    if value is not None:
                        found.setdefault(name, {})[step] = value
    return found


def _read_events(path: Path) -> dict[str, dict[float, float]]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return {}
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    found = {
        name: {float(event.step): event.value for event in events.Scalars(name) if math.isfinite(event.value)}
        for name in events.Tags()["scalars"]
    }
    return {name: points for name, points in found.items() if points}


def _number(text: object) -> float | None:
    try:
        value = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _curve(points: Mapping[float, float]) -> Curve:
    steps = np.array(sorted(points))
    return steps, np.array([points[step] for step in steps])
