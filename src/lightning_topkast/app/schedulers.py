"""Learning-rate schedules over fractions of the run, so that no step has to be counted by hand.

Each takes the optimizer and the run's total number of optimizer steps. `warmup` is the fraction of the run over which
the rate first rises linearly from near zero to the optimizer's own.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_topkast.app.errors import AppError


def constant(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.0) -> LambdaLR:
    """Keep the optimizer's learning rate."""
    return _schedule(optimizer, total_steps, warmup, lambda _: 1.0)


def cosine(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.05, final: float = 0.0) -> LambdaLR:
    """Fall along half a cosine from the peak to `final` times the peak."""

    def factor(progress: float) -> float:
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return _schedule(optimizer, total_steps, warmup, factor, after_warmup=True)


def linear(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.05, final: float = 0.0) -> LambdaLR:
    """Fall in a straight line from the peak to `final` times the peak."""
    return _schedule(optimizer, total_steps, warmup, lambda p: 1.0 - (1.0 - final) * p, after_warmup=True)


def multistep(
    optimizer: Optimizer,
    total_steps: int,
    *,
    milestones: Sequence[float] = (0.3, 0.7, 0.9),
    gamma: float = 0.1,
    warmup: float = 0.05,
) -> LambdaLR:
    """Multiply by `gamma` at each milestone, given as a fraction of the whole run."""
    if list(milestones) != sorted(milestones) or not all(0.0 < m < 1.0 for m in milestones):
        raise AppError(f"milestones are rising fractions of the run, between 0 and 1; got {list(milestones)}")
    return _schedule(optimizer, total_steps, warmup, lambda p: gamma ** bisect.bisect_right(milestones, p))


def _schedule(
    optimizer: Optimizer,
    total_steps: int,
    warmup: float,
    factor: Callable[[float], float],
    *,
    after_warmup: bool = False,
) -> LambdaLR:
    """Build warm-up followed by `factor(progress)`; `after_warmup` counts progress from the warm-up's end."""
    if not 0.0 <= warmup < 1.0:
        raise AppError(f"warmup is a fraction of the run, 0 <= warmup < 1; got {warmup}")
    warmup_steps = round(warmup * total_steps)
    start = warmup_steps if after_warmup else 0

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return factor(min(1.0, (step - start) / max(1, total_steps - start)))

    return LambdaLR(optimizer, rate)
