"""What the sets are made of: single entries, blocks of a weight's matrices, or so many of each few neighbours."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_topkast.distributed import Sharding, own_part
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.selection import ACTIVE, EXPLORING, TopK, nested_top_k, ranked
from lightning_topkast.method.sharded_selection import nested_top_k_of_shards
from lightning_topkast.ops.flat import indices


@dataclass(frozen=True)
class Entries:
    """Every entry is chosen by itself.

    What is chosen is a *unit*; the units of a weight form its grid. Sizes of sets are given in entries everywhere else.
    """

    noun: ClassVar[tuple[str, str]] = ("entry", "entries")

    def grid(self, shape: torch.Size) -> torch.Size:
        """The shape of a weight's units."""
        return shape

    def divides(self, shape: torch.Size) -> bool:
        """Whether all units of a weight have as many entries, so that the sizes of its sets are known exactly."""
        return True

    def active_count(self, density: float, shape: torch.Size) -> int:
        """Entries in A at a forward density; where units differ in size, on average over them."""
        size, units = shape.numel(), self.grid(shape).numel()
        return round(round(density * units) * size / max(units, 1))

    def updated_count(self, density: float, shape: torch.Size) -> int:
        """Entries in B at a backward density, likewise."""
        return self.active_count(density, shape)

    def units(self, count: int, shape: torch.Size) -> int:
        """So many entries, as they were counted above, in units."""
        return round(count * self.grid(shape).numel() / max(shape.numel(), 1))

    def scores(self, values: Tensor, sharding: Sharding) -> Tensor:
        """The units' scores: at least 0, and not finite where a value is not.

        Args:
            values: at least 0; of a sharded weight this process' part.
            sharding: of the weight.
        """
        return values

    def members(self, members: Tensor, sharding: Sharding) -> Tensor:
        """Which units a set of whole units (bool in the weight's shape) holds."""
        return own_part(members)

    def part_of(self, grid: Tensor, sharding: Sharding) -> Tensor:
        """What this process needs of a tensor in the shape of the grid, to choose by it."""
        return sharding.part_of(grid)

    def tiers(self, chosen: Tensor, sharding: Sharding) -> Tensor:
        """The entries' tiers for the units' ones; of a sharded weight this process' part."""
        return chosen

    def units_of(self, tiers: Tensor) -> Tensor:
        """The units' tiers for their entries', which are the same all over a unit; may share memory."""
        return tiers

    def are_whole(self, tiers: Tensor, sharding: Sharding) -> bool:
        """Whether no unit has entries of several tiers; a collective if others hold parts.

        Args:
            tiers: of the entries, on the weight's device; of a sharded weight this process' part.
            sharding: of the weight.
        """
        return True

    def entries(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Flat indices of the entries of some units, unit by unit, within each in row-major order.

        Args:
            units: int64, flat indices of units in the grid.
            shape: of a weight that the units divide.
        """
        return units

    def order(self, tiers: Tensor) -> Tensor:
        r"""Flat indices of B in packed order: the units of A, then those of B\A, each by their place in the grid."""
        return self.entries(torch.cat(units_in_order(self.units_of(tiers))), tiers.shape)

    def selection(self, sharding: Sharding) -> TopK:
        """How the largest units of a weight are found, whose parts may be on several devices."""
        if not sharding.is_cut:
            return nested_top_k
        return partial(
            nested_top_k_of_shards, size=sharding.shape.numel(), total=sharding.sum, indices=sharding.flat_indices
        )

    @property
    def note(self) -> str:
        """What there is to say about it, if anything."""
        return ""

    def __str__(self) -> str:
        return "entry"


@dataclass(frozen=True)
class Blocks(Entries):
    """Blocks of outputs × inputs, at each position of a kernel by itself, are chosen by the norm of their entries.

    What is left over at a matrix's edges is a smaller block.

    Args:
        outputs: height of a block.
        inputs: width of a block.
    """

    noun: ClassVar[tuple[str, str]] = ("block", "blocks")

    outputs: int
    inputs: int

    def grid(self, shape: torch.Size) -> torch.Size:
        """Blocks downwards × across × kernel positions; of a vector those across."""
        return torch.Size(-(-size // step) for size, step in zip(shape, self._steps(shape), strict=True))

    def divides(self, shape: torch.Size) -> bool:
        """Whether no block is smaller than the others."""
        return all(size % step == 0 for size, step in zip(shape, self._steps(shape), strict=True))

    def scores(self, values: Tensor, sharding: Sharding) -> Tensor:
        """Norms of all blocks, on every process; a collective if others hold parts."""
        return self._sums(values.detach(), sharding, _squares).sqrt_()

    def norms(self, blocks: Tensor) -> Tensor:
        """Norms of single blocks, bit for bit as `scores` has them.

        Args:
            blocks: (blocks, entries of a block), each in row-major order.
        """
        count, size = blocks.shape
        rows = blocks.detach().reshape(count, size // self.inputs, self.inputs)
        sums = _sums_of_runs(rows, 1, rows.shape[1], _squares)
        return _sums_of_runs(sums, 2, self.inputs).view(-1).sqrt_()

    def members(self, members: Tensor, sharding: Sharding) -> Tensor:
        """Blocks that hold a member."""
        return self._sums(own_part(members).float(), sharding) > 0

    def part_of(self, grid: Tensor, sharding: Sharding) -> Tensor:
        """All of it: every process chooses among all blocks."""
        return grid

    def tiers(self, chosen: Tensor, sharding: Sharding) -> Tensor:
        """Every entry has its block's tier."""
        for dim in reversed(range(len(sharding.shape))):
            step = self._steps(sharding.shape)[dim]
            if step > 1 or dim in sharding.cuts:
                chosen = chosen.index_select(dim, sharding.coordinates(dim).to(chosen.device) // step)
        return chosen.reshape(sharding.part_shape)

    def units_of(self, tiers: Tensor) -> Tensor:
        """Each block's tier is that of its first entry."""
        return tiers[tuple(slice(None, None, step) for step in self._steps(tiers.shape))]

    def are_whole(self, tiers: Tensor, sharding: Sharding) -> bool:
        """Every entry has its block's mean."""
        mean = self._sums(tiers.float(), sharding) / self._sums(torch.ones_like(tiers, dtype=torch.float), sharding)
        return not int(sharding.sum(torch.count_nonzero(self.tiers(mean, sharding) != tiers)))

    def entries(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Block by block."""
        first, within, stride = torch.zeros_like(units), units.new_zeros(1), 1
        for step, size in zip(reversed(self._steps(shape)), reversed(shape), strict=True):
            first += units % (size // step) * (step * stride)
            units = units // (size // step)
            along = torch.arange(step, device=units.device) * stride
            within = (along[:, None] + within).flatten()
            stride *= size
        return (first[:, None] + within).flatten()

    def selection(self, sharding: Sharding) -> TopK:
        """Every process finds the largest of all blocks."""
        return nested_top_k

    def _steps(self, shape: torch.Size) -> tuple[int, ...]:
        sides = (self.outputs, self.inputs) if len(shape) > 1 else (self.inputs,)
        return (*sides, *(1 for _ in shape[2:])) if shape else ()

    def _sums(self, values: Tensor, sharding: Sharding, of: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """Sums of a function over each block's entries, in a fixed order: ranks that hold the same choose the same."""
        values = values.reshape(sharding.sizes)
        for dim, (step, side) in enumerate(zip(self._steps(sharding.shape), self.grid(sharding.shape), strict=True)):
            if step == 1 and dim not in sharding.cuts:
                continue
            if dim not in sharding.cuts and values.shape[dim] % step == 0:
                values = _sums_of_runs(values, dim, step, of)
            else:
                lengths = torch.bincount(sharding.coordinates(dim).to(values.device) // step, minlength=side)
                across = of(values).transpose(0, dim).contiguous()
                values = torch.segment_reduce(across, "sum", lengths=lengths, axis=0, initial=0).transpose(0, dim)
            of = torch.clone
        return sharding.sum(of(values).contiguous())

    @property
    def note(self) -> str:
        """What the sets are made of."""
        return f"the sets are made of blocks of {self.outputs}×{self.inputs}"

    def __str__(self) -> str:
        return f"{self.outputs}×{self.inputs} block"


@dataclass(frozen=True)
class NOfM(Entries):
    """Of each m neighbours in a row of outputs × (all else) the n largest are active; B is chosen entry by entry.

    Args:
        n: active entries of a group; what is left over at the end of a row has as many, or all it has.
        m: entries of a group.
    """

    n: int
    m: int

    def active_count(self, density: float, shape: torch.Size) -> int:
        """Entries in A, whatever the density."""
        rows, length = _rows(shape)
        return rows * (length // self.m * self.n + min(length % self.m, self.n))

    def updated_count(self, density: float, shape: torch.Size) -> int:
        """Entries in B at a backward density."""
        return round(density * shape.numel())

    def selection(self, sharding: Sharding) -> TopK:
        """The n largest of each group come before all others."""
        if sharding.cuts - ({0} if len(sharding.shape) > 1 else set()):
            raise TopKastError(
                f"granularity='{self}' needs whole rows of a weight on each device, found one of shape "
                f"{tuple(sharding.shape)} that is cut across them: exclude it, or shard its first dimension only"
            )
        return partial(self._select, active=self.active_count(0, sharding.shape), among=super().selection(sharding))

    def _select(self, scores: Tensor, counts: Sequence[int], active: int, among: TopK) -> Tensor:
        tiers = among(scores, (0,))  # nothing, but what is not finite is refused, on every device
        first = self._winners(scores)
        for count in counts:
            if count > active:
                tiers += among(ranked(scores, ~first), (count - active,))
            tiers += first if count >= active else among(ranked(scores, first), (count,))
        return tiers

    def _winners(self, scores: Tensor) -> Tensor:
        """The n largest of each group, ties to the first."""
        rows, length = _rows(scores.shape)
        padded = F.pad(scores.reshape(rows, length), (0, -length % self.m), value=-1.0)
        members = padded.view(-1, self.m).T.contiguous()  # a group is a column: neighbours in memory are compared alike
        larger = torch.zeros_like(members, dtype=torch.uint8)
        for later in range(1, self.m):
            for earlier in range(later):
                wins = members[later] > members[earlier]
                larger[earlier] += wins
                larger[later] += ~wins
        winners = (larger < self.n).T.reshape(rows, -1)
        return winners[:, :length].reshape(scores.shape)

    @property
    def note(self) -> str:
        """What A is like."""
        return f"{self.n} of each {self.m} neighbours are active"

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def units_in_order(grid: Tensor) -> tuple[Tensor, Tensor]:
    r"""Flat indices of A's units and of those of B\A, by the tiers of a grid."""
    flat = grid.reshape(-1)
    return indices(flat == ACTIVE), indices(flat == EXPLORING)


def _squares(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32)).square()


def _sums_of_runs(values: Tensor, dim: int, length: int, of: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
    """Sums of a function over runs of so many neighbours along `dim`.

    On CPU each goes from its first to its last, as `segment_reduce` does, but takes a tenth of the time, for the
    function is never in memory as a whole.
    """
    runs = values.unflatten(dim, (values.shape[dim] // length, length))
    if values.device.type != "cpu":
        return of(runs).sum(dim + 1)
    sums = of(runs.select(dim + 1, 0))
    for at in range(1, length):
        sums += of(runs.select(dim + 1, at))
    return sums


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """Rows of a weight's matrix, and their length."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def granularity_of(name: str, block_shape: Sequence[int]) -> Entries | None:
    """What "entry", "block" or N:M such as "2:4" means; None if it means nothing."""
    if name == "block":
        return Blocks(*block_shape)
    pattern = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", name)
    if pattern:
        n, m = int(pattern[1]), int(pattern[2])
        return NOfM(n, m) if 0 < n < m else None
    return Entries() if name == "entry" else None
