"""Structures of the sets: single entries, blocks of a weight's matrices, or N of every M consecutive entries."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_topkast.checks import check, is_count
from lightning_topkast.distributed import Sharding, to_local
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.fan_in import FanIn, bounded_selection, fan_in_of
from lightning_topkast.method.selection import ACTIVE, EXPLORING, Draw, TopK, nested_top_k
from lightning_topkast.method.sharded_selection import nested_top_k_of_shards
from lightning_topkast.ops.flat import indices_of


class Structure(ABC):
    """The structure of the sets. A *unit* is chosen as a whole; the units of a weight form its *grid*.

    Units are single entries here, and subclasses override what differs. Outside this module, sizes are in entries.
    """

    noun: ClassVar[tuple[str, str]] = ("entry", "entries")

    def grid(self, shape: torch.Size) -> torch.Size:
        """Return the shape of the grid of a weight's units."""
        return shape

    def divides(self, shape: torch.Size) -> bool:
        """Return whether all units of a weight have the same size, so that the sizes of its sets are known exactly."""
        return True

    def active_count(self, density: float, shape: torch.Size) -> int:
        """Return the number of entries in A at a forward density; the average if units differ in size."""
        size, units = shape.numel(), self.grid(shape).numel()
        return round(round(density * units) * size / max(units, 1))

    def updated_count(self, density: float, shape: torch.Size) -> int:
        """Return the number of entries in B at a backward density; the average if units differ in size."""
        return self.active_count(density, shape)

    def units(self, count: int, shape: torch.Size) -> int:
        """Return the number of units for a number of entries from `active_count` or `updated_count`."""
        return round(count * self.grid(shape).numel() / max(shape.numel(), 1))

    def scores(self, values: Tensor, sharding: Sharding) -> Tensor:
        """Return the units' scores: at least 0, and non-finite for units with a non-finite value.

        Args:
            values: at least 0; for a sharded weight this process' part.
            sharding: of the weight.
        """
        return values

    def members(self, members: Tensor, sharding: Sharding) -> Tensor:
        """Return which units belong to a set of whole units (bool in the weight's shape)."""
        return to_local(members)

    def part_of(self, grid: Tensor, sharding: Sharding) -> Tensor:
        """Return the part of a tensor in the shape of the grid that this process needs for its selection."""
        return sharding.to_local(grid)

    def drawn(self, draw: Callable[[tuple[int, int] | None], Tensor], sharding: Sharding) -> Tensor:
        """Return the numbers drawn for the units of which this process chooses.

        Args:
            draw: returns the numbers of some rows of the grid, or of all.
            sharding: of the weight.
        """
        return self.part_of(draw(None), sharding) if sharding.rows is None else draw(sharding.rows)

    def tiers(self, chosen: Tensor, sharding: Sharding) -> Tensor:
        """Return the entries' tiers from the units' tiers; for a sharded weight this process' part."""
        return chosen

    def units_of(self, tiers: Tensor) -> Tensor:
        """Return the units' tiers from the entries' tiers, which agree within a unit; may share memory."""
        return tiers

    def are_whole(self, tiers: Tensor, sharding: Sharding) -> bool:
        """Return whether all entries of each unit have the same tier; a collective if the weight is sharded.

        Args:
            tiers: of the entries, on the weight's device; for a sharded weight this process' part.
            sharding: of the weight.
        """
        return True

    def entries(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return flat indices of the entries of some units, unit by unit, in row-major order within each unit.

        Args:
            units: int64, flat indices of units in the grid.
            shape: of a weight that the units divide.
        """
        return units

    def order(self, units: Tensor, shape: torch.Size) -> Tensor:
        r"""Return flat indices of B in packed order, from the units' tiers.

        These are the units of A, then those of B\A, both in the grid's order.
        """
        return self.entries(torch.cat(units_in_order(units)), shape)

    def selection(self, sharding: Sharding, draw: Draw | None = None) -> TopK:
        """Return the function that finds the largest units of a weight, which may be sharded.

        Args:
            sharding: of the weight.
            draw: orders the units whose score is zero, as in `nested_top_k`.
        """
        if not sharding.is_sharded:
            return partial(nested_top_k, draw=draw)
        size, total, indices = sharding.shape.numel(), sharding.sum, sharding.flat_indices
        return partial(nested_top_k_of_shards, size=size, total=total, indices=indices, draw=draw)

    @property
    def note(self) -> str:
        """A note for the summary, or ""."""
        return ""

    @abstractmethod
    def __str__(self) -> str:
        """Return the name under which checkpoints have it."""


@dataclass(frozen=True)
class Unstructured(Structure):
    """Single entries are chosen.

    Args:
        fan_in: the least and the most entries that each row may have in a set, as multiples of the mean over all rows
            (rounded down and up), such as (0.25, 2); (1, 1) is constant fan-in, None is no bound. A row is an index of
            the weight's first dimension: an output of Linear and Conv, but an input of ConvTranspose and GPT-2's
            Conv1D.

    Raises:
        TopKastError: `fan_in` is not (least, most) with 0 <= least <= 1 <= most.
    """

    fan_in: FanIn | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fan_in", fan_in_of(self.fan_in))

    def selection(self, sharding: Sharding, draw: Draw | None = None) -> TopK:
        """Return the function that finds the largest entries, within bounds for each row if there are any.

        Raises:
            TopKastError: there are bounds, and rows are sharded.
        """
        if self.fan_in is None:
            return super().selection(sharding, draw)
        return bounded_selection(self.fan_in, sharding, draw)

    @property
    def note(self) -> str:
        """A note for the summary, or ""."""
        return _note_of(self.fan_in, "entries")

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Block(Structure):
    """Blocks of outputs × inputs, one per position of a convolution's kernel, are chosen by the norm of their entries.

    Blocks at the edges are smaller if the block size does not divide the weight.

    Args:
        outputs: height of a block, at least 1.
        inputs: width of a block, at least 1.
        fan_in: the least and the most blocks that each row of blocks may have in a set, as in `Unstructured`.

    Raises:
        TopKastError: a side is not an int of at least 1, or `fan_in` is not (least, most) with 0 <= least <= 1 <= most.
    """

    noun: ClassVar[tuple[str, str]] = ("block", "blocks")

    outputs: int = 32
    inputs: int = 32
    fan_in: FanIn | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fan_in", fan_in_of(self.fan_in))
        for name in ("outputs", "inputs"):
            check(is_count(getattr(self, name), 1), f"Block.{name}", getattr(self, name), "an int of at least 1")

    def grid(self, shape: torch.Size) -> torch.Size:
        """Return blocks down × blocks across × kernel positions; for a vector only blocks across."""
        return torch.Size(-(-size // step) for size, step in zip(shape, self._steps(shape), strict=True))

    def divides(self, shape: torch.Size) -> bool:
        """Return whether all blocks have the same size."""
        return all(size % step == 0 for size, step in zip(shape, self._steps(shape), strict=True))

    def scores(self, values: Tensor, sharding: Sharding) -> Tensor:
        """Return the norms of all blocks, on every process; a collective if the weight is sharded."""
        return self._sums(values.detach(), sharding, _squares).sqrt_()

    def norms(self, blocks: Tensor) -> Tensor:
        """Return the norms of single blocks, with the same bits as in `scores`.

        Args:
            blocks: (blocks, entries of a block), each in row-major order.
        """
        count, size = blocks.shape
        rows = blocks.detach().reshape(count, size // self.inputs, self.inputs)
        sums = _sums_of_runs(rows, 1, rows.shape[1], _squares)
        return _sums_of_runs(sums, 2, self.inputs).view(-1).sqrt_()

    def shared(self, scores: Tensor, sharding: Sharding) -> Tensor:
        """Return the scores of all blocks from those of the whole blocks that this process has; a collective."""
        whole = scores.new_zeros(self.grid(sharding.shape))
        first = int(sharding.local_coordinates(0)[0]) // self._steps(sharding.shape)[0] if scores.numel() else 0
        whole[first : first + len(scores)] = scores
        return sharding.sum(whole)

    def members(self, members: Tensor, sharding: Sharding) -> Tensor:
        """Return which blocks contain a member."""
        return self._sums(to_local(members).float(), sharding) > 0

    def part_of(self, grid: Tensor, sharding: Sharding) -> Tensor:
        """Return the whole grid, since every process chooses among all blocks."""
        return grid

    def drawn(self, draw: Callable[[tuple[int, int] | None], Tensor], sharding: Sharding) -> Tensor:
        """Return the numbers of the whole grid."""
        return draw(None)

    def tiers(self, chosen: Tensor, sharding: Sharding) -> Tensor:
        """Return each entry's tier, which is that of its block."""
        for dim in reversed(range(len(sharding.shape))):
            step = self._steps(sharding.shape)[dim]
            if step > 1 or dim in sharding.sharded_dims:
                chosen = chosen.index_select(dim, sharding.local_coordinates(dim).to(chosen.device) // step)
        return chosen.reshape(sharding.local_shape)

    def units_of(self, tiers: Tensor) -> Tensor:
        """Return each block's tier, which is that of its first entry."""
        return tiers[tuple(slice(None, None, step) for step in self._steps(tiers.shape))]

    def are_whole(self, tiers: Tensor, sharding: Sharding) -> bool:
        """Return whether every entry equals the mean of its block; a collective if the weight is sharded."""
        mean = self._sums(tiers.float(), sharding) / self._sums(torch.ones_like(tiers, dtype=torch.float), sharding)
        return not int(sharding.sum(torch.count_nonzero(self.tiers(mean, sharding) != tiers)))

    def entries(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return flat indices of the entries, block by block."""
        first, within, stride = torch.zeros_like(units), units.new_zeros(1), 1
        for step, size in zip(reversed(self._steps(shape)), reversed(shape), strict=True):
            first += units % (size // step) * (step * stride)
            units = units // (size // step)
            along = torch.arange(step, device=units.device) * stride
            within = (along[:, None] + within).flatten()
            stride *= size
        return (first[:, None] + within).flatten()

    def selection(self, sharding: Sharding, draw: Draw | None = None) -> TopK:
        """Return the unsharded selection, since every process chooses among all blocks."""
        if self.fan_in is None:
            return partial(nested_top_k, draw=draw)
        grid = Sharding("blocks", torch.empty(self.grid(sharding.shape), device="meta"))
        return bounded_selection(self.fan_in, grid, draw)

    def _steps(self, shape: torch.Size) -> tuple[int, ...]:
        sides = (self.outputs, self.inputs) if len(shape) > 1 else (self.inputs,)
        return (*sides, *(1 for _ in shape[2:])) if shape else ()

    def _sums(self, values: Tensor, sharding: Sharding, of: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """Sum a function over each block's entries, in a fixed order, so that equal ranks choose the same sets."""
        values = values.reshape(sharding.local_sizes)
        for dim, (step, side) in enumerate(zip(self._steps(sharding.shape), self.grid(sharding.shape), strict=True)):
            if step == 1 and dim not in sharding.sharded_dims:
                continue
            if dim not in sharding.sharded_dims and values.shape[dim] % step == 0:
                values = _sums_of_runs(values, dim, step, of)
            else:
                lengths = torch.bincount(sharding.local_coordinates(dim).to(values.device) // step, minlength=side)
                across = of(values).transpose(0, dim).contiguous()
                values = torch.segment_reduce(across, "sum", lengths=lengths, axis=0, initial=0).transpose(0, dim)
            of = torch.clone
        return sharding.sum(of(values).contiguous())

    @property
    def note(self) -> str:
        """A note for the summary."""
        bounded = _note_of(self.fan_in, "blocks")
        return f"the sets consist of blocks of {self.outputs}×{self.inputs} entries" + (bounded and f"; {bounded}")

    def __str__(self) -> str:
        return f"{self.outputs}×{self.inputs} block"


@dataclass(frozen=True)
class NOfM(Structure):
    """The n largest of every m consecutive entries in a row are active (a row per output); B is unstructured.

    A shorter group at the end of a row also has n active entries, or all of its entries if there are fewer.

    Args:
        n: number of active entries per group, at least 1.
        m: number of entries per group, above `n` and at most 99.

    Raises:
        TopKastError: a value is out of range.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        valid = is_count(self.n, 1) and is_count(self.m, 2) and self.n < self.m <= 99
        check(valid, "structure", f"{self.n}:{self.m}", "N:M with 1 <= N < M <= 99, such as 2:4")

    def active_count(self, density: float, shape: torch.Size) -> int:
        """Return the number of entries in A, which does not depend on the density."""
        rows, length = _rows(shape)
        return rows * (length // self.m * self.n + min(length % self.m, self.n))

    def updated_count(self, density: float, shape: torch.Size) -> int:
        """Return the number of entries in B at a backward density."""
        return round(density * shape.numel())

    def selection(self, sharding: Sharding, draw: Draw | None = None) -> TopK:
        """Return a selection that ranks the n largest of each group before all others."""
        if sharding.sharded_dims - ({0} if len(sharding.shape) > 1 else set()):
            raise TopKastError(
                f"structure='{self}' needs whole rows of a weight on each device, but the rows of one of shape "
                f"{tuple(sharding.shape)} are sharded: exclude it, or shard only its first dimension"
            )
        of_all, active = super().selection(sharding, draw), self.active_count(0, sharding.shape)
        return partial(self._select, active=active, of_all=of_all, draw=draw)

    def _select(
        self,
        scores: Tensor,
        counts: Sequence[int],
        *,
        among: Tensor | None = None,
        active: int,
        of_all: TopK,
        draw: Draw | None,
    ) -> Tensor:
        if among is not None:
            raise TopKastError(f"structure='{self}' chooses among all entries of each group; use rule=Magnitude()")
        tiers = of_all(scores, (0,))  # selects nothing, but refuses non-finite scores on every device
        first = self._winners(scores, draw)
        for count in counts:
            if count > active:
                tiers += of_all(scores, (count - active,), among=~first)
            tiers += first if count >= active else of_all(scores, (count,), among=first)
        return tiers

    def _winners(self, scores: Tensor, draw: Draw | None = None) -> Tensor:
        """Return which entries are the n largest of their group; ties as in `nested_top_k`."""
        rows, length = _rows(scores.shape)
        members = self._groups(scores, rows, length)
        lots = None
        holds_zeros = draw is not None and scores.numel() and bool(scores.amin() == 0)
        if draw is not None and holds_zeros and bool(((members > 0).sum(0) < self.n).any()):
            lots = self._groups(draw().to(scores.device), rows, length)  # a group has to choose among zeros
        larger = torch.zeros_like(members, dtype=torch.uint8)
        for later in range(1, self.m):
            for earlier in range(later):
                wins = members[later] > members[earlier]
                if lots is not None:
                    zero = (members[later] == 0) & (members[earlier] == 0)
                    wins |= zero & (lots[later] > lots[earlier])
                larger[earlier] += wins
                larger[later] += ~wins
        winners = (larger < self.n).T.reshape(rows, self._padded(length))
        return winners[:, :length].reshape(scores.shape)

    def _padded(self, length: int) -> int:
        """Return the length with the group at the end filled up; sizes are given, since a process may have no rows."""
        return -(-length // self.m) * self.m

    def _groups(self, values: Tensor, rows: int, length: int) -> Tensor:
        """Return values as places × groups, so that comparisons vectorise; -1 where a group is shorter."""
        padded = F.pad(values.reshape(rows, length), (0, self._padded(length) - length), value=-1.0)
        return padded.view(padded.numel() // self.m, self.m).T.contiguous()

    @property
    def note(self) -> str:
        """A note for the summary."""
        return f"{self.n} of every {self.m} consecutive entries are active"

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def units_in_order(grid: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return flat indices of A's units and of those of B\A, from the tiers of a grid."""
    flat = grid.reshape(-1)
    return indices_of(flat, ACTIVE), indices_of(flat, EXPLORING)


def _squares(values: Tensor) -> Tensor:
    """Return the squares in float64, in which those of float32 neither overflow nor vanish."""
    return values.double().square()


def _sums_of_runs(values: Tensor, dim: int, length: int, of: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
    """Sum a function over runs of `length` consecutive entries along `dim`.

    On CPU the order is from first to last, as in `segment_reduce`, but in a tenth of its time, since the values of the
    function are never all in memory.
    """
    runs = values.unflatten(dim, (values.shape[dim] // length, length))
    if values.device.type != "cpu":
        return of(runs).sum(dim + 1)
    sums = of(runs.select(dim + 1, 0))
    for at in range(1, length):
        sums += of(runs.select(dim + 1, at))
    return sums


def _note_of(fan_in: FanIn | None, units: str) -> str:
    return "" if fan_in is None else f"each row has {fan_in[0]:g} to {fan_in[1]:g} times the mean number of {units}"


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """Return the number of rows of a weight's matrix, and their length."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def structure_of(given: Any) -> Structure:
    """Return a structure, given as itself or by its string: "unstructured", "block" (32 × 32), or N:M such as "2:4".

    Raises:
        TopKastError: anything else; a configuration file may have read 2:4 without quotes as a number.
    """
    if isinstance(given, Structure):
        return given
    if isinstance(given, str) and (pattern := re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", given)):
        return NOfM(int(pattern[1]), int(pattern[2]))
    known = {"unstructured": Unstructured(), "block": Block()}
    valid = isinstance(given, str) and given in known
    check(valid, "structure", given, "'unstructured', 'block', N:M such as '2:4' (in quotes), or a Structure")
    return known[given]
