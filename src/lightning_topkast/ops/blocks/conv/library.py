"""Custom PyTorch operators for the products of a convolution by blocks; see `blocks.library`.

Images and results are (N, height, width, channels), contiguous; `numbers` are those of a `Geometry`.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from lightning_topkast.ops.blocks.choice import BlockKernels, choose_block_kernels
from lightning_topkast.ops.blocks.conv import portable
from lightning_topkast.ops.blocks.conv.geometry import Geometry
from lightning_topkast.ops.blocks.library import LINES
from lightning_topkast.ops.blocks.pattern import Lines
from lightning_topkast.ops.library import LIBRARY

_PRODUCT = (
    f"block_conv(Tensor images, Tensor values, Tensor? bias, {LINES}, int[] numbers, SymInt[] size, bool transposed, "
    "str kernels) -> Tensor"
)
_SAMPLED = (
    f"block_conv_sampled(Tensor grads, Tensor images, {LINES}, int[] numbers, SymInt[] shape, str kernels) -> Tensor"
)


def _implementation(kernels: str, images: Tensor, block_shape: tuple[int, int]) -> ModuleType:
    if choose_block_kernels(cast(BlockKernels, kernels), images.device, block_shape, images.dtype) == "torch":
        return portable
    from lightning_topkast.ops.blocks.conv import launch

    return launch


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
    products = _implementation(kernels, images, (values.shape[1], values.shape[2]))
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
    return _implementation(kernels, images, (shape[1], shape[2])).sampled(grads, images, lines, geometry, shape)


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


for _schema, _implemented, _fake in ((_PRODUCT, _product, _fake_product), (_SAMPLED, _sampled, _fake_sampled)):
    _name = LIBRARY.define(_schema)
    LIBRARY.impl(_name, _implemented, "CompositeExplicitAutograd")
    torch.library.register_fake(f"topkast::{_name}", _fake, lib=LIBRARY)

# The overloads themselves, since PyTorch would search for them at each call.
block_conv = torch.ops.topkast.block_conv.default
block_conv_sampled = torch.ops.topkast.block_conv_sampled.default
