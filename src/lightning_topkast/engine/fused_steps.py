"""Steps of masked weights on a GPU, around which a few kernels do for all weights what each would do by itself."""

from collections.abc import Iterable
from typing import TypeGuard

from torch import Tensor

from lightning_topkast.ops import fused
from lightning_topkast.ops.fused import Masked
from lightning_topkast.ops.step import Entries
from lightning_topkast.weights import MaskedWeight, SparseWeight


def mask_gradients(weights: Iterable[SparseWeight]) -> None:
    """Zero the gradients outside B, including infinite and NaN values."""
    open_weights((), weights)


def open_weights(weights: Iterable[SparseWeight], masked: Iterable[SparseWeight]) -> None:
    """Zero gradients outside B, and expose θ on B of weights to the optimizer.

    Args:
        weights: that are not open yet.
        masked: those whose gradients are to be zeroed.
    """
    gradients: dict[int, Masked] = {}
    for weight in masked:
        gradient = weight.masked_gradient() if _may_be_fused(weight) else None
        # one that two weights share is masked twice, which programs that run side by side must not do
        if gradient is None or not fused.fits(*gradient) or gradient.values.data_ptr() in gradients:
            weight.mask_gradient()
        else:
            gradients[gradient.values.data_ptr()] = gradient
    together = []
    for weight in weights:
        if _may_be_fused(weight):
            weight.begin_step()
            entries = _entries(weight, 0.0)
            if entries is not None:
                together.append((weight, entries))
                continue
        weight.open()
    if gradients or together:
        fused.open_(gradients.values(), [entries for _, entries in together])
    for weight, _ in together:
        weight.is_open = True


def close_weights(weights: Iterable[tuple[SparseWeight, float | Tensor]]) -> None:
    """Apply the penalty on B at a learning rate, and let the network compute with α again."""
    together = []
    for weight, lr in weights:
        entries = _entries(weight, lr) if _may_be_fused(weight) else None
        if entries is None:
            weight.close(lr)
        else:
            together.append((weight, entries))
    if together:
        fused.close_(entries for _, entries in together)
    for weight, _ in together:
        weight.is_open = False
        weight.end_step()


def _may_be_fused(weight: SparseWeight) -> TypeGuard[MaskedWeight]:
    """Return whether there are fused kernels for such weights; asked for each one at each step, also on a CPU."""
    return isinstance(weight, MaskedWeight) and fused.works(weight.parameter.device, weight.parameter.dtype)


def _entries(weight: MaskedWeight, lr: float | Tensor) -> Entries | None:
    """Return what the fused kernels take of a weight, or None if they cannot."""
    entries = weight.entries(lr) if weight.exponent == 1 else None
    return entries if entries is not None and fused.fits(entries.values, entries.members) else None
