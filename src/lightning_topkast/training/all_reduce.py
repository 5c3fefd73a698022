"""DDP's all-reduce of gradients, sending of a masked weight's only what is on B.

A communication hook packs each bucket into one dense vector: the gradients of dense parameters whole, those of masked
weights at B's entries, in the order of B's flat indices. Every rank knows B, so no index is sent. What reduces the
vector is another hook, PyTorch's own for one. Packed weights need none of this: their gradient is B's values.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # no Python file names it
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lightning_topkast.errors import TopKastError
from lightning_topkast.ops.flat import flat, indices
from lightning_topkast.topkast import TopKast
from lightning_topkast.weights import SparseWeight

Hook = Callable[[Any, Any], Future[Tensor]]

INNER_HOOKS: dict[str, Hook] = {
    "sparse": allreduce_hook,
    "sparse_bf16": bf16_compress_hook,
    "sparse_fp16": fp16_compress_hook,
}


def sparse_all_reduce(*engines: TopKast, hook: Hook = allreduce_hook) -> Hook:
    """A DDP communication hook that sends the gradients of masked weights on B only; they are zero elsewhere.

        ddp.register_comm_hook(None, sparse_all_reduce(topkast))

    It keeps B's flat indices from one refresh to the next, on the parameters' device: 8 bytes an entry of B. While an
    engine accompanies no optimizer, its weights' gradients are sent whole.

    Args:
        engines: those that work on the wrapped model.
        hook: what reduces the packed vector, and gets the state given to `register_comm_hook`: PyTorch's all-reduce,
            its 16-bit hooks and wrappers, or PowerSGD, which compresses dense gradients then, and whose error feedback
            can't follow B's change of size when exploration stops. Not post-local SGD: ranks must choose the same sets.
    """
    return sparse_all_reduce_of(lambda: engines, hook)


def sparse_all_reduce_of(engines: Callable[[], Iterable[TopKast]], hook: Hook) -> Hook:
    """`sparse_all_reduce` for engines that are yet to be made."""
    kept: WeakKeyDictionary[SparseWeight, tuple[int, Tensor]] = WeakKeyDictionary()

    def entries_of(weight: SparseWeight) -> Tensor:
        """B's flat indices in the parameter's memory order, which is also the bucket's."""
        changes, entries = kept.get(weight, (None, None))
        if entries is None or changes != weight.changes:
            entries = indices(flat(weight.updated))
            kept[weight] = weight.changes, entries
        return entries

    # DDP checks both annotations, and reads the name
    def sparse_all_reduce_hook(state: Any, bucket: GradBucket) -> Future[Tensor]:
        masked: dict[Tensor, SparseWeight] = {
            weight.parameter: weight
            for engine in engines()
            if engine.is_attached and not engine.needs_gradients
            for weight in engine.weights.values()
            if weight.execution == "masked"
        }
        weights = [masked.get(parameter) for parameter in bucket.parameters()]
        if not any(weights):
            return hook(state, bucket)
        packed = PackedBucket(bucket, [None if weight is None else entries_of(weight) for weight in weights])
        return hook(state, packed).then(packed.unpack)

    return sparse_all_reduce_hook


class PackedBucket:
    """A bucket of gradients packed into one vector, with all that a hook asks of DDP's own `GradBucket`.

    Args:
        bucket: to be packed, of DDP or packed already.
        entries: for each of its gradients the flat indices of what is packed, or None for all of it.
    """

    def __init__(self, bucket: "GradBucket | PackedBucket", entries: Sequence[Tensor | None]) -> None:
        self._bucket = bucket
        self._entries = entries
        self._whole = bucket.buffer()
        self._gradients = [flat(gradient) for gradient in bucket.gradients()]
        self._lengths = [
            gradient.numel() if kept is None else kept.numel()
            for gradient, kept in zip(self._gradients, entries, strict=True)
        ]
        self._buffer = self._whole.new_empty(sum(self._lengths))
        parts = self._buffer.split(self._lengths)
        for gradient, kept, part in zip(self._gradients, entries, parts, strict=True):
            if kept is None:
                part.copy_(gradient)
            else:
                torch.index_select(gradient, 0, kept, out=part)

    def unpack(self, reduced: Future[Tensor]) -> Tensor:
        """Write the reduced vector back into the bucket, zeros outside the entries; return the bucket's buffer."""
        # the future's own tensor, not ours: on a GPU its memory is guarded for the stream that this runs on
        parts = reduced.value().to(self._whole.dtype).split(self._lengths)
        for gradient, kept, part in zip(self._gradients, self._entries, parts, strict=True):
            if kept is None:
                gradient.copy_(part)
            else:
                # What ranks hold outside B differs, and must not: gradient scalers and norms read it.
                gradient.zero_().index_copy_(0, kept, part)
        return self._whole

    def buffer(self) -> Tensor:
        """The packed vector."""
        return self._buffer

    def set_buffer(self, tensor: Tensor) -> None:
        """Replace the packed vector by one as long, of another dtype for example."""
        self._buffer = tensor

    def gradients(self) -> list[Tensor]:
        """Views of the packed vector: in their parameter's shape if whole, else 1-D."""
        return [
            part.view(parameter.shape) if part.numel() == parameter.numel() else part
            for part, parameter in zip(self._buffer.split(self._lengths), self.parameters(), strict=True)
        ]

    def parameters(self) -> list[Tensor]:
        """The parameters whose gradients these are."""
        return self._bucket.parameters()

    def index(self) -> int:
        """Of the bucket, in the order in which DDP reduces them."""
        return self._bucket.index()

    def is_last(self) -> bool:
        """Whether it is the last bucket of this backward pass."""
        return self._bucket.is_last()


def register(ddp: DistributedDataParallel, engines: Sequence[TopKast], all_reduce: str) -> None:
    """Let `ddp` reduce as `all_reduce` says.

    Raises:
        TopKastError: it has a communication hook already.
    """
    if all_reduce == "dense":
        return
    try:
        ddp.register_comm_hook(None, sparse_all_reduce(*engines, hook=INNER_HOOKS[all_reduce]))
    except RuntimeError as error:
        raise TopKastError(
            f"all_reduce='{all_reduce}' is a communication hook, and DDP takes one only, which it has already: leave "
            "all_reduce='dense' and give DDP that hook in ours, "
            "DDPStrategy(ddp_comm_hook=callback.all_reduce_hook(hook))"
        ) from error
