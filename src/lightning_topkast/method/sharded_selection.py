"""Exact top-k over a sharded weight: only histograms are exchanged between its parts, never entries.

This is a radix search from the highest bits down: each round counts the digits of the remaining candidates over all
parts, and keeps those with the digit of the k-th largest. The bits of non-negative floats sort as the floats do, so 31
bits (float32) take three rounds of 11. Ties are resolved in the same way, by the flat index. On CPU, where counting
digits is slow, a sample of all parts first brackets the threshold, so that few candidates remain for the search.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_topkast.method.selection import EVERYTHING, SAMPLE, Draw, NonFiniteScoresError, finite_scan, only

_DIGIT = 11  # bits per round
_BINS = 1 << _DIGIT

Total = Callable[[Tensor], Tensor]


def nested_top_k_of_shards(
    scores: Tensor,
    counts: Sequence[int],
    size: int,
    total: Total,
    indices: Callable[[Tensor], Tensor],
    among: Tensor | None = None,
    draw: Draw | None = None,
) -> Tensor:
    """Compute this part of `nested_top_k` over all parts: exactly the same sets, with a few small collectives.

    Args:
        scores: scores of this part, finite and non-negative, of any shape, possibly empty.
        counts: sizes of the sets in the whole weight.
        size: number of entries of the whole weight.
        total: sums a tensor of the same shape over all parts; every part calls it equally often.
        indices: flat positions in this part → flat indices in the whole weight.
        among: this part of the entries that can be chosen, as in `nested_top_k`.
        draw: returns this part of the numbers drawn, as in `nested_top_k`.

    Returns:
        uint8 tensor in the shape of `scores`.

    Raises:
        NonFiniteScoresError: a score of any part is NaN or infinite; raised on every part.
    """
    flat = scores.detach().reshape(-1)
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()  # exact for bfloat16 and float16
    if among is not None:
        flat, draw = only(flat, among, draw)
    narrow = _narrowed if flat.device.type == "cpu" else _everything
    tiers, narrowed = narrow(flat, counts, size, total)
    bits = 8 * flat.element_size() - 1
    for candidates, missing in narrowed:
        larger, tied, missing = _largest(_keys(flat[candidates]), missing, bits, total)
        tiers[candidates[larger]] += 1
        if missing:
            tied = candidates[tied]
            if draw is not None and not int(total(torch.count_nonzero(flat[tied]))):
                lots = draw().reshape(-1).to(flat.device)[tied]
                larger, places, missing = _largest(_keys(lots), missing, 8 * lots.element_size() - 1, total)
                tiers[tied[larger]] += 1
                tied = tied[places]
        if missing:
            lowest, _, _ = _largest(size - 1 - indices(tied), missing, (size - 1).bit_length(), total)
            tiers[tied[lowest]] += 1
    return tiers.view(scores.shape)


# uint8: the sets that each entry belongs to for certain; for each set, positions of its candidates and places for them
Narrowed = tuple[Tensor, list[tuple[Tensor, int]]]


def _everything(flat: Tensor, counts: Sequence[int], size: int, total: Total) -> Narrowed:
    """Return all entries as candidates of every set."""
    if int(total(torch.count_nonzero(~torch.isfinite(flat)))):
        raise NonFiniteScoresError("scores must be finite")
    everything = torch.arange(flat.numel(), device=flat.device)
    return torch.zeros_like(flat, dtype=torch.uint8), [(everything, count) for count in counts]


def _narrowed(flat: Tensor, counts: Sequence[int], size: int, total: Total) -> Narrowed:
    """Return the few candidates that a sample leaves; on CPU."""
    if size <= 4 * SAMPLE:
        return _everything(flat, counts, size, total)
    brackets = _brackets(flat, counts, size, total)
    try:
        (tiers, above, inside), finite = finite_scan(flat, brackets), True
    except NonFiniteScoresError:
        (tiers, above, inside), finite = (flat, [0] * len(counts), [(flat[:0], flat[:0])] * len(counts)), False
    found = [[larger, values.numel()] for larger, (_, values) in zip(above, inside, strict=True)]
    *sums, broken = total(torch.tensor([*np.ravel(found), not finite])).tolist()
    if broken:
        raise NonFiniteScoresError("scores must be finite")
    missing = [count - larger for count, larger in zip(counts, sums[::2], strict=True)]
    if not all(0 <= places <= candidates for places, candidates in zip(missing, sums[1::2], strict=True)):
        return _everything(flat, counts, size, total)  # the sample was not representative
    return tiers, [(candidates, places) for (candidates, _), places in zip(inside, missing, strict=True)]


def _brackets(flat: Tensor, counts: Sequence[int], size: int, total: Total) -> list[tuple[float, float]]:
    """Return, for each count, bounds that very likely enclose the threshold and few scores, the same on every part."""
    # an odd stride, so that it includes every column of the usual widths; the scan finds non-finite values
    sample = _keys(flat[:: size // SAMPLE | 1])
    shift = 8 * flat.element_size() - 1 - _DIGIT
    firsts = sample >> shift & (_BINS - 1)
    at_least = _at_least(total(torch.bincount(firsts, minlength=_BINS)))
    drawn, ranks = at_least[0], []
    for count in counts:
        share = count / size
        margin = 4 * math.sqrt(drawn * share * (1 - share)) + 1  # four standard deviations of the rank
        ranks += [drawn * share + margin, drawn * share - margin]
    digits = [_digit(at_least, min(max(rank, 0), drawn)) for rank in ranks]
    # the digit after that one, of the keys that have it
    seconds = [sample[firsts == digit] >> shift - _DIGIT & (_BINS - 1) for digit in digits]
    counted = total(torch.stack([torch.bincount(each, minlength=_BINS) for each in seconds]))
    edges = []
    for histogram, digit, rank in zip(counted, digits, ranks, strict=True):
        above = at_least[digit + 1] if digit + 1 < _BINS else 0
        edges.append((digit << _DIGIT) + _digit(_at_least(histogram), min(rank, drawn) - above))
    keys = [(edge + number % 2 << shift - _DIGIT) - number % 2 for number, edge in enumerate(edges)]
    bounds = torch.tensor(keys, dtype=sample.dtype).view(flat.dtype).tolist()
    return [
        (low if ranks[0] < drawn else EVERYTHING[0], high if ranks[1] > 0 else EVERYTHING[1])
        for low, high, ranks in zip(bounds[::2], bounds[1::2], zip(ranks[::2], ranks[1::2], strict=True), strict=True)
    ]


def _digit(at_least: Sequence[int], rank: float) -> int:
    """Return the largest digit that so many candidates have, or a larger one; 0 if there are fewer."""
    return next((digit for digit in reversed(range(_BINS)) if at_least[digit] >= rank), 0)


def _keys(flat: Tensor) -> Tensor:
    """Return integers that sort as the scores do; + 0.0 removes the sign of a negative zero."""
    return (flat + 0.0).view(torch.int32 if flat.dtype == torch.float32 else torch.int64)


def _at_least(histogram: Tensor) -> list[int]:
    """Return the number of candidates with each digit or a larger one."""
    return histogram.flip(0).cumsum(0).flip(0).tolist()


def _largest(keys: Tensor, count: int, bits: int, total: Total) -> tuple[Tensor, Tensor, int]:
    """Find the members of the `count` largest keys of all parts that are in this part.

    Args:
        keys: keys of this part, 1-D, non-negative integers.
        count: at most the number of keys in all parts.
        bits: number of bits of the largest possible key.
        total: sums over all parts.

    Returns:
        positions of the chosen keys, positions of keys that tie for the last places, and the number of these places
        over all parts, which is less than the number of ties, or 0 if there are none.
    """
    positions = torch.arange(keys.numel(), device=keys.device)
    chosen = [positions[:0]]
    shift = bits
    while count:
        shift = max(shift - _DIGIT, 0)  # the last digit may overlap the previous one, in which all candidates agree
        digits = (keys >> shift) & (_BINS - 1)
        histogram = total(torch.bincount(digits, minlength=_BINS))
        at_least = _at_least(histogram)
        digit = _digit(at_least, count)
        larger = at_least[digit + 1] if digit + 1 < _BINS else 0
        chosen.append(positions[digits > digit])
        candidates = digits == digit
        positions, keys = positions[candidates], keys[candidates]
        settled = at_least[digit] == count  # all candidates are chosen
        count -= larger
        if settled:
            chosen.append(positions)
            return torch.cat(chosen), positions[:0], 0
        if shift == 0:
            break
    return torch.cat(chosen), positions, count
