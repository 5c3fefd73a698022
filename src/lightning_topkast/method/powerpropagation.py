"""Powerpropagation: the optimizer updates φ, the network computes with θ = φ|φ|^(a-1) (Schwarz et al. 2021).

Large weights then learn faster than small ones, which sharpens the order that the selection goes by. θ is all that is
kept: φ exists between the opening of a weight and its closing, while the optimizer steps.
"""

import torch
from torch import Tensor

from lightning_topkast.ops import addresses


class Powerpropagation:
    """φ, which takes the place of θ for one step of the optimizer.

    Args:
        theta: θ, any shape.
        exponent: a, above 1.
    """

    def __init__(self, theta: Tensor, exponent: float) -> None:
        self._exponent = exponent
        self._before = theta.clone()
        self.phi = theta.abs().pow_(1 / exponent).copysign_(theta)
        self._after: Tensor | None = None

    def gradient_(self, gradient: Tensor) -> None:
        """Make the gradient by θ that by φ, in place."""
        gradient.mul_(self.phi.abs().pow_(self._exponent - 1).mul_(self._exponent))

    def theta_of(self, values: Tensor) -> Tensor:
        """θ for `values` of φ; bit for bit what it was where φ has not changed.

        Once asked for by `leave_` it stays the same, and before φ was put in its place it is θ as it was, so that an
        interruption does no harm.
        """
        if self._after is not None:
            return self._after
        waits = addresses.stays(values.device)  # if it is asked, which a captured step must not do
        if not waits and torch.equal(values, self._before):
            return values
        theta = values.abs().pow_(self._exponent).copysign_(values)
        theta = torch.where(values == self.phi, self._before, theta)
        return torch.where((values == self._before).all(), values, theta) if waits else theta

    def leave_(self, values: Tensor) -> None:
        """Put θ in the place of φ."""
        self._after = self.theta_of(values)
        values.copy_(self._after)
