"""The largest entries of a weight with bounds for the number in each row: balanced or constant fan-in.

In every set a row has the first entries of its own order: the `least` first ones of each row, then the best of all
others up to the `most`-th of their row. That is optimal, since a further entry of a row is worth no more than the one
before. So only the number in each row is chosen globally, and the sorted ends of the rows suffice for that.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_topkast.checks import check, is_number
from lightning_topkast.distributed import Sharding
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.selection import Draw, TopK, nested_top_k
from lightning_topkast.method.sharded_selection import nested_top_k_of_shards

FanIn = tuple[float, float]  # bounds for the number of entries in a row, as multiples of the mean

_CHUNK = 1 << 18  # scores whose rows are sorted at a time, so that they stay in the cache


def fan_in_of(given: Any) -> FanIn | None:
    """Return bounds, given as a pair, or as a list of two from a configuration file, or None.

    Raises:
        TopKastError: they are not numbers with 0 <= least <= 1 <= most.
    """
    if given is None:
        return None
    pair = [*given] if isinstance(given, Sequence) and not isinstance(given, str) else []
    valid = len(pair) == 2 and all(map(is_number, pair)) and 0 <= pair[0] <= 1 <= pair[1]
    check(valid, "fan_in", given, "(least, most) with 0 <= least <= 1 <= most, multiples of the mean such as (0.25, 2)")
    return float(pair[0]), float(pair[1])


def bounds(fan_in: FanIn, count: int, rows: int, length: int) -> tuple[int, int]:
    """Return the least and the largest number of entries in a row of a set; together the rows always fit the set.

    Args:
        fan_in: multiples of the mean, as they are written in decimal: 1.1 times 10 is 11.
        count: size of the set.
        rows: number of rows.
        length: of a row.
    """
    least, most = (Fraction(str(bound)) * count / rows for bound in fan_in)
    return math.floor(least), min(math.ceil(most), length)


def bounded_selection(fan_in: FanIn, sharding: Sharding, draw: Draw | None) -> TopK:
    """Return the function that finds the largest units with bounds for each row; a vector is a single row.

    Args:
        fan_in: the bounds.
        sharding: of the units' grid, whose first dimension is the rows.
        draw: orders the units whose score is zero, as in `nested_top_k`.

    Raises:
        TopKastError: rows are cut by the sharding.
    """
    if sharding.sharded_dims - ({0} if len(sharding.shape) > 1 else set()):
        raise TopKastError(
            f"fan_in={fan_in} needs whole rows of a weight on each device, but the rows of one of shape "
            f"{tuple(sharding.shape)} are sharded: exclude it, or shard only its first dimension"
        )
    return partial(_bounded_top_k, fan_in=fan_in, sharding=sharding, draw=draw)


def _bounded_top_k(
    scores: Tensor,
    counts: Sequence[int],
    *,
    among: Tensor | None = None,
    fan_in: FanIn,
    sharding: Sharding,
    draw: Draw | None,
) -> Tensor:
    """Count, for each entry, the nested sets of the largest entries that it belongs to; ties as in `nested_top_k`.

    Args:
        scores: at least 0, of any shape; of a sharded weight this process' rows.
        counts: sizes of the sets. The smallest is chosen first, and each larger one around it, by its own bounds.
        among: not supported.
        fan_in: the bounds.
        sharding: of the grid.
        draw: orders the entries whose score is zero.

    Raises:
        NonFiniteScoresError: a score is NaN or infinite.
    """
    if among is not None:
        raise TopKastError(f"fan_in={fan_in} chooses among all entries of each row; use rule=Magnitude()")
    shape = sharding.shape
    height, length = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())
    rows = scores.detach().reshape(-1, length)
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()  # exact for bfloat16 and float16
    flat = rows.reshape(-1)
    tiers = _select(flat, flat, 0, length, sharding)  # selects nothing, but refuses non-finite scores on every device
    most = max(bounds(fan_in, count, height, length)[1] for count in counts)
    tops = _largest_of_rows(rows, min(most + 1, length))  # one more, to see ties
    numbers, chosen = torch.zeros(len(rows), dtype=torch.long, device=rows.device), 0
    for count in sorted(counts):
        least, most = bounds(fan_in, count, height, length)
        missing = int(sharding.sum((least - numbers).clamp_min(0).sum()))
        least -= missing > count - chosen  # by rounding only: what has been chosen leaves one less for each row
        numbers = _numbers_of_rows(rows, tops, count, numbers.clamp_min(least), most, sharding, draw)
        tiers += _first_of_rows(rows, tops, numbers, draw).view(-1)
        chosen = count
    return tiers.view(scores.shape)


def _numbers_of_rows(
    rows: Tensor, tops: Tensor, count: int, least: Tensor, most: int, sharding: Sharding, draw: Draw | None
) -> Tensor:
    """Return how many entries each row has in the best set of `count` entries.

    Args:
        rows: this process' scores.
        tops: the largest of every row, in ascending order.
        count: size of the set, over all processes.
        least: of each row.
        most: of all rows.
        sharding: of the grid.
        draw: orders the entries whose score is zero.
    """
    keys = tops.view(torch.int32 if tops.dtype == torch.float32 else torch.int64)

    def numbers(key: int) -> Tensor:
        """Return how many entries each row has if all are taken whose key is at least this, within the bounds."""
        keys_of_rows = torch.full((len(keys), 1), key, dtype=keys.dtype, device=keys.device)
        found = keys.shape[1] - torch.searchsorted(keys, keys_of_rows).squeeze(1)
        return found.clamp_max(most).maximum(least)

    # the largest key with which there are enough; the bits of numbers of at least 0 sort as the numbers do
    key, above = 0, int(torch.tensor(math.inf, dtype=tops.dtype).view(keys.dtype))
    while above - key > 1:
        middle = (key + above) // 2
        if int(sharding.sum(numbers(middle).sum())) >= count:
            key = middle
        else:
            above = middle
    first, last = numbers(key + 1), numbers(key)
    # the entries with just this key, of which not all may be needed: their row, and their place in its order
    row = torch.arange(len(rows), device=rows.device).repeat_interleave(last - first)
    place = torch.arange(len(row), device=rows.device) - ((last - first).cumsum(0) - last)[row]
    places, needed = row * rows.shape[1] + place, count - int(sharding.sum(first.sum()))

    def lots() -> Tensor:
        assert draw is not None
        drawn = _lots(rows, draw)
        return drawn.gather(1, _order(rows, drawn)).view(-1)[places]

    tied = torch.full_like(row, min(key, 1), dtype=rows.dtype)  # zeros are drawn
    entering = _select(tied, places, needed, rows.shape[1], sharding, draw and lots)
    return first + torch.bincount(row[entering.bool()], minlength=len(rows))


def _select(
    scores: Tensor, places: Tensor, count: int, length: int, sharding: Sharding, draw: Draw | None = None
) -> Tensor:
    """Return which of some entries, which may be sharded, are the `count` largest (uint8).

    Args:
        scores: of this process' entries, 1-D.
        places: their flat indices in this process' rows, ascending.
        count: number of entries to choose.
        length: of a row.
        sharding: of the rows.
        draw: returns numbers for entries whose score is zero.
    """
    if not sharding.is_sharded:
        return nested_top_k(scores, (count,), draw=draw)

    def indices(positions: Tensor) -> Tensor:
        own = places[positions]
        return sharding.local_coordinates(0).to(own.device)[own // length] * length + own % length

    size = sharding.shape[0] * length
    return nested_top_k_of_shards(scores, (count,), size, sharding.sum, indices, draw=draw)


def _largest_of_rows(rows: Tensor, count: int) -> Tensor:
    """Return the largest values of every row, in ascending order."""
    if rows.device.type != "cpu":
        return torch.topk(rows, count, 1).values.flip(1)
    # several times faster than torch.topk
    values, length = rows.numpy(), rows.shape[1]
    found = np.empty((len(values), count), values.dtype)
    step = max(_CHUNK // length, 1)
    for begin in range(0, len(values), step):
        part = values[begin : begin + step]
        if count < length:
            part = np.partition(part, length - count, 1)[:, length - count :]
        found[begin : begin + step] = np.sort(part, 1)
    return torch.from_numpy(found)


def _first_of_rows(rows: Tensor, tops: Tensor, numbers: Tensor, draw: Draw | None) -> Tensor:
    """Return which entries are the first ones of their row's order, as many as `numbers` has for it (bool)."""
    numbers, count = numbers[:, None], tops.shape[1]
    last = tops.gather(1, (count - numbers).clamp_max(count - 1)).masked_fill_(numbers == 0, math.inf)
    next_one = tops.gather(1, (count - numbers - 1).clamp_min(0))
    chosen = rows >= last
    tied = torch.nonzero(((last == next_one) & (numbers < rows.shape[1])).squeeze(1)).squeeze(1)
    if tied.numel():
        zeros = draw is not None and bool((last[tied] == 0).any())
        order = _order(rows[tied], _lots(rows, draw)[tied] if draw is not None and zeros else None)
        enters = torch.arange(rows.shape[1], device=rows.device) < numbers[tied]
        chosen[tied] = torch.zeros_like(enters).scatter_(1, order, enters)
    return chosen


def _lots(rows: Tensor, draw: Draw) -> Tensor:
    """Return the numbers drawn for entries whose score is zero, and 0 for others."""
    return draw().to(rows.device).reshape(rows.shape).masked_fill(rows != 0, 0)


def _order(rows: Tensor, lots: Tensor | None) -> Tensor:
    """Return the places of every row's entries by score, then by lot, then from left to right."""
    if lots is None:
        return rows.sort(dim=1, descending=True, stable=True).indices
    by_lot = lots.sort(dim=1, descending=True, stable=True).indices
    return by_lot.gather(1, rows.gather(1, by_lot).sort(dim=1, descending=True, stable=True).indices)
