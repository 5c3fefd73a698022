"""Where a packed weight's θ and sets are in host memory, and how values come there and leave."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_topkast.distributed import HostGroup, RowSharding, Sharding, Shares, exchange
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.penalty import Total
from lightning_topkast.method.structure import Structure, units_in_order
from lightning_topkast.weights.layouts import Layout

_ALL = Shares([])  # of a process that shares nothing


def can_share(shape: torch.Size) -> bool:
    """Return whether processes can share a weight of this shape, row by row."""
    return len(shape) > 1 and shape.numel() > 0


class Own(NamedTuple):
    r"""What a process has at home of a layout: of A, then of B\A, both sorted by unit.

    Args:
        units: int64, flat indices in the grid of the rows at home here.
        places: int64, flat indices of their entries in these rows.
        active: number of units in A.
        shares: of the layout's values that every process has at home, if they are shared.
    """

    units: Tensor
    places: Tensor
    active: int
    shares: Shares = _ALL

    @property
    def split(self) -> int:
        r"""Where the places of B\A begin if both runs are sorted, and else 0; see `put_`."""
        return self.active if self.places is self.units else 0


class Copies:
    """The packed values where every process has a copy of all."""

    begin = 0  # of this process' part
    sharding: Sharding | None = None
    total: Total = None  # sums over all parts

    def shares(self, count: int, group: HostGroup) -> Shares:
        """Return which of so many values each process has."""
        processes = range(group.size)
        return Shares([[(0, count)] for _ in processes], replicas=processes)


class Slices(Copies):
    """The packed values where FSDP2 gives every process a slice of them.

    Args:
        name: of the weight.
        parameter: 1-D.
        group: the processes.

    Raises:
        TopKastError: it is not sharded once, as FSDP2 does, over all processes of the run.
    """

    def __init__(self, name: str, parameter: DTensor, group: HostGroup) -> None:
        self.sharding = Sharding(name, parameter)
        self.total = self.sharding.sum
        mesh, placements = parameter.device_mesh, parameter.placements
        dims = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
        if len(dims) != 1 or mesh.size() != group.size:
            raise TopKastError(
                f"expected the packed values of '{name}' to be sharded once, over all {group.size} processes of the "
                f"run (with copies or without), got {placements} over {mesh.size()} of them: call fully_shard with "
                "one mesh of all processes"
            )
        copies = mesh.mesh.movedim(dims[0], -1).reshape(-1, mesh.size(dims[0]))
        self._chunk = -(-parameter.numel() // copies.shape[1])
        self._starts, self._replicas = [0] * group.size, [0] * group.size
        for number, processes in enumerate(copies.tolist()):
            for at, process in enumerate(processes):
                self._starts[process], self._replicas[process] = at * self._chunk, number
        self.begin = min(self._starts[group.rank], parameter.numel())

    def shares(self, count: int, group: HostGroup) -> Shares:
        """Return which of so many values each process has."""
        ranges = [[(min(start, count), min(start + self._chunk, count))] for start in self._starts]
        return Shares(ranges, self._replicas)


class Home:
    """The host memory of a process, which has all rows of the weight.

    Args:
        name: of the weight.
        shape: of the weight.
        structure: what the sets consist of; it divides the weight.
    """

    sharding: Sharding
    values: Copies = Copies()

    def __init__(self, name: str, shape: torch.Size, structure: Structure) -> None:
        self._structure = structure
        self._begin(name, Sharding(name, torch.empty(shape, device="meta")))

    def _begin(self, name: str, sharding: Sharding) -> None:
        self.sharding = sharding
        # the rows at home here as a weight of their own, whose units need no other process
        self.rows = Sharding(name, torch.empty(sharding.local_shape, device="meta"))
        self.grid = self._structure.grid(self.rows.shape)
        self.unit_size = sharding.shape.numel() // max(self._structure.grid(sharding.shape).numel(), 1)

    def __deepcopy__(self, memo: Any) -> "Home":
        """Return the object itself, since it never changes and process groups cannot be copied."""
        return self

    def own(self, layout: Layout) -> Own:
        """Return what is at home here of a layout."""
        units = layout.units_in_order()
        return self._of(units, layout.active_count // self.unit_size)

    def _of(self, units: Tensor, active: int, shares: Shares = _ALL) -> Own:
        places = units if self.unit_size == 1 else self._structure.entries(units, self.rows.shape)
        return Own(units, places, active, shares)

    def bring(self, values: Tensor, layout: Layout, own: Own) -> Tensor:
        """Return those of a layout's values that are at home here, as they are in `own`; a collective if shared."""
        return values[: layout.updated_count]

    def send(self, values: Tensor, layout: Layout, own: Own) -> Tensor:
        """Return a layout's values that the parameter has here, from those at home; a collective if shared."""
        return values

    def shown(self, part: Tensor) -> Tensor:
        """Return a whole tensor, a DTensor if the values are one, from what is at home here; a collective if shared."""
        return part

    def units_in_order(self, tiers: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return flat indices of A's units and of those of B\A in the whole weight; a collective if shared.

        Args:
            tiers: of the units at home here.
        """
        return units_in_order(tiers)


class SharedHome(Home):
    """The host memory of all processes, each of which has some of the weight's rows.

    Args:
        name: of the weight.
        shape: of the weight, which is not empty.
        structure: what the sets consist of; it divides the weight.
        group: the processes.
    """

    sharding: RowSharding

    def __init__(self, name: str, shape: torch.Size, structure: Structure, group: HostGroup) -> None:
        self._structure, self._group = structure, group
        grid = structure.grid(shape)
        height = shape[0] // grid[0]
        self._begin(name, RowSharding(shape, group, height))
        units = grid[1:].numel()
        self._boundaries = torch.tensor([row // height * units for row in self.sharding.boundaries])

    def own(self, layout: Layout) -> Own:
        """Return what is at home here of a layout."""
        units, active = layout.units_in_order(), layout.active_count // self.unit_size
        begins = [
            torch.searchsorted(units[:active], self._boundaries),
            torch.searchsorted(units[active:], self._boundaries) + active,
        ]
        shares = Shares.between(*((each * self.unit_size).tolist() for each in begins))
        rank = self._group.rank
        ranges = [units[each[rank] : each[rank + 1]] - self._boundaries[rank] for each in begins]
        return self._of(torch.cat(ranges), ranges[0].numel(), shares)

    def bring(self, values: Tensor, layout: Layout, own: Own) -> Tensor:
        """Return those of a layout's values that are at home here, on CPU; a collective."""
        shares = self._shares(layout)
        count = sum(end - begin for begin, end in shares.ranges[self._group.rank])
        return exchange(values[:count].cpu(), shares, own.shares, self._group)

    def send(self, values: Tensor, layout: Layout, own: Own) -> Tensor:
        """Return a layout's values that the parameter has here, from those at home; a collective."""
        return exchange(values, own.shares, self._shares(layout), self._group)

    def _shares(self, layout: Layout) -> Shares:
        return self.values.shares(layout.updated_count, self._group)

    def shown(self, part: Tensor) -> Tensor:
        """Return a whole tensor, a DTensor if the values are one, from what is at home here; a collective."""
        if self.values.sharding is not None:
            return self.sharding.to_dtensor(part)
        return self.sharding.full_tensor(part, everywhere=True)

    def units_in_order(self, tiers: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return flat indices of A's units and of those of B\A in the whole weight; a collective."""
        active, exploring = units_in_order(tiers)
        rank, size = self._group.rank, self._group.size
        counts = torch.zeros(size, 2, dtype=torch.int64)
        counts[rank] = torch.tensor([active.numel(), exploring.numel()])
        ends = self.sharding.sum(counts).cumsum(0)
        found = []
        for number, units in enumerate((active, exploring)):
            boundaries = [0, *ends[:, number].tolist()]
            is_narrow = int(self._boundaries[-1]) <= torch.iinfo(torch.int32).max
            sent = (units + self._boundaries[rank]).to(torch.int32 if is_narrow else torch.int64)
            everywhere = Copies().shares(boundaries[-1], self._group)
            found.append(exchange(sent, Shares.between(boundaries), everywhere, self._group).long())
        return found[0], found[1]

    def with_slices(self, name: str, parameter: DTensor) -> "SharedHome":
        """Return the same home for values of which each process has a slice from now on; see `Slices`."""
        home = copy.copy(self)
        home.values = Slices(name, parameter, self._group)
        return home
