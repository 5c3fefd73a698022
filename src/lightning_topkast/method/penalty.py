r"""The exploration penalty, applied in closed form after the optimizer's step (paper section 2.3).

The loss adds strength · R(θ) on A and (strength / D) · R(θ) on B\A, D being the forward *density*. It depends on no
data, so it is decoupled from the optimizer as AdamW's weight decay is: inside an adaptive optimizer's gradient the
factor 1/D would be divided away again.

| penalty | R(θ) of one group of entries | closed form of a step of `amount` = lr · strength (or lr · strength / D) |
|---|---|---|
| l2 | ½ ‖θ‖² | θ · (1 - amount) |
| l1 | ‖θ‖₁ | sign(θ) · max(\|θ\| - amount, 0) |
| norm | ‖θ‖₂ | θ · max(1 - amount / ‖θ‖₂, 0) |
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Penalty = Literal["l2", "l1", "norm"]
# sums a scalar over all parts of a sharded weight, of which the values are one; None: they are all there is
Total = Callable[[Tensor], Tensor] | None


def shrink_(values: Tensor, penalty: Penalty, amount: float | Tensor, total: Total = None) -> Tensor:
    """Take one penalty step on `values` in place, never past zero; zeros stay zeros."""
    if penalty == "l2":
        return values.mul_((1 - amount).clamp_min(0) if isinstance(amount, Tensor) else max(1 - amount, 0.0))
    if penalty == "l1":
        return values.copy_(values.sign() * (values.abs() - amount).clamp_min_(0))
    length = _length(values, total)
    return values.mul_((1 - amount / length.clamp_min(torch.finfo(values.dtype).tiny)).clamp_min(0))


def penalty_of(values: Tensor, penalty: Penalty, strength: float, total: Total = None) -> Tensor:
    """The penalty `strength` · R(values), a scalar tensor."""
    if penalty == "norm":
        return _length(values, total) * strength
    value = values.square().sum() / 2 if penalty == "l2" else values.abs().sum()
    return (value if total is None else total(value)) * strength


def _length(values: Tensor, total: Total) -> Tensor:
    length = torch.linalg.vector_norm(values)
    return length if total is None else total(length.square()).sqrt()
