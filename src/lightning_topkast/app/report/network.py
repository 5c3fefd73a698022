"""The picture of a network: a column for each of its weights, filled by density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lightning_topkast.app import formatting


@dataclass(frozen=True)
class Column:
    r"""One weight.

    Attributes:
        name: Name, without what all names have in common.
        about: Full name, shape and densities.
        width: Relative width, the square root of the number of entries.
        active: Height of A, in per cent of the picture.
        updated: Height of B, likewise; that of A if it is dense.
        is_dense: Whether it is a dense weight.
    """

    name: str
    about: str
    width: float
    active: float
    updated: float
    is_dense: bool


@dataclass(frozen=True)
class Network:
    """The picture: its columns from the first weight of the model to the last, and its scale.

    Attributes:
        columns: One for each weight.
        marks: Densities at powers of ten with their heights in per cent, the highest first.
    """

    columns: Sequence[Column]
    marks: Sequence[tuple[str, float]]


def network(rows: Sequence[Any]) -> Network | None:
    """Return the picture of weights, or None if none of them is sparse.

    Args:
        rows: Weights as in the table of the report, in the order of the model.
    """
    rows = [row for row in rows if row.entries]
    densities = [count / row.entries for row in rows if (count := row.active) is not None and count]
    if not densities:
        return None
    decades = max(1, math.ceil(-math.log10(min(densities)) - 1e-9))
    # A density that is a power of ten would have no height: the scale begins at a third of it.
    floor = decades + 0.5

    def height(density: float) -> float:
        return round(100 * max(0.0, 1 + math.log10(density) / floor), 2) if density else 0.0

    paths = zip(*(row.name.split(".")[:-1] for row in rows), strict=False)  # up to the shortest
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, paths))
    columns = []
    for row in rows:
        is_dense = row.active is None
        active = (row.entries if row.nonzero is None else row.nonzero) if is_dense else row.active
        updated = active if is_dense else row.updated
        forward, backward = active / row.entries, updated / row.entries
        what = f"dense{f': {row.reason}' if row.reason else ''}" if is_dense else (
            f"forward density {formatting.percent(forward)}, backward {formatting.percent(backward)}"
        )  # fmt: skip
        parts = row.name.split(".")[shared:]
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "weight" else parts)
        about = f"{row.name}, {row.shape}: {what}"
        columns.append(Column(name, about, math.sqrt(row.entries), height(forward), height(backward), is_dense))
    marks = [(f"{10.0 ** (2 - power):g} %", round(100 * (1 - power / floor), 2)) for power in range(decades + 1)]
    return Network(columns, marks)
