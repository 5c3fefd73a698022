"""What must hold of convolutions by blocks. test_block_conv.py calls it for torch's, and runs it for Triton's:

    TRITON_INTERPRET=1 python block_convs.py SEED [--device cuda]

See blocks.py, which does the same for matrices.
"""

import itertools
import random
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_topkast.ops import BlockPattern, block_sparse_conv2d
from lightning_topkast.ops.blocks.conv import library
from lightning_topkast.ops.blocks.pattern import Lines
from tests.blocks import DTYPES, On, at_the_end_of_memory, close, main, pattern_of

KERNELS = ((1, 1), (3, 3), (2, 3), (1, 5), (4, 1))
FORMATS = (torch.channels_last, torch.contiguous_format)


@dataclass
class Conv:
    """A convolution of which only some blocks are there; `tiers` (blocks down, blocks across, *kernel)."""

    pattern: BlockPattern
    values: Tensor
    bias: Tensor | None
    tiers: Tensor
    kernels: str
    geometry: dict[str, tuple[int, int]]

    def __call__(self, images: Tensor) -> Tensor:
        return block_sparse_conv2d(images, self.values, self.bias, self.pattern, **self.geometry, kernels=self.kernels)

    def weight(self) -> Tensor:
        """A, float64, from the tiers alone."""
        blocks = self.values.new_zeros(*self.tiers.shape, *self.pattern.block_shape, dtype=torch.float64)
        active = self.tiers == 2
        blocks[active] = self.values.detach()[: int(active.sum())].double()
        return blocks.permute(0, 4, 1, 5, 2, 3).reshape(self.pattern.shape)

    def blocks_of(self, weight: Tensor) -> Tensor:
        """The blocks of a weight that are in B, in packed order, from the tiers alone."""
        (rows, columns, *kernel), (height, width) = self.tiers.shape, self.pattern.block_shape
        blocks = weight.reshape(rows, height, columns, width, *kernel).permute(0, 2, 4, 5, 1, 3)
        return torch.cat([blocks[self.tiers == 2], blocks[self.tiers == 1]])

    def compare(self, images: Tensor, grad: Tensor | None = None) -> None:
        """Output and gradients against `F.conv2d` in float64; `grad` is all ones unless given."""
        ours = [tensor for tensor in (self.values, self.bias) if tensor is not None]
        leaves = [tensor.detach().requires_grad_() for tensor in (images, *ours)]
        shadow = replace(self, values=leaves[1], bias=leaves[2] if self.bias is not None else None)
        output = shadow(leaves[0])
        grad = torch.ones_like(output) if grad is None else grad
        found = [output, *torch.autograd.grad(output, leaves, grad)]

        wide = [images.detach().double(), self.weight(), *(tensor.detach().double() for tensor in ours[1:])]
        wide = [tensor.requires_grad_() for tensor in wide]
        expected = F.conv2d(wide[0], wide[1], wide[2] if self.bias is not None else None, **self.geometry)
        wanted = [expected, *torch.autograd.grad(expected, wide, grad.double())]
        of_values = torch.zeros_like(self.values, dtype=torch.float64)
        updated = self.blocks_of(wanted[2])
        of_values[: len(updated)] = updated
        wanted[2] = of_values
        for name, mine, reference in zip(("output", "input", "values", "bias"), found, wanted, strict=False):
            assert mine.shape == reference.shape
            close(name, mine, reference)


def conv(on: On, grid, block, dtype=torch.float32, tail=0, bias=True, tiers=None, **geometry) -> Conv:
    """A convolution of this grid with random tiers, unless they are given; `tail` more values than blocks."""
    if tiers is None:
        tiers = on.tiers(grid[0], grid[1] * grid[2] * grid[3]).view(grid)
    tiers = tiers.to(on.device)
    pattern = pattern_of(tiers, block)
    values = on.random(pattern.updated_count + tail, *block, dtype=dtype)
    bias = on.random(grid[0] * block[0], dtype=dtype) if bias else None
    return Conv(pattern, values, bias, tiers, on.kernels, geometry)


def images_for(on: On, layer: Conv, *shape: int, order=torch.channels_last) -> Tensor:
    """Random images, (batch, height, width)."""
    batch, *size = shape
    images = on.random(batch, layer.pattern.shape[1], *size, dtype=layer.values.dtype)
    return images.contiguous(memory_format=order)


# --- the checks; each draws its own inputs from the seed --------------------------------------------------------------


def output_and_gradients_are_those_of_a_dense_convolution(on: On) -> None:
    """Any kernel, stride, padding and dilation, images of any size in either format, blocks of all sides."""
    draw = random.Random(on.seed)
    dtypes = (*DTYPES, torch.float64) if on.kernels == "torch" else DTYPES
    for number in range(120 if on.kernels == "torch" else 18):
        dtype, kernel = dtypes[number % len(dtypes)], draw.choice(KERNELS)
        sides = (16, 32) if number % 6 else (64, 128)
        block = draw.choice(sides), draw.choice(sides)
        blocks = draw.randint(1, 3 if number % 6 else 1), draw.randint(1, 3 if number % 6 else 1)
        stride, dilation = ((draw.randint(1, 3), draw.randint(1, 3)) for _ in range(2))
        padding = draw.randint(0, 4), draw.randint(0, 4)
        least = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        size = [max(1, each) + draw.randint(0, 5) for each in least]
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        layer = conv(on, (*blocks, *kernel), block, dtype, bias=number % 3 < 2, **geometry)
        images = images_for(on, layer, draw.randint(1, 3), *size, order=FORMATS[number % 2])
        with torch.no_grad():
            grad = on.random(*layer(images).shape, dtype=dtype)
        layer.compare(images, grad)


def sums_are_made_in_float32(on: On) -> None:
    """Sums in bfloat16 would stand still at 256, where its step is 2."""
    for dtype in (torch.float16, torch.bfloat16):
        layer = conv(on, (1, 4, 3, 3), (16, 16), dtype, tiers=torch.full((1, 4, 3, 3), 2), padding=(1, 1))
        layer.values, layer.bias = torch.ones_like(layer.values), torch.zeros_like(layer.bias)
        images = torch.ones(1, 64, 25, 25, device=on.device, dtype=dtype)
        images[:, 32:] = -1
        images[:, 0] = 3
        layer.compare(images)


def any_strides_will_do_and_the_memory_format_is_kept(on: On) -> None:
    layer = conv(on, (2, 1, 3, 3), (16, 32), padding=(1, 0), stride=(1, 2))
    wide = on.random(2, 40, 7, 18)
    views = (wide[:, 3:35], wide[:, :32, ::2], wide[:, :32, :, ::2], wide[:, :32].transpose(2, 3))
    for images in (*views, on.random(32, 1, 1).expand(2, 32, 5, 6)):
        layer.compare(images)
        assert layer(images).is_contiguous()
    for order in FORMATS:
        images = images_for(on, layer, 2, 6, 7, order=order).requires_grad_()
        output = layer(images)
        grad = on.random(*output.shape[:2], *reversed(output.shape[2:])).transpose(2, 3)
        layer.compare(images, grad)
        (of_images,) = torch.autograd.grad(output, images, grad)
        assert output.is_contiguous(memory_format=order)
        assert of_images.is_contiguous(memory_format=order)
    layer.values = layer.values.transpose(1, 2).contiguous().transpose(1, 2)
    layer.bias = on.random(64)[::2]
    layer.compare(wide[:, :32])


def nothing_is_read_beside_the_inputs(on: On) -> None:
    def amid_nans(tensor: Tensor) -> Tensor:
        memory = tensor.new_full((tensor.numel() + 20_000,), torch.nan)
        return memory[10_000:-10_000].view(tensor.shape).copy_(tensor)

    tiers = on.tiers(3, 18).view(3, 2, 3, 3)
    tiers[2] = 0
    tiers[2, 1, 2, 2] = 2  # a line of one block, at the end
    for size, stride in (((5, 4), (1, 1)), ((7, 6), (2, 3))):
        layer = conv(on, (3, 2, 3, 3), (16, 32), tiers=tiers, padding=(2, 1), dilation=(1, 2), stride=stride)
        layer.values, layer.bias = amid_nans(layer.values), amid_nans(layer.bias)

        def rows(at) -> Tensor:
            return at(images_for(on, layer, 2, *size).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # noqa: B023

        layer.compare(rows(amid_nans))
        if on.device == "cpu" and sys.platform != "win32":  # to read on is to crash
            layer.values, layer.bias = at_the_end_of_memory(layer.values), at_the_end_of_memory(layer.bias)
            lines = Lines(*map(at_the_end_of_memory, layer.pattern.updated_by_row))
            layer.pattern = replace(layer.pattern, updated_by_row=lines)
            images = rows(at_the_end_of_memory)
            grad = at_the_end_of_memory(on.random(*layer(images).permute(0, 2, 3, 1).shape)).permute(0, 3, 1, 2)
            layer.compare(images, grad)


def a_line_without_blocks_gives_the_bias_or_zero(on: On) -> None:
    tiers = on.tiers(3, 18).view(3, 2, 3, 3)
    tiers[1], tiers[2], tiers[:, 1] = 0, 1, 0
    for bias in (True, False):
        layer = conv(on, (3, 2, 3, 3), (16, 16), bias=bias, tiers=tiers)
        images = images_for(on, layer, 2, 5, 5).requires_grad_()
        output = layer(images)
        empty = output[:, 16:32]
        assert torch.equal(empty, layer.bias[16:32, None, None].expand_as(empty) if bias else torch.zeros_like(empty))
        output.sum().backward()
        assert not images.grad[:, 16:].count_nonzero()
        layer.compare(images)


def the_sets_and_the_batch_may_be_empty_or_everything(on: On) -> None:
    for tier, batch in itertools.product((0, 1, 2), (0, 2)):
        layer = conv(on, (1, 2, 3, 2), (16, 32), tiers=torch.full((1, 2, 3, 2), tier), tail=1, padding=(1, 1))
        layer.compare(images_for(on, layer, batch, 4, 5))


def values_behind_those_of_b_have_no_gradient(on: On) -> None:
    layer = conv(on, (2, 2, 3, 3), (16, 16), tail=3)
    for size in (4, 20):  # the sum over 324 pixels is split
        torch.full((4, 1024, 64), torch.nan, device=on.device)  # what new memory may hold
        layer.compare(images_for(on, layer, 1, size, size))


def few_blocks_split_the_sum_over_the_pixels(on: On) -> None:
    tiers = torch.zeros(2, 2, 3, 3, dtype=torch.uint8)
    tiers[0, 1, 0, 2], tiers[1, 0, 2, 1] = 2, 1
    for dtype in (torch.float32, torch.bfloat16):
        layer = conv(on, (2, 2, 3, 3), (16, 32), dtype, tiers=tiers, tail=1, padding=(1, 1))
        layer.compare(images_for(on, layer, 2, 17, 19))


def a_gradient_is_made_for_what_needs_one(on: On) -> None:
    layer = conv(on, (1, 2, 1, 3), (16, 16))
    images = images_for(on, layer, 1, 3, 5)
    for wanted in itertools.product((False, True), repeat=3):
        if any(wanted):
            given = zip((images, layer.values, layer.bias), wanted, strict=True)
            tensors = [tensor.detach().requires_grad_(is_wanted) for tensor, is_wanted in given]
            block_sparse_conv2d(*tensors, layer.pattern, kernels=on.kernels).sum().backward()
            assert [tensor.grad is not None for tensor in tensors] == list(wanted)


def gradients_refuse_to_be_differentiated(on: On) -> None:
    layer = conv(on, (1, 1, 2, 2), (16, 16), tiers=torch.full((1, 1, 2, 2), 2))
    layer.values.requires_grad_()
    output = layer(images_for(on, layer, 1, 3, 3))
    (grad,) = torch.autograd.grad(output.square().sum(), layer.values, create_graph=True)
    refusal = ""
    try:
        grad.sum().backward()
    except RuntimeError as error:
        refusal = str(error)
    assert "once_differentiable" in refusal


def results_are_the_same_each_time(on: On) -> None:
    layer = conv(on, (2, 2, 3, 3), (16, 32), torch.bfloat16, padding=(1, 1), stride=(2, 1))
    images = images_for(on, layer, 2, 16, 12).requires_grad_()
    layer.values.requires_grad_()

    def once() -> list[Tensor]:
        output = layer(images)
        return [output, *torch.autograd.grad(output.float().square().sum(), (images, layer.values))]

    first = once()
    for _ in range(20 if on.device == "cuda" else 1):
        assert all(map(torch.equal, first, once()))


def the_operators_are_registered_as_torch_wants_them(on: On) -> None:
    layer = conv(on, (2, 2, 3, 3), (16, 32), tail=1)
    pattern, values, kernels = layer.pattern, layer.values, on.kernels
    images, grads = on.random(2, 6, 5, 64), on.random(2, 2, 5, 32)
    numbers = [3, 3, 2, 1, 0, 1, 1, 1]
    rows, columns, updated = pattern.active_by_row, pattern.active_by_column, pattern.updated_by_row
    torch.library.opcheck(library.block_conv, (images, values, layer.bias, *rows, numbers, [2, 5], False, kernels))
    torch.library.opcheck(library.block_conv, (grads, values, None, *columns, numbers, [6, 5], True, kernels))
    arguments = (grads, images, *updated, numbers, list(values.shape), kernels)
    torch.library.opcheck(library.block_conv_sampled, arguments)


class Net(nn.Module):
    def __init__(self, on: On) -> None:
        super().__init__()
        self.layer = conv(on, (2, 2, 3, 3), (16, 16), padding=(1, 1), stride=(2, 1))
        self.values, self.bias = nn.Parameter(self.layer.values), nn.Parameter(self.layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        return replace(self.layer, values=self.values, bias=self.bias)(images.relu()).square()

    def compare(self, compiled: nn.Module, on: On, batch: int, size: int) -> None:
        images, results = images_for(on, self.layer, batch, size, 4), []
        for forward in (self, compiled):
            leaf = images.detach().requires_grad_()
            output = forward(leaf)
            results.append([output, *torch.autograd.grad(output.sum(), (leaf, self.values, self.bias))])
        assert all(map(torch.equal, *results))


def torch_compile_makes_one_graph_of_it(on: On) -> None:
    torch.compiler.reset()
    net = Net(on)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for batch, size in ((2, 5), (3, 5), (3, 6), (4, 8)):
        net.compare(compiled, on, batch, size)
    net.layer.pattern = pattern_of(net.layer.tiers.flip(0), (16, 16))
    with torch.compiler.set_stance("fail_on_recompile"):
        net.compare(compiled, on, 5, 9)


def autocast_computes_in_its_type(on: On) -> None:
    layer = conv(on, (1, 2, 3, 3), (16, 32))
    leaves = [tensor.requires_grad_() for tensor in (images_for(on, layer, 2, 4, 5), layer.values, layer.bias)]
    with torch.autocast(on.device, torch.bfloat16):
        output = layer(leaves[0])
    assert output.dtype == torch.bfloat16
    grad = torch.ones_like(output)
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in leaves]
    expected = block_sparse_conv2d(*narrow, layer.pattern, kernels=on.kernels)
    assert torch.equal(output, expected)
    grads = torch.autograd.grad(output, leaves, grad)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, narrow, grad), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.float())


def float32_is_as_exact_as_torch_is_told(on: On) -> None:
    from lightning_topkast.ops.blocks.conv.launch import _SETTINGS
    from lightning_topkast.ops.blocks.launch import numerics

    before = torch.backends.cudnn.allow_tf32
    for allowed, expected in ((True, "tf32"), (False, "ieee")):
        torch.backends.cudnn.allow_tf32 = allowed
        assert numerics(on.random(1), _SETTINGS)["PRECISION"] == expected
    torch.backends.cudnn.allow_tf32 = before


CHECKS = (
    output_and_gradients_are_those_of_a_dense_convolution,
    sums_are_made_in_float32,
    any_strides_will_do_and_the_memory_format_is_kept,
    nothing_is_read_beside_the_inputs,
    a_line_without_blocks_gives_the_bias_or_zero,
    the_sets_and_the_batch_may_be_empty_or_everything,
    values_behind_those_of_b_have_no_gradient,
    few_blocks_split_the_sum_over_the_pixels,
    a_gradient_is_made_for_what_needs_one,
    gradients_refuse_to_be_differentiated,
    results_are_the_same_each_time,
    the_operators_are_registered_as_torch_wants_them,
    torch_compile_makes_one_graph_of_it,
    autocast_computes_in_its_type,
)
OF_TRITON = (*CHECKS, float32_is_as_exact_as_torch_is_told)


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False  # on a GPU
    main(OF_TRITON, __doc__)
