"""Layouts: the places of a weight's packed values, and products with them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lightning_topkast.errors import TopKastError
from lightning_topkast.method.selection import ACTIVE, EXPLORING
from lightning_topkast.method.structure import Block, Structure
from lightning_topkast.ops import (
    BlockKernels,
    BlockPattern,
    CsrPattern,
    EntryPattern,
    Pattern,
    block_sparse_conv2d,
    block_sparse_linear,
    convolves_by_blocks,
    sparse_conv2d,
    sparse_linear,
)
from lightning_topkast.ops.addresses import overwrite
from lightning_topkast.ops.dtypes import product_dtype

Pair = tuple[int, int]

_CHUNK = 1 << 24  # units whose tiers are in memory at a time


@dataclass(frozen=True)
class Product:
    """How a layer multiplies by a packed weight.

    Args:
        groups: of a convolution; None: the weight is a matrix.
        transposed: whether the first dimension of a matrix are the layer's inputs, not its outputs.
        kernels: the kernels that multiply on CPU.
    """

    groups: int | None = None
    transposed: bool = False
    kernels: str = "torch"

    def kernels_on(self, device: torch.device) -> str:
        """Return the kernels that multiply by single entries on a device; compiled ones compute on CPU only."""
        return self.kernels if device.type == "cpu" else "torch"


@dataclass(frozen=True, eq=False)
class Layout(ABC):
    r"""The places of packed values: first those of A, then those of B\A; see `Structure.order`.

    A layout never changes; a refresh makes a new one. After exploration has stopped, values beyond the places are zero.

    Args:
        shape: the weight's own shape.
        active_count: |A|.
        updated_count: |B|.
        unit_size: number of entries of each unit.
        units: flat indices of B's units in the grid, in the same order, on CPU; None if the units are entries.
        pattern: the places on the device: flat indices, or what the kernels take.
    """

    shape: torch.Size
    active_count: int
    updated_count: int
    unit_size: int
    units: Tensor | None
    pattern: Tensor | CsrPattern | EntryPattern | BlockPattern

    @property
    def device(self) -> torch.device:
        """The device of the indices."""
        return self.pattern.device

    @property
    def nbytes(self) -> int:
        """Size of the indices in bytes."""
        return self.pattern.nbytes

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of the pattern."""
        return _tensors(self.pattern)

    @abstractmethod
    def to(self, device: torch.device) -> "Layout":
        """Return the layout for another device."""

    def placed(self, device: torch.device, before: "Layout") -> "Layout":
        """Return the layout for a device, in the memory of the one before it there if only the places differ.

        So a captured graph reads the new places. `before` must not be used any more.
        """
        placed = self.to(device)
        if placed._fixed == before._fixed and overwrite(before.tensors(), placed.tensors()):
            return replace(placed, pattern=before.pattern)
        return placed

    @property
    def _fixed(self) -> Any:
        """What a graph that reads the pattern holds fixed besides the memory."""
        return type(self), self.active_count, self.updated_count, _form(self.pattern)

    @abstractmethod
    def indices(self) -> Tensor:
        """Return the flat indices of the packed values."""

    def units_in_order(self) -> Tensor:
        r"""Return flat indices of A's units in the grid, then those of B\A, both sorted: int64, on CPU."""
        return self.indices().cpu().long() if self.units is None else self.units

    def tiers(self) -> Iterator[Tensor]:
        """Yield the units' tiers in the order of the grid, many at a time: uint8, on CPU."""
        units, active = self.units_in_order(), self.active_count // self.unit_size
        runs, end = ((units[:active], ACTIVE), (units[active:], EXPLORING)), self.shape.numel() // self.unit_size
        for begin in range(0, end, _CHUNK):
            tiers = torch.zeros(min(_CHUNK, end - begin), dtype=torch.uint8)
            for run, tier in runs:
                first, last = torch.searchsorted(run, torch.tensor([begin, begin + tiers.numel()])).tolist()
                tiers[run[first:last] - begin] = tier
            yield tiers

    def product(self, input: Tensor, values: Tensor, bias: Tensor | None, batch_last: bool = False) -> Tensor:
        """Multiply the last dimension of `input` by A, as its `Product` says, and add `bias`.

        `batch_last`: if the products need it, the batch may be last in the result's memory.
        """
        raise TopKastError("the layer of this weight computes with the dense weight; use unpack() instead of product()")

    def unpack(self, values: Tensor) -> Tensor:
        """Return α, dense, in the weight's shape; differentiable, with a gradient for all of B."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            with ThreadPoolExecutor(1) as other:  # of which the trace records nothing: it cannot hold our operators
                active = other.submit(self.indices).result()[: self.active_count].long()
            zeros = values.new_zeros(self.shape.numel())
            return zeros.index_copy(0, active, values[: self.active_count]).view(self.shape)
        dense: Tensor = _Unpack.apply(values, self)  # type: ignore[no-untyped-call]
        return dense


@dataclass(frozen=True, eq=False)
class FlatLayout(Layout):
    """The layout of a weight whose layer computes with the dense weight: flat indices."""

    pattern: Tensor

    def to(self, device: torch.device) -> Layout:
        """Return the same layout on another device."""
        return self if device == self.device else replace(self, pattern=self.pattern.to(device))

    def indices(self) -> Tensor:
        """Return the flat indices of the packed values."""
        return self.pattern


@dataclass(frozen=True, eq=False)
class MatrixLayout(Layout):
    """The layout of a weight for products with single entries, by compiled kernels or PyTorch's.

    Args:
        how: how the layer multiplies.
    """

    pattern: CsrPattern | EntryPattern
    how: Product

    @classmethod
    def of(cls, shape: torch.Size, active: Tensor, exploring: Tensor, how: Product, kernels: str) -> "MatrixLayout":
        r"""Make the layout of the flat indices of A and of B\A, on CPU, for these kernels."""
        rows, columns = _as_matrix(shape)
        pattern = (
            EntryPattern.from_flat(active, exploring, (rows, columns, 1, 1), transposed=how.transposed)
            if kernels == "compiled"
            else CsrPattern.from_flat(active, exploring, (rows, columns), how.transposed)
        )
        return cls(shape, active.numel(), active.numel() + exploring.numel(), 1, None, pattern, how)

    def to(self, device: torch.device) -> Layout:
        """Return the layout for another device; the compiled kernels compute on CPU, PyTorch's elsewhere."""
        kernels = self.how.kernels_on(device)
        if self.pattern.kernels == kernels and device == self.device:
            return self
        if isinstance(self.pattern, CsrPattern) and kernels == "torch":
            return replace(self, pattern=self.pattern.to(device))
        indices = self.indices().cpu()
        sets = indices[: self.active_count], indices[self.active_count :]
        return MatrixLayout.of(self.shape, *sets, self.how, kernels).to(device)

    def indices(self) -> Tensor:
        """Return the flat indices of the packed values."""
        return self.pattern.flat_indices()

    def product(self, input: Tensor, values: Tensor, bias: Tensor | None, batch_last: bool = False) -> Tensor:
        """Multiply the last dimension of `input` by A, as its `Product` says, and add `bias`."""
        return sparse_linear(input, values, bias, self.pattern, batch_last)


@dataclass(frozen=True, eq=False)
class ConvLayout(Layout):
    """The layout of a weight for convolutions with single entries, which are computed on CPU."""

    pattern: EntryPattern

    def to(self, device: torch.device) -> Layout:
        """Return a layout for another device, where the layer computes with the dense weight."""
        if device == self.device:
            return self
        sets = (self.shape, self.active_count, self.updated_count, self.unit_size, self.units)
        return FlatLayout(*sets, _narrowed(self.indices(), self.shape).to(device))

    def indices(self) -> Tensor:
        """Return the flat indices of the packed values."""
        return self.pattern.flat_indices()

    def convolve(
        self, images: Tensor, values: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        """Convolve `images` (batch, in, height, width) with A and add `bias`."""
        return sparse_conv2d(images, values, bias, self.pattern, stride, padding, dilation)


@dataclass(frozen=True, eq=False)
class BlockLayout(Layout):
    """A layout for products with blocks.

    Args:
        how: how the layer multiplies.
    """

    pattern: BlockPattern
    how: Product

    def to(self, device: torch.device) -> Layout:
        """Return the same layout on another device."""
        return self if device == self.device else replace(self, pattern=self.pattern.to(device))

    def indices(self) -> Tensor:
        """Return the flat indices of the packed values."""
        return self.pattern.flat_indices()


@dataclass(frozen=True, eq=False)
class BsrLayout(BlockLayout):
    """The layout of a matrix for products with blocks."""

    def product(self, input: Tensor, values: Tensor, bias: Tensor | None, batch_last: bool = False) -> Tensor:
        """Multiply the last dimension of `input` by A, as its `Product` says, and add `bias`."""
        blocks = values.view(-1, *self.pattern.block_shape)
        return block_sparse_linear(input, blocks, bias, self.pattern, self.how.kernels, self.how.transposed)


@dataclass(frozen=True, eq=False)
class BlockConvLayout(BlockLayout):
    """The layout of a weight for convolutions by blocks, where their kernels are faster than a dense copy."""

    def multiplies(self, input: Tensor, stride: Sequence[int]) -> bool:
        """Return whether a layer with this stride multiplies an input by blocks, not by the dense weight."""
        # at all pixels of the input, though only those in a grid of that stride have a gradient at each position
        of_input = self.active_count * math.prod(stride)
        share = (self.active_count + of_input + self.updated_count) / (3 * max(self.shape.numel(), 1))
        block_shape, dtype = self.pattern.block_shape, product_dtype(input)
        return convolves_by_blocks(cast(BlockKernels, self.how.kernels), input.device, block_shape, dtype, share)

    def convolve(
        self, images: Tensor, values: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        """Convolve `images` (batch, in, height, width) with A and add `bias`."""
        blocks = values.view(-1, *self.pattern.block_shape)
        return block_sparse_conv2d(images, blocks, bias, self.pattern, stride, padding, dilation, self.how.kernels)


def make_layout(
    active: Tensor,
    exploring: Tensor,
    shape: torch.Size,
    structure: Structure,
    product: Product | None,
    device: torch.device,
) -> Layout:
    r"""Make the layout for these sets, on CPU, in the form for a device.

    Args:
        active: int64, on CPU, sorted: flat indices of A's units in the weight's grid.
        exploring: likewise, of those of B\A.
        shape: of the weight.
        structure: what the sets consist of; it divides the weight.
        product: how the layer multiplies by the packed values; None: it computes with the dense weight.
        device: where it multiplies.
    """
    grid = structure.grid(shape)
    size = shape.numel() // max(grid.numel(), 1)
    counts = (active.numel() * size, (active.numel() + exploring.numel()) * size)
    sets = (shape, *counts, size, torch.cat([active, exploring]) if size > 1 else None)
    if product is None:
        return FlatLayout(*sets, _narrowed(structure.entries(torch.cat([active, exploring]), shape), shape))
    if isinstance(structure, Block):
        sides = (structure.outputs, structure.inputs)
        if product.groups is not None:
            return BlockConvLayout(*sets, BlockPattern.from_flat(active, exploring, as_kernel(grid), sides), product)
        return BsrLayout(*sets, BlockPattern.from_flat(active, exploring, _as_matrix(grid), sides), product)
    if product.groups is not None:
        return ConvLayout(*sets, EntryPattern.from_flat(active, exploring, as_kernel(shape), product.groups))
    return MatrixLayout.of(shape, active, exploring, product, product.kernels_on(device))


def can_multiply(shape: torch.Size, active: int, updated: int, structure: Structure, product: Product) -> bool:
    """Return whether the kernels' integers can hold the indices of a weight of this shape, with |A| and |B| entries."""
    if isinstance(structure, Block):
        units = structure.grid(shape)
        grid = _as_matrix(units) if product.groups is None else as_kernel(units)
        return BlockPattern.fits(grid, (structure.outputs, structure.inputs))
    if product.groups is not None:
        return EntryPattern.fits(as_kernel(shape), updated)
    return Pattern.fits(_as_matrix(shape), updated)


def as_kernel(shape: torch.Size) -> tuple[int, int, int, int]:
    """Return the shape of a convolution's weight in two dimensions; that of a one-dimensional one has height 1."""
    out, channels, *sides = shape
    height, width = sides if len(sides) == 2 else (1, *sides)
    return out, channels, height, width


def _tensors(part: Any) -> Iterator[Tensor]:
    """Yield the tensors of a pattern, in the order of its fields."""
    if isinstance(part, Tensor):
        yield part
    elif is_dataclass(part):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))
    elif isinstance(part, tuple):
        for each in part:
            yield from _tensors(each)


def _form(part: Any) -> Any:
    """Return what a pattern is but for the content of its tensors."""
    if isinstance(part, Tensor):
        return part.device, part.dtype, part.shape
    if is_dataclass(part):
        return type(part), *(_form(getattr(part, field.name)) for field in fields(part))
    return tuple(map(_form, part)) if isinstance(part, tuple) else part


def _narrowed(indices: Tensor, shape: torch.Size) -> Tensor:
    return indices.to(torch.int32 if shape.numel() <= torch.iinfo(torch.int32).max else torch.int64)


def _as_matrix(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape.numel() // max(shape[0], 1)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: Layout) -> Tensor:
        entries = layout.indices()
        ctx.entries, ctx.length = entries, values.numel()
        dense = values.new_zeros(layout.shape.numel())
        # index_copy_ needs int64; even with the conversion it is faster than index_put_
        active = entries[: layout.active_count].long()
        dense.index_copy_(0, active, values[: layout.active_count])
        return dense.view(layout.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].new_zeros(ctx.length)
        torch.index_select(gradients[0].reshape(-1), 0, ctx.entries, out=gradient[: ctx.entries.numel()])
        return gradient, None
