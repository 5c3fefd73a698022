"""The places of the blocks of a block-sparse matrix, or of a convolution's weight."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_topkast.errors import TopKastError

_LARGEST = torch.iinfo(torch.int32).max


class Lines(NamedTuple):
    """Blocks in the order of the grid's *lines*, which are its rows or its columns.

    Attributes:
        starts: int32 (lines + 1,); line i holds positions starts[i] to starts[i + 1] of the next two tensors.
        others: int32 (blocks,); position of a block within its line, increasing within a line.
        blocks: int32 (blocks,); index of the block among the packed blocks.
        longest_first: int32 (lines,); the lines by decreasing number of blocks; work started in this order ends evenly.
    """

    starts: Tensor
    others: Tensor
    blocks: Tensor
    longest_first: Tensor

    @classmethod
    def of(cls, lines: Tensor, others: Tensor, count: int) -> "Lines":
        """Sort packed blocks by line and, within a line, by position.

        Args:
            lines: int64 (blocks,), the line of each block.
            others: int64 (blocks,), its position within the line.
            count: number of lines.
        """
        blocks = torch.argsort(lines * (others.max() + 1) + others) if others.numel() else others
        lengths = torch.bincount(lines, minlength=count)
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        longest_first = torch.argsort(lengths, descending=True, stable=True)
        return cls(starts.int(), others[blocks].int(), blocks.int(), longest_first.int())

    def to(self, device: torch.device | str) -> "Lines":
        """Return the same lines on another device."""
        return Lines(*(tensor.to(device) for tensor in self))

    @property
    def nbytes(self) -> int:
        """Size of the indices in bytes."""
        return sum(tensor.nbytes for tensor in self)


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """The places of the blocks of a block-sparse weight; some blocks have only a gradient.

    The weight is a matrix (out, in), or that of a convolution (out, in, *kernel), each of whose blocks is at one
    position of the kernel. The position of a block within its line (`Lines.others`) is then its column in the grid, or
    its row, times the number of positions of the kernel, plus its own.

    Packed order: first the active blocks, which the product uses, in row-major order of the grid, then the exploring
    blocks, which have only a gradient. Together they are the updated blocks.

    Attributes:
        shape: shape of the weight.
        block_shape: shape of a block, which divides that of the weight.
        active_count: number of active blocks.
        rows: int32 (updated blocks,); row of each block in the grid.
        columns: int32 (updated blocks,); position of each block within its row.
        active_by_row: active blocks along the grid's rows, for the forward product.
        active_by_column: active blocks along its columns, for the gradient of the input.
        updated_by_row: updated blocks along its rows, for the gradient of the values.
    """

    shape: tuple[int, ...]
    block_shape: tuple[int, int]
    active_count: int
    rows: Tensor
    columns: Tensor
    active_by_row: Lines
    active_by_column: Lines
    updated_by_row: Lines

    @classmethod
    def from_flat(
        cls, active: Tensor, exploring: Tensor, grid: Sequence[int], block_shape: tuple[int, int]
    ) -> "BlockPattern":
        """Make the pattern of blocks with these flat row-major indices in a grid.

        Args:
            active: int64 (blocks,), increasing: the blocks of the product.
            exploring: int64 (blocks,), increasing: the blocks that have only a gradient; none of them is active.
            grid: rows and columns of the grid of blocks, and the sides of a convolution's kernel.
            block_shape: rows and columns of a block.

        Raises:
            TopKastError: the grid has fewer than two dimensions, or is too large for int32.
        """
        if len(grid) < 2 or min(block_shape) < 1:
            raise TopKastError(
                f"expected at least a 2-D grid and positive block sides, got a grid of shape {tuple(grid)} and blocks "
                f"of {tuple(block_shape)}"
            )
        (rows, columns, *kernel), (height, width) = grid, block_shape
        if not cls.fits(grid, block_shape):
            raise TopKastError(
                f"{' × '.join(map(str, grid))} blocks of {height} × {width} exceed the int32 limit of {_LARGEST}; use "
                "larger blocks"
            )
        updated, positions = torch.cat([active, exploring]), math.prod(kernel)
        row, within = updated // max(columns * positions, 1), updated % max(columns * positions, 1)
        column, across = within // max(positions, 1), row * positions + within % max(positions, 1)
        count = active.numel()
        return cls(
            shape=(rows * height, columns * width, *kernel),
            block_shape=(height, width),
            active_count=count,
            rows=row.int(),
            columns=within.int(),
            active_by_row=Lines.of(row[:count], within[:count], rows),
            active_by_column=Lines.of(column[:count], across[:count], columns),
            updated_by_row=Lines.of(row, within, rows),
        )

    @staticmethod
    def fits(grid: Sequence[int], block_shape: tuple[int, int]) -> bool:
        """Return whether int32 can hold the indices of the blocks of a grid, and of the rows and columns."""
        (rows, columns, *_), (height, width) = grid, block_shape
        return max(math.prod(grid), rows * height, columns * width) <= _LARGEST

    @property
    def updated_count(self) -> int:
        """Number of updated blocks."""
        return self.rows.numel()

    @property
    def device(self) -> torch.device:
        """The device of the indices."""
        return self.rows.device

    @property
    def nbytes(self) -> int:
        """Size of the indices in bytes."""
        lines = (self.active_by_row, self.active_by_column, self.updated_by_row)
        return self.rows.nbytes + self.columns.nbytes + sum(each.nbytes for each in lines)

    def to(self, device: torch.device | str) -> "BlockPattern":
        """Return the same pattern on another device."""
        return replace(
            self,
            rows=self.rows.to(device),
            columns=self.columns.to(device),
            active_by_row=self.active_by_row.to(device),
            active_by_column=self.active_by_column.to(device),
            updated_by_row=self.updated_by_row.to(device),
        )

    def flat_indices(self) -> Tensor:
        """Return the flat index in the weight of each packed value: int64 (updated blocks × height × width,)."""
        (height, width), device = self.block_shape, self.device
        inputs, positions = self.shape[1], math.prod(self.shape[2:])
        column, position = self.columns.long() // max(positions, 1), self.columns.long() % max(positions, 1)
        first = (self.rows.long() * (height * inputs) + column * width) * positions + position
        down, across = (torch.arange(side, device=device) * positions for side in (height, width))
        return (first[:, None] + (down[:, None] * inputs + across).view(-1)).view(-1)
