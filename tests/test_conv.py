"""Convolutions with packed weights: the operators against dense float64 references, and layers against masked ones."""

import itertools
import os
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_topkast import Packed, Targets, TopKast
from lightning_topkast.errors import TopKastError
from lightning_topkast.ops import CONV_KERNELS, EntryPattern, sparse_conv2d
from lightning_topkast.weights.layouts import ConvLayout, FlatLayout
from tests.processes import run
from tests.test_ops import needs_compiler

pytestmark = needs_compiler
# of the largest value; sums of some ten thousand products
TOLERANCE = {torch.float32: 3e-5, torch.float64: 3e-12}
ALL = Targets(keep_first_dense=False, keep_last_dense=False)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    assert CONV_KERNELS.choose("compiled", torch.device("cpu")) == "compiled"


def draw_sets(shape, density=(0.3, 0.6), seed=0):
    """Flat indices of a random A and B\\A."""
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).flatten()
    active = scores < density[0]
    return active.nonzero().flatten(), ((scores < density[1]) & ~active).nonzero().flatten()


def close(result, expected, dtype):
    result, expected = result.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        result.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale, check_stride=False
    )


def check(shape, groups, images, dtype=torch.float32, density=(0.3, 0.6), sides=None, tail=2, **geometry):
    """Output and all gradients are those of a dense convolution."""
    geometry = {key: (value, value) if isinstance(value, int) else value for key, value in geometry.items()}
    active, exploring = draw_sets(shape, density)
    pattern = EntryPattern.from_flat(active, exploring, shape, groups)
    if sides is not None:  # of blocks and panels
        index = torch.ops.topkast.entry_index(
            active, exploring, shape[0], shape[1] * groups, shape[2] * shape[3], groups, False, *sides
        )
        pattern = EntryPattern(shape, groups, False, active.numel(), pattern.updated, *sides, *index)
    entries = torch.cat([active, exploring])
    assert torch.equal(pattern.flat_indices(), entries)
    values = torch.randn(entries.numel() + tail, dtype=dtype).requires_grad_()
    bias = torch.randn(shape[0], dtype=dtype).requires_grad_()
    images = images.detach().to(dtype).requires_grad_()
    output = sparse_conv2d(images, values, bias, pattern, **geometry)

    dense = torch.zeros(shape, dtype=torch.float64)
    dense.view(-1)[active] = values.detach()[: active.numel()].double()
    wanted = [images.detach().double(), dense, bias.detach().double()]
    wanted = [tensor.requires_grad_() for tensor in wanted]
    expected = F.conv2d(*wanted, **geometry, groups=groups)
    assert output.dtype == dtype
    close(output, expected, dtype)
    grad = torch.randn_like(output)
    result = torch.autograd.grad(output, (images, values, bias), grad, retain_graph=True)
    expected = torch.autograd.grad(expected, wanted, grad.double())
    of_values = torch.zeros(values.shape, dtype=torch.float64)
    of_values[: entries.numel()] = expected[1].reshape(-1)[entries]
    for got, want in zip(result, (expected[0], of_values, expected[2]), strict=True):
        close(got, want, dtype)
    # without the gradient of the input, as in a first layer
    close(torch.autograd.grad(output, values, grad)[0], of_values, dtype)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_output_and_gradients_are_those_of_a_dense_convolution(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = groups * draw(st.integers(1, 20)), groups * draw(st.integers(1, 20))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 5), (7, 7), (1, 3)]))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, dilation, padding = draw(pair), draw(pair), draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    needed = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [least + draw(st.integers(0, 20)) for least in needed]
    images = torch.randn(draw(st.sampled_from([1, 3, 16, 17, 33])), channels, *size)
    if draw(st.booleans()):
        images = images.contiguous(memory_format=torch.channels_last)
    sides = draw(st.integers(1, channels)), draw(st.integers(1, out))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    shape = (out, channels // groups, *kernel)
    check(shape, groups, images, dtype, sides=sides, stride=stride, dilation=dilation, padding=padding)


@pytest.mark.parametrize("density", [(0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (1.0, 1.0)], ids=str)
def test_sets_may_be_empty_or_whole(density):
    check((5, 4, 3, 3), 1, torch.randn(9, 4, 6, 7), density=density, padding=1)


def test_maps_of_one_pixel_and_maps_of_several_bands():
    """A map is computed in bands whose maps fit a cache, here of two or more rows."""
    check((70, 90, 3, 3), 1, torch.randn(17, 90, 1, 1), padding=1)
    check((40, 64, 3, 3), 1, torch.randn(18, 64, 40, 24), padding=1)
    check((40, 64, 3, 3), 1, torch.randn(18, 64, 41, 24), padding=2, stride=2, dilation=(3, 1))


def test_short_rows_of_1x1_kernels_hold_the_same_pixels():
    for size in ((10, 12), (7, 21), (13, 13)):
        images = torch.randn(18, 7, *size).contiguous(memory_format=torch.channels_last)
        check((5, 7, 1, 1), 1, images)
        check((5, 7, 1, 1), 1, images[:, :, :, : size[1] // 2])  # whose rows are apart
        check((4, 7, 1, 1), 1, images, stride=2)
        check((4, 7, 1, 1), 1, images, padding=1)


def test_an_empty_batch_is_empty_and_gives_zero_gradients():
    check((5, 4, 3, 3), 1, torch.randn(0, 4, 6, 7), padding=1)


@pytest.mark.parametrize("channels_last", [False, True])
def test_output_and_gradient_have_the_memory_format_of_the_input(channels_last):
    order = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(8, 4, 6, 6).contiguous(memory_format=order).requires_grad_()
    pattern = EntryPattern.from_flat(*draw_sets((6, 4, 3, 3)), (6, 4, 3, 3), 1)
    output = sparse_conv2d(images, torch.randn(pattern.updated), None, pattern)
    (gradient,) = torch.autograd.grad(output.sum(), images)
    assert output.is_contiguous(memory_format=order)
    assert gradient.is_contiguous(memory_format=order)


def test_strided_views_are_read_as_what_they_are():
    whole = torch.randn(9, 8, 14, 14)
    for images in (whole[:, ::2, ::2, 1:8], whole.transpose(2, 3)[:, :4], whole.expand(9, 8, 14, 14)[:, 2:6]):
        check((6, 4, 3, 3), 1, images)


def test_the_same_bits_every_time_and_the_same_output_for_any_number_of_threads():
    shape = (48, 32, 3, 3)
    pattern = EntryPattern.from_flat(*draw_sets(shape), shape, 1)
    images, values = torch.randn(40, 32, 20, 20), torch.randn(pattern.updated)

    def run():
        inputs = images.clone().requires_grad_(), values.clone().requires_grad_()
        output = sparse_conv2d(*inputs, None, pattern, padding=(1, 1))
        return output.detach(), *torch.autograd.grad(output, inputs, torch.ones_like(output))

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for first, second in itertools.pairwise(results[:2]):
        assert all(map(torch.equal, first, second))
    for first, second in itertools.pairwise(results[2:4]):
        assert all(map(torch.equal, first, second))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])
        torch.testing.assert_close(result[2], results[0][2], rtol=1e-4, atol=1e-3)


def test_bfloat16_and_autocast_compute_in_float32():
    shape = (6, 4, 3, 3)
    pattern = EntryPattern.from_flat(*draw_sets(shape), shape, 1)
    images, values = torch.randn(8, 4, 6, 6), torch.randn(pattern.updated).requires_grad_()
    expected = sparse_conv2d(images, values, None, pattern)
    with torch.autocast("cpu", torch.bfloat16):
        output = sparse_conv2d(images, values, None, pattern)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected.bfloat16())
    (gradient,) = torch.autograd.grad(output.sum(), values)
    assert gradient.dtype == torch.float32
    low = sparse_conv2d(images.bfloat16(), values.bfloat16(), None, pattern)
    assert low.dtype == torch.bfloat16


def test_inputs_that_do_not_fit_are_refused():
    shape = (6, 4, 3, 3)
    pattern = EntryPattern.from_flat(*draw_sets(shape), shape, 1)
    images, values = torch.randn(8, 4, 6, 6), torch.randn(pattern.updated)
    for wrong, message in (
        ((images[:, :3], values, None), "expected input to be \\(batch, 4, height, width\\), got \\(8, 3, 6, 6\\)"),
        ((images, values[1:], None), "expected 1-D values with at least"),
        ((images, values, torch.zeros(5)), "expected bias to be \\(6,\\), got \\(5,\\)"),
        ((images, values.double(), None), "must have the same dtype"),
        ((images[..., :2, :2], values, None), "does not fit an input of \\(2, 2\\)"),
    ):
        with pytest.raises(TopKastError, match=message):
            sparse_conv2d(*wrong, pattern)
    for flat in ([3, 2], [216], [-1, 4]):
        with pytest.raises(ValueError, match=r"expected (indices below|strictly)"):
            EntryPattern.from_flat(torch.tensor(flat), torch.tensor([], dtype=torch.int64), shape, 1)


def test_operators_pass_the_checks_for_custom_operators():
    shape = (6, 4, 3, 3)
    pattern = EntryPattern.from_flat(*draw_sets(shape), shape, 1)
    images, values = torch.randn(8, 4, 6, 6), torch.randn(pattern.updated)
    numbers = [3, 3, 1, 1, 1, 1, 1, 1, 6, 6]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.topkast
    for last in (False, True):
        arguments = values, pattern.index, pattern.sizes, images, None, numbers, last
        torch.library.opcheck(ops.conv.default, arguments, test_utils=tests)
    torch.library.opcheck(ops.entry_flat_indices.default, (pattern.index, pattern.sizes, 1, False), test_utils=tests)
    grads = torch.randn(8, 6, 6, 6)
    arguments = values, pattern.index, pattern.sizes, images, grads, numbers
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(ops.conv_gradients.default, (*arguments, *wanted), test_utils=tests)


# Layers


def network(sides=2, dtype=torch.float64):
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if sides == 2 else (nn.Conv1d, nn.BatchNorm1d)
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), conv(8, 12, 3, stride=2, padding="valid", bias=False), nn.Tanh(),
        conv(12, 8, 3, padding="same", dilation=2, groups=2), nn.Tanh(), conv(8, 8, 3, groups=8), nn.Tanh(),
        conv(8, 6, 1, stride=2), nn.Tanh(), conv(6, 6, 3, padding=1, padding_mode="circular"), nn.AdaptiveAvgPool2d(2)
        if sides == 2 else nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(24, 4),
    ).to(dtype)  # fmt: skip


def train(storage, model, images, steps=25, compiled=False):
    topkast = TopKast(model, 0.8, 0.5, storage=storage, update_every=5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    topkast.attach(optimizer)
    forward = torch.compile(model, fullgraph=True) if compiled else model
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(images), torch.arange(len(images)) % 4)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return topkast, losses


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sides", [1, 2])
def test_packed_convolutions_train_like_masked_ones(sides, channels_last):
    images = torch.randn(9, 3, *(19, 17)[:sides], dtype=torch.float64)
    if channels_last and sides == 2:
        images = images.contiguous(memory_format=torch.channels_last)
    runs = {storage: train(storage, network(sides), images) for storage in ("masked", "packed")}
    layouts = {name: weight.layout for name, weight in runs["packed"][0].weights.items()}
    assert [name for name, layout in layouts.items() if isinstance(layout, FlatLayout)] == ["7.weight"]  # depthwise
    assert sum(isinstance(layout, ConvLayout) for layout in layouts.values()) == 4
    assert runs["packed"][1] == pytest.approx(runs["masked"][1], rel=1e-8)
    for name, weight in runs["packed"][0].weights.items():
        other = runs["masked"][0].weights[name]
        assert torch.equal(weight.tiers, other.tiers)
        torch.testing.assert_close(weight.theta(), other.theta(), rtol=1e-8, atol=1e-10)


def test_a_single_column_may_have_any_stride():
    rows = torch.randn(17, 4, 1, 9)
    check((6, 4, 3, 1), 1, rows.transpose(2, 3))
    shape = (6, 4, 3, 1)
    pattern = EntryPattern.from_flat(*draw_sets(shape), shape, 1)
    images, values = rows.transpose(2, 3).contiguous().requires_grad_(), torch.randn(pattern.updated).requires_grad_()
    output = sparse_conv2d(images, values, None, pattern)
    grad = torch.randn(17, 6, 1, 7).transpose(2, 3)
    assert grad.is_contiguous()
    for got, want in zip(
        torch.autograd.grad(output, (images, values), grad, retain_graph=True),
        torch.autograd.grad(output, (images, values), grad.clone(memory_format=torch.contiguous_format)),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("batch", [None, 1, 5, 6])
@pytest.mark.parametrize("sides", [1, 2])
def test_any_batch_gives_what_the_dense_layer_gives(sides, batch):
    model = network(sides).eval()
    topkast = TopKast(model, 0.8, 0.5, storage="packed", targets=ALL)
    images = torch.randn(*(() if batch is None else (batch,)), 3, *(19, 17)[:sides], dtype=torch.float64)
    for index in (0, 3, 5, 9, 11):
        layer = model[index]
        plain = getattr(nn, layer.plain_class.__name__)(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, layer.bias is not None, layer.padding_mode,
        ).double()  # fmt: skip
        plain.load_state_dict({key: value.detach() for key, value in layer.state_dict().items()})
        channels = torch.randn(*images.shape[: -sides - 1], layer.in_channels, *images.shape[-sides:]).double()
        torch.testing.assert_close(layer(channels), plain(channels))
    assert topkast.weights["11.weight"].storage == "packed"


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 8])
def test_compiled_models_train_alike(batch):
    images = torch.randn(batch, 3, 12, 12)
    plain = train("packed", network(dtype=torch.float32), images, steps=6)[1]
    compiled = train("packed", network(dtype=torch.float32), images, steps=6, compiled=True)[1]
    assert compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("compiler", [True, False])
def test_another_process_computes_with_a_pickled_model(compiler, tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 8))
    TopKast(model, 0.8, 0.5, storage="packed", targets=ALL)
    images = torch.randn(8, 4, 6, 6)
    torch.save((model, images, model(images).detach()), tmp_path / "model.pt")
    program = f"""
        import torch
        model, images, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        output = model(images)
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        assert model[0]._parameters["weight"].grad is not None
        """
    none = {"CXX": "/no/such/compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = run([sys.executable, "-c", textwrap.dedent(program)], env=os.environ | ({} if compiler else none))
    assert done.returncode == 0, done.stderr


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_checkpointed_activations_change_no_bit():
    images = torch.randn(8, 3, 12, 12)
    losses = []
    for kind in (nn.Sequential, Checkpointed):
        layers = [*network(dtype=torch.float32)]
        losses.append(train("packed", nn.Sequential(kind(*layers[:7]), *layers[7:]), images, steps=6)[1])
    assert losses[0] == losses[1]


def test_maps_that_are_too_wide_for_the_offsets_are_computed_with_a_dense_copy(monkeypatch):
    model = nn.Sequential(nn.Conv1d(64, 64, 3))
    topkast = TopKast(model, 0.9, 0.8, storage="packed", targets=ALL)
    layout = topkast.weights["0.weight"].layout
    assert isinstance(layout, ConvLayout)
    assert not model[0]._is_too_wide(100_000)
    assert model[0]._is_too_wide(1_000_000)
    monkeypatch.setattr(type(model[0]), "_is_too_wide", lambda *_: True)
    images = torch.randn(8, 64, 50)
    torch.testing.assert_close(model(images), F.conv1d(images, topkast.weights["0.weight"].alpha(), model[0].bias))


def test_layers_that_share_a_weight_must_agree_on_groups():
    def shared(groups):
        layers = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4 * groups, 4, 3, stride=2, padding=2, groups=groups)
        layers[1].weight = layers[0].weight
        return nn.Sequential(layers[0], nn.Tanh(), layers[1] if groups == 1 else nn.Identity())

    model = shared(1)
    topkast = TopKast(model, 0.8, 0.5, storage="packed", targets=ALL)
    (weight,) = topkast.weights.values()
    assert isinstance(weight.layout, ConvLayout)
    images = torch.randn(6, 4, 9, 9)
    alpha = weight.alpha()
    h = F.conv2d(images, alpha, model[0].bias, padding=1).tanh()
    torch.testing.assert_close(model(images), F.conv2d(h, alpha, model[2].bias, stride=2, padding=2))


def test_without_compiled_kernels_convolutions_are_compact_and_1x1_ones_matrices():
    model = network()
    topkast = TopKast(model, 0.8, 0.5, storage=Packed(kernels="torch"))
    kept = {name: weight.storage for name, weight in topkast.weights.items()}
    assert kept == {"3.weight": "compact", "5.weight": "compact", "7.weight": "compact", "9.weight": "packed",
                    "11.weight": "compact"}  # fmt: skip


def test_a_layout_on_another_device_is_that_of_a_dense_weight():
    shape = torch.Size((6, 4, 3, 3))
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    (weight,) = TopKast(model, 0.8, 0.5, storage="packed", targets=ALL).weights.values()
    moved = weight.layout.to(torch.device("meta"))
    assert isinstance(moved, FlatLayout)
    assert (moved.shape, moved.active_count, moved.updated_count) == (shape, weight.active_count, weight.updated_count)
    assert moved.pattern.device.type == "meta"


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 7]), st.sampled_from([1, 2, 4]))
@settings(max_examples=30, deadline=None)
def test_the_size_of_an_index_is_known_before_it_is_made(out, channels, side, groups):
    shape = (out * groups, channels, side, side)
    active, exploring = draw_sets(shape, (0.1, 0.3))
    pattern = EntryPattern.from_flat(active, exploring, shape, groups)
    assert pattern.nbytes == EntryPattern.bytes_of(shape, groups, False, active.numel(), pattern.updated)


def test_auto_packs_convolutions_where_it_is_faster():
    kept = {}
    for pair in ((0.6, 0.3), (0.95, 0.9)):
        model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(4, 4, 3))
        topkast = TopKast(model, *pair, storage="auto", targets=ALL)
        kept[pair] = [weight.storage for weight in topkast.weights.values()]
    assert kept == {(0.6, 0.3): ["compact", "compact"], (0.95, 0.9): ["packed", "compact"]}
