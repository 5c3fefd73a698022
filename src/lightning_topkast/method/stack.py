"""The structure of a stack of matrices, such as the experts of a layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_topkast.distributed import Sharding, to_local
from lightning_topkast.method.selection import Draw, TopK
from lightning_topkast.method.structure import Structure


@dataclass(frozen=True)
class Stack(Structure):
    """Equal matrices along the first dimension, such as experts: each has a structure, a size of A and of B of its own.

    A weight may be sharded along the first dimension, so that every process has whole matrices.

    Args:
        of: the structure of each matrix.
    """

    of: Structure

    def grid(self, shape: torch.Size) -> torch.Size:
        """Return matrices × the grid of a matrix."""
        return torch.Size((shape[0], *self.of.grid(shape[1:])))

    def divides(self, shape: torch.Size) -> bool:
        """Return whether all units of a matrix have the same size."""
        return self.of.divides(shape[1:])

    def active_count(self, density: float, shape: torch.Size) -> int:
        """Return the number of entries in A of all matrices, which have equally many."""
        return shape[0] * self.of.active_count(density, shape[1:])

    def updated_count(self, density: float, shape: torch.Size) -> int:
        """Return the number of entries in B of all matrices, which have equally many."""
        return shape[0] * self.of.updated_count(density, shape[1:])

    def units(self, count: int, shape: torch.Size) -> int:
        """Return the number of units of all matrices for a number of entries of all matrices."""
        return shape[0] * self.of.units(count // shape[0], shape[1:])

    def scores(self, values: Tensor, sharding: Sharding) -> Tensor:
        """Return the scores of every matrix; no collective, since each is whole."""
        matrix, parts = self.matrix(sharding), values.reshape(sharding.local_sizes)
        return self._each(lambda part: self.of.scores(part, matrix), parts, self.of.grid(matrix.shape))

    def members(self, members: Tensor, sharding: Sharding) -> Tensor:
        """Return which units of every matrix belong to a set of whole units."""
        matrix, parts = self.matrix(sharding), to_local(members).reshape(sharding.local_sizes)
        return self._each(lambda part: self.of.members(part, matrix), parts, self.of.grid(matrix.shape))

    def part_of(self, grid: Tensor, sharding: Sharding) -> Tensor:
        """Return the grids of this process' matrices."""
        return grid.index_select(0, sharding.local_coordinates(0).to(grid.device)) if sharding.is_sharded else grid

    def tiers(self, chosen: Tensor, sharding: Sharding) -> Tensor:
        """Return the entries' tiers from the units' tiers, matrix by matrix."""
        matrix = self.matrix(sharding)
        return self._each(lambda part: self.of.tiers(part, matrix), chosen, matrix.shape).reshape(sharding.local_shape)

    def units_of(self, tiers: Tensor) -> Tensor:
        """Return the units' tiers from the entries' tiers, matrix by matrix."""
        return self._each(self.of.units_of, tiers, self.of.grid(tiers.shape[1:]))

    def are_whole(self, tiers: Tensor, sharding: Sharding) -> bool:
        """Return whether all entries of each unit have the same tier; a collective if the weight is sharded."""
        matrix, parts = self.matrix(sharding), tiers.reshape(sharding.local_sizes)
        broken = sum(not self.of.are_whole(part, matrix) for part in parts)
        return not int(sharding.sum(torch.tensor(broken, device=tiers.device)))

    def entries(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return flat indices of the entries of some units, unit by unit."""
        matrix = shape[1:]
        per_matrix = self.of.grid(matrix).numel()
        within = self.of.entries(units % per_matrix, matrix).view(units.numel(), matrix.numel() // per_matrix)
        return ((units // per_matrix * matrix.numel())[:, None] + within).flatten()

    def selection(self, sharding: Sharding, draw: Draw | None = None) -> TopK:
        """Return the function that finds equally many of the largest units in every matrix of this process."""
        of_one = self.selections(sharding, draw)

        def select(scores: Tensor, counts: Sequence[int], *, among: Tensor | None = None) -> Tensor:
            counts = [count // sharding.shape[0] for count in counts]
            members = [None] * len(scores) if among is None else list(among)
            chosen = [of_one(at)(part, counts, among=members[at]) for at, part in enumerate(scores)]
            return torch.stack(chosen) if chosen else torch.zeros_like(scores, dtype=torch.uint8)

        return select

    def selections(self, sharding: Sharding, draw: Draw | None) -> Callable[[int], TopK]:
        """Return the function from a matrix' place among those of this process to the selection within it."""
        matrix = self.matrix(sharding)
        return lambda at: self.of.selection(matrix, None if draw is None else lambda: draw()[at])

    def matrix(self, sharding: Sharding) -> Sharding:
        """Return the sharding of one matrix: it is whole."""
        return Sharding("a matrix", torch.empty(sharding.shape[1:], device="meta"))

    @staticmethod
    def _each(function: Callable[[Tensor], Tensor], parts: Tensor, shape: torch.Size) -> Tensor:
        """Apply a function to every matrix; `shape` is that of a result, for a process that has no matrix."""
        given = list(parts)
        results = [function(part) for part in given]
        if all(result is part for result, part in zip(results, given, strict=True)):
            return parts.reshape(len(parts), *shape)  # no copy where there is nothing to do, as for single entries
        return torch.stack(results)

    @property
    def note(self) -> str:
        """A note for the summary."""
        return self.of.note

    def __str__(self) -> str:
        return str(self.of)
