"""The places of a sparse weight's entries, as the compiled kernels of `entries.h` take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_topkast.ops.flat import check_indices
from lightning_topkast.ops.library import LIBRARY

_LARGEST = torch.iinfo(torch.int32).max
_MOST_KEYS = torch.iinfo(torch.int16).max  # places within a block or panel
_CACHED = 768  # vectors that a tile of pixels meets of a block or panel, which fit an L1 cache
_TILE = 2, 4  # pixels of a typical tile
_ENTRIES = 12  # of a block or panel that meet the same vectors, so that these are worth loading
# of a matrix, measured at batches of 32 to 512: fewer rows and columns lose more than the cache gains
_LEAST_TOGETHER = 64
_ENTRIES_OF_PANEL = 25

LIBRARY.define(
    "entry_index(Tensor active, Tensor exploring, int rows, int channels, int taps, int groups, bool transposed, "
    "int block, int panel) -> Tensor[]"
)
LIBRARY.define("entry_flat_indices(Tensor[] index, int[] sizes, int groups, bool transposed) -> Tensor")


def _fake_flat_indices(index: Sequence[Tensor], sizes: Sequence[int], groups: int, transposed: bool) -> Tensor:
    return torch.empty(sizes[-1], dtype=torch.int64)


torch.library.register_fake("topkast::entry_flat_indices", _fake_flat_indices, lib=LIBRARY)


@dataclass(frozen=True, eq=False)
class EntryPattern:
    r"""The places of a weight's entries in the orders in which the compiled kernels use them, on CPU.

    The values lie as in `Structure.order`: those of A by flat index, then those of B\A. The outputs are rows, the
    inputs channels, and the places of a convolution's kernel taps; a matrix has one tap. The product takes the channels
    in blocks, the gradients take the rows in panels, so that what their entries meet stays in the L1 cache.

    Attributes:
        shape: (out, in / groups, height, width) of the weight; `transposed`: (in, out, height, width).
        groups: of a convolution.
        transposed: whether the inputs come first in the weight; then there is one group.
        active: |A|.
        updated: |B|.
        block: channels of a block.
        panel: rows of a panel.
        forward_cut: int32 (blocks + 1, rows): the entries of A in a block and row are those from there to where the
            next block begins.
        forward_keys: int16 (|A|,): channel within the block · taps + tap.
        backward_cut: int32 (panels · channels · 2 + 1,): where the entries of A, then those of B\A, of a panel and
            channel begin.
        backward_keys: int16 (|B|,): row within the panel · taps + tap.
        backward_order: int32 (|B|,): positions of their values.
        forward_order: int32 (|A|,): the same for the product; None: the values lie in its order.
    """

    kernels: ClassVar[str] = "compiled"

    shape: tuple[int, int, int, int]
    groups: int
    transposed: bool
    active: int
    updated: int
    block: int
    panel: int
    forward_cut: Tensor
    forward_keys: Tensor
    backward_cut: Tensor
    backward_keys: Tensor
    backward_order: Tensor
    forward_order: Tensor | None = None

    @classmethod
    def from_flat(
        cls,
        active: Tensor,
        exploring: Tensor,
        shape: tuple[int, int, int, int],
        groups: int = 1,
        transposed: bool = False,
    ) -> "EntryPattern":
        r"""Make the pattern of a weight; `MATRIX_KERNELS` or `CONV_KERNELS` must be loaded.

        Args:
            active: int64 flat indices of A on CPU, strictly increasing.
            exploring: those of B\A.
            shape: see the attributes, also for the others; height and width of a matrix are 1.
            groups: of the convolution.
            transposed: whether the inputs come first.

        Raises:
            ValueError: the indices are out of range or not strictly increasing.
        """
        updated = active.numel() + exploring.numel()
        rows, channels = _rows_and_channels(shape, groups, transposed)
        taps = shape[2] * shape[3]
        for indices in (active, exploring):
            check_indices(indices, prod(shape))
        sides = _sides(shape, groups, transposed, active.numel(), updated)
        index = torch.ops.topkast.entry_index(active, exploring, rows, channels, taps, groups, transposed, *sides)
        return cls(shape, groups, transposed, active.numel(), updated, *sides, *index)

    @staticmethod
    def fits(shape: tuple[int, int, int, int], updated: int) -> bool:
        """Return whether the index types can hold the places of this many entries of a weight."""
        return shape[2] * shape[3] <= _MOST_KEYS and updated <= _LARGEST

    @staticmethod
    def bytes_of(shape: tuple[int, int, int, int], groups: int, transposed: bool, active: int, updated: int) -> int:
        """Return `nbytes` of the pattern with this many entries."""
        rows, channels = _rows_and_channels(shape, groups, transposed)
        block, panel = _sides(shape, groups, transposed, active, updated)
        blocks, panels = max(ceil(channels / block), 1), max(ceil(rows / panel), 1)
        cuts = (blocks + 1) * rows + panels * channels * 2 + 1
        return 4 * (cuts + updated + (active if transposed else 0)) + 2 * (active + updated)

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return _rows_and_channels(self.shape, self.groups, self.transposed)[0]

    @property
    def channels(self) -> int:
        """Number of inputs."""
        return _rows_and_channels(self.shape, self.groups, self.transposed)[1]

    @property
    def device(self) -> torch.device:
        """The device of the index."""
        return self.backward_order.device

    @property
    def index(self) -> list[Tensor]:
        """The tensors of the index, as the kernels take them."""
        tensors = [self.forward_cut, self.forward_keys, self.backward_cut, self.backward_keys, self.backward_order]
        return tensors if self.forward_order is None else [*tensors, self.forward_order]

    @property
    def sizes(self) -> list[int]:
        """The numbers that describe the index, as the kernels take them."""
        taps = self.shape[2] * self.shape[3]
        return [self.rows, self.channels, taps, self.block, self.panel, self.active, self.updated]

    @property
    def nbytes(self) -> int:
        """Size of the index in bytes."""
        return sum(tensor.nbytes for tensor in self.index)

    def flat_indices(self) -> Tensor:
        """Return the flat indices of the values, int64."""
        indices: Tensor = torch.ops.topkast.entry_flat_indices(self.index, self.sizes, self.groups, self.transposed)
        return indices


def _rows_and_channels(shape: tuple[int, int, int, int], groups: int, transposed: bool) -> tuple[int, int]:
    first, second = shape[:2]
    return (second, first) if transposed else (first, second * groups)


def _sides(
    shape: tuple[int, int, int, int], groups: int, transposed: bool, active: int, updated: int
) -> tuple[int, int]:
    """Return the channels of a block and the rows of a panel: as many as the L1 cache holds, but not too few."""
    size, taps = max(prod(shape), 1), prod(shape[2:])
    met = prod(tile + side - 1 for tile, side in zip(_TILE, shape[2:], strict=True))
    least, of_panel = (_LEAST_TOGETHER, _ENTRIES_OF_PANEL) if taps == 1 else (_CACHED // met, _ENTRIES)

    def together(count: int, entries: int, known: int) -> int:
        needed = ceil(entries * size / (taps * known)) if known else count
        return max(min(count, max(least, needed), _MOST_KEYS // max(taps, 1)), 1)

    rows, channels = _rows_and_channels(shape, groups, transposed)
    return together(channels, _ENTRIES, active), together(rows, of_panel, updated)
