"""Which entries of a weight its packed values are."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_topkast.ops import Pattern
from lightning_topkast.selection import ACTIVE, EXPLORING


@dataclass(frozen=True, eq=False)
class Packing:
    r"""The places of packed values: first A's, then those of B\A, each in row-major order of the weight.

    It never changes; a refresh makes a new one. Values beyond the places, once exploration has stopped, stay zero.

    Args:
        shape: the weight's own shape.
        active_count: |A|.
        updated_count: |B|.
        entries: flat indices of B, for weights that operators want whole.
        active: A as a sparse matrix, for weights that are multiplied by in packed form.
        exploring: B\A, likewise.
    """

    shape: torch.Size
    active_count: int
    updated_count: int
    entries: Tensor | None = None
    active: Pattern | None = None
    exploring: Pattern | None = None

    @classmethod
    def of(cls, tiers: Tensor, products: bool) -> "Packing":
        """Pack by `tiers` (uint8, on CPU); with `products` as sparse matrices whose rows are the first dimension."""
        flat = tiers.numpy().reshape(-1)
        active, exploring = (np.flatnonzero(flat == tier) for tier in (ACTIVE, EXPLORING))
        counts = active.size, active.size + exploring.size
        if not products:
            narrow = np.int32 if flat.size <= np.iinfo(np.int32).max else np.int64
            entries = torch.from_numpy(np.concatenate([active, exploring]).astype(narrow))
            return cls(tiers.shape, *counts, entries=entries)
        matrix = (tiers.shape[0], flat.size // tiers.shape[0])
        return cls(
            tiers.shape,
            *counts,
            active=Pattern.from_flat(torch.from_numpy(active), matrix),
            exploring=Pattern.from_flat(torch.from_numpy(exploring), matrix, transpose=False),
        )

    @property
    def device(self) -> torch.device:
        """Where its indices are."""
        return self.entries.device if self.entries is not None else self.active.col.device  # type: ignore[union-attr]

    @property
    def nbytes(self) -> int:
        """Bytes that its indices take."""
        return sum(part.nbytes for part in (self.entries, self.active, self.exploring) if part is not None)

    def to(self, device: torch.device) -> "Packing":
        """The same on another device."""
        if device == self.device:
            return self
        moved = {
            name: part.to(device)
            for name in ("entries", "active", "exploring")
            if (part := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def indices(self) -> Tensor:
        """Flat indices of the packed values."""
        if self.entries is not None:
            return self.entries
        return torch.cat([_flat_indices(pattern) for pattern in (self.active, self.exploring) if pattern is not None])

    def unpack(self, values: Tensor) -> Tensor:
        """α, dense, in the weight's shape; differentiable, with a gradient for all of B."""
        dense: Tensor = _Unpack.apply(values, self)  # type: ignore[no-untyped-call]
        return dense


def _flat_indices(pattern: Pattern) -> Tensor:
    rows = torch.arange(pattern.shape[0], device=pattern.col.device)
    starts = torch.repeat_interleave(rows * pattern.shape[1], pattern.crow.diff(), output_size=pattern.nnz)
    return starts + pattern.col


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, packing: Packing) -> Tensor:
        entries = packing.indices()
        ctx.entries, ctx.length = entries, values.numel()
        dense = values.new_zeros(packing.shape.numel())
        # index_copy_ wants int64, and is still faster with the conversion than index_put_ is without
        active = entries[: packing.active_count].long()
        dense.index_copy_(0, active, values[: packing.active_count])
        return dense.view(packing.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].new_zeros(ctx.length)
        torch.index_select(gradients[0].reshape(-1), 0, ctx.entries, out=gradient[: ctx.entries.numel()])
        return gradient, None
