"""The figures at the top of a report: what came out of a run, and what its sparsity saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_topkast.app.report.masks import Saved

_BYTES = 4  # of a stored value; a mask takes a bit an entry


@dataclass(frozen=True)
class Card:
    """A figure.

    Attributes:
        name: what it is.
        value: as it stands in the result, for programs.
        text: the same for people.
        note: what it is measured in or against.
    """

    name: str
    value: float
    text: str
    note: str = ""


def cards(result: Mapping[str, Any], saved: Saved | None) -> list[Card]:
    """Return what is known, the metrics first."""
    found = [*_metrics(result), *_sparsities(result, saved), *_costs(result)]
    if (seconds := result.get("seconds")) is not None:
        steps, examples = result.get("steps"), result.get("examples")
        note = f"{steps:,} steps, {examples:,} examples" if steps is not None and examples is not None else ""
        found.append(Card("training time", seconds, duration(seconds), note))
    return found


def _metrics(result: Mapping[str, Any]) -> list[Card]:
    monitor = result.get("monitor") or {}
    followed = str(monitor.get("name", "")).partition("/")[2]
    tested = {name: value for name, value in (result.get("metrics") or {}).items() if value is not None}
    ordered = sorted(tested, key=lambda name: (name.partition("/")[2] != followed, name))
    found = [Card(name, tested[name], f"{tested[name]:.4f}", "in the test") for name in ordered]
    if monitor.get("value") is not None:
        best = {"max": "highest of the run", "min": "lowest of the run"}.get(str(monitor.get("mode")), "")
        found.insert(min(1, len(found)), Card(monitor["name"], monitor["value"], f"{monitor['value']:.4f}", best))
    return found


def _sparsities(result: Mapping[str, Any], saved: Saved | None) -> list[Card]:
    found, sparsity = [], result.get("sparsity") or {}
    if sparsity.get("weights") is not None:
        value = sparsity["weights"]
        found.append(Card("forward sparsity", value, percent(value), "zeros among the sparse weights' entries"))
    if saved is not None and saved.weights:
        entries = sum(weight.entries for weight in saved.weights) or 1
        if not found:  # of a run that has not come to its end
            value = 1 - sum(weight.active for weight in saved.weights) / entries
            found.append(Card("forward sparsity", value, percent(value), "of the sparse weights, in the checkpoint"))
        backward = 1 - sum(weight.updated for weight in saved.weights) / entries
        found.append(Card("backward sparsity", backward, percent(backward), "of their gradients, in the checkpoint"))
    if sparsity.get("model") is not None:
        value = sparsity["model"]
        found.append(Card("model sparsity", value, percent(value), "zeros among all parameters"))
    parameters = result.get("parameters") or {}
    if parameters.get("total"):  # 0 of a run that has diverged, whose weights were not counted
        nonzero, total = parameters["nonzero"], parameters["total"]
        found.append(Card("parameters in use", nonzero, f"{nonzero:,}", f"of {total:,}"))
        dense, stored = _BYTES * total, min(_BYTES * total, _BYTES * nonzero + -(-total // 8))
        note = f"of {size(dense)} dense, as non-zero 32-bit values and a bit mask"
        found.append(Card("bytes saved", dense - stored, size(dense - stored), note))
    return found


def _costs(result: Mapping[str, Any]) -> list[Card]:
    flops, found = result.get("flops") or {}, []
    for part, name in (("forward", "inference FLOPs"), ("training", "training FLOPs")):
        ratio = flops.get(f"{part}_flops_ratio")
        if ratio is not None:
            own, dense = (flops.get(f"{kind}{part}_flops") for kind in ("", "dense_"))
            note = f"of dense; {count(own)} instead of {count(dense)} an example" if own and dense else "of dense"
            found.append(Card(name, ratio, f"{ratio:.3f}×", note))
    if found and result.get("examples") and flops.get("dense_training_flops"):
        saved = (flops["dense_training_flops"] - flops["training_flops"]) * result["examples"]
        found.append(Card("FLOPs saved", saved, count(saved), "in all of training, as far as sparsity allows"))
    return found


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.2f} %"


def count(number: float) -> str:
    """Return a large number with three digits."""
    for bound, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= bound:
            return f"{number / bound:.3g} {unit}"
    return f"{number:.3g}"


def size(number: float) -> str:
    """Return bytes."""
    return f"{count(number)}{'' if abs(number) >= 1e3 else ' '}B"


def duration(seconds: float) -> str:
    """Return a time in its own unit."""
    for bound, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * bound:
            return f"{seconds / bound:.1f} {unit}"
    return f"{seconds:.1f} s"
