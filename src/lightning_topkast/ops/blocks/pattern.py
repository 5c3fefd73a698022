"""Where the blocks of a block-sparse matrix are."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_topkast.errors import TopKastError
from lightning_topkast.method.selection import ACTIVE, EXPLORING

_LARGEST = torch.iinfo(torch.int32).max


class Lines(NamedTuple):
    """Blocks in the order of the grid's rows, or of its columns: its *lines*.

    Attributes:
        starts: int32 (lines + 1,); line i holds the places starts[i] to starts[i + 1] of the next two.
        others: int32 (blocks,); where across its line a block is, increasing within a line.
        blocks: int32 (blocks,); which of the packed blocks it is.
        longest_first: int32 (lines,); the lines by falling number of blocks: work that is begun in this order ends
            evenly.
    """

    starts: Tensor
    others: Tensor
    blocks: Tensor
    longest_first: Tensor

    @classmethod
    def of(cls, lines: Tensor, others: Tensor, count: int) -> "Lines":
        """Sort packed blocks by line and, within one, by their place across.

        Args:
            lines: int64 (blocks,), which of the `count` lines each is in.
            others: int64 (blocks,), where across.
            count: number of lines.
        """
        blocks = torch.argsort(lines * (others.max() + 1) + others) if others.numel() else others
        lengths = torch.bincount(lines, minlength=count)
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        longest_first = torch.argsort(lengths, descending=True, stable=True)
        return cls(starts.int(), others[blocks].int(), blocks.int(), longest_first.int())

    def to(self, device: torch.device | str) -> "Lines":
        """The same on another device."""
        return Lines(*(tensor.to(device) for tensor in self))

    @property
    def nbytes(self) -> int:
        """The memory that the indices take."""
        return sum(tensor.nbytes for tensor in self)


@dataclass(frozen=True, eq=False)
class BlockPattern:
    r"""The blocks of a weight (out, in) that are in B, in packed order, and the two ways to walk along those of A.

    Packed order: A's blocks in row-major order of the grid, then those of B\A.

    Attributes:
        shape: of the weight.
        block_shape: of a block, which divides it.
        active_count: blocks in A.
        rows: int32 (blocks of B,); each block's row in the grid.
        columns: int32 (blocks of B,); its column.
        active_by_row: A's blocks along the grid's rows, as the forward product needs them.
        active_by_column: A's blocks along its columns, for the gradient of the input.
        updated_by_row: B's blocks along its rows, for the gradient of the values.
    """

    shape: tuple[int, int]
    block_shape: tuple[int, int]
    active_count: int
    rows: Tensor
    columns: Tensor
    active_by_row: Lines
    active_by_column: Lines
    updated_by_row: Lines

    @classmethod
    def from_tiers(cls, tiers: Tensor, block_shape: tuple[int, int]) -> "BlockPattern":
        """The pattern of a grid of blocks.

        Args:
            tiers: uint8 (rows, columns) of the grid, on any device: 0 reservoir, 1 exploring, 2 active.
            block_shape: rows and columns of a block.

        Raises:
            TopKastError: the grid is no matrix, or too large for int32.
        """
        if tiers.dim() != 2 or min(block_shape) < 1:
            raise TopKastError(
                f"a block pattern needs the tiers of a 2-D grid and positive block sides, got a grid of shape "
                f"{tuple(tiers.shape)} and blocks of {tuple(block_shape)}"
            )
        rows, columns = tiers.shape
        height, width = block_shape
        if max(tiers.numel(), rows * height, columns * width) > _LARGEST:
            raise TopKastError(
                f"{rows} × {columns} blocks of {height} × {width}: int32 counts to {_LARGEST}; use larger blocks"
            )
        active = torch.nonzero(tiers.reshape(-1) == ACTIVE).squeeze(1)
        updated = torch.cat([active, torch.nonzero(tiers.reshape(-1) == EXPLORING).squeeze(1)])
        row, column = updated // max(columns, 1), updated % max(columns, 1)
        count = active.numel()
        return cls(
            shape=(rows * height, columns * width),
            block_shape=(height, width),
            active_count=count,
            rows=row.int(),
            columns=column.int(),
            active_by_row=Lines.of(row[:count], column[:count], rows),
            active_by_column=Lines.of(column[:count], row[:count], columns),
            updated_by_row=Lines.of(row, column, rows),
        )

    @property
    def updated_count(self) -> int:
        """Blocks in B."""
        return self.rows.numel()

    @property
    def device(self) -> torch.device:
        """Where its indices are."""
        return self.rows.device

    @property
    def nbytes(self) -> int:
        """The memory that the indices take."""
        lines = (self.active_by_row, self.active_by_column, self.updated_by_row)
        return self.rows.nbytes + self.columns.nbytes + sum(each.nbytes for each in lines)

    def to(self, device: torch.device | str) -> "BlockPattern":
        """The same pattern on another device."""
        return replace(
            self,
            rows=self.rows.to(device),
            columns=self.columns.to(device),
            active_by_row=self.active_by_row.to(device),
            active_by_column=self.active_by_column.to(device),
            updated_by_row=self.updated_by_row.to(device),
        )

    def flat_indices(self) -> Tensor:
        """Where in the weight each packed value is: int64 (blocks of B × height × width,), row-major."""
        height, width = self.block_shape
        device = self.device
        down = self.rows.long()[:, None] * height + torch.arange(height, device=device)
        across = self.columns.long()[:, None] * width + torch.arange(width, device=device)
        return (down[:, :, None] * self.shape[1] + across[:, None, :]).view(-1)
