"""The places of the entries of a sparse convolution's weight."""

from dataclasses import dataclass, fields
from math import ceil, prod

import torch
from torch import Tensor

_LARGEST = torch.iinfo(torch.int32).max
_MOST_KEYS = torch.iinfo(torch.int16).max  # places within a block or panel
_CACHED = 768  # vectors that a tile meets of a block or panel, which fit an L1 cache
_TILE = 2, 4  # pixels of a typical tile
_ENTRIES = 12  # of a block or panel that meet the same vectors, so that these are worth loading


@dataclass(frozen=True, eq=False)
class ConvPattern:
    r"""The places of a weight's entries in the orders in which the kernels use them, on CPU.

    The values lie as in `Structure.order`: those of A by flat index, then those of B\A. The output channels are rows.
    The forward pass takes the input channels in blocks, the backward pass the rows in panels.

    Attributes:
        shape: (out, in / groups, height, width) of the weight.
        groups: of the convolution.
        active: |A|.
        updated: |B|.
        block: input channels of a block.
        panel: rows of a panel.
        forward_cut: int32 (blocks + 1, out): the entries of A in a block and row are those from there to where the
            next block begins.
        forward_keys: int16 (|A|,): channel within the block · height · width + place in the kernel.
        backward_cut: int32 (panels · in · 2 + 1,): where the entries of A, then those of B\A, of a panel and input
            channel begin.
        backward_keys: int16 (|B|,): row within the panel · height · width + place in the kernel.
        backward_order: int32 (|B|,): positions of their values.
    """

    shape: tuple[int, int, int, int]
    groups: int
    active: int
    updated: int
    block: int
    panel: int
    forward_cut: Tensor
    forward_keys: Tensor
    backward_cut: Tensor
    backward_keys: Tensor
    backward_order: Tensor

    @classmethod
    def from_flat(
        cls, active: Tensor, exploring: Tensor, shape: tuple[int, int, int, int], groups: int
    ) -> "ConvPattern":
        r"""Make the pattern of a weight; `CONV_KERNELS` must be loaded.

        Args:
            active: int64 flat indices of A on CPU, strictly increasing.
            exploring: those of B\A.
            shape: (out, in / groups, height, width).
            groups: of the convolution.

        Raises:
            ValueError: the indices are out of range or not strictly increasing.
        """
        for indices in (active, exploring):
            if indices.numel() and not (int(indices[0]) >= 0 and int(indices[-1]) < prod(shape)):
                raise ValueError(f"expected indices below {prod(shape)}, got {int(indices[0])} to {int(indices[-1])}")
            if not bool((indices.diff() > 0).all()):
                raise ValueError("expected strictly increasing indices")
        updated = active.numel() + exploring.numel()
        block, panel = _sides(shape, groups, active.numel(), updated)
        rows, channels, taps = shape[0], shape[1] * groups, shape[2] * shape[3]
        index = torch.ops.topkast.conv_index(active, exploring, rows, channels, taps, groups, block, panel)
        return cls(shape, groups, active.numel(), updated, block, panel, *index)

    @staticmethod
    def fits(shape: tuple[int, int, int, int], updated: int) -> bool:
        """Return whether the index types can hold the places of this many entries of a weight."""
        return shape[2] * shape[3] <= _MOST_KEYS and updated <= _LARGEST

    @staticmethod
    def bytes_of(shape: tuple[int, int, int, int], groups: int, active: int, updated: int) -> int:
        """Return `nbytes` of the pattern with this many entries."""
        block, panel = _sides(shape, groups, active, updated)
        rows, channels = shape[0], shape[1] * groups
        cuts = (ceil(channels / block) + 1) * rows + ceil(rows / panel) * channels * 2 + 1
        return 4 * (cuts + updated) + 2 * (active + updated)

    @property
    def index(self) -> list[Tensor]:
        """The tensors of the index, as the kernels take them."""
        return [getattr(self, field.name) for field in fields(self)[6:]]

    @property
    def sizes(self) -> list[int]:
        """The numbers that describe the index, as the kernels take them."""
        out, of_group, height, width = self.shape
        channels = of_group * self.groups
        return [out, channels, height * width, self.block, self.panel, self.active, self.updated]

    @property
    def nbytes(self) -> int:
        """Size of the index in bytes."""
        return sum(tensor.nbytes for tensor in self.index)

    def flat_indices(self) -> Tensor:
        """Return the flat indices of the values, int64."""
        indices: Tensor = torch.ops.topkast.conv_flat_indices(self.index, self.sizes, self.groups)
        return indices


def _sides(shape: tuple[int, int, int, int], groups: int, active: int, updated: int) -> tuple[int, int]:
    """Return the input channels of a block and the rows of a panel."""
    size = max(prod(shape), 1)
    return _together(shape[1] * groups, shape[2:], active / size), _together(shape[0], shape[2:], updated / size)


def _together(count: int, kernel: tuple[int, ...], density: float) -> int:
    """Return how many channels of a side are computed together: as many as the L1 cache holds, but not too few."""
    taps = prod(kernel)
    met = prod(tile + side - 1 for tile, side in zip(_TILE, kernel, strict=True))
    least = ceil(_ENTRIES / (taps * density)) if density else count
    return max(min(count, max(_CACHED // met, least), _MOST_KEYS // taps), 1)
