"""The packed linear operators against dense float64 references, and the building of the compiled kernels."""

import os
import platform
import re
import subprocess
import sys
import textwrap
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_topkast.errors import TopKastError
from lightning_topkast.ops import MATRIX_KERNELS, CsrPattern, EntryPattern, Pattern, compiled, sparse_linear
from lightning_topkast.ops.csr.linear import _batch_last
from tests.helpers import has_compiler, needs_compiler
from tests.processes import run, started

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(scope="module", params=["torch", pytest.param("compiled", marks=needs_compiler)])
def kernels(request):
    return MATRIX_KERNELS.choose(request.param, CPU)


@dataclass
class Layer:
    """A random sparse layer: what `sparse_linear` takes, and the same densely."""

    values: Tensor
    bias: Tensor | None
    shape: tuple[int, int]
    active: Tensor  # flat indices
    exploring: Tensor
    transposed: bool = False
    patterns: dict[str, CsrPattern | EntryPattern] = field(default_factory=dict)  # by kernels

    def __call__(self, input: Tensor, kernels: str) -> Tensor:
        return sparse_linear(input, self.values, self.bias, self.pattern(kernels))

    def pattern(self, kernels: str) -> CsrPattern | EntryPattern:
        sets = self.active, self.exploring
        if kernels not in self.patterns:
            self.patterns[kernels] = (
                CsrPattern.from_flat(*sets, self.shape, self.transposed)
                if kernels == "torch"
                else EntryPattern.from_flat(*sets, (*self.shape, 1, 1), transposed=self.transposed)
            )
        return self.patterns[kernels]

    @property
    def entries(self) -> Tensor:
        """Flat indices, in the order of the values."""
        return torch.cat([self.active, self.exploring])

    def weight(self) -> Tensor:
        """(out, in), float64."""
        dense = torch.zeros(self.shape, dtype=torch.float64).view(-1)
        dense[self.active] = self.values.detach()[: self.active.numel()].double()
        dense = dense.view(self.shape)
        return dense.t() if self.transposed else dense

    def reference(self, input: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output and the gradients of input, values and bias, float64."""
        weight = self.weight().requires_grad_()
        x = input.detach().double().requires_grad_()
        bias = torch.zeros(weight.shape[0], dtype=torch.float64) if self.bias is None else self.bias.detach().double()
        bias.requires_grad_()
        output = F.linear(x, weight, bias)
        input_grad, weight_grad, bias_grad = torch.autograd.grad(output, (x, weight, bias), grad.double())
        if self.transposed:
            weight_grad = weight_grad.t()
        values_grad = torch.zeros(self.values.shape, dtype=torch.float64)
        values_grad[: self.entries.numel()] = weight_grad.reshape(-1)[self.entries]
        return output.detach(), input_grad, values_grad, bias_grad


def make_layer(
    shape=(9, 7), density=(0.3, 0.6), dtype=torch.float32, bias=True, tail=0, seed=0, transposed=False, scores=None
):
    """A layer of (rows × columns) patterns; where `scores` (default random) are below the densities lie A and B."""
    generator = torch.Generator().manual_seed(seed)
    if scores is None:
        scores = torch.rand(shape, generator=generator)
    scores = scores.reshape(-1)
    active = (scores < density[0]).nonzero().flatten()
    exploring = ((scores >= density[0]) & (scores < density[1])).nonzero().flatten()
    count = active.numel() + exploring.numel() + tail
    features = shape[1] if transposed else shape[0]
    return Layer(
        torch.randn(count, generator=generator, dtype=dtype).requires_grad_(),
        torch.randn(features, generator=generator, dtype=dtype).requires_grad_() if bias else None,
        tuple(shape),
        active,
        exploring,
        transposed,
    )


def check(layer: Layer, input: Tensor, kernels: str) -> None:
    """Output and every gradient agree with the dense reference in shape, dtype and value."""
    input = input.detach().requires_grad_()
    output = layer(input, kernels)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [input, layer.values] + ([layer.bias] if layer.bias is not None else [])
    results = [output.detach(), *torch.autograd.grad(output, wanted, grad.to(output.dtype))]
    for result, expected in zip(results, layer.reference(input, grad.to(output.dtype)), strict=False):
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        assert result.dtype == input.dtype
        torch.testing.assert_close(
            result.double(), expected, rtol=0, atol=TOLERANCE[input.dtype] * scale, check_stride=False
        )


def random(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


# Pattern


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_pattern_and_its_transpose_hold_the_entries(data):
    rows, columns = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    chosen = data.draw(st.sets(st.integers(0, rows * columns - 1)))
    flat = torch.tensor(sorted(chosen), dtype=torch.int64)
    pattern = Pattern.from_flat(flat, (rows, columns))
    assert pattern.nnz == len(chosen)
    row = torch.repeat_interleave(torch.arange(rows), pattern.crow.diff())
    assert torch.equal(row * columns + pattern.col, flat)
    t_row = torch.repeat_interleave(torch.arange(columns), pattern.t_crow.diff())
    assert torch.equal(pattern.t_col * columns + t_row, flat[pattern.t_order])
    assert torch.equal(t_row * rows + pattern.t_col, torch.sort(t_row * rows + pattern.t_col).values)
    tensors = (pattern.crow, pattern.col, pattern.t_crow, pattern.t_col, pattern.t_order)
    assert {tensor.dtype for tensor in tensors} == {torch.int32}
    assert pattern.nbytes == 4 * sum(tensor.numel() for tensor in tensors)


def test_pattern_without_transpose_is_smaller():
    pattern = Pattern.from_flat(torch.tensor([0, 5]), (2, 3), transpose=False)
    assert pattern.nbytes == 4 * (3 + 2)
    assert pattern.to("meta").col.device.type == "meta"


@pytest.mark.parametrize("indices", [[-1, 2], [0, 6], [3, 2], [2, 2]])
def test_invalid_indices_are_refused(indices):
    with pytest.raises(ValueError, match="indices"):
        Pattern.from_flat(torch.tensor(indices), (2, 3))


def test_patterns_beyond_int32_are_refused():
    with pytest.raises(ValueError, match="int32"):
        Pattern.from_flat(torch.empty(0, dtype=torch.int64), (1 << 31, 1))


@needs_compiler
@given(st.data())
@settings(max_examples=50, deadline=None)
def test_compiled_patterns_hold_the_entries_and_know_their_size_before(data):
    MATRIX_KERNELS.choose("compiled", CPU)
    rows, columns = data.draw(st.integers(0, 200)), data.draw(st.integers(0, 200))
    low, transposed = data.draw(st.floats(0, 1)), data.draw(st.booleans())
    layer = make_layer((rows, columns), (low, data.draw(st.floats(low, 1))), transposed=transposed)
    pattern = layer.pattern("compiled")
    assert torch.equal(pattern.flat_indices(), layer.entries)
    assert (pattern.rows, pattern.channels) == ((columns, rows) if transposed else (rows, columns))
    sets = layer.active.numel(), layer.entries.numel()
    assert pattern.nbytes == EntryPattern.bytes_of((rows, columns, 1, 1), 1, transposed, *sets)


@needs_compiler
def test_blocks_and_panels_hold_as_many_entries_as_are_worth_loading():
    MATRIX_KERNELS.choose("compiled", CPU)
    nothing = torch.empty(0, dtype=torch.int64)
    sides = {
        every: EntryPattern.from_flat(torch.arange(0, 600 * 600, every), nothing, (600, 600, 1, 1))
        for every in (2, 20, 90)
    }
    assert [(each.block, each.panel) for each in sides.values()] == [(64, 64), (240, 500), (600, 600)]


# Values and gradients


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_layers_agree_with_dense_ones(kernels, data):
    integers = st.integers(1, 40)
    shape = data.draw(integers), data.draw(integers)
    active = data.draw(st.floats(0, 1))
    layer = make_layer(
        shape,
        (active, data.draw(st.floats(active, 1))),
        data.draw(st.sampled_from([torch.float32, torch.float64])),
        data.draw(st.booleans()),
        data.draw(st.integers(0, 3)),
        data.draw(st.integers(0, 1000)),
        data.draw(st.booleans()),
    )
    lead = data.draw(st.sampled_from([(), (1,), (2,), (7,), (17,), (33,), (2, 3), (5, 9), (2, 3, 4), (140,)]))
    columns = shape[0] if layer.transposed else shape[1]
    check(layer, random(*lead, columns, dtype=layer.values.dtype), kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 3, 7, 8, 15, 16, 17, 31, 64, 100, 127, 128, 129, 143, 255, 300])
def test_every_batch_size_is_right(kernels, batch, dtype):
    check(make_layer((21, 35), (0.2, 0.5), dtype), random(batch, 35, dtype=dtype), kernels)


@pytest.mark.parametrize("transposed", [False, True])
def test_operands_larger_than_the_cache_are_right(kernels, transposed):
    # many blocks, and more rows than are computed together
    for shape in ((3, 5000), (1500, 40)):
        layer = make_layer(shape, (0.02, 0.04), transposed=transposed)
        check(layer, random(150, shape[0] if transposed else shape[1]), kernels)


@pytest.mark.parametrize("shape", [(3, 700), (700, 3)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_and_columns_of_hundreds_of_entries_are_right(kernels, shape, transposed, dtype):
    layer = make_layer(shape, (0.4, 0.8), dtype, transposed=transposed)
    assert min(layer.active.numel(), layer.exploring.numel()) > 3 * 250
    for batch in (1, 20, 130):
        check(layer, random(batch, shape[0] if transposed else shape[1], dtype=dtype), kernels)


@pytest.mark.parametrize("density", [(0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("batch", [0, 1, 20])
def test_empty_and_full_patterns_are_right(kernels, density, batch):
    for bias in (True, False):
        check(make_layer(density=density, bias=bias), random(batch, 7), kernels)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_layers_without_features_are_right(kernels, shape):
    check(make_layer(shape), random(20, shape[1]), kernels)


def test_empty_rows_and_columns_are_right(kernels):
    scores = torch.rand(12, 10, generator=torch.Generator().manual_seed(0))
    scores[[0, 5, 11]] = 2.0
    scores[:, [0, 4, 9]] = 2.0
    for transposed in (False, True):
        layer = make_layer(scores.shape, (0.4, 0.7), scores=scores, transposed=transposed)
        check(layer, random(18, 12 if transposed else 10), kernels)


def test_uninitialised_memory_does_not_show(kernels):
    # the allocator hands the freed NaNs out again
    for batch in (1, 20):
        layer = make_layer((30, 20), (0.0, 0.1), bias=False)
        for size in (30 * batch, 20 * batch, layer.values.numel()):
            del [torch.full((size,), torch.nan) for _ in range(8)][:]
        check(layer, random(batch, 20), kernels)


@pytest.mark.parametrize("transposed", [False, True])
def test_leading_dimensions_are_kept(kernels, transposed):
    layer = make_layer((9, 7), dtype=torch.float64, transposed=transposed)
    columns = 9 if transposed else 7
    for lead in [(), (4,), (2, 3), (2, 0, 3), (2, 3, 4)]:
        check(layer, random(*lead, columns, dtype=torch.float64), kernels)


def test_non_contiguous_inputs_are_right(kernels):
    layer = make_layer((9, 7))
    for input in (
        random(7, 20).t(),
        random(20, 14)[:, ::2],
        random(40, 7)[::2],
        random(1, 7).expand(20, 7),
        random(20, 1).expand(20, 7),
        random(7, 4, 5).permute(1, 2, 0),
        random(4, 7, 5).transpose(1, 2),
    ):
        check(layer, input, kernels)


def test_expanded_output_gradients_are_right(kernels):
    layer = make_layer((9, 7), dtype=torch.float64)
    input = random(20, 7, dtype=torch.float64).requires_grad_()
    layer(input, kernels).sum().backward()
    _, input_grad, values_grad, bias_grad = layer.reference(input, torch.ones(20, 9))
    torch.testing.assert_close(input.grad, input_grad)
    torch.testing.assert_close(layer.values.grad, values_grad)
    torch.testing.assert_close(layer.bias.grad, bias_grad)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(kernels, transposed):
    # without exploring entries, whose gradient is not that of the output
    layer = make_layer((5, 4), (0.5, 0.5), torch.float64, tail=2, transposed=transposed)
    input = random(3, 5 if transposed else 4, dtype=torch.float64).requires_grad_()

    def function(input, values, bias):
        return sparse_linear(input, values, bias, layer.pattern(kernels))

    assert torch.autograd.gradcheck(function, (input, layer.values, layer.bias))


def test_a_second_derivative_is_refused(kernels):
    layer = make_layer()
    (grad,) = torch.autograd.grad(layer(random(3, 7), kernels).square().sum(), layer.values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_values_beyond_the_patterns_get_no_gradient(kernels):
    layer = make_layer(tail=5)
    layer(random(20, 7), kernels).sum().backward()
    assert layer.values.grad[-5:].tolist() == [0.0] * 5
    assert (layer.values.grad[:-5] != 0).all()


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)))
def test_only_wanted_gradients_are_made(kernels, wanted):
    layer = make_layer()
    input = random(20, 7)
    leaves = [input, layer.values, layer.bias]
    for leaf, wants in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(wants)
    output = layer(input, kernels)
    assert output.requires_grad == any(wanted)
    if any(wanted):
        output.backward(torch.ones_like(output))
    for leaf, wants, expected in zip(leaves, wanted, layer.reference(input, torch.ones(20, 9))[1:], strict=True):
        assert (leaf.grad is not None) == wants
        if wants:
            torch.testing.assert_close(leaf.grad.double(), expected, rtol=0, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [5, 40, 300])
def test_threads_and_repetitions_change_no_bit(transposed, batch):
    # several blocks and panels, and ranges of threads that end within one vector of gradients
    layer = make_layer((650, 530), (0.05, 0.2), transposed=transposed)
    input = random(batch, 650 if transposed else 530).requires_grad_()

    def run():
        output = layer(input, "compiled")
        return output.detach(), *torch.autograd.grad(output.square().sum(), (input, layer.values))

    MATRIX_KERNELS.choose("compiled", CPU)
    expected = run()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for result, expect in zip(run(), expected, strict=True):
                assert torch.equal(result, expect)
    finally:
        torch.set_num_threads(1)
    check(layer, input, "compiled")


def test_two_torch_threads_share_the_rows(kernels):
    torch.set_num_threads(2)
    try:
        scores = torch.rand(60, 50, generator=torch.Generator().manual_seed(0))
        scores[:20] = 2.0  # rows without work, and one with most of it
        scores[30] = 0.0
        for batch in (5, 130):
            check(make_layer((60, 50), (0.3, 0.6), scores=scores), random(batch, 50), kernels)
            check(make_layer((60, 50), (0.3, 0.6), scores=scores, transposed=True), random(batch, 60), kernels)
    finally:
        torch.set_num_threads(1)


def test_python_threads_do_not_disturb_each_other(kernels):
    failures = []

    def work(seed):
        try:
            layer = make_layer((40, 30), seed=seed)
            for batch in (3, 64, 130):
                check(layer, random(batch, 30), kernels)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_layers_compute_in_float32(kernels, dtype):
    layer = make_layer((40, 30), (0.5, 0.8), dtype)
    input = random(20, 30).to(dtype).requires_grad_()
    output = layer(input, kernels)
    grad = random(20, 40).to(dtype)
    output.backward(grad)
    results = output, input.grad, layer.values.grad, layer.bias.grad
    for result, expected in zip(results, layer.reference(input, grad), strict=True):
        assert result.dtype == dtype
        # no worse than the rounding of the result
        torch.testing.assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtypes_that_a_dense_layer_gives(kernels, dtype):
    layer = make_layer((40, 30), (0.5, 0.8))
    input = random(20, 30).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        dense = F.linear(input, torch.zeros(40, 30))
        output = layer(input, kernels)
        output.float().sum().backward()
    assert output.dtype == dense.dtype == torch.bfloat16
    assert (input.grad.dtype, layer.values.grad.dtype, layer.bias.grad.dtype) == (dtype, torch.float32, torch.float32)
    expected = layer.reference(input, torch.ones(20, 40))
    torch.testing.assert_close(output.double(), expected[0], rtol=0.01, atol=0.01)
    torch.testing.assert_close(layer.values.grad.double(), expected[2], rtol=1e-4, atol=1e-4)


def test_autocast_leaves_float64_alone(kernels):
    layer = make_layer(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        check(layer, random(20, 7, dtype=torch.float64), kernels)


# Memory layout


class Copies(TorchDispatchMode):
    """Notes every operator that copies a tensor."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lead", [(20,), (4, 5)])
def test_neighbours_copy_nothing(kernels, lead):
    first, second = make_layer((30, 7)), make_layer((8, 30), seed=1)
    first.pattern(kernels), second.pattern(kernels)
    input = _batch_last(random(*lead, 7)).view(7, *lead).movedim(0, -1)
    with Copies() as copies:
        hidden = F.gelu(first(input, kernels))
        output = second(hidden, kernels)
        assert _batch_last(hidden).data_ptr() == hidden.data_ptr()
        torch.autograd.grad((output * output).sum(), (first.values, second.values))
    # the sum's gradient is expanded, and the square's output not
    assert copies.names == []


def test_in_place_activations_are_allowed(kernels):
    layer = make_layer()
    input = random(4, 5, 7)
    output = torch.relu_(layer(input, kernels))
    (grad,) = torch.autograd.grad(output.sum(), layer.values)
    expected = layer.reference(input, (layer.reference(input, torch.zeros(4, 5, 9))[0] > 0).float())[2]
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-4)


# torch.compile


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.slow
def test_compiles_into_one_graph(kernels, transposed):
    layer = make_layer((30, 30), transposed=transposed)
    other = make_layer((30, 30), seed=1, bias=False)
    layer.pattern(kernels), other.pattern(kernels)

    def network(input):
        return other(F.relu(layer(input, kernels)), kernels)

    def run(function):
        input = random(4, 5, 30).requires_grad_()
        output = function(input)
        return output, *torch.autograd.grad(output.square().sum(), (input, layer.values, layer.bias, other.values))

    torch.compiler.reset()
    expected = run(network)
    for backend in ("eager", "aot_eager"):
        results = run(torch.compile(network, fullgraph=True, backend=backend))
        for result, expect in zip(results, expected, strict=True):
            torch.testing.assert_close(result, expect)


def test_fakes_agree_with_the_kernels(kernels):
    layer = make_layer((9, 7), tail=2)
    pattern, values, inputs, grads = layer.pattern(kernels), layer.values.detach(), random(7, 20), random(9, 20)
    checks = ("test_schema", "test_faketensor")
    namespace = torch.ops.topkast
    product_op = getattr(namespace, f"{kernels}_product").default
    for bias in (None, random(9)):
        torch.library.opcheck(
            product_op, (values, pattern.index, pattern.sizes, inputs, bias, [4, 5]), test_utils=checks
        )
    for of_input, of_values in product([False, True], repeat=2):
        torch.library.opcheck(
            getattr(namespace, f"{kernels}_gradients").default,
            (values, pattern.index, pattern.sizes, inputs, grads, [4, 5], of_input, of_values),
            test_utils=checks,
        )


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": random(3, 8)}, r"expected input to be \(\.\.\., 7\)"),
        ({"input": torch.tensor(1.0)}, r"expected input to be \(\.\.\., 7\)"),
        ({"values": torch.zeros(3)}, "expected 1-D values with at least"),
        ({"bias": torch.zeros(7)}, r"expected bias to be \(9,\)"),
        ({"input": random(3, 7).double()}, "the same dtype"),
        ({"input": random(3, 7).to("meta")}, "the same device"),
    ],
)
def test_misfits_are_refused(kernels, change, message):
    layer = make_layer()
    arguments = {
        "input": random(3, 7),
        "values": layer.values,
        "bias": layer.bias,
        "pattern": layer.pattern(kernels),
    }
    with pytest.raises(TopKastError, match=message):
        sparse_linear(**(arguments | change))


def test_on_the_meta_device_there_are_shapes():
    layer = make_layer()
    input, values = (tensor.detach().to("meta").requires_grad_() for tensor in (random(3, 7), layer.values))
    output = sparse_linear(input, values, layer.bias.detach().to("meta"), layer.pattern("torch").to("meta"))
    output.sum().backward()
    assert (output.shape, input.grad.shape, values.grad.shape) == ((3, 9), (3, 7), layer.values.shape)
    assert output.device.type == "meta"


def test_a_pattern_without_transpose_serves_inference_only():
    layer = make_layer()
    pattern = CsrPattern(
        *(Pattern.from_flat(set_, (9, 7), transpose=False) for set_ in (layer.active, layer.exploring))
    )
    input = random(20, 7)
    expected = layer.reference(input, torch.zeros(20, 9))[0]
    output = sparse_linear(input, layer.values, layer.bias, pattern)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    with pytest.raises(TopKastError, match="transpose=True"):
        sparse_linear(input.requires_grad_(), layer.values, layer.bias, pattern)


@needs_compiler
def test_the_pattern_of_a_convolution_is_no_matrix():
    MATRIX_KERNELS.choose("compiled", CPU)
    none = torch.empty(0, dtype=torch.int64)
    for shape, groups in (((4, 6, 3, 1), 1), ((4, 3, 1, 1), 2)):
        pattern = EntryPattern.from_flat(none, none, shape, groups)
        with pytest.raises(TopKastError, match="expected the pattern of a matrix"):
            sparse_linear(torch.ones(2, 6), torch.ones(0), None, pattern)


# Building


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """As in a process that has not loaded the kernels, with an empty cache and libraries that are not loaded."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(MATRIX_KERNELS, "_obstacle", None)
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(path.read_bytes()))
    return loaded


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A quick stand-in for the compiler; it notes the output of each run in the file that is returned."""
    script, log = tmp_path / "compiler", tmp_path / "runs"
    source = f"""\
        #!{sys.executable} -S
        import sys, time
        path = sys.argv[sys.argv.index("-o") + 1]
        open({str(log)!r}, "a").write(path + "\\n")
        with open(path, "wb") as output:
            output.write(b"half a ")
            output.flush()
            time.sleep(0.5)
            output.write(b"library")
        """
    script.write_text(textwrap.dedent(source))
    script.chmod(0o755)
    log.touch()
    monkeypatch.setenv("CXX", str(script))
    return log


@pytest.mark.parametrize(
    ("command", "reason"),
    [("/bin/false", "failed with exit status 1"), ("/no/such/compiler -O1", "no C\\+\\+ compiler '/no/such/compiler'")],
)
def test_broken_compilers_never_stop_auto_which_says_so(unloaded, monkeypatch, caplog, command, reason):
    monkeypatch.setenv("CXX", command)
    assert MATRIX_KERNELS.choose("auto", CPU) == "torch"
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(f"slower than dense ones.*{reason}", said[-1], re.DOTALL)
    with pytest.raises(TopKastError, match=f"(?s){reason}.*Use kernels='auto' or 'torch'"):
        MATRIX_KERNELS.choose("compiled", CPU)
    assert unloaded == []
    assert [*os.scandir(compiled._cache())] == []  # nothing half-built is left


@pytest.mark.skipif(not has_compiler, reason="no C++ compiler")
def test_the_compilers_last_lines_are_quoted(unloaded, monkeypatch, tmp_path):
    source = tmp_path / "kernels.cpp"
    source.write_text("#error the kernels are out of order\n")
    monkeypatch.setattr(MATRIX_KERNELS, "source", source)
    with pytest.raises(TopKastError, match="the kernels are out of order"):
        MATRIX_KERNELS.choose("compiled", CPU)


def test_an_unwritable_cache_never_stops_auto(unloaded, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert MATRIX_KERNELS.choose("auto", CPU) == "torch"


def test_a_built_library_is_built_once(unloaded, compiler, monkeypatch):
    for _ in range(2):
        assert MATRIX_KERNELS.choose("compiled", CPU) == "compiled"
        monkeypatch.setattr(MATRIX_KERNELS, "_obstacle", None)
    assert unloaded == [b"half a library"] * 2
    assert len(compiler.read_text().splitlines()) == 1


@pytest.mark.parametrize("damage", [b"half a", b"half a librarz", b""])
def test_damaged_libraries_are_built_again(unloaded, compiler, monkeypatch, damage):
    MATRIX_KERNELS.choose("compiled", CPU)
    (library,) = compiled._cache().glob("*.so")
    library.write_bytes(damage)
    monkeypatch.setattr(MATRIX_KERNELS, "_obstacle", None)
    assert MATRIX_KERNELS.choose("auto", CPU) == "compiled"
    assert unloaded == [b"half a library"] * 2


@pytest.mark.parametrize("digest", [None, "", "0" * 64, b"\xff"], ids=["missing", "empty", "wrong", "no text"])
def test_libraries_without_their_digest_are_built_again(unloaded, compiler, monkeypatch, digest):
    MATRIX_KERNELS.choose("compiled", CPU)
    (place,) = compiled._cache().glob("*.sha256")
    right = place.read_text()
    if digest is None:
        place.unlink()
    else:
        place.write_bytes(digest if isinstance(digest, bytes) else digest.encode())
    monkeypatch.setattr(MATRIX_KERNELS, "_obstacle", None)
    assert MATRIX_KERNELS.choose("compiled", CPU) == "compiled"
    assert len(compiler.read_text().splitlines()) == 2
    assert place.read_text() == right


@pytest.mark.parametrize("what", ["torch", "machine", "command", "source", "header"])
def test_libraries_of_another_torch_machine_command_or_text_are_not_loaded(
    unloaded, compiler, monkeypatch, tmp_path, what
):
    source, header = Path(tmp_path, "source", "kernels.cpp"), tmp_path / "entries.h"
    source.parent.mkdir()
    source.write_text('#include "../entries.h"\n')
    header.write_text("// a header\n")
    monkeypatch.setattr(MATRIX_KERNELS, "source", source)
    MATRIX_KERNELS.choose("compiled", CPU)
    monkeypatch.setattr(MATRIX_KERNELS, "_obstacle", None)
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "2.0.0")
    elif what == "machine":
        monkeypatch.setattr(compiled.platform, "machine", lambda: "another")
    elif what == "command":
        monkeypatch.setenv("CXX", f"{os.environ['CXX']} -O1")
    elif what == "source":
        source.write_text(source.read_text() + "// another\n")
    else:
        header.write_text("// another\n")
    MATRIX_KERNELS.choose("compiled", CPU)
    assert len(compiler.read_text().splitlines()) == 2
    assert len([*compiled._cache().glob("*.so")]) == 2


def test_libraries_that_do_not_load_are_built_again_and_the_log_says_why(unloaded, compiler, monkeypatch, caplog):
    MATRIX_KERNELS.choose("compiled", CPU)
    monkeypatch.setattr(MATRIX_KERNELS, "_obstacle", None)
    outcomes = iter([OSError("another libc"), None])

    def load(path):
        if (outcome := next(outcomes)) is not None:
            raise outcome

    monkeypatch.setattr(torch.ops, "load_library", load)
    with caplog.at_level("INFO", logger=compiled.__name__):
        assert MATRIX_KERNELS.choose("compiled", CPU) == "compiled"
    assert len(compiler.read_text().splitlines()) == 2
    assert "again, since it cannot be loaded: another libc" in caplog.text


def _owned_by(monkeypatch, *paths):
    """Let files appear as those of another user, since only root can make them so."""
    real, others = Path.stat, {str(path) for path in paths}

    def stat(self, **options):
        found = real(self, **options)
        return os.stat_result([*found[:4], 54321, *found[5:10]]) if str(self) in others else found

    monkeypatch.setattr(Path, "stat", stat)


UNSAFE = ("the folder", "the library", "its digest")


@pytest.mark.parametrize("what", UNSAFE)
@pytest.mark.parametrize("mode", [0o770, 0o702, "another user's"], ids=str)
def test_libraries_that_others_may_have_planted_are_not_loaded(unloaded, compiler, monkeypatch, caplog, what, mode):
    MATRIX_KERNELS.choose("compiled", CPU)
    folder = compiled._cache()
    (library,) = folder.glob("*.so")
    place = {"the folder": folder, "the library": library, "its digest": library.with_suffix(".sha256")}[what]
    unloaded.clear()
    caplog.clear()
    monkeypatch.setattr(MATRIX_KERNELS, "_obstacle", None)
    if isinstance(mode, int):
        place.chmod(mode)
    else:
        _owned_by(monkeypatch, place)
    assert MATRIX_KERNELS.choose("auto", CPU) == "torch"
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(place) in said
    assert "chmod go-w" in said or "TORCH_EXTENSIONS_DIR" in said
    assert "\n" not in said
    assert unloaded == []
    with pytest.raises(TopKastError, match="kernels='compiled' is not available"):
        MATRIX_KERNELS.choose("compiled", CPU)


def test_a_cache_in_a_folder_that_all_may_change_is_not_used(unloaded, compiler, monkeypatch, tmp_path, caplog):
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "shared" / "extensions"))
    (tmp_path / "shared").chmod(0o777)
    assert MATRIX_KERNELS.choose("auto", CPU) == "torch"
    assert f"all users may write to {tmp_path}/shared" in caplog.text
    (tmp_path / "shared").chmod(0o1777)  # as /tmp: only its owner may rename a folder
    monkeypatch.setattr(MATRIX_KERNELS, "_obstacle", None)
    assert MATRIX_KERNELS.choose("auto", CPU) == "compiled"


def test_what_is_built_is_for_its_owner_only_whatever_the_umask(unloaded, compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new" / "extensions"))
    before = os.umask(0)
    try:
        for _ in range(2):
            assert MATRIX_KERNELS.choose("compiled", CPU) == "compiled"
            monkeypatch.setattr(MATRIX_KERNELS, "_obstacle", None)
    finally:
        os.umask(before)
    assert len(compiler.read_text().splitlines()) == 1
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.slow
def test_processes_that_build_at_once_all_load_whole_libraries(compiler, tmp_path):
    program = """
        import torch
        from lightning_topkast.ops import MATRIX_KERNELS
        torch.ops.load_library = lambda path: print(path.read_bytes())
        print(MATRIX_KERNELS.choose("compiled", torch.device("cpu")))
        """
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with ExitStack() as both:
        running = [
            both.enter_context(started(command, env=environment, stdout=subprocess.PIPE, text=True)) for _ in range(2)
        ]
        for process in running:
            assert process.communicate()[0] == "b'half a library'\ncompiled\n"
    cache = tmp_path / "lightning_topkast"
    assert len([*cache.iterdir()]) == 2  # the library and its digest
    folders = [Path(path).parent for path in compiler.read_text().splitlines()]
    assert len({cache, *folders}) == 1 + len(folders)  # each of its own, none where libraries are loaded from


def test_other_devices_run_by_torch():
    assert MATRIX_KERNELS.choose("auto", torch.device("meta")) == "torch"
    with pytest.raises(TopKastError, match="run on CPU, not on meta"):
        MATRIX_KERNELS.choose("compiled", torch.device("meta"))


def test_unknown_operators_are_refused():
    with pytest.raises(TopKastError, match="one of auto, torch, compiled"):
        MATRIX_KERNELS.choose("fast", CPU)


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="no such instructions")
@pytest.mark.parametrize("tests", ["test_ops.py", "test_conv.py"])
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_kernels_for_older_processors_pass_the_same_tests(capability, tests, tmp_path):
    """PyTorch has a variable for the instructions that it and its vectors use, for which we compile too."""
    path = Path(__file__).with_name(tests)
    building = "not built and not compilers and not damaged and not libraries and not cache"  # needs no kernels
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-k", building, "-p", "no:cacheprovider", path]
    variables = {"ATEN_CPU_CAPABILITY": capability, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = run(command, env=os.environ | variables, cwd=path.parents[1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [*tmp_path.rglob("*_kernels_*.so")], "nothing was built"
