"""What ranks must agree on."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_topkast.errors import TopKastError


def check_ranks_agree(names: Sequence[str], tiers: Sequence[Tensor]) -> None:
    """Compare every weight's sets over all ranks by a digest: one small collective, none on a single process.

    Raises:
        TopKastError: on every rank, with the first weight whose sets differ.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or not tiers:
        return
    own = torch.stack([_digest(tensor) for tensor in tiers])
    lowest, highest = own.clone(), own.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    differing = [name for name, differs in zip(names, (lowest != highest).tolist(), strict=True) if differs]
    if differing:
        raise TopKastError(
            f"the ranks chose different active sets for '{differing[0]}' ({len(differing)} weights differ): their "
            "weights have drifted apart. Every rank must start from the same weights and see the same gradients "
            "(DDP sees to both; do not change parameters on one rank only)"
        )


def _digest(tiers: Tensor) -> Tensor:
    """64 bits of `tiers` as an int64 scalar on its device: a weighted sum that wraps around."""
    flat = tiers.contiguous().view(-1)
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    # odd multipliers from a linear congruence, so that swapped or shifted words change the sum
    multipliers = torch.arange(words.numel(), device=words.device) * 6364136223846793005 + 1442695040888963407
    return (words * (multipliers | 1)).sum()


@torch.no_grad()
def from_rank_0_(tensor: Tensor) -> None:
    """Give every rank the tensor of rank 0, as DDP does later for parameters, of which packed weights are no more."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    on_gpu = dist.get_backend() == "nccl" and tensor.device.type == "cpu"
    sent = tensor.detach().cuda() if on_gpu else tensor.detach().contiguous()
    dist.broadcast(sent, src=0)
    tensor.detach().copy_(sent)
