"""Weights that are sharded over devices: the part of this process, sums over all parts, and checks that ranks agree."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_topkast.errors import TopKastError

_CHUNK = 1 << 22  # entries whose 64-bit places are in memory at a time


class Sharding:
    """The part of a weight that this process holds; a weight that is not a DTensor is a single part.

    Sums are collectives: every process that holds a part must call them, in the same order.

    Args:
        name: the weight's name, for errors.
        weight: the weight, whole or a DTensor.

    Raises:
        TopKastError: a placement is partial (a pending sum), or the part is not contiguous in memory.
    """

    def __init__(self, name: str, weight: Tensor) -> None:
        self.shape = weight.shape
        self._mesh: Any = None
        self._placements: Sequence[Any] = ()
        # for each sharded dimension, the global coordinates of this process' slices
        self._coordinates: dict[int, Tensor] = {}
        self.local_shape = to_local(weight.detach()).shape
        if not isinstance(weight, DTensor):
            return
        self._mesh = weight.device_mesh
        self._placements = placements = list[Any](weight.placements)
        if any(placement.is_partial() for placement in placements):
            raise TopKastError(
                f"expected '{name}' to be a DTensor with Shard or Replicate placements, got partial sums "
                f"({self._placements}); redistribute it"
            )
        for dim in sorted({placement.dim for placement in placements if not placement.is_replicate()}):
            along = [
                _along_first(placement) if not placement.is_replicate() and placement.dim == dim else Replicate()
                for placement in placements
            ]
            whole = torch.arange(self.shape[dim], device=weight.device)
            self._coordinates[dim] = to_local(distribute_tensor(whole, self._mesh, along, src_data_rank=None))
        part = to_local(weight.detach())
        expected = self.local_sizes
        # FSDP2 gives processes without entries a part that has size 0 in every dimension
        if (
            part.numel() != math.prod(expected)
            or (part.numel() and list(part.shape) != expected)
            or (not part.is_contiguous())
        ):
            raise TopKastError(
                f"expected '{name}', sharded as {self._placements}, to have a contiguous part of shape "
                f"{tuple(expected)}, got shape {tuple(part.shape)} and strides {part.stride()}; exclude it"
            )

    def __deepcopy__(self, memo: Any) -> "Sharding":
        """Return the object itself, since it never changes and process groups cannot be copied."""
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether other processes hold other parts of the weight."""
        return bool(self._coordinates)

    @property
    def rows(self) -> tuple[int, int] | None:
        """The first row of this process' part, and the one after its last; None if it is not known to be such rows."""
        return None

    @property
    def local_sizes(self) -> list[int]:
        """Sizes of this process' part in each dimension; FSDP2 gives an empty part another shape."""
        return [len(self._coordinates.get(dim, range(size))) for dim, size in enumerate(self.shape)]

    @property
    def sharded_dims(self) -> set[int]:
        """The dimensions along which the weight is sharded."""
        return set(self._coordinates)

    def local_coordinates(self, dim: int) -> Tensor:
        """Return the coordinates of this process' part along `dim` of the whole weight: int64, ascending."""
        return self._coordinates[dim] if dim in self._coordinates else torch.arange(self.shape[dim])

    @property
    def is_dtensor(self) -> bool:
        """Whether the weight is a DTensor, sharded or replicated."""
        return self._mesh is not None

    def sum(self, value: Tensor) -> Tensor:
        """Return `value` summed over all parts; a collective if the weight is sharded.

        Args:
            value: a tensor of the same shape on every process, on the weight's device; it may be overwritten.
        """
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """Return the largest `value` of all parts, entry by entry; a collective as `sum`."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def _reduce(self, value: Tensor, op: Any) -> Tensor:
        for dim, placement in enumerate(self._placements):
            if not placement.is_replicate():
                dist.all_reduce(value, op=op, group=self._mesh.get_group(dim))
        return value

    @cached_property
    def _first_entry(self) -> int | None:
        """The flat index at which this part begins, if it is consecutive rows, as FSDP2's is.

        Found once, since a GPU is waited for.
        """
        rows = self._coordinates.get(0)
        if rows is None or len(self._coordinates) > 1 or not rows.numel():
            return None
        first, last = int(rows[0]), int(rows[-1])
        return first * self.shape[1:].numel() if last - first == rows.numel() - 1 else None

    def flat_indices(self, positions: Tensor) -> Tensor:
        """Return flat indices in the whole weight for flat positions in this part: int64, ascending if those are."""
        if not self.is_sharded:
            return positions
        if self._first_entry is not None:
            return positions + self._first_entry
        indices = torch.zeros_like(positions)
        for dim, size in reversed(list(enumerate(self.local_sizes))):
            coordinate = positions % max(size, 1)
            positions = positions // max(size, 1)
            if dim in self._coordinates:
                coordinate = self._coordinates[dim][coordinate]
            indices += coordinate * math.prod(self.shape[dim + 1 :])
        return indices

    def to_local(self, whole: Tensor) -> Tensor:
        """Return this process' part of a tensor in the weight's shape, whole or a DTensor; no collective."""
        if isinstance(whole, DTensor):
            return to_local(whole)
        for dim, coordinates in self._coordinates.items():
            whole = whole.index_select(dim, coordinates.to(whole.device))
        return whole.reshape(self.local_shape) if self._coordinates else whole

    def to_dtensor(self, part: Tensor) -> Tensor:
        """Return a tensor in the weight's shape of which `part` is this process' part; no collective."""
        return part if self._mesh is None else self._as_dtensor(part.reshape(self.local_sizes))

    def _as_dtensor(self, local: Tensor) -> Tensor:
        strides = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self._mesh, self._placements, run_check=False, shape=self.shape, stride=strides
        )

    def full_tensor(self, part: Tensor, everywhere: bool = False) -> Tensor:
        """Return the whole tensor of which `part` is this process' part, on the host; a collective.

        Args:
            part: in the shape of this process' part.
            everywhere: on every rank, rather than on rank 0 and empty on the other ranks, to save memory.
        """
        whole = self.to_dtensor(part).full_tensor()  # type: ignore[attr-defined]
        return whole.cpu() if everywhere or dist.get_rank() == 0 else whole.new_empty(0, device="cpu")

    def to_save(self, part: Tensor, gathered: bool) -> Tensor:
        """Return what a saved state has of a tensor of which `part` is this process' part: a contiguous copy on CPU.

        Args:
            part: in the shape of this process' part.
            gathered: return the whole tensor of a sharded weight on rank 0, a collective, rather than a DTensor.
        """
        if not self.is_dtensor:
            return torch.empty(part.shape, dtype=part.dtype).copy_(part)
        return self.full_tensor(part) if gathered else self.to_dtensor(part.clone()).cpu()


def to_local(tensor: Tensor) -> Tensor:
    """Return this process' part of a DTensor, sharing its memory; return any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _along_first(placement: Any) -> Any:
    """Return the same placement for a 1-D tensor."""
    if type(placement) is Shard:
        return Shard(0)
    return type(placement)(0, split_factor=placement.split_factor)  # FSDP2 over tensor parallelism


def check_ranks_agree(names: Sequence[str], tiers: Sequence[Tensor], shardings: Sequence[Sharding] = ()) -> None:
    """Compare the sets of all weights over all ranks by digests, with a few small collectives; none on one process.

    Args:
        names: of the weights.
        tiers: of each weight, or other integers that these follow from; for a sharded weight this rank's part.
        shardings: the sharding of each weight, if any is sharded. The digest covers the whole weight, so replicas must
            agree however they are sharded, even if their ranks share no process group.

    Raises:
        TopKastError: sets differ; raised on every rank, with the name of the first such weight.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or not tiers:
        return
    digests = [_digest(tensor) for tensor in tiers]
    for i, sharding in enumerate(shardings):
        if sharding.is_sharded:
            digests[i] = sharding.sum(_digest_of_part(tiers[i], sharding))
    own = torch.stack([digest.cpu() for digest in digests])
    own = own.cuda() if dist.get_backend() == "nccl" else own
    lowest, highest = own.clone(), own.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    differing = [name for name, differs in zip(names, (lowest != highest).tolist(), strict=True) if differs]
    if differing:
        raise TopKastError(
            f"the ranks chose different active sets for '{differing[0]}' ({len(differing)} weights differ): their "
            "weights differ. Every rank must start from the same weights and get the same gradients (DDP and FSDP2 "
            "ensure both over the ranks of their mesh; do not change parameters on one rank only)"
        )


def _digest(tiers: Tensor) -> Tensor:
    """Return a 64-bit digest of `tiers` as an int64 scalar on its device: a weighted sum that wraps around."""
    flat = tiers.contiguous().view(-1).view(torch.uint8)
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    return (words * _multipliers(torch.arange(words.numel(), device=words.device))).sum()


def _digest_of_part(tiers: Tensor, sharding: Sharding) -> Tensor:
    """Return the digest of a part, entry by entry; the digests of all parts add up to that of the whole weight."""
    flat = tiers.contiguous().view(-1)
    digest = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        entries = flat[start : start + _CHUNK]
        places = sharding.flat_indices(torch.arange(start, start + entries.numel(), device=flat.device))
        digest += (entries * _multipliers(places)).sum()
    return digest


def _multipliers(places: Tensor) -> Tensor:
    # odd numbers from a linear congruence, so that swapped or shifted entries change the sum
    return (places * 6364136223846793005 + 1442695040888963407) | 1


@torch.no_grad()
def from_rank_0_(tensor: Tensor) -> None:
    """Copy the tensor of rank 0 to every rank, as DDP does for parameters, which dense θ of packed weights is not."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    on_gpu = dist.get_backend() == "nccl" and tensor.device.type == "cpu"
    sent = tensor.detach().cuda() if on_gpu else tensor.detach().contiguous()
    dist.broadcast(sent, src=0)
    tensor.detach().copy_(sent)
