"""SOFT: a differentiable top-k, the entropic transport of scores to the two targets "chosen" and "not chosen"."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_topkast.checks import check, is_count, is_number
from lightning_topkast.errors import TopKastError

_MOST_ITERATIONS = 50  # never more than 10 were seen


def soft_top_k(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Return how much each score belongs to the k largest: numbers in [0, 1] whose sum is k.

    These are σ((s - t) / temperature), with the one t for which they sum to k. As the temperature falls they become
    the indicator of the k largest scores, and equal scores share what is left to them. They can be differentiated any
    number of times; a gradient costs O(n), however t was found.

    This is the transport plan of SOFT (Xie et al. 2020, "Differentiable Top-k Operator with Optimal Transport"), whose
    regularisation is twice the temperature, as its cost is the squared distance to the targets 0 and 1.

    Args:
        scores: finite, (..., n). The k largest are those along the last dimension; each row is a problem of its own.
        k: in [1, n]; with k = n the result is 1 everywhere, and its gradient is 0.
        temperature: positive, in the unit of the scores. A gap between scores of ten temperatures is a hard choice.

    Returns:
        tensor in the shape and type of `scores`; computed in float32 at least.

    Raises:
        TopKastError: the scores are not floating-point numbers or not finite, or k or the temperature is out of range.
    """
    check(scores.is_floating_point() and scores.dim() > 0, "scores", scores, "a floating-point tensor (..., n)")
    size = scores.shape[-1]
    check(is_count(k, 1) and k <= size, "k", k, f"an int in [1, {size}], the number of scores")
    values = scores if scores.dtype == torch.float64 else scores.float()
    limits = torch.finfo(values.dtype)
    check(
        is_number(temperature) and limits.tiny <= temperature,
        "temperature",
        temperature,
        f"a number of at least {limits.tiny:.3g}, the smallest of {values.dtype}; for a hard choice use torch.topk",
    )
    if not bool(torch.isfinite(scores).all()):
        raise TopKastError("scores hold NaN or infinity, so that the largest are not defined; leave out these entries")
    if k == size:
        return scores * 0 + 1
    # In units of the temperature, and from the k-th largest: nothing that matters is then lost to rounding.
    largest = values.detach().topk(k, sorted=False).indices
    kth = values.detach().gather(-1, largest).amin(-1, keepdim=True)
    bound = limits.max**0.5  # far beyond where a sigmoid is 0 or 1, and sums of a few such numbers are finite
    logits = ((values - kth) / temperature).clamp(-bound, bound)
    return torch.sigmoid(_Balanced.apply(logits, largest)).to(scores.dtype)  # type: ignore[no-untyped-call]


class _Balanced(torch.autograd.Function):
    """Logits minus the number u for which their sigmoids sum to k, given the indices of the k largest."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, largest: Tensor) -> Tensor:
        balanced = logits - _offset(logits, largest)
        ctx.save_for_backward(balanced)
        return balanced

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # du/dz is σ'(z - u) over its sum; in logarithms, since all of them may be too small for a number.
        (balanced,) = ctx.saved_tensors
        shares = torch.softmax(logsigmoid(balanced) + logsigmoid(-balanced), -1)
        return gradient - shares * gradient.sum(-1, keepdim=True), None


def _offset(logits: Tensor, largest: Tensor) -> Tensor:
    """Return the u (..., 1) for which the sigmoids of `logits - u` sum to k: Newton's method within a bracket.

    It solves log(what the k largest lack of 1) = log(what the others have). The difference of the two logarithms grows
    with u, at a rate between 1/2 and 2: of the k largest and the others, one kind lies wholly on its own side of u.
    So any value of it brackets the root, and neither flat tails nor cancellation can hurt.
    """
    top, rest = logits.gather(-1, largest), logits.scatter(-1, largest, -torch.inf)
    u = (top.amin(-1, keepdim=True) + rest.amax(-1, keepdim=True)) / 2
    low, high = torch.full_like(u, -torch.inf), torch.full_like(u, torch.inf)
    for _ in range(_MOST_ITERATIONS):
        excess, rate, rounding = _imbalance(top, rest, u)
        low = torch.maximum(low, u - excess * torch.where(excess > 0, 2, 0.5))
        high = torch.minimum(high, u - excess * torch.where(excess > 0, 0.5, 2))
        step = u - excess / rate
        settled = excess.abs() <= rounding
        u = torch.where(settled, u, torch.where((low <= step) & (step <= high), step, (low + high) / 2))
        if bool(settled.all()):
            break
    return u


def _imbalance(top: Tensor, rest: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log(what the top lacks) - log(what the rest has), its derivative by u, and its rounding error."""
    lacks, has = logsigmoid(u - top), logsigmoid(rest - u)
    lacking, having = lacks.logsumexp(-1, keepdim=True), has.logsumexp(-1, keepdim=True)
    rate = ((lacks - lacking).exp() * torch.sigmoid(top - u)).sum(-1, keepdim=True)
    rate += ((has - having).exp() * torch.sigmoid(u - rest)).sum(-1, keepdim=True)
    rounding = 8 * torch.finfo(u.dtype).eps * (1 + lacking.abs())
    return lacking - having, rate, rounding
