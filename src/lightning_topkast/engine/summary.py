"""The table of every weight: sparse or dense, and why."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_topkast.method.schedule import RefreshSchedule
from lightning_topkast.method.strength import describe, peak_learning_rates
from lightning_topkast.method.targets import Target
from lightning_topkast.settings import Settings
from lightning_topkast.weights import SparseWeight

_KEPT = {"masked": "sparse", "packed": "sparse, packed", "compact": "sparse, compact"}


@dataclass(frozen=True)
class WeightSummary:
    """One parameter: its sets' exact sizes and how it is kept, or the reason why it is dense."""

    name: str
    shape: tuple[int, ...]
    size: int
    active: int
    updated: int
    reason: str = ""
    execution: str = ""

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
    """Every parameter of a model; `str()` is a table, `to_dict()` plain data."""

    rows: tuple[WeightSummary, ...]
    notes: tuple[str, ...] = ()

    @property
    def model_density(self) -> float:
        """Share of all parameters, dense ones counted, that are not held at zero."""
        return sum(row.active for row in self.rows) / max(sum(row.size for row in self.rows), 1)

    def to_dict(self) -> dict[str, Any]:
        """Rows and notes as plain data."""
        return {"rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}

    def __str__(self) -> str:
        header = ("weight", "shape", "entries", "|A| forward", "|B| backward", "density A", "density B", "")
        lines = [header]
        for row in self.rows:
            sets = (f"{row.active:,}", f"{row.updated:,}", f"{row.forward_density:.4f}", f"{row.backward_density:.4f}")
            kept = f"dense: {row.reason}" if row.reason else _KEPT[row.execution]
            lines.append((
                row.name, "×".join(map(str, row.shape)) or "scalar", f"{row.size:,}",
                *(("", "", "", "") if row.reason else sets), kept,
            ))  # fmt: skip
        sparse = [row for row in self.rows if not row.reason]
        entries = sum(row.size for row in sparse)
        active, updated = sum(row.active for row in sparse), sum(row.updated for row in sparse)
        lines.append((
            f"{len(sparse)} sparse weights", "", f"{entries:,}", f"{active:,}", f"{updated:,}",
            f"{active / max(entries, 1):.4f}", f"{updated / max(entries, 1):.4f}", "",
        ))  # fmt: skip
        total = sum(row.size for row in self.rows)
        used = sum(row.active for row in self.rows)
        lines.append(("whole model", "", f"{total:,}", f"{used:,}", "", f"{used / max(total, 1):.4f}", "", ""))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        text = [
            "  ".join(
                cell.ljust(width) if column in (0, 1, 7) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "─" * max(map(len, text))
        return "\n".join([text[0], rule, *text[1:-2], rule, *text[-2:], *self.notes])


def _how_chosen(schedule: RefreshSchedule, settings: Settings) -> str:
    until = "" if schedule.stop_refreshing_at is None else f" until step {schedule.stop_refreshing_at}"
    if settings.rule is not None:
        how = f"by {settings.rule}"
    else:
        stop = schedule.stop_exploration_at
        how = f"{settings.exploration} exploration" + ("" if stop is None else f" until step {stop}")
    return f"refresh every {settings.update_every} steps{until}, {how}, {settings.distribution} distribution"


def summarize(
    targets: Iterable[Target],
    weights: Mapping[str, SparseWeight],
    schedule: RefreshSchedule,
    settings: Settings,
    optimizers: Sequence[Optimizer],
) -> Summary:
    """The summary of a run: every parameter, when the sets are chosen, what the penalty amounts to."""
    rows = []
    for target in targets:
        size = target.shape.numel()
        weight = weights.get(target.name)
        active, updated = (weight.active_count, weight.updated_count) if weight else (size, size)
        execution = weight.execution if weight else ""
        rows.append(WeightSummary(target.name, tuple(target.shape), size, active, updated, target.reason, execution))
    rule = settings.chosen_rule
    notes = [_how_chosen(schedule, settings)]
    if settings.chosen_ramp is not None:
        forward, backward = settings.sparsities_on_ramp(1.0)
        end = "" if schedule.ramp_end is None else f", between step {schedule.ramp_begin} and {schedule.ramp_end}"
        notes.append(f"the sizes are those of the run's end: it starts at sparsities {forward:g} and {backward:g}{end}")
    if settings.chosen_granularity.note:
        units = settings.chosen_granularity
        uneven = any(not units.divides(weight.shape) for weight in weights.values())
        notes.append(units.note + ("; those at the edges are smaller, so that the sizes vary" if uneven else ""))
    if settings.distribution == "global":
        notes.append("the sizes count together only: the weights compete for them")
    if rule.explores and settings.chosen_ramp is None and not any(weight.can_explore for weight in weights.values()):
        notes.append("backward sparsity = forward sparsity: B = A, so that nothing outside A is ever tried")
    if settings.penalty == "l2":
        peaks = peak_learning_rates(weights, optimizers)
        shrinkages = [
            peaks[weight.name] * weight.strength / weight.forward_density_target
            for weight in weights.values()
            if weight.can_explore and weight.name in peaks
        ]
        least = min((torch.finfo(weight.parameter.dtype).eps / 2 for weight in weights.values()), default=0.0)
        notes += describe(max(shrinkages, default=0.0), settings.update_every, least)
    return Summary(tuple(rows), tuple(notes))
