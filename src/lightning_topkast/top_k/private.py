"""The k largest scores with differential privacy: noise once, then the exact top-k of the noisy scores."""

import math
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_topkast.checks import check, check_choice, is_count, is_number
from lightning_topkast.distributed import from_rank_0_
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.selection import nested_top_k

Noise = Literal["gumbel", "laplace"]
_LOST_TO_ROUNDING = 2.0**32  # noise scales: float64 keeps 20 bits of the noise below such scores


class PrivateChoice(NamedTuple):
    """What was chosen, and what it has cost.

    Attributes:
        mask: bool, k of them True.
        epsilon: of the differential privacy that was spent.
        delta: likewise; 0 where the noise that pure differential privacy needs is the smaller one.
    """

    mask: Tensor
    epsilon: float
    delta: float


def private_top_k(
    scores: Tensor, k: int, epsilon: float, delta: float, sensitivity: float, noise: Noise = "gumbel"
) -> PrivateChoice:
    """Choose the k largest scores so that the choice is (ε, δ)-differentially private.

    Noise is added once to every score, and only the set of the k largest noisy scores is returned, neither their order
    nor their values. Every call costs (ε, δ) anew. It is meant for few scores whose sensitivity is known.

    "gumbel": adding Gumbel noise once is the same as k exponential mechanisms, each among what is left (Durfee & Rogers
    2019, "Practical Differentially Private Top-k Selection with Pay-what-you-get Composition"). The privacy loss of
    each has a range of η = 2 · sensitivity / scale, so that it is η²/8-concentrated private (Cesar & Rogers 2021,
    "Bounding, Concentrating, and Truncating"). The composition of k has ρ = k η²/8, and is
    (ρ + 2 √(ρ log 1/δ), δ)-private for every δ (Bun & Steinke 2016, "Concentrated Differential Privacy").

    "laplace": a scale of 8 · sensitivity · √(k log(n/δ)) / ε, for ε ≤ 0.2 and δ ≤ 0.05 (Qiao, Su & Zhang 2021, "Oneshot
    Differentially Private Top-k Selection", theorem 2.2).

    With either, a scale of 2 k · sensitivity / ε is (ε, 0)-private, and is used where it is the smaller one.

    The noise is drawn from the operating system's entropy, in float64: numbers of torch's generators could be drawn
    again by whoever knows or guesses the seed, and taken off. In `torch.distributed` all processes must call this, and
    all get the choice of rank 0, so that it is paid for once.

    Args:
        scores: finite, of any shape, n of them.
        k: in [1, n).
        epsilon: the budget, positive.
        delta: the probability with which more may be lost, in (0, 1); below 1 / (number of people) at least.
        sensitivity: the most by which one person's data can change any one score, whatever the data; positive. Scores
            without such a bound, such as |θ| that was trained without privacy, cannot be chosen privately.
        noise: "gumbel", or "laplace", which needs six to eight times as much noise.

    Raises:
        TopKastError: an argument is out of its range, or scores are so large that they would swallow the noise.
    """
    size = scores.numel()
    check(is_count(k, 1) and k < size, "k", k, f"an int in [1, {size}), less than the number of scores")
    check_choice("noise", noise, Noise)
    check(is_number(epsilon) and epsilon > 0, "epsilon", epsilon, "a positive number")
    check(is_number(delta) and 0 < delta < 1, "delta", delta, "a number in (0, 1)")
    if noise == "laplace" and (epsilon > 0.2 or delta > 0.05):
        raise TopKastError(
            f"noise='laplace' is proven to be private for epsilon <= 0.2 and delta <= 0.05 only, got {epsilon} and "
            f"{delta}; use noise='gumbel', which is for any budget and needs less noise"
        )
    check(is_number(sensitivity) and sensitivity > 0, "sensitivity", sensitivity, "a positive number")
    values = scores.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise TopKastError("scores hold NaN or infinity; give finite scores, whose sensitivity is bounded")
    scale, spent = noise_scale(size, k, epsilon, delta, sensitivity, noise)
    largest = float(values.abs().max())
    if largest > _LOST_TO_ROUNDING * scale:
        raise TopKastError(
            f"scores of {largest:.3g} would swallow noise of scale {scale:.3g} by rounding; clip them, "
            "or subtract a number that does not depend on the data from all of them"
        )
    draw = _gumbel if noise == "gumbel" else _laplace
    mask = nested_top_k(values + scale * torch.from_numpy(draw(values.shape)), (k,))
    from_rank_0_(mask)
    return PrivateChoice(mask.bool().to(scores.device), float(epsilon), spent)


def noise_scale(
    size: int, k: int, epsilon: float, delta: float, sensitivity: float, noise: Noise
) -> tuple[float, float]:
    """Return the smallest proven scale of the noise, and the δ that it spends; see `private_top_k`.

    `scale` is that of the distribution: the standard deviation of Gumbel noise is 1.28 times, that of Laplace noise
    1.41 times as large.
    """
    pure = 2 * k * sensitivity / epsilon
    if noise == "gumbel":
        rare = math.log(1 / delta)
        root = epsilon / (math.sqrt(epsilon + rare) + math.sqrt(rare))  # √ρ, since ε = ρ + 2 √(ρ log 1/δ)
        scale = sensitivity * math.sqrt(k / 2) / root  # since ρ = k (2 · sensitivity / scale)² / 8
    else:
        scale = 8 * sensitivity * math.sqrt(k * math.log(size / delta)) / epsilon
    return (pure, 0.0) if pure <= scale else (scale, float(delta))


def _uniform(shape: Sequence[int]) -> np.ndarray:
    """Return secret numbers in (0, 1): odd multiples of 2^-53, so that neither end is reached, by rounding either."""
    bits = np.frombuffer(os.urandom(8 * math.prod(shape)), dtype=np.uint64) >> np.uint64(12)
    return ((bits.astype(np.float64) + 0.5) * 2.0**-52).reshape(shape)


def _gumbel(shape: Sequence[int]) -> np.ndarray:
    """Return Gumbel noise of scale 1."""
    return -np.log(-np.log(_uniform(shape)))


def _laplace(shape: Sequence[int]) -> np.ndarray:
    """Return Laplace noise of scale 1, the difference of two exponential numbers."""
    return np.log(_uniform(shape)) - np.log(_uniform(shape))
