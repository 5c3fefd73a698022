"""DDP's all-reduce of gradients that sends the gradients of masked weights on B only.

A communication hook packs each bucket into one dense vector: the whole gradients of dense parameters, and those of
masked weights at B's entries, in the order of B's flat indices. Every rank knows B, so no indices are sent. Another
hook, such as PyTorch's own, reduces the vector. Packed weights need no hook, since their gradient has only B's values.
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
    """Return a DDP communication hook that sends the gradients of masked weights on B only; they are zero elsewhere.

        ddp.register_comm_hook(None, sparse_all_reduce(topkast))

    The hook keeps B's flat indices from one refresh to the next, on the parameters' device: 8 bytes per entry of B.
    While an engine is attached to no optimizer, the gradients of its weights are sent whole.

    Args:
        engines: the engines of the wrapped model.
        hook: reduces the packed vector, and gets the state given to `register_comm_hook`: PyTorch's all-reduce, its
            16-bit hooks and wrappers, or PowerSGD, which then compresses dense gradients, and whose error feedback does
            not support the change of B's size when exploration stops. Post-local SGD is not supported, since ranks must
            choose the same sets.
    """
    return sparse_all_reduce_of(lambda: engines, hook)


def sparse_all_reduce_of(engines: Callable[[], Iterable[TopKast]], hook: Hook) -> Hook:
    """Return `sparse_all_reduce` for engines that are created later."""
    kept: WeakKeyDictionary[SparseWeight, tuple[int, Tensor]] = WeakKeyDictionary()

    def entries_of(weight: SparseWeight) -> Tensor:
        """Return B's flat indices in the parameter's memory order, which is also the bucket's."""
        version, entries = kept.get(weight, (None, None))
        if entries is None or version != weight.version:
            entries = indices(flat(weight.updated))
            kept[weight] = weight.version, entries
        return entries

    # DDP checks both annotations and reads the name
    def sparse_all_reduce_hook(state: Any, bucket: GradBucket) -> Future[Tensor]:
        sparse = reduced_weights(engines())
        weights = [sparse.get(parameter) for parameter in bucket.parameters()]
        if all(weight is None or weight.is_packed for weight in weights):
            return hook(state, bucket)
        packed = PackedBucket(
            bucket, [None if weight is None or weight.is_packed else entries_of(weight) for weight in weights]
        )
        return hook(state, packed).then(packed.unpack)

    return sparse_all_reduce_hook


def reduced_weights(engines: Iterable[TopKast]) -> dict[Tensor, SparseWeight]:
    """Return parameter → sparse weight of which only the gradient on B is needed in this backward pass."""
    return {
        weight.parameter: weight
        for engine in engines
        if engine.is_attached and not engine.needs_gradients
        for weight in engine.weights.values()
    }


class PackedBucket:
    """A bucket of gradients packed into one vector, with the interface of DDP's own `GradBucket`.

    Args:
        bucket: a bucket of DDP or an already packed one.
        entries: for each gradient the flat indices of the packed entries, or None for all entries.
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
        """Write the reduced vector back into the bucket, zeros outside the entries; return the bucket's buffer.

        Gradients of which no entry was packed stay as they are.
        """
        # the future's own tensor, not ours: on a GPU its memory is synchronised with the current stream
        parts = reduced.value().to(self._whole.dtype).split(self._lengths)
        for gradient, kept, part in zip(self._gradients, self._entries, parts, strict=True):
            if kept is None:
                gradient.copy_(part)
            elif kept.numel():
                # Gradients outside B differ between ranks and are zeroed, since gradient scalers and norms read them.
                gradient.zero_().index_copy_(0, kept, part)
        return self._whole

    def buffer(self) -> Tensor:
        """Return the packed vector."""
        return self._buffer

    def set_buffer(self, tensor: Tensor) -> None:
        """Replace the packed vector with another of the same length, for example of another dtype."""
        self._buffer = tensor

    def gradients(self) -> list[Tensor]:
        """Return views of the packed vector: in their parameter's shape if whole, else 1-D; none that are empty."""
        parts = [part for part in self._buffer.split(self._lengths) if part.numel()]
        return [
            part.view(parameter.shape) if part.numel() == parameter.numel() else part
            for part, parameter in zip(parts, self.parameters(), strict=True)
        ]

    def parameters(self) -> list[Tensor]:
        """Return the parameters of these gradients."""
        return [each for each, length in zip(self._bucket.parameters(), self._lengths, strict=True) if length]

    def index(self) -> int:
        """Return the index of the bucket in the order in which DDP reduces the buckets."""
        return self._bucket.index()

    def is_last(self) -> bool:
        """Return whether this is the last bucket of the backward pass."""
        return self._bucket.is_last()
