"""Sets of blocks and of n in m neighbours: what is chosen, how many, and that the method holds for them."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from lightning_topkast import Block, Magnitude, NonFiniteWeightError, Targets, TopKast, TopKastError
from lightning_topkast.baselines import SET, RigL, Static
from lightning_topkast.distributed import Sharding
from lightning_topkast.method.structure import NOfM, units_in_order
from lightning_topkast.weights.layouts import Product, make_layout
from tests.helpers import MIDDLE, fit, make_callback, make_net, make_trainer, nouns

SHAPES = [(6, 8), (7, 10), (5,), (4, 6, 3), (5, 4, 3, 2), (3, 2, 2, 2, 2), (1, 9), (9, 1)]
BLOCKS = [(2, 2), (3, 4), (1, 4), (4, 1), (16, 16)]


class Conv(nn.Module):
    """Holds a weight of any shape; by the class's name, one with three dimensions is a kernel, not a stack."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def sparse(module: nn.Module, forward: float = 0.5, backward: float = 0.25, **options):
    return TopKast(module, forward, backward, **nouns(include=["theta"], **options)).weights["theta"]


def blocks_of(shape, outputs, inputs):
    """Index tuples of every block, by hand: outputs × inputs at each position of a kernel."""
    sides = [inputs] if len(shape) == 1 else [outputs, inputs] + [1] * (len(shape) - 2)
    starts = itertools.product(*(range(0, size, side) for size, side in zip(shape, sides, strict=True)))
    return [tuple(slice(a, a + side) for a, side in zip(start, sides, strict=True)) for start in starts]


# --- blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_sets_are_the_blocks_with_the_largest_norms(shape, block):
    module = Conv(*shape)
    theta = module.theta.detach().clone()
    places = blocks_of(shape, *block)
    norms = [float(theta[place].double().norm()) for place in places]
    if round(0.5 * len(places)) == 0:
        with pytest.raises(TopKastError, match=r"has 1 blocks, too few for one active block"):
            sparse(module, structure="block", block=block)
        return
    weight = sparse(module, structure="block", block=block)
    by_norm = sorted(range(len(places)), key=lambda i: -norms[i])
    tiers = torch.zeros(shape, dtype=torch.uint8)
    for count in (round(0.75 * len(places)), round(0.5 * len(places))):
        for number in by_norm[:count]:
            tiers[places[number]] += 1
    assert torch.equal(weight.tiers, tiers)
    assert torch.equal(weight.parameter.detach(), theta * (tiers == 2))
    assert (int(weight.active_entries), int(weight.updated_entries)) == (
        int((tiers == 2).sum()),
        int((tiers > 0).sum()),
    )


def test_equal_blocks_go_by_their_place():
    module = Conv(8, 8)
    nn.init.ones_(module.theta)
    weight = sparse(module, structure="block", block=(4, 2), forward=0.75, backward=0.5)
    assert weight.tiers[::4, ::2].tolist() == [[2, 2, 1, 1], [0, 0, 0, 0]]


def test_edge_blocks_compete_by_the_entries_they_have():
    module = Conv(4, 5)
    nn.init.ones_(module.theta)
    # norms: 2, 2 and at the edge √2
    weight = sparse(module, structure="block", block=(2, 2), forward=0.5, backward=0.0)
    assert not weight.active[:, 4].any()


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global", "global_normalized"])
def test_counts_are_whole_numbers_of_blocks_under_every_distribution(distribution):
    model = nn.Sequential(nn.Linear(32, 64), nn.Conv2d(16, 32, 3), nn.Linear(64, 16))
    topkast = TopKast(
        model,
        0.9,
        0.8,
        targets=Targets(keep_first_dense=False, keep_last_dense=False),
        structure=Block(8, 4),
        distribution=distribution,
    )
    blocks = {name: weight.size // 32 for name, weight in topkast.weights.items()}
    active = {name: int(weight.active_entries) for name, weight in topkast.weights.items()}
    updated = {name: int(weight.updated_entries) for name, weight in topkast.weights.items()}
    assert all(count % 32 == 0 for count in (*active.values(), *updated.values()))
    if distribution == "uniform":
        assert active == {name: 32 * round(0.1 * count) for name, count in blocks.items()}
    assert sum(active.values()) / 32 == pytest.approx(0.1 * sum(blocks.values()), abs=1.5)
    assert sum(updated.values()) / 32 == pytest.approx(0.2 * sum(blocks.values()), abs=1.5)


@pytest.mark.parametrize("rule", [Static(), SET(0.5), RigL(0.5)])
def test_baselines_choose_among_blocks(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    topkast = TopKast(
        model,
        0.75,
        0.75,
        targets=Targets(keep_first_dense=False, keep_last_dense=False),
        update_every=2,
        penalty=None,
        structure=Block(2, 2),
        rule=rule,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer, total_steps=20)
    seen = []
    for step in range(20):
        optimizer.zero_grad()
        model(torch.randn(5, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        tiers = topkast.weights["0.weight"].tiers
        grid = tiers[::2, ::2]
        assert torch.equal(tiers, grid.repeat_interleave(2, 0).repeat_interleave(2, 1))
        seen.append(grid == 2)
    assert int(seen[-1].sum()) == 8
    assert any(not torch.equal(before, seen[-1]) for before in seen) is (type(rule) is not Static)


def test_gradients_of_half_precision_weights_do_not_overflow_in_norms():
    values = torch.full((4, 4), 300.0, dtype=torch.float16)
    assert Block(4, 4).scores(values, Sharding("w", values)).tolist() == [[1200.0]]


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-22, 1e22, 1e37])
def test_norms_of_tiny_and_huge_values_neither_vanish_nor_overflow(scale):
    values = torch.rand(8, 12) * scale
    norms = Block(4, 4).scores(values, Sharding("w", values))
    blocks = values.double().unflatten(0, (2, 4)).unflatten(2, (3, 4))
    assert torch.allclose(norms, blocks.square().sum((1, 3)).sqrt(), rtol=1e-6, atol=0)
    alone = Block(4, 4).norms(values.view(2, 4, 3, 4).transpose(1, 2).reshape(6, 16))
    assert torch.equal(alone, norms.view(-1))


@pytest.mark.parametrize("structure", ["block", "2:4"])
@pytest.mark.parametrize("backward", [0.25, 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_the_refresh_with_the_weights_name(structure, backward, value):
    module = Conv(8, 8)
    topkast = TopKast(module, 0.5, backward, **nouns(include=["theta"], structure=structure, block=(4, 4)))
    before = topkast.weights["theta"].tiers.clone()
    with torch.no_grad():
        module.theta[topkast.weights["theta"].active] = value
    with pytest.raises(NonFiniteWeightError, match="'theta' holds NaN"):
        topkast.refresh()
    assert torch.equal(topkast.weights["theta"].tiers, before)


@pytest.mark.parametrize("storage", ["packed", "compact"])
def test_packed_blocks_train_as_masked_ones(storage):
    def train(kept):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        topkast = TopKast(
            model,
            0.75,
            0.5,
            **nouns(structure="block", block=(4, 8), update_every=3, strength=0.1, storage=kept, kernels="torch"),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        topkast.attach(optimizer)
        for step in range(10):
            optimizer.zero_grad()
            model(torch.randn(5, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        return topkast.weights["2.weight"]

    masked, packed = train("masked"), train(storage)
    assert torch.equal(masked.tiers, packed.tiers)
    assert torch.allclose(masked.theta(), packed.theta(), atol=1e-6)


@pytest.mark.parametrize("storage", ["masked", "packed", "compact"])
def test_what_is_counted_of_blocks_is_their_entries(storage):
    model = nn.Sequential(nn.Linear(16, 16))
    options = {"structure": Block(4, 2), "storage": storage, "rule": Magnitude("random"), "penalty": None}
    targets = Targets(keep_first_dense=False, keep_last_dense=False)
    topkast = TopKast(model, 0.75, 0.5, targets=targets, update_every=1, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    topkast.attach(optimizer)
    weight = topkast.weights["0.weight"]
    first, ever, promoted = ~weight.updated, torch.zeros(16, 16, dtype=torch.bool), []
    for step in range(6):
        before = weight.active
        optimizer.zero_grad()
        model(torch.randn(5, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        ever |= weight.active
        promoted.append(weight.promoted)
        assert weight.promoted == int((weight.active & ~before).sum())
        assert int(weight.never_active_entries) == int((first & ~ever).sum())
    assert any(promoted)
    assert 0 < int(weight.never_active_entries) < weight.first_reservoir == int(first.sum())


@pytest.mark.parametrize(
    ("shape", "block"), [((6, 8), (3, 4)), ((12,), (5, 4)), ((4, 6, 3), (2, 3)), ((4, 4, 3, 2), (4, 1))]
)
def test_packed_order_is_block_by_block(shape, block):
    units = Block(*block)
    blocks = blocks_of(shape, *block)
    tiers = torch.randint(3, (len(blocks),), dtype=torch.uint8)
    dense, expected = torch.empty(shape, dtype=torch.uint8), []
    places = torch.arange(dense.numel()).view(shape)
    for tier, where in zip(tiers, blocks, strict=True):
        dense[where] = tier
    for wanted in (2, 1):
        expected += [places[where].flatten() for tier, where in zip(tiers, blocks, strict=True) if tier == wanted]
    assert torch.equal(units.order(units.units_of(dense), dense.shape), torch.cat(expected))
    for product in (None, Product()) if len(shape) == 2 else (None,):
        packing = make_layout(*units_in_order(tiers), dense.shape, units, product, torch.device("cpu"))
        assert torch.equal(packing.indices(), torch.cat(expected))
        counts = int((tiers == 2).sum()) * math.prod(block[-len(shape) :]), len(torch.cat(expected))
        assert (packing.active_count, packing.updated_count) == counts


@pytest.mark.parametrize("storage", ["packed", "compact"])
@pytest.mark.parametrize("options", [{}, {"delay": 2}, {"rule": SET(0.5), "backward_sparsity": 0.75}], ids=str)
def test_scores_that_are_kept_are_those_of_the_weights(storage, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    settings = {"forward_sparsity": 0.75, "backward_sparsity": 0.5, "update_every": 4, "kernels": "torch"} | options
    topkast = TopKast(model, **nouns(structure="block", block=(4, 2), storage=storage, **settings))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    topkast.attach(optimizer)
    weight = topkast.weights["2.weight"]

    def agree() -> bool:
        return torch.equal(weight.scores(), weight.structure.scores(weight.theta(), weight.sharding))

    for step in range(15):
        optimizer.zero_grad()
        model(torch.randn(5, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        assert agree(), step
    assert topkast.refresh_count == 3
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})
    assert agree()
    model.bfloat16()
    assert agree()
    topkast.refresh()
    assert agree()


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_a_state_whose_sets_cut_through_blocks_is_refused(storage):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
        settings = {"structure": "block", "block": (4, 2), "update_every": 2, "delay": 1}
        topkast = TopKast(model, 0.75, 0.5, **nouns(storage=storage, kernels="torch", **settings))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        topkast.attach(optimizer)
        for _ in range(2):
            model(torch.ones(1, 8)).sum().backward()
            optimizer.step()
        return model, topkast

    model, topkast = build()
    state, other = topkast.state_dict(), build()
    other[0].load_state_dict(model.state_dict())
    other[1].load_state_dict(state)
    for damage, message in (
        (lambda s: s["weights"]["1.weight"]["tiers"], "do not consist of whole 4×2 blocks"),
        (lambda s: s["selections"][0]["tiers"]["1.weight"], "next sets of '1.weight'"),
    ):
        damaged = copy.deepcopy(state)
        tiers = damage(damaged)
        here, there = (tiers == 0).nonzero()[0], (tiers == 1).nonzero()[0]
        tiers[tuple(here)], tiers[tuple(there)] = 1, 0
        with pytest.raises(TopKastError, match=message):
            build()[1].load_state_dict(damaged)


def test_packed_blocks_must_divide_the_weight():
    model = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 10), nn.Linear(10, 4))
    with pytest.raises(TopKastError, match=r"'1.weight' of shape \(10, 10\) is not a multiple of the 4×4 block"):
        TopKast(model, 0.5, 0.25, structure=Block(4, 4), storage="packed")


# --- n of m neighbours --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 3), (3, 8)])
def test_active_are_the_largest_of_each_group_and_exploring_the_largest_of_the_rest(shape, n, m):
    module = Conv(*shape)
    theta = module.theta.detach().abs().reshape(shape[0] if len(shape) > 1 else 1, -1)
    weight = sparse(module, 1 - n / m, 0.1, structure=f"{n}:{m}")
    active = weight.active.reshape(theta.shape)
    for row, chosen in zip(theta, active, strict=True):
        for begin in range(0, len(row), m):
            group, members = row[begin : begin + m], chosen[begin : begin + m]
            kept = min(n, len(group))
            assert int(members.sum()) == kept
            assert set(group[members].tolist()) == set(group.sort(descending=True).values[:kept].tolist())
    exploring = (weight.updated & ~weight.active).reshape(theta.shape)
    rest = theta[~active].sort(descending=True).values
    more = max(round(0.9 * theta.numel()) - int(active.sum()), 0)
    assert sorted(theta[exploring].tolist()) == sorted(rest[:more].tolist())


@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 2, 2), (0,)])
def test_process_without_a_row_of_a_sharded_weight_chooses_nothing(shape):
    assert NOfM(1, 4)._winners(torch.empty(shape)).shape == shape


def test_ties_within_a_group_go_to_the_first():
    winners = NOfM(2, 4)._winners(torch.tensor([[1.0, 1, 1, 1, 0, 2, 0, 0], [3, 1, 3, 3, 5, 5, 5, 6]]))
    assert winners.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0, 0, 1]]


# --- through the callback -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sparsity"),
    [({"structure": "block", "block": (4, 8)}, 0.75), ({"structure": "2:4", "forward_sparsity": 0.5}, 0.5)],
)
def test_a_run_is_resumed_with_its_granularity_and_with_no_other(options, sparsity, tmp_path):
    arguments = {"forward_sparsity": 0.75, "backward_sparsity": 0.25, "update_every": 3} | options
    whole, begun, resumed = (make_callback(**arguments) for _ in range(3))
    fit(make_trainer(tmp_path, whole, max_epochs=3), make_net())
    fit(trainer := make_trainer(tmp_path, begun, max_epochs=2), make_net())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    fit(make_trainer(tmp_path, resumed, max_epochs=3), make_net(1), ckpt_path=tmp_path / "two.ckpt")
    one, other = (callback.topkast.weights[MIDDLE] for callback in (whole, resumed))
    assert one.forward_density == 1 - sparsity
    assert torch.equal(one.tiers, other.tiers)
    assert torch.equal(one.theta(), other.theta())

    other = make_callback(**(arguments | {"structure": "unstructured"}))
    with pytest.raises(TopKastError, match="resume with the structure it was saved with"):
        fit(make_trainer(tmp_path, other, max_epochs=3), make_net(1), ckpt_path=tmp_path / "two.ckpt")


def test_the_start_up_table_says_what_the_sets_are_made_of():
    said = [
        str(TopKast(Conv(*shape), 0.5, 0.25, **nouns(include=["theta"], structure=kind, block=(2, 4))).summary())
        for kind, shape in (("block", (7, 8)), ("block", (8, 8)), ("2:4", (8, 8)), ("unstructured", (8, 8)))
    ]
    assert "blocks of 2×4 entries; blocks at the edges are smaller" in said[0]
    assert "blocks of 2×4 entries" in said[1]
    assert "edges" not in said[1]
    assert "2 of every 4 consecutive entries are active" in said[2]
    assert "blocks" not in said[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "blocks"}, "expected structure to be 'unstructured', 'block', N:M.*, got 'blocks'"),
        ({"structure": "4:2"}, "expected structure to be N:M with 1 <= N < M <= 99, such as 2:4, got '4:2'"),
        ({"structure": 3}, "expected structure to be 'unstructured', 'block', N:M.*, got 3"),
        ({"structure": "block", "block": (0, 4)}, "expected Block.outputs to be an int of at least 1, got 0"),
        ({"structure": "block", "block": (4, True)}, "expected Block.inputs to be an int of at least 1, got True"),
        (
            {"structure": "block", "storage": "packed", "kernels": "compiled"},
            "expected kernels to be one of 'auto', 'torch', 'triton' with structure='32×32 block', got 'compiled'",
        ),
        (
            {"storage": "packed", "kernels": "triton"},
            "expected kernels to be one of 'auto', 'torch', 'compiled' with structure='unstructured', got 'triton'",
        ),
        ({"structure": "2:4"}, "expected forward_sparsity=0.5, got 0.75"),
        ({"structure": "1:4", "overrides": {"*": {"forward_sparsity": 0.5}}}, r"in overrides\['\*'\], got 0.5"),
        ({"structure": "1:4", "exploration": "random"}, "needs rule=Magnitude"),
        ({"structure": "1:4", "distribution": "erk"}, "needs distribution='uniform'"),
        ({"structure": "1:4", "rule": Static(), "backward_sparsity": 0.75}, "needs rule=Magnitude"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_way_out(options, message):
    with pytest.raises(TopKastError, match=message):
        make_callback(**({"forward_sparsity": 0.75, "backward_sparsity": 0.5} | options))
