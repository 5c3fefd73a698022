"""Exact top-k over a weight that is cut into parts: histograms are summed over them, entries never leave theirs.

A radix search from the highest bits down: each round counts the digits of the candidates left, over all parts, and
keeps those of the digit that the k-th largest falls into. The bits of a non-negative float order as it does, so 31 of
them (float32) take three rounds of 11. Ties are searched on in the same way, by the flat index. On CPU, where counting
digits is slow, a sample of all parts first brackets the threshold, so that few candidates are left for the search.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_topkast.method.selection import EVERYTHING, SAMPLE, NonFiniteScoresError, scan

_DIGIT = 11  # bits a round
_BINS = 1 << _DIGIT

Total = Callable[[Tensor], Tensor]


def nested_top_k_of_shards(
    scores: Tensor, counts: Sequence[int], size: int, total: Total, indices: Callable[[Tensor], Tensor]
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
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()  # exact for bfloat16 and float16
    narrowed = _narrowed(flat, counts, size, total) if flat.device.type == "cpu" else _everything(flat, counts, total)
    tiers = torch.zeros_like(flat, dtype=torch.uint8)
    bits = 8 * flat.element_size() - 1
    for above, candidates, missing in narrowed:
        tiers += above
        larger, tied, missing = _largest(_keys(flat[candidates]), missing, bits, total)
        tiers[candidates[larger]] += 1
        if missing:
            tied = candidates[tied]
            lowest, _, _ = _largest(size - 1 - indices(tied), missing, (size - 1).bit_length(), total)
            tiers[tied[lowest]] += 1
    return tiers.view(scores.shape)


def _everything(flat: Tensor, counts: Sequence[int], total: Total) -> list[tuple[Tensor, Tensor, int]]:
    """For every count: what is in the set for sure (uint8), positions of the candidates, places left for those."""
    if int(total(torch.count_nonzero(~torch.isfinite(flat)))):
        raise NonFiniteScoresError("scores must be finite")
    everything = torch.arange(flat.numel(), device=flat.device)
    return [(torch.zeros_like(flat, dtype=torch.uint8), everything, count) for count in counts]


def _narrowed(flat: Tensor, counts: Sequence[int], size: int, total: Total) -> list[tuple[Tensor, Tensor, int]]:
    """`_everything`, but with the few candidates that a sample leaves; on CPU."""
    if size <= 4 * SAMPLE:
        return _everything(flat, counts, total)
    brackets = _brackets(flat, counts, size, total)
    try:
        scans, finite = scan(flat.numpy(), brackets), True
    except NonFiniteScoresError:
        scans, finite = [], False
    found = [[int(np.count_nonzero(above)), inside.size] for above, inside in scans] or [[0, 0]] * len(counts)
    *sums, broken = total(torch.tensor([*np.ravel(found), not finite])).tolist()
    if broken:
        raise NonFiniteScoresError("scores must be finite")
    missing = [count - larger for count, larger in zip(counts, sums[::2], strict=True)]
    if not all(0 <= places <= inside for places, inside in zip(missing, sums[1::2], strict=True)):
        return _everything(flat, counts, total)  # the sample misled
    return [
        (torch.from_numpy(above.view(np.uint8)), torch.from_numpy(inside), places)
        for (above, inside), places in zip(scans, missing, strict=True)
    ]


def _brackets(flat: Tensor, counts: Sequence[int], size: int, total: Total) -> list[tuple[float, float]]:
    """For every count, bounds that very likely enclose the threshold and few others, the same on every part."""
    shift = 8 * flat.element_size() - 1 - _DIGIT
    # an odd stride, so that it meets every column of the usual widths; what is not finite is found by the scan
    sample = _keys(flat[:: size // SAMPLE | 1])
    at_least = _at_least(total(torch.bincount((sample >> shift) & (_BINS - 1), minlength=_BINS)))
    drawn, brackets = at_least[0], []
    for count in counts:
        share = count / size
        margin = 4 * math.sqrt(drawn * share * (1 - share)) + 1  # four standard deviations of the rank
        low, high = (
            next(d for d in reversed(range(_BINS)) if at_least[d] >= min(max(drawn * share + off, 0), drawn))
            for off in (margin, -margin)
        )
        edges = torch.tensor([low << shift, (high + 1 << shift) - 1], dtype=sample.dtype).view(flat.dtype).tolist()
        low_edge = edges[0] if drawn * share + margin < drawn else EVERYTHING[0]
        brackets.append((low_edge, edges[1] if drawn * share - margin > 0 else EVERYTHING[1]))
    return brackets


def _keys(flat: Tensor) -> Tensor:
    """Integers that order as the scores do; + 0.0, since the sign of a minus zero would count."""
    return (flat + 0.0).view(torch.int32 if flat.dtype == torch.float32 else torch.int64)


def _at_least(histogram: Tensor) -> list[int]:
    """How many have each digit or a larger one."""
    return histogram.flip(0).cumsum(0).flip(0).tolist()


def _largest(keys: Tensor, count: int, bits: int, total: Total) -> tuple[Tensor, Tensor, int]:
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
        at_least = _at_least(histogram)
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
