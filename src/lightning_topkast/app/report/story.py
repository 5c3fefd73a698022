"""The story of a run in one sentence, of nothing but what is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_topkast.app import formatting
from lightning_topkast.app.report.contents import RunContents
from lightning_topkast.app.report.key_figures import KeyFigure, headline
from lightning_topkast.app.run_folder.result import DIVERGED, FAILED, RUNNING

_LEVEL, _NEAR = 1e-3, 5e-2  # by which a curve of sparsity may vary and yet be level, and differ from what was tested
_ENDS = {RUNNING: "has not ended", DIVERGED: "has diverged", FAILED: "has failed"}


def story(run: RunContents, figures: Sequence[KeyFigure]) -> str | None:
    """Return what was trained, how sparse, how good and what it saves, as far as it is known; None if nothing is."""
    result, shown = run.result, headline(figures)
    model, data = (result.choices.get(group) if result else None for group in ("model", "data"))
    if result and result.status in _ENDS:
        return f"The training of {model or 'this network'}{f' on {data}' if data else ''} {_ENDS[result.status]}."
    is_dense = bool(result and result.sparsity and result.sparsity.weights is None)
    known = {figure.name: figure for figure in shown if not figure.is_metric}
    sparsity = known.get("forward sparsity")
    metric = next((figure for figure in shown if figure.is_metric), None)
    if not (sparsity or metric):
        return None
    sparse = f" with {_zeros(sparsity.value, run)}" if sparsity else " without sparsity" if is_dense else ""
    began = f"The network {model} was trained" if model else "This network ran" if sparse else "This network"
    said = f"{began}{f' on {data}' if data else ''}{sparse}"
    if metric:
        said += f"{', and' if model or sparse else ''} reached {metric.name} {metric.text}"
    if sparsity and (flops := known.get("training FLOPs")):
        said += f" for {100 * flops.value:.3g} % of a dense network's training FLOPs, as far as zeros are skipped"
    elif sparsity and (used := known.get("parameters in use")):
        said += f" with {used.text} {used.note} parameters in use"
    return f"{said}{'; what it reaches without sparsity is not known' if sparsity and metric else ''}."


def _zeros(sparsity: float, run: RunContents) -> str:
    steps, values = run.curves.get("topkast/forward_sparsity", (np.empty(0), np.empty(0)))
    if not len(steps):
        return f"{formatting.level(sparsity)} % of its sparse weights at zero"
    least = float(values.min())
    if np.abs(values - sparsity).max() > _NEAR:
        when = "when it was tested" if run.result and run.result.metrics else "in the end"
        return f"{formatting.level(sparsity)} % of its sparse weights at zero {when}"
    bound = "at least " if np.ptp(values) > _LEVEL else ""
    return f"{bound}{formatting.level(least)} % of its sparse weights at zero in every forward pass"
