"""Convolutions by blocks: the operators, torch's here and Triton's by its interpreter, and layers that use them."""

import json
import random
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lightning_topkast import Block, Packed, Targets, TopKast
from lightning_topkast.costs.memory import Held, _packing
from lightning_topkast.errors import TopKastError
from lightning_topkast.ops import block_sparse_conv2d, block_sparse_linear, convolves_by_blocks
from lightning_topkast.ops.blocks import choice
from lightning_topkast.weights.layouts import BlockConvLayout, BsrLayout, FlatLayout, Product
from tests import block_convs
from tests.blocks import On, pattern_of
from tests.test_block_ops import needs_triton, run_python

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ALL = Targets(keep_first_dense=False, keep_last_dense=False)
SMALL = Block(4, 2)


@pytest.fixture(scope="module")
def seed():
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return seed


@pytest.fixture(scope="module")
def failures_of_triton(seed):
    return json.loads(run_python(Path(block_convs.__file__), seed, TRITON_INTERPRET="1"))


@pytest.mark.parametrize("check", block_convs.CHECKS, ids=lambda check: check.__name__)
def test_with_torchs_operators(check, seed):
    check(On("torch", "cpu", seed))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("check", block_convs.OF_TRITON, ids=lambda check: check.__name__)
def test_with_interpreted_triton(check, seed, failures_of_triton):
    assert not failures_of_triton[check.__name__], failures_of_triton[check.__name__]


def test_gradients_are_those_of_finite_differences():
    on = On("torch", "cpu", 0)
    layer = block_convs.conv(
        on, (2, 2, 2, 3), (2, 1), torch.float64, tiers=on.tiers(2, 12, 0.5, 0.5).view(2, 2, 2, 3),
        stride=(2, 1), padding=(1, 2), dilation=(1, 2),
    )  # fmt: skip
    leaves = [on.random(2, 2, 4, 5, dtype=torch.float64), layer.values, layer.bias]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(
        lambda images, values, bias: replace(layer, values=values, bias=bias)(images), leaves
    )


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_a_kernels_blocks_are_in_lines_of_outputs_and_of_inputs(seed):
    on = On("torch", "cpu", seed)
    tiers = on.tiers(4, 18).view(4, 3, 2, 3)
    pattern = pattern_of(tiers, (2, 5))
    assert pattern.shape == (8, 15, 2, 3)
    for lines, grid in (
        (pattern.active_by_row, (tiers == 2).flatten(1)),
        (pattern.active_by_column, (tiers == 2).transpose(0, 1).flatten(1)),
        (pattern.updated_by_row, (tiers > 0).flatten(1)),
    ):
        assert lines.starts.diff().tolist() == grid.sum(1).tolist()
        assert lines.others.tolist() == grid.nonzero()[:, 1].tolist()
    entries = torch.arange(8 * 15 * 6).view(4, 2, 3, 5, 2, 3).permute(0, 2, 4, 5, 1, 3)
    packed = torch.cat([entries[tiers == 2], entries[tiers == 1]])
    assert torch.equal(pattern.flat_indices(), packed.flatten())
    units = torch.cat([(tiers.view(-1) == tier).nonzero().squeeze(1) for tier in (2, 1)])
    assert torch.equal(pattern.flat_indices(), Block(2, 5).entries(units, torch.Size(pattern.shape)))
    by_column = packed[: pattern.active_count][pattern.active_by_column.blocks.long(), 0, 0]
    expected = entries.permute(1, 0, 2, 3, 4, 5)[(tiers == 2).transpose(0, 1)][:, 0, 0]
    assert torch.equal(by_column, expected)


def test_the_size_of_an_index_is_known_before_it_is_made():
    pattern = pattern_of(On("torch", "cpu", 0).tiers(4, 27).view(4, 3, 3, 3), (2, 5))
    counts = pattern.active_count * 10, pattern.updated_count * 10
    held = Held(pattern.shape, torch.float32, "packed", *counts, counts[1], structure=Block(2, 5), product=Product(1))
    assert _packing(held) == pattern.nbytes


# --- refusals ---------------------------------------------------------------------------------------------------------


def arguments():
    pattern = pattern_of(torch.full((3, 2, 3, 3), 2, dtype=torch.uint8), (16, 32))
    return {
        "input": torch.ones(2, 64, 5, 6),
        "values": torch.ones(54, 16, 32),
        "bias": torch.ones(48),
        "pattern": pattern,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input": torch.ones(2, 48, 5, 6)}, r"expected input to be \(batch, 64, height, width\), got \(2, 48, 5, 6\)"),
        ({"input": torch.ones(64, 5, 6)}, r"expected input to be \(batch, 64, height, width\), got \(64, 5, 6\)"),
        ({"values": torch.ones(53, 16, 32)}, r"expected values to be at least \(54, 16, 32\), got \(53, 16, 32\)"),
        ({"bias": torch.ones(64)}, r"expected bias to be \(48,\), got \(64,\)"),
        ({"bias": torch.ones(48).double()}, "the same dtype; convert the input, or run under torch.autocast"),
        ({"values": torch.ones(54, 16, 32, device="meta")}, "must be on the same device"),
        ({"input": torch.ones(2, 64, 5, 2)}, r"kernel of 3 × 3.* does not fit an input of \(5, 2\) with padding"),
        ({"pattern": pattern_of(torch.ones(2, 2), (16, 32))}, r"a weight \(out, in, height, width\), got one of \(32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(wrong, message):
    block_sparse_conv2d(**arguments())
    with pytest.raises(TopKastError, match=message) as caught:
        block_sparse_conv2d(**(arguments() | wrong))
    assert "\n" not in str(caught.value)


def test_a_linear_product_refuses_the_pattern_of_a_convolution():
    with pytest.raises(TopKastError, match=r"expected the pattern of a matrix, got .* \(48, 64, 3, 3\)"):
        block_sparse_linear(**arguments())


def test_on_the_meta_device_there_are_shapes():
    moved = {name: each.to("meta") for name, each in arguments().items()}
    assert block_sparse_conv2d(**moved, stride=(2, 1), padding=(1, 0)).shape == (2, 48, 3, 4)


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "device", "side", "dtype", "share", "by_blocks"),
    [
        ("auto", CPU, 32, torch.float32, 0.13, True),
        ("auto", CPU, 32, torch.float32, 0.30, False),
        ("auto", CPU, 8, torch.float32, 0.13, False),
        ("auto", CPU, 64, torch.float64, 0.13, True),
        ("auto", CPU, 64, torch.bfloat16, 0.01, False),
        ("auto", torch.device("meta"), 64, torch.float32, 0.01, False),
        ("auto", GPU, 64, torch.bfloat16, 0.5, True),
        ("auto", GPU, 8, torch.bfloat16, 0.01, False),
        ("torch", CPU, 8, torch.bfloat16, 1.0, True),
        ("triton", CPU, 8, torch.bfloat16, 1.0, True),
    ],
)
def test_auto_multiplies_by_blocks_where_that_is_faster(name, device, side, dtype, share, by_blocks):
    def obstacle(device, block_shape, dtype):
        return "" if device == GPU and min(block_shape) >= 16 else "it is no GPU"

    with mock.patch.object(choice, "_obstacle", obstacle):
        assert convolves_by_blocks(name, device, (side, side), dtype, share) == by_blocks


def packed(layer, kernels="auto", pair=(0.9, 0.8), structure=SMALL):
    """A packed layer within a model of its own, and its weight."""
    model = nn.Sequential(layer)
    topkast = TopKast(model, *pair, structure=structure, targets=ALL, storage=Packed(kernels=kernels))
    return model, topkast.weights["0.weight"]


@pytest.fixture
def products():
    """Counts the products by blocks."""
    calls = []
    real = BlockConvLayout.convolve

    def convolve(self, *args):
        calls.append(self)
        return real(self, *args)

    with mock.patch.object(BlockConvLayout, "convolve", convolve):
        yield calls


@pytest.mark.parametrize(
    ("pair", "stride", "dtype", "counted"),
    [
        ((0.9, 0.8), 1, torch.float32, 1),
        ((0.9, 0.8), 2, torch.float32, 0),  # the gradient of the input takes four times as long
        ((0.5, 0.3), 1, torch.float32, 0),
        ((0.9, 0.8), 1, torch.bfloat16, 0),
    ],
)
def test_a_layer_computes_with_a_dense_copy_where_that_is_faster(products, pair, stride, dtype, counted):
    layer = nn.Conv2d(64, 64, 3, stride, padding=1, dtype=dtype)
    model, weight = packed(layer, pair=pair, structure=Block(32, 32))
    assert weight.storage == "packed"
    assert "by blocks where that should be faster" in weight.storage_reason
    images = torch.randn(2, 64, 12, 12, dtype=dtype)
    expected = F.conv2d(images, weight.alpha(), layer.bias, stride, 1)
    torch.testing.assert_close(model(images), expected)
    assert len(products) == counted


@pytest.mark.parametrize("batch", [None, 0, 1, 7])
def test_any_batch_gives_what_the_dense_layer_gives(products, batch):
    model, weight = packed(nn.Conv2d(4, 8, 3), "torch")
    images = torch.randn(*(() if batch is None else (batch,)), 4, 7, 6)
    torch.testing.assert_close(model(images), F.conv2d(images, weight.alpha(), model[0].bias))
    assert len(products) == (batch is not None)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 1)])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_every_padding_is_that_of_the_dense_layer(products, kind, padding, mode):
    padding = padding[:1] if isinstance(padding, tuple) and kind is nn.Conv1d else padding
    plain = kind(4, 8, 3, padding=padding, dilation=2, padding_mode=mode, dtype=torch.float64)
    other = kind(4, 8, 3, padding=padding, dilation=2, padding_mode=mode, dtype=torch.float64)
    model, weight = packed(other, "torch")
    plain.load_state_dict({"weight": weight.alpha(), "bias": other.bias.detach()})
    images = torch.randn(2, 4, *(9, 8)[: 1 if kind is nn.Conv1d else 2], dtype=torch.float64)
    torch.testing.assert_close(model(images), plain(images))
    assert len(products) == 1


def test_grouped_convolutions_are_compact_and_1x1_ones_matrices():
    structure = Block(2, 1)
    layers = {
        "grouped": nn.Conv2d(4, 8, 3, groups=2),
        "depthwise": nn.Conv2d(4, 4, 3, groups=4),
        "plain": nn.Conv2d(4, 8, 3),
        "one": nn.Conv2d(4, 8, 1, stride=2),
        "padded": nn.Conv2d(4, 8, 1, padding=1),
    }
    found = {name: packed(layer, structure=structure, pair=(0.7, 0.4))[1].layout for name, layer in layers.items()}
    kinds = {name: type(layout) for name, layout in found.items()}
    assert kinds == {
        "grouped": FlatLayout,
        "depthwise": FlatLayout,
        "plain": BlockConvLayout,
        "one": BsrLayout,
        "padded": BlockConvLayout,
    }


def test_a_layout_moves_with_its_places():
    layout = packed(nn.Conv2d(4, 8, 3))[1].layout
    moved = layout.to(torch.device("meta"))
    assert isinstance(moved, BlockConvLayout)
    assert moved.device.type == "meta"
    assert torch.equal(layout.to(CPU).indices(), layout.indices())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_traces_hold_no_operators_of_ours():
    model, weight = packed(nn.Conv2d(4, 8, 3), "torch")
    images = torch.randn(2, 4, 7, 6)
    traced = torch.jit.trace(model, images)
    assert "topkast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images), F.conv2d(images, weight.alpha(), model[0].bias))


# --- training ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        h = self.norm1(self.first(x)).relu()
        return (self.norm2(self.second(h)) + self.shortcut(x)).relu()


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Residual(8, 8, 1), Residual(8, 16, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).to(dtype)  # fmt: skip


def train(storage, images, steps=13, compiled=False):
    model = network(images.dtype)
    topkast = TopKast(model, 0.75, 0.5, structure=SMALL, storage=storage, update_every=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    topkast.attach(optimizer)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(images), torch.arange(len(images)) % 4)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert topkast.refresh_count == 3
    return topkast, losses


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_packed_convolutions_train_like_masked_ones(products, order):
    images = torch.randn(8, 3, 9, 8, dtype=torch.float64).contiguous(memory_format=order)
    runs = [train(storage, images) for storage in ("masked", Packed(kernels="torch"))]
    assert len(products) == 4 * 13
    assert sum(isinstance(weight.layout, BlockConvLayout) for weight in runs[1][0].weights.values()) == 4
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-8)
    for name, weight in runs[1][0].weights.items():
        other = runs[0][0].weights[name]
        assert torch.equal(weight.tiers, other.tiers)
        torch.testing.assert_close(weight.theta(), other.theta(), rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*TorchDynamo|.*torch._dynamo|.*Dynamo")
@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_a_packed_network_is_one_graph_over_refreshes(kernels):
    images = torch.randn(8, 3, 9, 8)
    torch.compiler.reset()
    counters.clear()
    losses = train(Packed(kernels=kernels), images, compiled=True)[1]
    assert not counters["graph_break"]
    assert (counters["frames"]["total"], counters["stats"]["unique_graphs"]) == (1, 1)
    assert losses == pytest.approx(train(Packed(kernels=kernels), images)[1], rel=1e-4)
