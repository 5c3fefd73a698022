"""The communication hook that a Trainer's DDP gets."""

from collections.abc import Sequence

import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_topkast.errors import TopKastError
from lightning_topkast.gradients import AllReduce, TopKGradients
from lightning_topkast.topkast import TopKast
from lightning_topkast.training.all_reduce import INNER_HOOKS, sparse_all_reduce
from lightning_topkast.training.top_k_all_reduce import TopKAllReduce


def register(
    ddp: DistributedDataParallel,
    engines: Sequence[TopKast],
    all_reduce: AllReduce,
    scaler: torch.amp.GradScaler | None,
) -> TopKAllReduce | None:
    """Register the communication hook for `all_reduce` on `ddp`; return it if it has a state.

    Raises:
        TopKastError: `ddp` already has a communication hook, or too many ranks for `TopKGradients`.
    """
    if all_reduce == "dense":
        return None
    compressed = None
    if isinstance(all_reduce, TopKGradients):
        compressed = TopKAllReduce(*engines, gradients=all_reduce, scaler=scaler)
    hook = compressed.hook if compressed else sparse_all_reduce(*engines, hook=INNER_HOOKS[str(all_reduce)])
    try:
        ddp.register_comm_hook(None, hook)
    except RuntimeError as error:
        raise TopKastError(
            f"all_reduce={all_reduce!r} is a communication hook, but DDP supports only one and already has one; use "
            "all_reduce='dense' and wrap the other hook, DDPStrategy(ddp_comm_hook=callback.all_reduce_hook(hook))"
        ) from error
    return compressed
