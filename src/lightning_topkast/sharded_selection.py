"""Exact top-k over a weight that is cut into parts: histograms are summed over them, entries never leave theirs.

A radix search from the highest bits down: each round counts the digits of the candidates left, over all parts, and
keeps those of the digit that the k-th largest falls into. The bits of a non-negative float order as it does, so 31 of
them (float32) take three rounds of 11. Ties are searched on in the same way, by the flat index.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_topkast.selection import NonFiniteScoresError

_DIGIT = 11  # bits a round
_BINS = 1 << _DIGIT


def nested_top_k_of_shards(
    scores: Tensor,
    counts: Sequence[int],
    size: int,
    total: Callable[[Tensor], Tensor],
    indices: Callable[[Tensor], Tensor],
) -> Tensor:
    """`nested_top_k` of all parts together, for this part: bit for bit the same sets, in a few small collectives.

    Args:
        scores: this part's scores, finite and not negative, of any shape, also empty.
        counts: sizes of the sets in the whole weight.
        size: entries of the whole weight.
        total: sums a tensor of one shape over all parts; every part calls it equally often.
        indices: flat positions in this part → flat indices in the whole weight.

    Returns:
        uint8 tensor in the shape of `scores`.

    Raises:
        NonFiniteScoresError: a score of any part is NaN or infinite; on every part.
    """
    flat = scores.detach().reshape(-1)
    if int(total(torch.count_nonzero(~torch.isfinite(flat)))):
        raise NonFiniteScoresError("scores must be finite")
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()  # exact for bfloat16 and float16
    # + 0.0: no minus zero, whose sign bit would count
    keys = (flat + 0.0).view(torch.int32 if flat.dtype == torch.float32 else torch.int64)
    tiers = torch.zeros_like(flat, dtype=torch.uint8)
    for count in counts:
        larger, tied, missing = _largest(keys, count, 8 * keys.element_size() - 1, total)
        tiers[larger] += 1
        if missing:
            lowest, _, _ = _largest(size - 1 - indices(tied), missing, (size - 1).bit_length(), total)
            tiers[tied[lowest]] += 1
    return tiers.view(scores.shape)


def _largest(keys: Tensor, count: int, bits: int, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, int]:
    """Where the `count` largest keys of all parts are in this one.

    Args:
        keys: this part's, 1-D, non-negative integers.
        count: at most the number of keys in all parts.
        bits: of the largest possible key.
        total: sums over all parts.

    Returns:
        positions of those that are chosen, of those that tie for the last places, and how many places these share over
        all parts: fewer than they are, 0 where all are settled.
    """
    positions = torch.arange(keys.numel(), device=keys.device)
    chosen = [positions[:0]]
    shift = bits
    while count:
        shift = max(shift - _DIGIT, 0)  # the last digit may overlap the one before, in which all candidates agree
        digits = (keys >> shift) & (_BINS - 1)
        histogram = total(torch.bincount(digits, minlength=_BINS))
        at_least = histogram.flip(0).cumsum(0).flip(0).tolist()  # how many have this digit or a larger one
        digit = max(d for d in range(_BINS) if at_least[d] >= count)
        larger = at_least[digit + 1] if digit + 1 < _BINS else 0
        chosen.append(positions[digits > digit])
        candidates = digits == digit
        positions, keys = positions[candidates], keys[candidates]
        settled = at_least[digit] == count  # all candidates are wanted
        count -= larger
        if settled:
            chosen.append(positions)
            return torch.cat(chosen), positions[:0], 0
        if shift == 0:
            break
    return torch.cat(chosen), positions, count
