r"""Exact top-k selection: scores → tiers.

A *tier* is the number of nested sets that an entry belongs to. With the counts of B and A: 0 is the reservoir C,
1 the exploring entries B\A and 2 the active entries A.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_topkast.ops.flat import Scan, scan

RESERVOIR, EXPLORING, ACTIVE = 0, 1, 2
_CHUNK = 1 << 22  # numbers that are drawn at a time only to reach those that are asked for

# Number of entries from which the bounds of a threshold are estimated.
SAMPLE = 1 << 16
EVERYTHING = -math.inf, math.inf

# returns numbers in [0, 1) in the shape of the scores: entries whose score is zero are ordered by them
Draw = Callable[[], Tensor]


class TopK(Protocol):
    """A function that counts, for each entry, the nested top-k sets of its score that it belongs to."""

    def __call__(self, scores: Tensor, counts: Sequence[int], *, among: Tensor | None = None) -> Tensor:
        """Return the number of sets for each entry; see `nested_top_k`."""


class NonFiniteScoresError(ValueError):
    """Raised if the scores hold NaN or infinity, so that the largest entries are not defined."""


def nested_top_k(
    scores: Tensor, counts: Sequence[int], among: Tensor | None = None, draw: Draw | None = None
) -> Tensor:
    """Count, for each entry, the nested top-k sets of `scores` that it belongs to.

    Each set has exactly the k largest entries (a plain `>=` threshold would include all ties). Ties go to the lowest
    flat index, but entries whose score is zero say nothing about which of them is worth more: of these, the ones with
    the largest numbers drawn enter. The order is the same for every set, so the sets are nested, whatever the ties.

    Args:
        scores: finite floating-point scores of any shape; at least 0 with `among`.
        counts: set sizes, each in [0, number of entries].
        among: bool in the shape of `scores`: the entries that can be chosen, at least as many as each count; None: all.
        draw: returns numbers in [0, 1) in the shape of `scores`. It is called only if a set has some, but not all, of
            the entries whose score is zero. None: their ties go to the lowest flat index too.

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
    if among is not None:
        flat, draw = only(flat, among, draw)
    tiers = (_tiers_cpu if flat.device.type == "cpu" else _tiers_torch)(flat, counts, draw)
    return tiers.view(scores.shape)


def drawn(seed: int, step: int, name: str, shape: Sequence[int], rows: tuple[int, int] | None = None) -> Tensor:
    """Return numbers in [0, 1) for a weight, the same on all ranks and in a resumed run, so that no state is saved.

    Args:
        seed: of the run.
        step: number of optimizer steps taken.
        name: of the weight.
        shape: of the weight's grid of units.
        rows: the first row of the grid to return and the one after the last; None: all.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{step}/{name}".encode()))
    if rows is None:
        return torch.rand(torch.Size(shape), generator=generator)
    length = math.prod(shape[1:])
    for begin in range(0, rows[0] * length, _CHUNK):  # one number after the other, whatever is asked for at a time
        torch.rand(min(_CHUNK, rows[0] * length - begin), generator=generator)
    return torch.rand((rows[1] - rows[0], *shape[1:]), generator=generator)


def top_k_then_random(
    scores: Tensor, active: int, updated: int, lottery: Tensor, select: TopK = nested_top_k
) -> Tensor:
    """Return tiers whose active set is the exact top-k and whose exploring set is drawn at random from the rest.

    This is the paper's ablation of magnitude-guided exploration (paper section 3.2).

    Args:
        scores: finite scores of any shape.
        active: |A|.
        updated: |B|, at least `active`.
        lottery: uniform in [0, 1), in the shape of `scores`; the largest values outside A win. Drawn on CPU, it is the
            same for every device and rank.
        select: finds the largest entries.

    Returns:
        uint8 tiers in the shape of `scores`.
    """
    is_active = select(scores, (active,)).bool()
    exploring = select(lottery.to(scores.device), (updated - active,), among=~is_active)
    return exploring.masked_fill_(is_active, ACTIVE)


def drop_and_grow(
    scores: Tensor, active: Tensor, growth: Tensor, kept: int, grown: int, select: TopK = nested_top_k
) -> Tensor:
    """Return the next active set of SET and RigL: the largest entries of the present set and the best other entries.

    Args:
        scores: finite, at least 0, of any shape; the `kept` largest active entries stay.
        active: the present active set, bool.
        growth: finite, at least 0; the `grown` best of all entries that do not stay, including dropped ones, enter.
        kept: number of entries that stay, at most the number of active entries.
        grown: number of entries that enter.
        select: finds the largest entries.

    Returns:
        uint8 in the shape of `scores`: 1 for an active entry.
    """
    stays = select(scores, (kept,), among=active).bool()
    return select(growth, (grown,), among=~stays).masked_fill_(stays, 1)


def only(flat: Tensor, among: Tensor, draw: Draw | None) -> tuple[Tensor, Draw]:
    """Return flat scores and a draw by which the `among` entries come before all others, even if their score is 0.

    Scores and numbers stay at least 0, since the bits of negative numbers do not sort.
    """
    members = among.reshape(-1)

    def drawn_among() -> Tensor:
        numbers = torch.ones_like(flat) if draw is None else draw().reshape(-1).to(flat.device)
        return numbers.clamp_min(torch.finfo(numbers.dtype).tiny).masked_fill_(~members, 0)

    return flat.masked_fill(~members, 0), drawn_among


def _tiers_cpu(scores: Tensor, counts: Sequence[int], draw: Draw | None = None) -> Tensor:
    """Compute `nested_top_k` of flat CPU scores: all above a bracket of the threshold, and the largest inside it."""
    tiers, above, inside = finite_scan(scores, _brackets(scores, counts))
    missing = [count - larger for count, larger in zip(counts, above, strict=True)]
    if not all(0 <= places <= values.numel() for places, (_, values) in zip(missing, inside, strict=True)):
        # The sample was not representative, for example because the scores are sorted in memory.
        tiers, missing, inside = tiers.zero_(), [*counts], [(torch.arange(scores.numel()), scores)] * len(counts)
    entered = tiers.numpy()
    for places, (candidates, values) in zip(missing, inside, strict=True):
        entered[_largest(values.numpy(), candidates.numpy(), places, draw)] += 1
    return tiers


def finite_scan(scores: Tensor, brackets: Sequence[tuple[float, float]]) -> Scan:
    """Return `scan` of flat CPU scores.

    Raises:
        NonFiniteScoresError: a score is NaN or infinite.
    """
    scanned = scan(scores, brackets)
    if scanned is None:
        raise NonFiniteScoresError("scores must be finite")
    return scanned


def _brackets(scores: Tensor, counts: Sequence[int]) -> list[tuple[float, float]]:
    """Return bounds, from a sample, that very likely enclose the `count`-th largest score and few others."""
    if scores.numel() <= 4 * SAMPLE:
        return [EVERYTHING] * len(counts)
    sample = np.sort(scores[:: _stride(scores.numel())].numpy())
    return [_around(sample, count / scores.numel()) for count in counts]


def _stride(size: int) -> int:
    """Return the stride of the sample, which is odd so that it includes every column of the usual widths."""
    return size // SAMPLE | 1


def _around(sample: Any, share: float) -> tuple[Any, Any]:
    """Return values of a sorted sample that very likely enclose the threshold for this share of all scores."""
    below, size = 1 - share, len(sample)
    margin = 4 * math.sqrt(size * below * (1 - below)) + 1  # four standard deviations of the rank
    low, high = math.floor(size * below - margin), math.ceil(size * below + margin)
    return sample[low] if low >= 0 else -math.inf, sample[high] if high < size else math.inf


def _largest(values: np.ndarray, candidates: np.ndarray, count: int, draw: Draw | None = None) -> np.ndarray:
    """Return the `count` candidates with the largest values; ties as in `nested_top_k`."""
    if count == 0:
        return candidates[:0]
    # NumPy does this about ten times faster than torch.topk
    threshold = np.partition(values, values.size - count)[values.size - count]
    larger, tied = candidates[values > threshold], candidates[values == threshold]
    missing = count - larger.size
    if draw is not None and threshold == 0 and missing < tied.size:
        return np.concatenate([larger, _largest(draw().reshape(-1).cpu().numpy()[tied], tied, missing)])
    return np.concatenate([larger, tied[:missing]])


def _tiers_torch(scores: Tensor, counts: Sequence[int], draw: Draw | None = None) -> Tensor:
    """Compute `nested_top_k` of flat scores on any device, in the same way, with few passes and synchronisations.

    `torch.topk` would sort all scores if k is large.
    """
    if scores.numel() and not bool(
        torch.isfinite(torch.stack(torch.aminmax(scores))).all()
    ):  # NaN is the smallest and the largest
        raise NonFiniteScoresError("scores must be finite")
    size, sample = scores.numel(), None
    if size > 4 * SAMPLE:
        sample = torch.sort(scores[:: _stride(size)]).values.cpu()  # so that bounds are plain numbers to the device
    tiers = torch.zeros_like(scores, dtype=torch.uint8)
    for count in counts:
        if count:
            low, high = EVERYTHING if sample is None else _around(sample, count / size)
            tiers += _chosen_torch(scores, count, low, high, draw)
    return tiers


def _chosen_torch(
    scores: Tensor, count: int, low: float | Tensor, high: float | Tensor, draw: Draw | None = None
) -> Tensor:
    """Return which scores are the `count` largest (bool); fast if `low` and `high` enclose few scores and the k-th."""
    chosen = scores > high
    candidates = torch.nonzero((scores >= low).logical_xor_(chosen)).squeeze(1)
    missing = count - int(torch.count_nonzero(chosen))
    if not 0 <= missing <= candidates.numel():
        return _chosen_torch(scores, count, *EVERYTHING, draw=draw)  # the sample was not representative
    # stable: ties go to the lowest index; + 0.0, since -0.0 would otherwise come after the zeros that it ties with
    values, order = torch.sort(scores[candidates] + 0.0, descending=True, stable=True)
    if draw is not None and 0 < missing < candidates.numel() and not bool(values[missing - 1 : missing + 1].any()):
        tied = order[values == 0]
        lots = draw().reshape(-1).to(scores.device)[candidates[tied]]
        order = torch.cat([order[values > 0], tied[lots.sort(descending=True, stable=True).indices]])
    return chosen.index_fill_(0, candidates[order[:missing]], True)
