"""Which pixels a convolution multiplies."""

from collections.abc import Sequence
from typing import NamedTuple

from lightning_topkast.errors import TopKastError


class Axis(NamedTuple):
    """The place along one axis of an image that pixel `at` of the result needs at one position of the kernel.

    It is (up · at + first + step · position) / down; there is none where this is no integer, or outside of the image.
    """

    up: int
    first: int
    step: int
    down: int


class Geometry(NamedTuple):
    """Kernel, stride, padding and dilation of a convolution, each along the height and the width."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Geometry":
        """Return the geometry of which these are the `numbers`."""
        pairs = [(numbers[at], numbers[at + 1]) for at in range(0, 8, 2)]
        return cls(*pairs)

    @property
    def numbers(self) -> list[int]:
        """All eight, for an operator."""
        return [number for pair in self for number in pair]

    def result_size(self, size: Sequence[int]) -> list[int]:
        """Return height and width of the result for images of this height and width.

        Raises:
            TopKastError: the kernel does not fit.
        """
        sides = zip(size, *self, strict=True)
        found = [
            (length + 2 * padding - dilation * (side - 1) - 1) // stride + 1
            for length, side, stride, padding, dilation in sides
        ]
        if min(found) < 1:
            raise TopKastError(
                f"a kernel of {self.kernel[0]} × {self.kernel[1]}, dilated by {self.dilation}, does not fit an input "
                f"of {tuple(size)} with padding {self.padding}"
            )
        return found

    def axes(self, transposed: bool) -> tuple[Axis, Axis]:
        """Return the axes of the product, or, if `transposed`, those of the gradient of its images."""
        vertical, horizontal = (
            Axis(1, padding, -dilation, stride) if transposed else Axis(stride, -padding, dilation, 1)
            for stride, padding, dilation in zip(self.stride, self.padding, self.dilation, strict=True)
        )
        return vertical, horizontal
