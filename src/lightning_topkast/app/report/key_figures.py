"""The key figures of a report: what a run has reached, and what its sparsity saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_topkast.app import formatting
from lightning_topkast.app.report.curves import part_and_quantity
from lightning_topkast.app.run_folder.logs import Curve
from lightning_topkast.app.run_folder.masks import SavedMasks
from lightning_topkast.app.run_folder.result import Result

_MOST_LOGGED = 12  # metrics
_BYTES = 4  # of a stored value; a mask takes one bit per entry


@dataclass(frozen=True)
class KeyFigure:
    """A figure with its context.

    Attributes:
        name: Name of the figure.
        value: Value as in the result.
        text: Formatted value.
        note: Unit or reference of the value.
        is_metric: Whether it says how good the network is; its name then comes from the run.
    """

    name: str
    value: float
    text: str
    note: str = ""
    is_metric: bool = False


def key_figures(
    result: Result | None, saved: SavedMasks | None, curves: Mapping[str, Curve] | None = None
) -> list[KeyFigure]:
    """Return the known figures, metrics first, and of these the monitored one, from the test if it was tested."""
    if result is None:
        return _logged(curves or {}, saved)
    found = [*_metrics(result), *_sparsities(result, saved), *_costs(result)]
    if (seconds := result.seconds) is not None:
        steps, examples = result.steps, result.examples
        note = f"{steps:,} steps, {examples:,} examples" if steps is not None and examples is not None else ""
        found.append(KeyFigure("training time", seconds, formatting.duration(seconds), note))
    return found


def _logged(curves: Mapping[str, Curve], saved: SavedMasks | None) -> list[KeyFigure]:
    """Return what is known of a run without a result: the last values in its log, and its checkpoint."""
    last = {name: float(values[-1]) for name, (_, values) in curves.items()}
    order = {"test": 0, "val": 1}
    tested = [
        (order[part], quantity, name) for name in last for part, quantity in [part_and_quantity(name)] if part in order
    ]
    tested.sort(key=lambda each: (each[0], "loss" in each[1], each[2]))
    found = [_metric(name, last[name], "last in the log") for _, _, name in tested[:_MOST_LOGGED]]
    if masks := _masks(saved, known=False):
        return found + masks
    for part in ("forward", "backward"):
        if (value := last.get(f"topkast/{part}_sparsity")) is not None:
            found.append(_share(f"{part} sparsity", value, "of the sparse weights, last in the log"))
    return found


def headline(figures: Sequence[KeyFigure]) -> list[KeyFigure]:
    """Return up to three of all figures: how good, how sparse, and what it saves."""
    own = {figure.name: figure for figure in figures if not figure.is_metric}
    metric = next((figure for figure in figures if figure.is_metric), None)
    cost = own.get("training FLOPs") or own.get("parameters in use")
    return [figure for figure in (metric, own.get("forward sparsity"), cost) if figure]


def _metrics(result: Result) -> list[KeyFigure]:
    monitor = result.monitor
    followed = monitor.name.partition("/")[2] if monitor else ""
    tested = {name: value for name, value in (result.metrics or {}).items() if value is not None}
    ordered = sorted(tested, key=lambda name: (name.partition("/")[2] != followed, name))
    found = [_metric(name, tested[name], "in the test") for name in ordered]
    if monitor and monitor.value is not None:
        best = {"max": "highest of the run", "min": "lowest of the run"}.get(str(monitor.mode), "")
        is_tested = bool(ordered) and ordered[0].partition("/")[2] == followed
        found.insert(int(is_tested), _metric(monitor.name, monitor.value, best))
    return found


def _metric(name: str, value: float, note: str) -> KeyFigure:
    return KeyFigure(name, value, f"{value:.4f}", note, is_metric=True)


def _sparsities(result: Result, saved: SavedMasks | None) -> list[KeyFigure]:
    weights, model = (result.sparsity.weights, result.sparsity.model) if result.sparsity else (None, None)
    found = [] if weights is None else [_share("forward sparsity", weights, "zeros among the sparse weights' entries")]
    found += _masks(saved, known=weights is not None)
    if model is not None:
        found.append(_share("model sparsity", model, "zeros among all parameters"))
    if result.parameters and result.parameters.total:  # 0 for a run that has diverged, whose weights were not counted
        nonzero, total = result.parameters.nonzero, result.parameters.total
        found.append(KeyFigure("parameters in use", nonzero, f"{nonzero:,}", f"of {total:,}"))
        dense, stored = _BYTES * total, min(_BYTES * total, _BYTES * nonzero + -(-total // 8))
        note = f"of {formatting.n_bytes(dense)} dense, as non-zero 32-bit values and a bit mask"
        found.append(KeyFigure("bytes saved", dense - stored, formatting.n_bytes(dense - stored), note))
    return found


def _masks(saved: SavedMasks | None, known: bool) -> list[KeyFigure]:
    """Return the sparsities in the checkpoint; the forward one only if it is not `known` from the result."""
    if saved is None or not saved.weights:
        return []
    entries = sum(weight.entries for weight in saved.weights) or 1
    forward = 1 - sum(weight.active for weight in saved.weights) / entries
    backward = 1 - sum(weight.updated for weight in saved.weights) / entries
    found = [] if known else [_share("forward sparsity", forward, "of the sparse weights, in the checkpoint")]
    return [*found, _share("backward sparsity", backward, "of their gradients, in the checkpoint")]


def _share(name: str, value: float, note: str) -> KeyFigure:
    return KeyFigure(name, value, formatting.percent(value), note)


def _costs(result: Result) -> list[KeyFigure]:
    flops, found = result.flops, []
    if flops is None:
        return []
    count = formatting.count
    for name, ratio, own, dense in (
        ("inference FLOPs", flops.forward_flops_ratio, flops.forward_flops, flops.dense_forward_flops),
        ("training FLOPs", flops.training_flops_ratio, flops.training_flops, flops.dense_training_flops),
    ):
        if ratio is not None:
            note = f"of dense; {count(own)} instead of {count(dense)} per example" if own and dense else "of dense"
            found.append(KeyFigure(name, ratio, f"{ratio:.3f}×", note))
    if found and result.examples and flops.dense_training_flops:
        saved = (flops.dense_training_flops - flops.training_flops) * result.examples
        found.append(KeyFigure("FLOPs saved", saved, count(saved), "in all of training, as far as sparsity allows"))
    return found
