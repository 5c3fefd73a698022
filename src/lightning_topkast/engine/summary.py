"""The table of all weights: sparse or dense, and why."""

import shutil
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_topkast.method.penalty import L2, describe_shrinkage, peak_learning_rates
from lightning_topkast.method.rule import Magnitude
from lightning_topkast.method.schedule import Timeline
from lightning_topkast.method.targets import Target, Targets
from lightning_topkast.settings import Settings
from lightning_topkast.text import short_names
from lightning_topkast.weights import SparseWeight

# Reasons for which a weight of two or more dimensions is dense by request or by the method's own set-up.
_EXPECTED = ("embedding", "first candidate", "last candidate", "excluded", "frozen", "norm", "bias")
_FEW = 3  # dense parameters with one reason that are shown one by one
_SHORTEST_NAME = 16


@dataclass(frozen=True)
class WeightSummary:
    """One parameter: the exact sizes of its sets and its storage, or the reason why it is dense."""

    name: str
    shape: tuple[int, ...]
    size: int
    active: int
    updated: int
    reason: str = ""
    storage: str = ""

    @property
    def forward_density(self) -> float:
        """|A| / n."""
        return self.active / self.size if self.size else 1.0

    @property
    def backward_density(self) -> float:
        """|B| / n."""
        return self.updated / self.size if self.size else 1.0


@dataclass(frozen=True)
class Summary:
    """All parameters of a model; `str()` returns a table, `to_dict()` plain data."""

    rows: tuple[WeightSummary, ...]
    notes: tuple[str, ...] = ()

    @property
    def model_density(self) -> float:
        """Share of all parameters, including dense ones, that are not held at zero."""
        return sum(row.active for row in self.rows) / max(sum(row.size for row in self.rows), 1)

    @property
    def sparse_share(self) -> float:
        """Share of all parameters that belong to sparse weights."""
        sparse = sum(row.size for row in self.rows if not row.reason)
        return sparse / max(sum(row.size for row in self.rows), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return rows and notes as plain data."""
        return {"rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}

    def __str__(self) -> str:
        return self.table(shutil.get_terminal_size().columns)

    def table(self, width: int = 80) -> str:
        """Return a table of the sparse weights, and of the dense parameters by the reason for it.

        Args:
            width: of a line in characters, to which names are shortened and notes wrapped.
        """
        sparse = [row for row in self.rows if not row.reason]
        storages = {row.storage for row in sparse}
        header = ["weight", "shape", "entries", "|A|", "|B|", "|A|/n", "|B|/n"]
        lines = [[row.name, *_sizes(row), *([row.storage] if len(storages) > 1 else [])] for row in sparse]
        entries, active, updated = (sum(getattr(row, name) for row in sparse) for name in ("size", "active", "updated"))
        total, used = (sum(getattr(row, name) for row in self.rows) for name in ("size", "active"))
        packed = f", {'/'.join(storages)}" if len(storages) == 1 and storages != {"masked"} else ""
        sums = [
            [f"{len(sparse)} sparse{packed}", *_sizes(WeightSummary("", (), entries, active, updated))],
            ["whole model", "", f"{total:,}", f"{used:,}", "", f"{used / max(total, 1):.4f}"],
        ]
        dense = [[name, shape, f"{size:,}", f"dense: {reason}"] for name, shape, size, reason in self._dense()]
        # a reason begins in the column of |A|, and may be longer than all that follow
        cells = [header, *lines, *sums, *(line[:3] for line in dense)]
        widths = [max((len(line[at]) for line in cells if len(line) > at), default=0) for at in range(8)]
        rest = sum(width + 2 for width in widths[1:] if width)
        for part in (lines, dense):
            names = short_names([line[0] for line in part], max(width - rest, _SHORTEST_NAME))
            for line, name in zip(part, names, strict=True):
                line[0] = name
        widths[0] = max(len(line[0]) for line in (header, *lines, *dense, *sums))
        rule = "─" * (widths[0] + rest)
        share = f"sparse weights hold {self.sparse_share:.1%} of the model's parameters"
        notes = [line for note in (share, *self.notes) for line in wrap(note, width, subsequent_indent="  ")]
        table = [header, *lines, *dense], sums
        above, below = ([_line(line, widths) for line in part] for part in table)
        return "\n".join([above[0], rule, *above[1:], rule, *below, *notes])

    def _dense(self) -> list[tuple[str, str, int, str]]:
        """Name, shape and size of the dense parameters with the reason; many with the same reason are one line."""
        found: list[tuple[str, str, int, str]] = []
        for reason in dict.fromkeys(row.reason for row in self.rows if row.reason):
            rows = [row for row in self.rows if row.reason == reason]
            if len(rows) > _FEW:
                found.append((f"{len(rows)} parameters", "", sum(row.size for row in rows), reason))
            else:
                found += [(row.name, _shape(row), row.size, reason) for row in rows]
        return found


def _sizes(row: WeightSummary) -> list[str]:
    density = [f"{row.forward_density:.4f}", f"{row.backward_density:.4f}"]
    return [_shape(row) if row.shape else "", f"{row.size:,}", f"{row.active:,}", f"{row.updated:,}", *density]


def _shape(row: WeightSummary) -> str:
    return "×".join(map(str, row.shape)) or "scalar"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return the name, the shape, up to five numbers or a reason, and the storage as a line."""
    aligned = [
        cell.ljust(width) if at < 2 or (len(cells) == 4 and at == 3) else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=False))
    ]
    return "  ".join(aligned).rstrip()


def warn_if_little(targets: Sequence[Target], chosen: Targets) -> None:
    """Warn if less than half of what could be sparse is, since the model has layers that are not known.

    Counted are weights of two or more dimensions, but not embeddings, norms and biases, the first and the last
    candidate, and what was excluded or frozen. Nothing is said where the sparse weights were named.
    """
    if chosen.include is not None or chosen.include_types is not None:
        return
    counted = [target for target in targets if len(target.shape) >= 2 and target.reason not in _EXPECTED]
    entries = sum(target.shape.numel() for target in counted)
    sparse = sum(target.shape.numel() for target in counted if target.sparse)
    if 2 * sparse >= entries:
        return
    dense = sorted((target for target in counted if not target.sparse), key=lambda target: -target.shape.numel())
    largest = ", ".join(f"'{t.name}' ({t.shape.numel():,} entries: {t.reason})" for t in dense[:3])
    warnings.warn(
        f"sparse weights hold only {sparse / entries:.1%} of the model's weights, not counting embeddings, the first "
        f"and the last layer, and what was excluded. The largest dense ones are {largest}. To make them sparse too, "
        "name all that should be, with include=[...] or Targets(include_types=[...])",
        stacklevel=5,
    )


def _how_chosen(timeline: Timeline, settings: Settings) -> str:
    schedule, rule = timeline.schedule, settings.rule
    until = "" if schedule.stop_updating_at is None else f" until step {schedule.stop_updating_at}"
    if isinstance(rule, Magnitude):
        stop = schedule.stop_exploring_at
        how = f"{rule.exploration} exploration" + ("" if stop is None else f" until step {stop}")
    else:
        how = f"by {rule}"
    return f"refresh every {schedule.update_every} steps{until}, {how}, {settings.allocation.distribution} distribution"


def _storages(weights: Collection[SparseWeight]) -> list[str]:
    """Say why weights are stored as they are, where that was chosen for each."""
    chosen = Counter((weight.storage, weight.storage_reason) for weight in weights if weight.storage_reason)
    return [f"{storage}, {count} of {len(weights)}: {reason}" for (storage, reason), count in sorted(chosen.items())]


def without_reservoir(
    weights: Mapping[str, SparseWeight], zeros: Mapping[str, tuple[int, int]], settings: Settings
) -> list[str]:
    """Return the names of the weights that explore, but are zero outside B, so that nothing says which entries to try.

    Args:
        weights: the sparse weights by name.
        zeros: weight name → the number of zeros in θ, and of those outside B.
        settings: of the run.
    """
    found = []
    for name, (everywhere, outside) in zeros.items():
        weight = weights.get(name)
        if weight is not None and 0 < outside == weight.size - int(weight.updated_entries) and everywhere < weight.size:
            found.append(name)
    return found if settings.rule.explores else []


def _of_zeros(
    weights: Mapping[str, SparseWeight], zeros: Mapping[str, tuple[int, int]], settings: Settings
) -> list[str]:
    """Name the weights whose magnitudes do not say which entries are worth exploring."""
    whole = [name for name, (everywhere, _) in zeros.items() if name in weights and everywhere == weights[name].size]
    reservoir = without_reservoir(weights, zeros, settings)
    notes = []
    if whole:
        notes.append(f"all zeros: {', '.join(whole)}; the sets are drawn at random until entries have values")
    if reservoir:
        named = ", ".join(reservoir)
        notes.append(f"all zeros outside B: {named}; exploration draws at random until entries have values")
    return notes


def summarize(
    targets: Iterable[Target],
    weights: Mapping[str, SparseWeight],
    timeline: Timeline,
    settings: Settings,
    optimizers: Sequence[Optimizer],
    zeros: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> Summary:
    """Summarize a run: all parameters, when the sets are chosen, and the effect of the penalty.

    Args:
        targets: all parameters.
        weights: weight name → the sparse ones.
        timeline: of the run.
        settings: of the run.
        optimizers: those that train the weights.
        zeros: weight name → the number of zeros in θ, and of those outside B, as training starts.
    """
    rows = []
    for target in targets:
        size = target.shape.numel()
        weight = weights.get(target.name)
        active, updated = (weight.active_count, weight.updated_count) if weight else (size, size)
        storage = weight.storage if weight else ""
        rows.append(WeightSummary(target.name, tuple(target.shape), size, active, updated, target.reason, storage))
    notes = [_how_chosen(timeline, settings), *_storages(weights.values())]
    if settings.ramp is not None:
        ramp = timeline.ramp or settings.ramp
        when = "" if timeline.ramp is None else f", between steps {ramp.begin} and {ramp.end}"
        notes.append(
            f"the sizes are those at the end of the run: sparsities rise from {ramp.forward_sparsity:g} and "
            f"{ramp.backward_sparsity:g}{when}"
        )
    structure = settings.structure
    if structure.note:
        uneven = any(not weight.structure.divides(weight.shape) for weight in weights.values())
        notes.append(structure.note + ("; blocks at the edges are smaller, so the sizes vary" if uneven else ""))
    if settings.allocation.competes:
        means = ", by scores divided by their weight's mean" * (settings.allocation.distribution == "global_normalized")
        notes.append(f"only the sum of the sizes is fixed: the weights compete for active entries{means}")
    explores = settings.rule.explores and settings.ramp is None
    if explores and not any(weight.can_explore for weight in weights.values()):
        notes.append("backward sparsity = forward sparsity: B = A, so entries outside A are never explored")
    notes += _of_zeros(weights, zeros, settings)
    peaks = peak_learning_rates({id(weight.parameter): name for name, weight in weights.items()}, optimizers)
    asked = settings.penalty.shrinkage if isinstance(settings.penalty, L2) else None
    shrinkages = [
        weight.shrinkage.share_at(peaks[weight.name]) if asked is None else asked
        for weight in weights.values()
        if weight.can_explore and weight.name in peaks
    ]
    resolution = min((torch.finfo(weight.parameter.dtype).eps / 2 for weight in weights.values()), default=0.0)
    notes += describe_shrinkage(max(shrinkages, default=0.0), settings.schedule.update_every, resolution)
    return Summary(tuple(rows), tuple(notes))
