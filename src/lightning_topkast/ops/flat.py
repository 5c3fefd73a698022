"""Finding, moving and masking the flat entries of a weight, with the fastest method on each device.

On a CPU large weights are passed over by the compiled functions of `flat.cpp`. Where these are not available, PyTorch
and NumPy do the same, bit for bit, in several passes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_topkast.ops.memory import empty
from lightning_topkast.ops.passes import passes_over, written

# an integer type for every size of a floating-point entry
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Number of entries that NumPy processes at a time, so that temporaries stay in the L2 cache.
_CHUNK = 1 << 16


def flat(tensor: Tensor) -> Tensor:
    """Return the entries in memory order, as a 1-D view; `view(-1)` does not support channels-last weights."""
    return tensor.as_strided((tensor.numel(),), (1,))


def is_like(tensor: Tensor, other: Tensor) -> bool:
    """Return whether the entries of two tensors have the same places in memory, without gaps."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.shape, tensor.stride(), last) == (other.shape, other.stride(), tensor.numel() - 1)


def mask_outside_(tensor: Tensor, members: Tensor) -> None:
    """Zero `tensor` where `members` (int8) is 0, and keep it where all bits are 1."""
    if (passes := passes_over(tensor, members)) and is_like(tensor, members):
        passes("mask", tensor.element_size(), tensor, members, tensor.numel(), torch.get_num_threads())
        written(tensor)
    else:
        tensor.view(_BITS[tensor.element_size()]).bitwise_and_(members)


def put_(values: Tensor, places: Tensor, entries: Tensor, split: int = 0) -> Tensor:
    """Write 1-D entries of the same type to the places (indices) of 1-D values, and return these.

    `split`: if not 0, where a second sorted run of places begins, which is then passed over together with the first.
    """
    entries = entries.contiguous()
    if (passes := passes_over(values, places, entries)) and values.dtype == entries.dtype and values.is_contiguous():
        at = values, values.numel(), places, split, places.numel()
        passes("put", values.element_size(), *at, entries, torch.get_num_threads())
        written(values)
        return values
    return values.index_copy_(0, places, entries)


def fill_(values: Tensor, places: Tensor, value: float) -> None:
    """Write a value to the places (indices) of 1-D values."""
    if (passes := passes_over(values, places)) and values.is_contiguous():
        one, threads = values.new_full((1,), value), torch.get_num_threads()
        passes("fill", values.element_size(), values, places, one, places.numel(), threads)
        written(values)
    else:
        values.index_fill_(0, places, value)


def take(values: Tensor, places: Tensor, split: int = 0, out: Tensor | None = None) -> Tensor:
    """Return the 1-D values at places (indices), in `out` if it is given; for `split` see `put_`."""
    if (passes := passes_over(values, places)) and values.is_contiguous():
        taken = empty(places.numel(), values.dtype) if out is None else out
        at = values, values.numel(), places, split, places.numel()
        passes("take", values.element_size(), *at, taken, torch.get_num_threads())
        written(taken)
        return taken
    return torch.index_select(values, 0, places, out=out)


def count_outside(tensor: Tensor, members: Tensor) -> Tensor:
    """Count the entries of `tensor` that are not zero where `members` (int8) is 0; a scalar tensor."""
    outside = torch.bitwise_and(tensor.view(_BITS[tensor.element_size()]), ~members)
    return torch.count_nonzero(outside.view(tensor.dtype))


def has_bits(tensor: Tensor, places: np.ndarray) -> bool:
    """Return whether any bit is set in the entries of a CPU tensor at these places in memory order."""
    # NumPy takes a tenth of PyTorch's time for so few entries
    return bool(flat(tensor).view(_BITS[tensor.element_size()]).numpy()[places].any())


def indices(members: Tensor) -> Tensor:
    """Return the indices at which a 1-D bool tensor is true; on CPU with NumPy, which is five times as fast."""
    if members.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(members.numpy()))
    return torch.nonzero(members).flatten()


def where(entries: Tensor, members: Tensor) -> Tensor:
    """Return the 1-D `entries` where `members` (bool) is true; on CPU with NumPy, which is five times as fast."""
    if members.device.type == "cpu":
        return torch.from_numpy(np.compress(members.numpy(), entries.numpy()))
    return entries[members]


def check_indices(indices: Tensor, size: int) -> None:
    """Refuse flat indices (int64, 1-D, on CPU) that do not increase strictly, or are not those of `size` entries.

    Raises:
        ValueError: they do not, or are not.
    """
    places = indices.numpy()
    if not (places[1:] > places[:-1]).all():
        raise ValueError("expected strictly increasing indices")
    if places.size and not (places[0] >= 0 and places[-1] < size):
        raise ValueError(f"expected indices below {size}, got {places[0]} to {places[-1]}")


def indices_of(tiers: Tensor, tier: int) -> Tensor:
    """Return the indices at which a 1-D uint8 tensor has this value."""
    if (passes := passes_over(tiers)) and tiers.is_contiguous():
        found = empty(passes("count", tiers, tiers.numel(), tier), torch.int64)
        passes("find", tiers, tiers.numel(), tier, found)
        return found
    return indices(tiers == tier)


class Changes(NamedTuple):
    """What other tiers change.

    Args:
        places: flat indices at which the tiers differ, sorted.
        before: the tiers there before (uint8).
        after: the tiers there after (uint8).
        exploring: flat indices of all entries whose tier is 1 now, sorted.
        explored: their values.
    """

    places: Tensor
    before: Tensor
    after: Tensor
    exploring: Tensor
    explored: Tensor


def changes(
    alpha: Tensor, latent: Tensor, members: Tensor, exploring: Tensor, explored: Tensor, tiers: Tensor
) -> Changes:
    """Compare tiers with those before; all tensors are 1-D.

    Args:
        alpha: the values of entries whose tier before was 2.
        latent: the values of those whose tier before was 0. Values of entries whose tier is 1 no longer are put there.
        members: int8, all bits set for the entries whose tier before was not 0.
        exploring: indices of the entries whose tier before was 1, sorted.
        explored: their values.
        tiers: uint8, those after.
    """
    passes = passes_over(alpha, latent, members, exploring, explored, tiers)
    if passes is None:
        put_(latent, exploring, explored)
        before, now = tiers_of(members, exploring), indices_of(tiers, 1)
        places = indices(tiers != before)
        values = torch.where(before.index_select(0, now) == 2, alpha.index_select(0, now), latent.index_select(0, now))
        return Changes(places, before.index_select(0, places), tiers.index_select(0, places), now, values)
    now = empty(passes("count", tiers, tiers.numel(), 1), torch.int64)
    values = empty(now.numel(), alpha.dtype)
    room, count = 0, 1 + tiers.numel() // 8
    while count > room:
        room = count
        places, before, after = empty(room, torch.int64), empty(room, torch.uint8), empty(room, torch.uint8)
        given = members, exploring, explored, exploring.numel(), tiers, tiers.numel(), alpha, latent
        count = passes("changes", alpha.element_size(), *given, places, before, after, room, now, values)
    written(latent)
    return Changes(places[:count], before[:count], after[:count], now, values)


def tiers_of(members: Tensor, exploring: Tensor) -> Tensor:
    """Return tiers (uint8): 0 where `members` (int8) is, 1 at the flat indices `exploring`, and 2 elsewhere."""
    tiers = (members * -2).view(torch.uint8)
    flat(tiers).index_fill_(0, exploring, 1)
    return tiers


def magnitudes(alpha: Tensor, latent: Tensor, exploring: Tensor, explored: Tensor) -> Tensor:
    """Return |alpha + latent|, but |explored| at the flat indices `exploring` (sorted); float32, contiguous, on CPU."""
    result = empty(alpha.numel(), torch.float32).view(alpha.shape)
    if passes := passes_over(alpha, latent, exploring, explored):
        count, threads = exploring.numel(), torch.get_num_threads()
        passes("magnitudes", alpha, latent, exploring, explored, count, result, alpha.numel(), threads)
        return result
    torch.add(alpha, latent, out=result)
    flat(result).index_copy_(0, exploring, explored)
    return result.abs_()


class Scan(NamedTuple):
    """How 1-D scores compare with brackets, each a lowest and a highest score inside.

    Args:
        tiers: number of brackets that each score is above (uint8).
        above: for each bracket, the number of scores above it.
        inside: for each bracket, the indices of the scores inside it, sorted, and these scores.
    """

    tiers: Tensor
    above: list[int]
    inside: list[tuple[Tensor, Tensor]]


def scan(scores: Tensor, brackets: Sequence[tuple[float, float]]) -> Scan | None:
    """Compare 1-D scores on CPU with brackets, in one pass; None if a score is NaN or infinite."""
    if scores.dtype != torch.float32 or not scores.is_contiguous() or not (passes := passes_over(scores)):
        return _scan(scores.numpy(), brackets)
    size, sets = scores.numel(), len(brackets)
    low, high = scores.new_tensor(brackets).view(sets, 2).t().contiguous()
    above, found = scores.new_empty(2, sets, dtype=torch.int64)
    tiers = empty(size, torch.uint8)
    room, most = 0, 1 + size // (1 if (-math.inf, math.inf) in brackets else 32)
    while most > room:
        room = most
        inside, values = (empty(sets * room, dtype).view(sets, room) for dtype in (torch.int64, torch.float32))
        if not passes("scan", scores, size, sets, low, high, tiers, inside, values, room, above, found):
            return None
        most = max(found.tolist(), default=0)
    parts = [(inside[at, :count], values[at, :count]) for at, count in enumerate(found.tolist())]
    return Scan(tiers, above.tolist(), parts)


def _scan(scores: np.ndarray, brackets: Sequence[tuple[float, float]]) -> Scan | None:
    tiers, members = np.zeros(scores.size, dtype=np.uint8), np.empty(min(scores.size, _CHUNK), dtype=bool)
    above, found = [0] * len(brackets), [[np.empty(0, dtype=np.int64)] for _ in brackets]
    for start in range(0, scores.size, _CHUNK):
        piece = scores[start : start + _CHUNK]
        inside = members[: piece.size]
        if not np.isfinite(piece, out=inside).all():
            return None
        for at, (low, high) in enumerate(brackets):
            larger = piece > high
            above[at] += int(np.count_nonzero(larger))
            tiers[start : start + _CHUNK] += larger.view(np.uint8)
            np.greater_equal(piece, low, out=inside)
            np.not_equal(inside, larger, out=inside)
            found[at].append(np.flatnonzero(inside) + start)
    places = [np.concatenate(each) for each in found]
    parts = [(torch.from_numpy(each), torch.from_numpy(scores[each])) for each in places]
    return Scan(torch.from_numpy(tiers), above, parts)


def positions(before: Tensor, after: Tensor, size: int) -> Tensor:
    """Return for each place of `after` its index in `before`, or -1.

    Args:
        before: int64, 1-D; two sorted runs of places, such as those of A and of B outside A.
        after: likewise.
        size: a number above all places.
    """
    if passes := passes_over(before, after):
        result = empty(after.numel(), torch.int64)
        passes("positions", before, before.numel(), after, after.numel(), size, result)
        return result
    table = torch.from_numpy(np.full(size, -1, dtype=np.int32 if size < 2**31 else np.int64))
    table.index_copy_(0, before, torch.arange(before.numel(), dtype=table.dtype))
    return table.index_select(0, after).long()


def moved(values: Tensor, sources: Tensor, start: float) -> Tensor:
    """Return 1-D values at these indices, and `start` where an index is -1."""
    if (passes := passes_over(values, sources)) and values.is_contiguous():
        result, first = empty(sources.numel(), values.dtype), values.new_full((1,), start)
        count, threads = sources.numel(), torch.get_num_threads()
        passes("move", values.element_size(), values, sources, first, result, count, threads)
        return result
    result = torch.full(sources.shape, start, dtype=values.dtype, device=values.device)
    kept = indices(sources >= 0)
    here, there = kept.to(values.device), sources.index_select(0, kept).to(values.device)
    return result.index_copy_(0, here, values.index_select(0, there))


def padded(values: Tensor, size: int, end: float) -> Tensor:
    """Return 1-D values, and `end` as often as there are fewer than `size` of them."""
    missing = size - values.numel()
    return torch.cat([values, values.new_full((missing,), end)]) if missing else values
