"""Weights that are sharded over devices: this process' part, sums over all parts, and what ranks must agree on."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_topkast.errors import TopKastError

_CHUNK = 1 << 22  # entries whose 64-bit places are in memory at a time


class Sharding:
    """The part of a weight that this process holds; a weight that is no DTensor is a single part.

    Sums are collectives: every process that holds a part must ask for them, in the same order.

    Args:
        name: the weight's name, for errors.
        weight: the weight, whole or a DTensor.

    Raises:
        TopKastError: a placement whose entries are sums yet to be made, or not contiguous in memory.
    """

    def __init__(self, name: str, weight: Tensor) -> None:
        self.shape = weight.shape
        self._mesh: Any = None
        self._placements: Sequence[Any] = ()
        # for every sharded dimension, the global coordinates of this process' slices
        self._coordinates: dict[int, Tensor] = {}
        self.part_shape = own_part(weight.detach()).shape
        if not isinstance(weight, DTensor):
            return
        self._mesh = weight.device_mesh
        self._placements = placements = list[Any](weight.placements)
        if any(placement.is_partial() for placement in placements):
            raise TopKastError(
                f"'{name}' is a DTensor of partial sums ({self._placements}), whose entries no process knows; "
                "redistribute it to Shard or Replicate"
            )
        for dim in sorted({placement.dim for placement in placements if not placement.is_replicate()}):
            along = [
                _along_first(placement) if not placement.is_replicate() and placement.dim == dim else Replicate()
                for placement in placements
            ]
            whole = torch.arange(self.shape[dim], device=weight.device)
            self._coordinates[dim] = own_part(distribute_tensor(whole, self._mesh, along, src_data_rank=None))
        part = own_part(weight.detach())
        expected = self.sizes
        # FSDP2 gives processes for which nothing is left a part without size in any dimension
        if (
            part.numel() != math.prod(expected)
            or (part.numel() and list(part.shape) != expected)
            or (not part.is_contiguous())
        ):
            raise TopKastError(
                f"'{name}' is sharded as {self._placements} with a part of shape {tuple(part.shape)} and strides "
                f"{part.stride()}, expected a contiguous one of {tuple(expected)}; exclude it"
            )

    def __deepcopy__(self, memo: Any) -> "Sharding":
        """Itself: it never changes, and the groups of processes that it names can't be copied."""
        return self

    @property
    def is_cut(self) -> bool:
        """Whether other processes hold other parts."""
        return bool(self._coordinates)

    @property
    def sizes(self) -> list[int]:
        """Of this process' part, in every dimension; FSDP2 gives it another shape where nothing is left."""
        return [len(self._coordinates.get(dim, range(size))) for dim, size in enumerate(self.shape)]

    @property
    def cuts(self) -> set[int]:
        """The dimensions that are cut."""
        return set(self._coordinates)

    def coordinates(self, dim: int) -> Tensor:
        """Where along `dim` of the whole weight this process' part lies: int64, ascending."""
        return self._coordinates[dim] if dim in self._coordinates else torch.arange(self.shape[dim])

    @property
    def is_distributed(self) -> bool:
        """Whether the weight is a DTensor, be it a replicated one."""
        return self._mesh is not None

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over all parts; a collective if there are others.

        Args:
            value: any tensor of one shape on every process, on the weight's device; it may be overwritten.
        """
        for dim, placement in enumerate(self._placements):
            if not placement.is_replicate():
                dist.all_reduce(value, group=self._mesh.get_group(dim))
        return value

    def flat_indices(self, positions: Tensor) -> Tensor:
        """Flat indices, in the whole weight, of flat positions in this part; int64, ascending if those are."""
        if not self.is_cut:
            return positions
        indices = torch.zeros_like(positions)
        for dim, size in reversed(list(enumerate(self.sizes))):
            coordinate = positions % max(size, 1)
            positions = positions // max(size, 1)
            if dim in self._coordinates:
                coordinate = self._coordinates[dim][coordinate]
            indices += coordinate * math.prod(self.shape[dim + 1 :])
        return indices

    def part_of(self, whole: Tensor) -> Tensor:
        """This process' part of a tensor in the weight's shape, whole or a DTensor; no collective."""
        if isinstance(whole, DTensor):
            return own_part(whole)
        for dim, coordinates in self._coordinates.items():
            whole = whole.index_select(dim, coordinates.to(whole.device))
        return whole.reshape(self.part_shape) if self._coordinates else whole

    def join(self, part: Tensor) -> Tensor:
        """A tensor in the weight's shape of which `part` is this process' part; no collective."""
        if self._mesh is None:
            return part
        strides = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            part.reshape(self.sizes), self._mesh, self._placements, run_check=False, shape=self.shape, stride=strides
        )

    def gather(self, part: Tensor) -> Tensor:
        """The tensor in the weight's shape of which `part` is this process' part, on the host; a collective.

        Returns:
            the whole on rank 0, an empty tensor on the others, which need not find room for it.
        """
        whole = self.join(part).full_tensor()  # type: ignore[attr-defined]
        return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0, device="cpu")


def own_part(tensor: Tensor) -> Tensor:
    """This process' part of a DTensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _along_first(placement: Any) -> Any:
    """The same cut for a 1-D tensor."""
    if type(placement) is Shard:
        return Shard(0)
    return type(placement)(0, split_factor=placement.split_factor)  # FSDP2 over tensor parallelism


def check_ranks_agree(names: Sequence[str], tiers: Sequence[Tensor], shardings: Sequence[Sharding] = ()) -> None:
    """Compare every weight's sets over all ranks by a digest: a small collective or two, none on a single process.

    Args:
        names: of the weights.
        tiers: each weight's tiers, of a sharded one this rank's part.
        shardings: how each weight is sharded, if any is. The digest is of the whole weight, so that copies must agree
            however they are cut, also where the ranks of one know nothing of those of the other.

    Raises:
        TopKastError: on every rank, with the first weight whose sets differ.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or not tiers:
        return
    digests = [_digest(tensor) for tensor in tiers]
    for i, sharding in enumerate(shardings):
        if sharding.is_cut:
            digests[i] = sharding.sum(_digest_of_part(tiers[i], sharding))
    own = torch.stack(digests)
    lowest, highest = own.clone(), own.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    differing = [name for name, differs in zip(names, (lowest != highest).tolist(), strict=True) if differs]
    if differing:
        raise TopKastError(
            f"the ranks chose different active sets for '{differing[0]}' ({len(differing)} weights differ): their "
            "weights have drifted apart. Every rank must start from the same weights and see the same gradients "
            "(DDP and FSDP2 see to both, over the ranks of their mesh; do not change parameters on one rank only)"
        )


def _digest(tiers: Tensor) -> Tensor:
    """64 bits of `tiers` as an int64 scalar on its device: a weighted sum that wraps around."""
    flat = tiers.contiguous().view(-1)
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    return (words * _multipliers(torch.arange(words.numel(), device=words.device))).sum()


def _digest_of_part(tiers: Tensor, sharding: Sharding) -> Tensor:
    """The same over a part, entry by entry, so that the digests of all parts add up to one of the whole."""
    flat = tiers.contiguous().view(-1)
    digest = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        entries = flat[start : start + _CHUNK]
        places = sharding.flat_indices(torch.arange(start, start + entries.numel(), device=flat.device))
        digest += (entries * _multipliers(places)).sum()
    return digest


def _multipliers(places: Tensor) -> Tensor:
    # odd, from a linear congruence, so that swapped or shifted entries change the sum
    return (places * 6364136223846793005 + 1442695040888963407) | 1


@torch.no_grad()
def from_rank_0_(tensor: Tensor) -> None:
    """Give every rank the tensor of rank 0, as DDP does later for parameters, of which packed weights are no more."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    on_gpu = dist.get_backend() == "nccl" and tensor.device.type == "cpu"
    sent = tensor.detach().cuda() if on_gpu else tensor.detach().contiguous()
    dist.broadcast(sent, src=0)
    tensor.detach().copy_(sent)
