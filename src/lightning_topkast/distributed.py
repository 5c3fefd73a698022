"""What ranks must agree on."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_topkast.errors import TopKastError
from lightning_topkast.weights import Sharding

_CHUNK = 1 << 22  # entries whose 64-bit places are in memory at a time


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
