"""Custom PyTorch operators for the products of a convolution by blocks; see `blocks.library`.

Images and results are (N, height, width, channels), contiguous; `numbers` are those of a `Geometry`.
"""

from collections.abc import Sequence

from torch import Tensor

from lightning_topkast.ops.blocks.choice import implementation
from lightning_topkast.ops.blocks.conv.geometry import Geometry
from lightning_topkast.ops.blocks.library import LINES
from lightning_topkast.ops.blocks.pattern import Lines
from lightning_topkast.ops.library import define

_PRODUCT = (
    f"block_conv(Tensor images, Tensor values, Tensor? bias, {LINES}, int[] numbers, SymInt[] size, bool transposed, "
    "str kernels) -> Tensor"
)
_SAMPLED = (
    f"block_conv_sampled(Tensor grads, Tensor images, {LINES}, int[] numbers, SymInt[] shape, str kernels) -> Tensor"
)


def _product(
    images: Tensor,
    values: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    others: Tensor,
    blocks: Tensor,
    longest_first: Tensor,
    numbers: Sequence[int],
    size: Sequence[int],
    transposed: bool,
    kernels: str,
) -> Tensor:
    lines, geometry = Lines(starts, others, blocks, longest_first), Geometry.of(numbers)
    products = implementation(kernels, images, (values.shape[1], values.shape[2]), __package__)
    return products.product(images, values, bias, lines, geometry, size, transposed)


def _fake_product(
    images: Tensor,
    values: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    others: Tensor,
    blocks: Tensor,
    longest_first: Tensor,
    numbers: Sequence[int],
    size: Sequence[int],
    transposed: bool,
    kernels: str,
) -> Tensor:
    return images.new_empty(images.shape[0], *size, (starts.shape[0] - 1) * values.shape[2 if transposed else 1])


def _sampled(
    grads: Tensor,
    images: Tensor,
    starts: Tensor,
    others: Tensor,
    blocks: Tensor,
    longest_first: Tensor,
    numbers: Sequence[int],
    shape: Sequence[int],
    kernels: str,
) -> Tensor:
    lines, geometry = Lines(starts, others, blocks, longest_first), Geometry.of(numbers)
    products = implementation(kernels, images, (shape[1], shape[2]), __package__)
    return products.sampled(grads, images, lines, geometry, shape)


def _fake_sampled(
    grads: Tensor,
    images: Tensor,
    starts: Tensor,
    others: Tensor,
    blocks: Tensor,
    longest_first: Tensor,
    numbers: Sequence[int],
    shape: Sequence[int],
    kernels: str,
) -> Tensor:
    return images.new_empty(shape)


block_conv = define(_PRODUCT, _product, _fake_product)
block_conv_sampled = define(_SAMPLED, _sampled, _fake_sampled)
