"""Media of a run, independent of the logger: histograms, pictures and a table."""

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from lightning_topkast.method.selection import ACTIVE, EXPLORING, RESERVOIR
from lightning_topkast.telemetry.pictures import heatmap, histogram_picture, mask_picture, on_white
from lightning_topkast.topkast import TopKast
from lightning_topkast.weights import SparseWeight

_BINS = 64
_COLUMNS = 1000  # of a heatmap, at least; up to twice as many
_PICTURED = 4  # weights whose masks and magnitudes are drawn
_BAND = ("mask_change_min", "mask_change", "mask_change_max")  # over the weights, around the share of all entries
_ATTENTION = ("attn", "attention", "in_proj", "q_proj", "k_proj", "v_proj", "query", "key", "value")
_TIERS = {"active": ACTIVE, "exploring": EXPLORING, "reservoir": RESERVOIR}
_KEY = "blue: active, orange: exploring, grey: reservoir"
_TABLE = ("weight", "shape", "entries", "active", "updated", "forward density", "backward density", "kept dense")


class Picture(NamedTuple):
    """An image and its caption."""

    image: Image.Image
    caption: str


class Table(NamedTuple):
    """Column names, and rows with one value per column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Lines(NamedTuple):
    """Several lines over the same steps, for one chart."""

    steps: list[int]
    values: dict[str, list[float]]


Histogram = tuple[np.ndarray, np.ndarray]  # counts and bin edges


class Media:
    """Collect the data of a run's pictures and draw them.

    Masks and magnitudes are shown at refresh 1, 2, 4, 8, ..., so that a long run stays small.

    Args:
        hidden: names of weights of which no histograms are shown.
    """

    def __init__(self, hidden: Collection[str] = ()) -> None:
        self._hidden = hidden
        self._band = Lines([], {name: [] for name in _BAND})
        self._columns = {"mask_change": _Columns(), "reservoir_activated": _Columns()}
        self._refreshes = 0

    def at_refresh(self, engines: Sequence[TopKast], values: Mapping[str, float], step: int) -> dict[str, Any]:
        """Record the changes; return name → histogram or picture, empty at most refreshes.

        Args:
            engines: of the run.
            values: the metrics of this refresh by name.
            step: of this refresh.
        """
        self._band.steps.append(step)
        for name, line in self._band.values.items():
            line.append(values[f"topkast/{name}"])
        for quantity, columns in self._columns.items():
            prefix = f"topkast/{quantity}/"
            columns.add({k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)})
        self._refreshes += 1
        return {} if self._refreshes & (self._refreshes - 1) else self._of_sets(engines)

    def at_end(self, engines: Sequence[TopKast]) -> dict[str, Any]:
        """Return name → final histograms and pictures, heatmaps and lines over the run, and the table of weights."""
        media = self._of_sets(engines)
        for quantity, columns in self._columns.items():
            if drawn := columns.all():
                caption = f"{quantity.replace('_', ' ')}: weights × refreshes"
                media[f"topkast/{quantity}_heatmap"] = Picture(heatmap(drawn), caption)
        return media | {"topkast/mask_change_of_weights": self._band, "topkast/weights": weight_table(engines)}

    def _of_sets(self, engines: Sequence[TopKast]) -> dict[str, Any]:
        weights = [weight for engine in engines for weight in engine.weights.values()]
        drawn = pictured(weights)
        media: dict[str, Any] = {}
        for weight in weights:
            if weight.name in self._hidden and weight.name not in drawn:
                continue
            groups = split_histogram(weight)
            if weight.name not in self._hidden:
                media |= {f"topkast/magnitude/{weight.name}/{group}": counted for group, counted in groups.items()}
            if weight.name not in drawn:
                continue
            image = histogram_picture(groups, {name: _least(groups[name]) for name in groups if name != "reservoir"})
            media[f"topkast/thresholds/{weight.name}"] = Picture(image, "magnitudes by set, and where the sets meet")
            if not weight.is_dtensor:
                picture = on_white(mask_picture(weight.tiers.cpu().numpy()))
                media[f"topkast/masks/{weight.name}"] = Picture(picture, _KEY)
        return media


class _Columns:
    """Columns of a heatmap; for a long run means of 2, 4, 8, ... refreshes, so that their number stays bounded."""

    def __init__(self) -> None:
        self._means: list[dict[str, float]] = []
        self._rest: list[dict[str, float]] = []
        self._each = 1

    def add(self, column: dict[str, float]) -> None:
        self._rest.append(column)
        if len(self._rest) == self._each:
            self._means.append(_mean(self._rest))
            self._rest = []
        if len(self._means) == 2 * _COLUMNS:
            self._means = [_mean(self._means[i : i + 2]) for i in range(0, len(self._means), 2)]
            self._each *= 2

    def all(self) -> list[dict[str, float]]:
        rest = [_mean(self._rest)] if self._rest else []
        return [column for column in self._means + rest if column]


def _mean(columns: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for column in columns for name in column)
    found = {name: [column[name] for column in columns if name in column] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def pictured(weights: Sequence[SparseWeight]) -> frozenset[str]:
    """Return names of the weights to draw: the first convolution and attention weights, or else the first weight."""
    convolutions = islice((weight.name for weight in weights if len(weight.shape) > 2), 1)
    attention = (w.name for w in weights if any(part in w.name.lower().split(".") for part in _ATTENTION))
    chosen = [*convolutions, *attention] or [weight.name for weight in weights]
    return frozenset(chosen[: _PICTURED if len(chosen) > 1 else 1])


def split_histogram(weight: SparseWeight) -> dict[str, Histogram]:
    r"""Return counts and bin edges of |θ| on A, B\A and C; groups without finite entries are omitted.

    A collective for a sharded weight.
    """
    theta, sharding = weight.own_theta(), weight.sharding
    magnitudes, tiers = theta.abs().float().cpu().flatten(), weight.own_tiers.cpu().flatten()
    finite = magnitudes.isfinite()  # a run may have diverged since its last refresh, which refuses non-finite values
    groups = {name: magnitudes[finite & (tiers == tier)] for name, tier in _TIERS.items()}
    parts = [*(-group for group in groups.values()), magnitudes[finite]]
    ends = torch.stack([each.max() if each.numel() else torch.tensor(-torch.inf) for each in parts])
    if sharding.is_sharded:
        ends = sharding.max(ends.to(theta.device))
    *least, top = ends.tolist()  # the least negated
    present = [name for name, end in zip(groups, least, strict=True) if end > -torch.inf]
    thresholds = [-end for name, end in zip(groups, least, strict=True) if name in present and name != "reservoir"]
    line = np.linspace(0, max(top, 0) or 1, _BINS + 1)
    edges = np.unique(np.concatenate([line, thresholds]).astype(np.float32))
    counted = np.stack([np.histogram(group.numpy(), bins=edges)[0] for group in groups.values()])
    if sharding.is_sharded:
        counted = sharding.sum(torch.from_numpy(counted).to(theta.device)).cpu().numpy()
    return {name: (counts, edges) for name, counts in zip(groups, counted, strict=True) if name in present}


def _least(histogram: Histogram) -> float:
    """Return the smallest counted magnitude, which is a bin edge, since the sets meet at edges."""
    counts, edges = histogram
    return float(edges[np.flatnonzero(counts)[0]])


def weight_table(engines: Sequence[TopKast]) -> Table:
    """Return a table with one row per parameter of the model: its densities, or why it is dense."""
    rows = []
    sparse = {name for engine in engines for name in engine.weights}
    for engine in engines:
        for row in engine.summary().rows:
            if row.name in engine.weights or (engine is engines[0] and row.name not in sparse):
                weight = engine.weights.get(row.name)
                updated = int(weight.updated_entries) if weight else row.updated
                density = updated / max(row.size, 1)
                rows.append(
                    (row.name, str(row.shape), row.size, row.active, updated, row.forward_density, density, row.reason)
                )
    return Table(_TABLE, rows)
