"""Preparing curves for drawing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_topkast.app.run_folder.logs import Curve

MASK_CHANGE = "topkast/mask_change"
_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def part_and_quantity(name: str) -> tuple[str, str]:
    """Return ("val", "acc") for `val/acc`, `val_acc` and `valid_acc_epoch`, and an empty part for other names."""
    prefix, slash, quantity = re.match(r"([a-z]*)([/_]?)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    if not (slash and quantity and prefix in _PARTS):
        return "", name
    return _PARTS[prefix], quantity.removesuffix("_epoch")


def of_layers(curves: Mapping[str, Curve], quantity: str = MASK_CHANGE) -> dict[str, Curve]:
    """Return the curves of a quantity that is logged for each sparse weight, by the name of the weight."""
    return {
        name.removeprefix(f"{quantity}/"): curve for name, curve in curves.items() if name.startswith(f"{quantity}/")
    }


def on_grid(curves: Mapping[str, Curve], most: int = 400) -> Curve:
    """Return at most `most` steps and a matrix of shape (curves, steps), with the last value logged up to each step."""
    steps = np.unique(np.concatenate([steps for steps, _ in curves.values()]))
    if len(steps) > most:
        steps = np.linspace(steps[0], steps[-1], most)
    rows = [values[np.searchsorted(at, steps, side="right").clip(min=1) - 1] for at, values in curves.values()]
    return steps, np.array(rows)


def over_seeds(curves: Sequence[Curve], most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return at most `most` steps, and the least, the mean and the greatest value of the curves at each.

    A curve counts from its first to its last step.
    """
    named = {str(number): thinned(curve, most) for number, curve in enumerate(curves)}
    steps, values = on_grid(named, most)
    inside = np.array([(steps >= at[0]) & (steps <= at[-1]) for at, _ in named.values()])
    known = inside.any(axis=0)
    values = np.where(inside, values, np.nan)[:, known]
    return steps[known], np.nanmin(values, axis=0), np.nanmean(values, axis=0), np.nanmax(values, axis=0)


def thinned(curve: Curve, most: int = 600) -> Curve:
    """Return a curve of at most `most` points, each the mean of neighbouring points."""
    steps, values = curve
    if len(steps) <= most:
        return curve
    means = [np.array([part.mean() for part in np.array_split(each, most)]) for each in (steps, values)]
    return means[0], means[1]
