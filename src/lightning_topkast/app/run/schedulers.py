"""Learning-rate schedules in fractions of the run.

Each takes the optimizer and the total number of optimizer steps. `warmup` is the fraction of the run in which the rate
rises linearly from near zero to that of the optimizer.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_topkast.app.errors import AppError


def constant(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.0) -> LambdaLR:
    """Keep the learning rate constant."""
    return _schedule(optimizer, total_steps, warmup, lambda _: 1.0)


def cosine(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.05, final: float = 0.0) -> LambdaLR:
    """Decay along half a cosine from the peak to `final` times the peak."""

    def factor(progress: float) -> float:
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return _schedule(optimizer, total_steps, warmup, factor, after_warmup=True)


def linear(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.05, final: float = 0.0) -> LambdaLR:
    """Decay linearly from the peak to `final` times the peak."""
    return _schedule(optimizer, total_steps, warmup, lambda p: 1.0 - (1.0 - final) * p, after_warmup=True)


def multistep(
    optimizer: Optimizer,
    total_steps: int,
    *,
    milestones: Sequence[float] = (0.3, 0.7, 0.9),
    gamma: float = 0.1,
    warmup: float = 0.05,
) -> LambdaLR:
    """Multiply the learning rate by `gamma` at each milestone, a fraction of the run."""
    if list(milestones) != sorted(milestones) or not all(0.0 < m < 1.0 for m in milestones):
        raise AppError(
            f"expected milestones to be increasing fractions of the run, between 0 and 1, got {list(milestones)}"
        )
    return _schedule(optimizer, total_steps, warmup, lambda p: gamma ** bisect.bisect_right(milestones, p))


def _schedule(
    optimizer: Optimizer,
    total_steps: int,
    warmup: float,
    factor: Callable[[float], float],
    *,
    after_warmup: bool = False,
) -> LambdaLR:
    """Build a warm-up followed by `factor(progress)`; with `after_warmup`, progress starts at its end."""
    if not 0.0 <= warmup < 1.0:
        raise AppError(f"expected warmup to be a fraction of the run, 0 <= warmup < 1, got {warmup}")
    warmup_steps = round(warmup * total_steps)
    start = warmup_steps if after_warmup else 0

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return factor(min(1.0, (step - start) / max(1, total_steps - start)))

    return LambdaLR(optimizer, rate)
