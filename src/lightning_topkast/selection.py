r"""Exact top-k selection: scores → tiers.

A *tier* counts the nested sets an entry belongs to. With the counts of B and A: 0 is the reservoir C,
1 the exploring entries B\A and 2 the active entries A.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RESERVOIR, EXPLORING, ACTIVE = 0, 1, 2

# Entries handled at a time on CPU, so that temporaries stay in the L2 cache.
_CHUNK = 1 << 16


class NonFiniteScoresError(ValueError):
    """The scores hold NaN or infinity, so that no largest entries exist."""


def nested_top_k(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Count, for every entry, how many of the nested top-k sets of `scores` it belongs to.

    Every set is exact: the k largest entries, ties to the lowest flat index (never a bare `>=` threshold,
    which ties would let swell). So the sets are nested whatever the ties.

    Args:
        scores: finite floating-point scores of any shape.
        counts: set sizes, each in [0, number of entries].

    Returns:
        uint8 tensor in the shape of `scores`; with `counts=(|B|, |A|)` these are the tiers.

    Raises:
        NonFiniteScoresError: a score is NaN or infinite.
        ValueError: a count is out of range.
    """
    for count in counts:
        if not 0 <= count <= scores.numel():
            raise ValueError(f"cannot select {count} of {scores.numel()} entries")
    flat = scores.detach().reshape(-1)
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()  # exact for bfloat16 and float16
    if flat.numel() == 0:
        return torch.zeros_like(flat, dtype=torch.uint8).view(scores.shape)
    # numpy's quickselect is vectorised and about ten times faster than torch.topk on CPU
    tiers = _tiers_numpy(flat.numpy(), counts) if flat.device.type == "cpu" else _tiers_torch(flat, counts)
    return tiers.view(scores.shape)


def top_k_then_random(scores: Tensor, active: int, updated: int, generator: torch.Generator) -> Tensor:
    """Tiers whose active set is the exact top-k and whose exploring set is drawn at random from the rest.

    This is the paper's ablation of magnitude-guided exploration (paper section 3.2). The draw is made on CPU, so
    that every device and every rank with the same generator state gets the same set.

    Args:
        scores: finite scores of any shape.
        active: |A|.
        updated: |B|, at least `active`.
        generator: CPU generator that decides the draw.

    Returns:
        uint8 tiers in the shape of `scores`.
    """
    tiers = nested_top_k(scores, (active,)).mul_(ACTIVE)
    lottery = torch.rand(scores.numel(), generator=generator).to(scores.device).view(scores.shape)
    lottery.masked_fill_(tiers == ACTIVE, -1.0)
    return tiers.add_(nested_top_k(lottery, (updated - active,)))


def _tiers_numpy(scores: np.ndarray, counts: Sequence[int]) -> Tensor:
    """`nested_top_k` of flat CPU scores: thresholds by partial sorting, then one pass in cache-sized pieces."""
    size = scores.size
    pool = scores.copy()
    thresholds: list[float] = []
    for count in sorted(counts, reverse=True):  # the next smaller set lies inside the slice of the last one
        if 0 < count < pool.size:
            pool.partition(pool.size - count)
            pool = pool[pool.size - count :]
            thresholds.append(pool[0])
        else:
            thresholds.append(pool.min() if count else np.inf)
    if not np.isfinite(pool.max()):  # NaN and infinity are sorted last, so the smallest slice has them
        raise NonFiniteScoresError("scores must be finite")

    tiers = np.zeros(size, dtype=np.uint8)
    members = np.empty(min(size, _CHUNK), dtype=bool)
    for start in range(0, size, _CHUNK):
        piece = scores[start : start + _CHUNK]
        inside = members[: piece.size]
        for threshold in thresholds:
            np.greater_equal(piece, threshold, out=inside)
            tiers[start : start + _CHUNK] += inside.view(np.uint8)

    for depth, (count, threshold) in enumerate(zip(sorted(counts, reverse=True), thresholds, strict=True), start=1):
        surplus = int(np.count_nonzero(tiers >= depth)) - count
        if surplus and count:
            tied = np.flatnonzero((scores == threshold) & (tiers >= depth))
            # a smaller set with the same threshold loses these entries too, since they are the last of its ties
            tiers[tied[tied.size - surplus :]] = depth - 1
    return torch.from_numpy(tiers)


def _tiers_torch(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """`nested_top_k` of flat scores on any device, without a synchronisation but the check for finiteness."""
    if not bool(torch.isfinite(scores).all()):
        raise NonFiniteScoresError("scores must be finite")
    tiers = torch.zeros_like(scores, dtype=torch.uint8)
    for count in counts:
        if count == 0:
            continue
        threshold = torch.topk(scores, count, sorted=False).values.min()
        greater = scores > threshold
        tied = scores == threshold
        within = torch.cumsum(tied, dim=0, dtype=torch.int64) <= count - greater.sum()
        tiers += greater | (tied & within)
    return tiers
