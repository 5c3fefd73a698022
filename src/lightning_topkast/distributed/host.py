"""What many processes share in their host memory: the rows of weights, and ranges of values that move between them."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lightning_topkast.distributed.sharding import Sharding, to_local
from lightning_topkast.errors import TopKastError


class HostGroup:
    """All processes of the run, for collectives on tensors in host memory.

    Collectives of two threads would mix, so that the thread which chooses sets in the background has its own.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._own, self._background = (dist.new_group(backend="gloo", timeout=_timeout()) for _ in range(2))
        self.mesh = DeviceMesh.from_group(self._own, "cpu")

    def __reduce__(self) -> Any:
        """Refuse to be pickled, in words."""
        raise TopKastError(
            "a packed model cannot be pickled while processes share its θ: save model.state_dict() and "
            "topkast.state_dict(gathered=True), or make TopKast with Packed(theta='replicated')"
        )

    @property
    def of_thread(self) -> Any:
        """The process group for collectives of this thread."""
        return self._background if getattr(_thread, "is_background", False) else self._own


def _timeout() -> Any:
    """Return how long the run's collectives wait, since torch gives further groups 30 minutes; None if unknown."""
    world: Any = dist.group.WORLD
    devices = getattr(world, "_device_types", ())  # torch has no public way to ask
    backend = world._get_backend(devices[0]) if devices else None
    return getattr(getattr(backend, "options", None), "_timeout", None)


_thread = threading.local()
_group: tuple[Any, HostGroup] | None = None  # and the processes that it was made for


def mark_background() -> None:
    """Keep collectives of this thread apart from those of the thread that trains."""
    _thread.is_background = True


def host_group() -> HostGroup | None:
    """Return the group of all processes, or None if there is only one; a collective when it is called first."""
    global _group
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    world = dist.group.WORLD
    if _group is None or _group[0] is not world:
        _group = world, HostGroup()
    return _group[1]


@dataclass(frozen=True)
class Shares:
    """The ranges of a sequence that the processes have.

    Args:
        ranges: of each process, from the first to the last: begins and ends.
        replicas: for each process the number of the copy of the sequence that its ranges are of; None: there is one.
    """

    ranges: Sequence[Sequence[tuple[int, int]]]
    replicas: Sequence[int] | None = None

    @classmethod
    def between(cls, *boundaries: Sequence[int]) -> "Shares":
        """Return shares with a range for each of some divisions of the sequence."""
        divisions = [list(pairwise(each)) for each in boundaries]
        return cls([list(ranges) for ranges in zip(*divisions, strict=True)])

    @property
    def are_whole(self) -> bool:
        """Whether every process has a copy of its own."""
        return self.replicas is not None and len(set(self.replicas)) == len(self.replicas)

    def pieces(self, process: int, after: "Shares", to: int) -> list[tuple[int, int, int]]:
        """Return what a process gives to `to` so that it has its ranges of `after`.

        Returns:
            for each piece, the number of the range that it is for, and its begin and end in the sequence.
        """
        if self.replicas is not None and self.replicas[process] != self.replicas[to]:
            return []
        found = []
        for number, (begin, end) in enumerate(after.ranges[to]):
            for first, last in self.ranges[process]:
                if max(begin, first) < min(end, last):
                    found.append((number, max(begin, first), min(end, last)))
        return found

    def part(self, values: Tensor, process: int, begin: int, end: int) -> Tensor:
        """Return a piece of the values that a process has of the sequence."""
        for first, last in self.ranges[process]:
            if first <= begin < last:
                return values[begin - first : end - first]
            values = values[last - first :]
        raise IndexError(f"process {process} has {self.ranges[process]}, not {begin}")


def exchange(values: Tensor, before: Shares, after: Shares, group: HostGroup) -> Tensor:
    """Give every process its ranges of a sequence; a collective, unless every process has all of it.

    Args:
        values: what this process has, 1-D, on CPU.
        before: what the processes have.
        after: what they get.
        group: the processes.

    Returns:
        what this process gets, in the order of its ranges.
    """
    rank, processes = group.rank, range(group.size)
    if before == after:
        return values
    taken = [before.pieces(of, after, rank) for of in processes]
    given = [before.pieces(rank, after, to) for to in processes]
    if before.are_whole:
        return _joined([before.part(values, rank, begin, end) for _, begin, end in taken[rank]], values)
    parts = [[before.part(values, rank, begin, end) for _, begin, end in pieces] for pieces in given]
    sent = _joined([part for each in parts for part in each], values)
    size = values.element_size()
    out, into = ([size * sum(end - begin for _, begin, end in each) for each in pieces] for pieces in (given, taken))
    received = values.new_empty(sum(into) // size)
    as_bytes = received.view(torch.uint8), sent.view(torch.uint8)  # not every type can be sent
    dist.all_to_all_single(*as_bytes, into, out, group=group.of_thread)
    pieces = [piece for each in taken for piece in each]
    found = zip(pieces, received.split([end - begin for _, begin, end in pieces]), strict=True)
    return _joined([part for _, part in sorted(found, key=lambda each: each[0])], values)


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts)) if parts else like[:0]


class RowSharding(Sharding):
    """The rows of a weight that each process keeps in host memory.

    Its sums take tensors on any device; conversions from and to DTensors are collectives, too.

    Args:
        shape: of the whole weight, which has a dimension at least.
        group: the processes.
        height: number of rows that stay together; it divides the first dimension.
    """

    def __init__(self, shape: torch.Size, group: HostGroup, height: int = 1) -> None:
        self.shape = shape
        self._group = group
        self._mesh, self._placements = group.mesh, [Shard(0)]
        self.boundaries = self._chunks(height)
        begin, end = self.boundaries[group.rank : group.rank + 2]
        self._coordinates = {0: torch.arange(begin, end)}
        self.local_shape = torch.Size((end - begin, *shape[1:]))

    @property
    def rows(self) -> tuple[int, int] | None:
        """The first row of this process' part, and the one after its last."""
        return self.boundaries[self._group.rank], self.boundaries[self._group.rank + 1]

    def _reduce(self, value: Tensor, op: Any) -> Tensor:
        total = value.cpu()
        dist.all_reduce(total, op=op, group=self._group.of_thread)
        return total.to(value.device)

    def to_local(self, whole: Tensor) -> Tensor:
        """Return this process' part of a tensor in the weight's shape."""
        if not isinstance(whole, DTensor):
            return super().to_local(whole)
        return self._exchanged(to_local(whole), self._of_dtensor, self._own).view(self.local_shape)

    def to_dtensor(self, part: Tensor) -> Tensor:
        """Return a tensor in the weight's shape of which `part` is this process' part."""
        return self._as_dtensor(self._exchanged(part, self._own, self._of_dtensor).view(-1, *self.shape[1:]))

    def full_tensor(self, part: Tensor, everywhere: bool = False) -> Tensor:
        """Return the whole tensor, on the host; see `Sharding.full_tensor`."""
        whole, size, rank = [(0, self.shape.numel())], self._group.size, self._group.rank
        found = self._exchanged(part, self._own, Shares([whole if everywhere or to == 0 else [] for to in range(size)]))
        return found.view(self.shape) if everywhere or rank == 0 else found

    def _exchanged(self, part: Tensor, before: Shares, after: Shares) -> Tensor:
        return exchange(part.cpu().contiguous().view(-1), before, after, self._group)

    def _chunks(self, height: int) -> list[int]:
        """Return where the rows of each process begin, and where all end."""
        rows = -(-self.shape[0] // height // self._group.size) * height
        return [min(rank * rows, self.shape[0]) for rank in range(self._group.size + 1)]

    @property
    def _own(self) -> Shares:
        return self._shares(self.boundaries)

    @property
    def _of_dtensor(self) -> Shares:
        """What a DTensor has on each process: it keeps no rows together."""
        return self._shares(self._chunks(height=1))

    def _shares(self, boundaries: Sequence[int]) -> Shares:
        return Shares.between([row * self.shape[1:].numel() for row in boundaries])
