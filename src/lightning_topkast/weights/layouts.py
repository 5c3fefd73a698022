"""Which entries of a weight its packed values are, and products by them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_topkast.errors import TopKastError
from lightning_topkast.method.structure import Blocks, Entries, units_in_order
from lightning_topkast.ops import BlockPattern, Pattern, block_sparse_linear, sparse_linear


@dataclass(frozen=True, eq=False)
class Packing(ABC):
    r"""The places of packed values: first A's, then those of B\A; see `Entries.order`.

    It never changes; a refresh makes a new one. Values beyond the places, once exploration has stopped, stay zero.

    Args:
        shape: the weight's own shape.
        active_count: |A|.
        updated_count: |B|.
        units: where in the grid B's units are, in that order, on CPU; None where entries are the units.
    """

    shape: torch.Size
    active_count: int
    updated_count: int
    units: Tensor | None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its indices are."""

    @property
    def nbytes(self) -> int:
        """Bytes that its indices take."""
        return sum(part.nbytes for part in self._parts().values())

    def to(self, device: torch.device) -> "Packing":
        """The same on another device."""
        if device == self.device:
            return self
        return replace(self, **{name: part.to(device) for name, part in self._parts().items()})

    def _parts(self) -> dict[str, Any]:
        """What is on the device, which each kind of packing adds to the fields of all."""
        own = fields(self)[len(fields(Packing)) :]
        return {field.name: getattr(self, field.name) for field in own}

    @abstractmethod
    def indices(self) -> Tensor:
        """Flat indices of the packed values."""

    def product(self, input: Tensor, values: Tensor, bias: Tensor | None, operators: str, transposed: bool) -> Tensor:
        """The last dimension of `input` times the rows (`transposed`: columns) of A, plus `bias`."""
        raise TopKastError("these packed values are of a weight that its layer wants whole")

    def unpack(self, values: Tensor) -> Tensor:
        """α, dense, in the weight's shape; differentiable, with a gradient for all of B."""
        dense: Tensor = _Unpack.apply(values, self)  # type: ignore[no-untyped-call]
        return dense


@dataclass(frozen=True, eq=False)
class Listed(Packing):
    """Of a weight that its layer wants whole.

    Args:
        entries: flat indices.
    """

    entries: Tensor

    @property
    def device(self) -> torch.device:
        """Where its indices are."""
        return self.entries.device

    def indices(self) -> Tensor:
        """Flat indices of the packed values."""
        return self.entries


@dataclass(frozen=True, eq=False)
class InRows(Packing):
    r"""Of a weight that is multiplied by entry by entry.

    Args:
        active: A as a sparse matrix.
        exploring: B\A, likewise.
    """

    active: Pattern
    exploring: Pattern

    @property
    def device(self) -> torch.device:
        """Where its indices are."""
        return self.active.col.device

    def indices(self) -> Tensor:
        """Flat indices of the packed values."""
        return torch.cat([_flat_indices(pattern) for pattern in (self.active, self.exploring)])

    def product(self, input: Tensor, values: Tensor, bias: Tensor | None, operators: str, transposed: bool) -> Tensor:
        """The last dimension of `input` times the rows (`transposed`: columns) of A, plus `bias`."""
        # chosen before the model was moved, perhaps to a device that the compiled ones don't run on
        operators = operators if values.device.type == "cpu" else "torch"
        return sparse_linear(input, values, bias, self.active, self.exploring, operators, transposed)


@dataclass(frozen=True, eq=False)
class InBlocks(Packing):
    """Of a weight that is multiplied by block by block.

    Args:
        pattern: where the blocks are.
    """

    pattern: BlockPattern

    @property
    def device(self) -> torch.device:
        """Where its indices are."""
        return self.pattern.device

    def indices(self) -> Tensor:
        """Flat indices of the packed values."""
        return self.pattern.flat_indices()

    def product(self, input: Tensor, values: Tensor, bias: Tensor | None, operators: str, transposed: bool) -> Tensor:
        """The last dimension of `input` times the rows (`transposed`: columns) of A, plus `bias`."""
        blocks = values.view(-1, *self.pattern.block_shape)
        return block_sparse_linear(input, blocks, bias, self.pattern, operators, transposed)


def pack(tiers: Tensor, shape: torch.Size, units: Entries, products: bool) -> Packing:
    """The places for these sets.

    Args:
        tiers: uint8, on CPU, in the shape of the weight's grid of units.
        shape: of the weight.
        units: what the sets are made of, which divide the weight.
        products: whether its layer multiplies by the packed values, with the first dimension as rows.
    """
    active, exploring = units_in_order(tiers)
    size = shape.numel() // max(tiers.numel(), 1)
    both = torch.cat([active, exploring])
    sets = (shape, active.numel() * size, both.numel() * size, both if size > 1 else None)
    if not products:
        narrow = torch.int32 if shape.numel() <= torch.iinfo(torch.int32).max else torch.int64
        return Listed(*sets, units.entries(both, shape).to(narrow))
    if isinstance(units, Blocks):
        return InBlocks(*sets, BlockPattern.from_tiers(tiers.reshape(len(tiers), -1), (units.outputs, units.inputs)))
    matrix = (shape[0], shape.numel() // max(shape[0], 1))
    return InRows(*sets, Pattern.from_flat(active, matrix), Pattern.from_flat(exploring, matrix, transpose=False))


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
