"""What must hold of the block-sparse operators. test_block_ops.py calls it for torch's, and runs it for Triton's:

    TRITON_INTERPRET=1 python blocks.py SEED [--device cuda]

Triton is interpreted or not for a whole process. Prints what failed of each check, as JSON; benchmarks/gpu.py runs it
too.
"""

import argparse
import ctypes
import itertools
import json
import mmap
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_topkast.ops import BlockPattern, block_sparse_linear, choose_block_kernels
from lightning_topkast.ops.blocks import library
from lightning_topkast.ops.blocks.pattern import Lines

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of an element itself, and of the largest one. The interpreter cuts bfloat16 off, where a GPU rounds.
TOLERANCE = {
    torch.float64: (0, 1e-13),
    torch.float32: (0, 3e-6),
    torch.float16: (2**-10, 1e-5),
    torch.bfloat16: (2**-7, 1e-5),
}
# out × in, block, rows of the batch: no two of a kind, blocks of all sides, batches that no tile divides
SHAPES = (
    ((96, 64), (16, 16), 100),
    ((64, 128), (32, 32), 37),
    ((128, 64), (64, 64), 5),
    ((128, 256), (128, 128), 18),
    ((128, 64), (16, 64), 1),
    ((64, 128), (64, 32), 50),
    ((128, 48), (128, 16), 33),
)


def pattern_of(tiers: Tensor, block: tuple[int, int]) -> BlockPattern:
    """The pattern of a grid of tiers: 0 neither, 1 gets a gradient only, 2 is active."""
    active, exploring = (torch.nonzero(tiers.reshape(-1) == tier).squeeze(1) for tier in (2, 1))
    return BlockPattern.from_flat(active, exploring, tuple(tiers.shape), block)


@dataclass
class On:
    """The operators under check, where they run, and whence their random inputs come."""

    kernels: str
    device: str
    seed: int

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)

    def tiers(self, rows: int, columns: int, active: float = 0.3, updated: float = 0.6) -> Tensor:
        drawn = torch.rand(rows, columns, generator=self.generator)
        return ((drawn < updated).to(torch.uint8) + (drawn < active).to(torch.uint8)).to(self.device)

    def layer(self, shape, block, dtype=torch.float32, tail=0, bias=True, tiers=None, transposed=False) -> "Layer":
        if tiers is None:
            tiers = self.tiers(shape[0] // block[0], shape[1] // block[1])
        tiers = tiers.to(self.device)
        pattern = pattern_of(tiers, block)
        values = self.random(pattern.updated_count + tail, *block, dtype=dtype)
        bias = self.random(shape[1 if transposed else 0], dtype=dtype) if bias else None
        return Layer(pattern, values, bias, tiers, self.kernels, transposed)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)


@dataclass
class Layer:
    pattern: BlockPattern
    values: Tensor
    bias: Tensor | None
    tiers: Tensor
    kernels: str
    transposed: bool = False

    def __call__(self, input: Tensor) -> Tensor:
        return block_sparse_linear(input, self.values, self.bias, self.pattern, self.kernels, self.transposed)

    def weight(self) -> Tensor:
        """A, float64, from the tiers alone."""
        (rows, columns), (height, width) = self.pattern.shape, self.pattern.block_shape
        grid = self.values.new_zeros(rows // height, columns // width, height, width, dtype=torch.float64)
        active = (self.tiers == 2).nonzero()
        grid[active[:, 0], active[:, 1]] = self.values.detach()[: len(active)].double()
        return grid.transpose(1, 2).reshape(rows, columns)

    def blocks_of(self, weight: Tensor) -> Tensor:
        """The blocks of a weight that are in B, in packed order, from the tiers alone."""
        (rows, columns), (height, width) = self.pattern.shape, self.pattern.block_shape
        grid = weight.reshape(rows // height, height, columns // width, width).transpose(1, 2)
        return torch.cat([grid[self.tiers == 2], grid[self.tiers == 1]])

    def compare(self, input: Tensor, grad: Tensor) -> None:
        """Output and gradients against dense float64 ones."""
        ours = [tensor for tensor in (self.values, self.bias) if tensor is not None]
        leaves = [tensor.detach().requires_grad_() for tensor in (input, *ours)]
        shadow = replace(self, values=leaves[1], bias=leaves[2] if self.bias is not None else None)
        output = shadow(leaves[0])
        found = [output, *torch.autograd.grad(output, leaves, grad)]

        wide, weight = input.detach().double().flatten(0, -2), self.weight()
        weight = weight.t() if self.transposed else weight
        wide_grad = grad.double().flatten(0, -2)
        bias = None if self.bias is None else self.bias.double()
        values_grad = torch.zeros_like(self.values, dtype=torch.float64)
        weight_grad = wide_grad.t() @ wide
        updated = self.blocks_of(weight_grad.t() if self.transposed else weight_grad)
        values_grad[: len(updated)] = updated
        expected = [F.linear(wide, weight, bias), wide_grad @ weight, values_grad]
        expected += [] if bias is None else [wide_grad.sum(0)]
        for name, mine, reference in zip(("output", "input", "values", "bias"), found, expected, strict=False):
            close(name, mine, reference.view(mine.shape))


def close(name: str, found: Tensor, expected: Tensor) -> None:
    relative, absolute = TOLERANCE[found.dtype]
    scale = expected.abs().max().item() if expected.numel() else 0
    error = (found.double() - expected).abs()
    excess = (error - relative * expected.abs()).max().item() if expected.numel() else 0
    assert excess <= absolute * scale, f"{name}: off by {error.max().item():.2e}, the largest is {scale:.2e}"


def at_the_end_of_memory(tensor: Tensor) -> Tensor:
    """A copy, behind which is a page that can't be read."""
    length = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, length + mmap.PAGESIZE)
    beyond = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + length
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(beyond), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    part = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=length - tensor.nbytes)
    return part.view(tensor.shape).copy_(tensor)


# --- the checks; each draws its own inputs from the seed --------------------------------------------------------------


def output_and_gradients_are_those_of_the_dense_weight(on: On) -> None:
    dtypes = (*DTYPES, torch.float64) if on.kernels == "torch" else DTYPES
    for number, (shape, block, rows) in enumerate(SHAPES):
        for dtype in dtypes:
            transposed = (number + dtypes.index(dtype)) % 2 == 1
            layer = on.layer(shape, block, dtype, bias=number % 3 < 2, transposed=transposed)
            ends = [on.random(rows, side, dtype=dtype) for side in shape]
            layer.compare(*(ends if transposed else reversed(ends)))


def sums_are_made_in_float32(on: On) -> None:
    """Sums in bfloat16 would stand still at 256, where its step is 2."""
    for (shape, rows), dtype in itertools.product((((16, 512), 20), ((16, 16), 600)), (torch.float16, torch.bfloat16)):
        layer = on.layer(shape, (16, 16), dtype, tiers=torch.full((1, shape[1] // 16), 2))
        layer.values, layer.bias = torch.ones_like(layer.values), torch.zeros_like(layer.bias)
        input, grad = torch.ones(rows, shape[1]), torch.ones(rows, shape[0])
        input[:, shape[1] // 2 :] = grad[rows // 2 :] = -1  # up, and down again
        input[:, 0] = grad[0] = 3
        layer.compare(input.to(on.device, dtype), grad.to(on.device, dtype))


def any_leading_shape_and_any_strides_will_do(on: On) -> None:
    layer = on.layer((64, 96), (16, 32))
    leads = ((), (7,), (3, 5), (2, 3, 4), (0,), (4, 0, 2))
    for lead in leads:
        input, grad = on.random(*lead, 96), on.random(*lead, 64)
        if lead:
            layer.compare(input, grad)
        assert layer(input).shape == (*lead, 64)
        assert layer(input).is_contiguous()
    close("vector", layer(input := on.random(96)), F.linear(input.double(), layer.weight(), layer.bias.double()))
    inputs = (
        on.random(96, 20).t(),
        on.random(20, 97)[:, :96],
        on.random(20, 200)[:, 3:99],
        on.random(20, 192)[:, ::2],
        on.random(96).expand(20, 96),
    )
    grads = (
        on.random(64, 20).t(),
        on.random(20, 72)[:, 4:68],
        on.random(20, 70)[:, 5:69],
        on.random(20, 128)[:, 1::2],
        on.random(1).expand(20, 64),
    )
    for input, grad in itertools.product(inputs, grads):
        layer.compare(input, grad)
    layer.values = layer.values.transpose(1, 2).contiguous().transpose(1, 2)
    layer.bias = on.random(128)[::2]
    layer.compare(on.random(9, 96), on.random(9, 64))


def nothing_is_read_beside_the_inputs(on: On) -> None:
    def amid_nans(tensor: Tensor) -> Tensor:
        memory = tensor.new_full(tuple(size + 200 for size in tensor.shape), torch.nan)
        part = memory[tuple(slice(100, 100 + size) for size in tensor.shape)]
        return part.copy_(tensor)

    tiers = on.tiers(4, 3)
    tiers[3] = torch.tensor([0, 2, 0])  # a line of one block, at the end
    for rows in (1, 23, 300):
        layer = on.layer((64, 96), (16, 32), tiers=tiers)
        layer.bias = amid_nans(layer.bias)
        layer.compare(amid_nans(on.random(rows, 96)), amid_nans(on.random(rows, 64)))
        if on.device == "cpu" and sys.platform != "win32":  # to read on is to crash
            layer.values, layer.bias = at_the_end_of_memory(layer.values), at_the_end_of_memory(layer.bias)
            lines = Lines(*map(at_the_end_of_memory, layer.pattern.updated_by_row))
            layer.pattern = replace(layer.pattern, updated_by_row=lines)
            layer.compare(at_the_end_of_memory(on.random(rows, 96)), at_the_end_of_memory(on.random(rows, 64)))


def a_line_without_blocks_gives_the_bias_or_zero(on: On) -> None:
    tiers = on.tiers(4, 4)
    tiers[1] = 0
    tiers[2] = 1
    tiers[:, 3] = 0
    for bias in (True, False):
        layer = on.layer((64, 64), (16, 16), bias=bias, tiers=tiers)
        input = on.random(9, 64).requires_grad_()
        output = layer(input)
        assert torch.equal(
            output[:, 16:48], layer.bias[16:48].expand(9, 32) if bias else torch.zeros_like(output[:, 16:48])
        )
        output.sum().backward()
        assert torch.equal(input.grad[:, 48:], torch.zeros_like(input.grad[:, 48:]))
        layer.compare(on.random(9, 64), on.random(9, 64))


def the_sets_may_be_empty_or_everything(on: On) -> None:
    for tier in (0, 1, 2):
        for rows in (0, 20):
            layer = on.layer((32, 64), (16, 32), tiers=torch.full((2, 2), tier), tail=1)
            layer.compare(on.random(rows, 64), on.random(rows, 32))


def exploring_blocks_change_no_output_but_have_a_gradient(on: On) -> None:
    layer = on.layer((64, 64), (32, 32), tiers=torch.tensor([[2, 1], [0, 1]]))
    input = on.random(10, 64)
    before = layer(input)
    layer.values[1:] = on.random(2, 32, 32) * 1e3
    assert torch.equal(layer(input), before)
    layer.values.requires_grad_()
    layer(input).square().sum().backward()
    assert layer.values.grad.abs().amin((1, 2)).min() > 0
    layer.values = layer.values.detach()
    layer.compare(input, on.random(10, 64))


def values_behind_those_of_b_have_no_gradient(on: On) -> None:
    layer = on.layer((64, 64), (16, 16), tail=3)
    for rows in (20, 300):  # the sum over 300 is split
        torch.full((4, 1024, 64), torch.nan, device=on.device)  # what new memory may hold
        layer.compare(on.random(rows, 64), on.random(rows, 64))


def a_gradient_is_made_for_what_needs_one(on: On) -> None:
    layer = on.layer((32, 64), (16, 16))
    input = on.random(5, 64)
    for wanted in itertools.product((False, True), repeat=3):
        if not any(wanted):
            continue
        tensors = [
            tensor.detach().requires_grad_(on_)
            for tensor, on_ in zip((input, layer.values, layer.bias), wanted, strict=True)
        ]
        block_sparse_linear(*tensors, layer.pattern, on.kernels).sum().backward()
        assert [tensor.grad is not None for tensor in tensors] == list(wanted)


def gradients_refuse_to_be_differentiated(on: On) -> None:
    layer = on.layer((32, 64), (16, 16), tiers=torch.full((2, 4), 2))
    layer.values.requires_grad_()
    (grad,) = torch.autograd.grad(layer(on.random(5, 64)).square().sum(), layer.values, create_graph=True)
    refusal = ""
    try:
        grad.sum().backward()
    except RuntimeError as error:
        refusal = str(error)
    assert "once_differentiable" in refusal


def results_are_the_same_each_time(on: On) -> None:
    layer = on.layer((64, 128), (16, 32), torch.bfloat16)
    layer.values.requires_grad_()
    input, grad = on.random(300, 128, dtype=torch.bfloat16).requires_grad_(), on.random(300, 64, dtype=torch.bfloat16)

    def once() -> list[Tensor]:
        output = layer(input)
        return [output, *torch.autograd.grad(output, (input, layer.values), grad)]

    first = once()
    for _ in range(20 if on.device == "cuda" else 1):
        for one, other in zip(first, once(), strict=True):
            assert torch.equal(one, other)


def few_blocks_split_the_sum_over_the_batch(on: On) -> None:
    tiers = torch.zeros(4, 2, dtype=torch.uint8)
    tiers[1, 0], tiers[3, 1] = 2, 1
    for rows, dtype in ((600, torch.float32), (513, torch.bfloat16)):
        layer = on.layer((64, 32), (16, 16), dtype, tiers=tiers, tail=1)
        layer.compare(on.random(rows, 32, dtype=dtype), on.random(rows, 64, dtype=dtype))


def splits_cover_the_batch_and_depend_on_no_tile(on: On) -> None:
    from lightning_topkast.ops.blocks.launch import processors, split

    assert split(300, 1, processors(torch.device(on.device)))[0] > 1, "the checks above split nothing"
    for rows, programs in itertools.product((1, 127, 128, 129, 600, 8192, 100_000), (1, 3, 50, 205, 5000)):
        splits, each = split(rows, programs, 132)
        assert (splits - 1) * each < rows <= splits * each, "some split is empty, or some row left out"
        assert each % 128 == 0


def splits_fill_the_processors(on: On) -> None:
    from lightning_topkast.ops.blocks.launch import split

    def busiest(programs: int, splits: int, each: int) -> int:
        """Rows that the busiest of 132 processors sums."""
        return -(-programs * splits // 132) * each

    assert split(8192, 3, 132)[0] == 16
    assert split(8192, 205, 132) == (1, 8192), "in two they would take as long, and folding time on top"
    for programs in range(1, 1000, 7):
        splits, each = split(8192, programs, 132)
        assert splits == 1 or busiest(programs, splits, each) < busiest(programs, 1, 8192) or programs < 132
        assert programs < 20 * 132 / splits, "folding costs more than it gains"


def the_operators_are_registered_as_torch_wants_them(on: On) -> None:
    layer = on.layer((64, 96), (16, 32), tail=1)
    pattern, values, kernels = layer.pattern, layer.values, on.kernels
    input, grad = on.random(6, 96), on.random(6, 64)
    rows, columns, updated = pattern.active_by_row, pattern.active_by_column, pattern.updated_by_row
    turned = input.t().contiguous().t()
    torch.library.opcheck(library.block_product, (input, values, layer.bias, *rows, False, kernels))
    torch.library.opcheck(library.block_product, (turned, values, None, *rows, False, kernels))
    torch.library.opcheck(library.block_product, (grad, values, None, *columns, True, kernels))
    torch.library.opcheck(library.block_sampled, (grad, input, *updated, list(values.shape), kernels))


class Net(nn.Module):
    def __init__(self, on: On, transposed: bool) -> None:
        super().__init__()
        self.layer = on.layer((32, 64) if transposed else (64, 32), (16, 16), transposed=transposed)
        self.values, self.bias = nn.Parameter(self.layer.values), nn.Parameter(self.layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        return replace(self.layer, values=self.values, bias=self.bias)(input.relu()).square()

    def compare(self, compiled: nn.Module, rows: int) -> None:
        results = []
        for forward in (self, compiled):
            input = torch.linspace(-1, 1, rows * 32, device=self.values.device).view(rows, 32).requires_grad_()
            output = forward(input)
            results.append([output, *torch.autograd.grad(output.sum(), (input, self.values, self.bias))])
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def torch_compile_makes_one_graph_of_it(on: On) -> None:
    for transposed in (False, True):
        net = Net(on, transposed)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        for rows in (5, 8, 11):
            net.compare(compiled, rows)
        net.layer.pattern = pattern_of(net.layer.tiers.flip(0), (16, 16))
        with torch.compiler.set_stance("fail_on_recompile"):
            net.compare(compiled, 11)


def autocast_computes_in_its_type(on: On) -> None:
    layer = on.layer((32, 64), (16, 16))
    leaves = [tensor.requires_grad_() for tensor in (on.random(20, 64), layer.values, layer.bias)]
    grad = on.random(20, 32, dtype=torch.bfloat16)
    with torch.autocast(on.device, torch.bfloat16):
        output = layer(leaves[0])
    assert output.dtype == torch.bfloat16
    grads = torch.autograd.grad(output, leaves, grad)
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in leaves]
    expected = block_sparse_linear(*narrow, layer.pattern, on.kernels)
    assert torch.equal(output, expected)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, narrow, grad), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.float())

    output = layer(leaves[0])
    outside = torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)
    with torch.autocast(on.device, torch.bfloat16):
        inside = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(torch.equal(one, other) for one, other in zip(outside, inside, strict=True))


def float32_is_as_exact_as_torch_is_told(on: On) -> None:
    from lightning_topkast.ops.blocks.launch import numerics

    before = torch.get_float32_matmul_precision()
    for precision, expected in (("high", "tf32"), ("highest", "ieee")):
        torch.set_float32_matmul_precision(precision)
        assert numerics(on.random(1))["PRECISION"] == expected
    torch.set_float32_matmul_precision(before)


def without_tensor_descriptors_it_holds_too(on: On) -> None:
    """As on GPUs before Hopper."""
    from lightning_topkast.ops.blocks import launch

    with mock.patch.object(launch, "_describes", return_value=False):
        output_and_gradients_are_those_of_the_dense_weight(on)
        nothing_is_read_beside_the_inputs(on)
        few_blocks_split_the_sum_over_the_batch(on)


CHECKS = (
    output_and_gradients_are_those_of_the_dense_weight,
    sums_are_made_in_float32,
    any_leading_shape_and_any_strides_will_do,
    nothing_is_read_beside_the_inputs,
    a_line_without_blocks_gives_the_bias_or_zero,
    the_sets_may_be_empty_or_everything,
    exploring_blocks_change_no_output_but_have_a_gradient,
    values_behind_those_of_b_have_no_gradient,
    a_gradient_is_made_for_what_needs_one,
    gradients_refuse_to_be_differentiated,
    results_are_the_same_each_time,
    few_blocks_split_the_sum_over_the_batch,
    the_operators_are_registered_as_torch_wants_them,
    torch_compile_makes_one_graph_of_it,
    autocast_computes_in_its_type,
)
OF_TRITON = (
    *CHECKS,
    without_tensor_descriptors_it_holds_too,
    splits_cover_the_batch_and_depend_on_no_tile,
    splits_fill_the_processors,
    float32_is_as_exact_as_torch_is_told,
)


def draw_tiles(seed: int) -> None:
    """On a GPU each kernel runs in one of its tilings, drawn at random: to tune all of these shapes takes minutes."""
    from lightning_topkast.ops.blocks import launch
    from lightning_topkast.ops.blocks.conv import launch as conv

    draw = random.Random(seed)
    for tuner in (launch._product, launch._sampled, conv._product, conv._sampled):
        fitting = tuner.early_config_prune
        tuner.early_config_prune = lambda *args, fitting=fitting, **constants: [
            draw.choice(fitting(*args, **constants))
        ]


def main(checks: Sequence[Callable[[On], None]], description: str | None) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", help="names of checks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # the exceptions that pyproject.toml makes for torch.compile
    warnings.filterwarnings("ignore", message=".*torch.jit.script_method. is deprecated")
    warnings.filterwarnings("ignore", message=".*torch.autograd.function.Function.* should not be instantiated")
    if arguments.device == "cuda":
        draw_tiles(arguments.seed)
    failed: dict[str, str] = {}
    choose_block_kernels("triton", torch.device(arguments.device), (16, 16), torch.float32)
    for check in checks:
        if arguments.only and check.__name__ not in arguments.only:
            continue
        failed[check.__name__] = ""
        try:
            check(On("triton", arguments.device, arguments.seed))
        except Exception:
            failed[check.__name__] = traceback.format_exc()
    print(json.dumps(failed))


if __name__ == "__main__":
    main(OF_TRITON, __doc__)
