"""Entries that are zero: which of them belong to a set is drawn, the same on every path, part and storage."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_topkast import L2, SET, Magnitude, RigL, Schedule, Targets, TopKast
from lightning_topkast.method.selection import _tiers_torch, drawn, drop_and_grow, nested_top_k, top_k_then_random
from lightning_topkast.method.sharded_selection import nested_top_k_of_shards
from lightning_topkast.method.structure import Block, NOfM
from lightning_topkast.reference import Reference
from lightning_topkast.reference import draw as reference_draw
from tests.helpers import fit, make_callback, make_net, make_trainer, same

ALL = Targets(keep_first_dense=False, keep_last_dense=False)


def by_sorting(scores, lots, among, counts):
    order = sorted(
        (i for i in range(len(scores)) if among[i]), key=lambda i: (-scores[i], -lots[i] if scores[i] == 0 else 0, i)
    )
    tiers = torch.zeros(len(scores), dtype=torch.uint8)
    for count in counts:
        tiers[order[:count]] += 1
    return tiers


def in_one_part(scores, counts, among, draw):
    return nested_top_k_of_shards(
        scores, counts, len(scores), lambda value: value, lambda positions: positions, among, draw
    )


@given(data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_zeros_enter_by_the_numbers_drawn_and_all_else_by_size_and_index(data):
    size = data.draw(st.integers(1, 40))
    scores = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0]), min_size=size, max_size=size)))
    lots = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), min_size=size, max_size=size)))
    among = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    updated = data.draw(st.integers(0, int(among.sum())))
    counts = (updated, data.draw(st.integers(0, updated)))
    expected = by_sorting(scores.tolist(), lots.tolist(), among.tolist(), counts)
    assert torch.equal(nested_top_k(scores, counts, among, lambda: lots), expected)
    assert torch.equal(in_one_part(scores, counts, among, lambda: lots), expected)
    everywhere = by_sorting(scores.tolist(), lots.tolist(), [True] * size, counts)
    assert torch.equal(_tiers_torch(scores, counts, lambda: lots), everywhere)
    assert torch.equal(nested_top_k(scores, counts, draw=lambda: lots), everywhere)


@pytest.mark.parametrize("select", [nested_top_k, in_one_part])
def test_nothing_is_drawn_where_all_or_none_of_the_zeros_enter(select):
    def draw():
        raise AssertionError("drawn without need")

    scores = torch.tensor([0.0, 3.0, 1.0, 1.0, 0.0])
    everything = torch.ones(5, dtype=torch.bool)
    assert select(scores, (3, 2), among=everything, draw=draw).tolist() == [0, 2, 2, 1, 0]
    assert _tiers_torch(scores, (5, 2), draw).tolist() == [1, 2, 2, 1, 1]


def test_a_large_weight_draws_alike_on_every_path():
    scores = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0))
    scores[scores < 0.95] = 0
    lots, counts = drawn(0, 0, "w", scores.shape), (200_000, 100_000)
    expected = nested_top_k(scores, counts, draw=lambda: lots)
    assert ((expected > 0) & (scores == 0)).sum() > 100_000
    assert lots[(expected == 2) & (scores == 0)].min() >= lots[expected == 1].max()
    assert torch.equal(_tiers_torch(scores, counts, lambda: lots), expected)
    assert torch.equal(in_one_part(scores, counts, None, lambda: lots), expected)


def test_a_group_of_n_of_m_draws_among_its_zeros():
    scores = torch.tensor([[0.0, 0, 0, 0, 5, 0, 0, 0], [1, 2, 0, 0, 1, 1, 1, 1]])
    lots = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.9, 0.1, 0.2, 0.3], [0.5, 0.5, 0.9, 0.9, 0.1, 0.2, 0.3, 0.4]])
    winners = NOfM(2, 4)._winners(scores, lambda: lots)
    assert winners.int().tolist() == [[0, 1, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1, 0, 0]]


def test_the_reference_draws_the_numbers_of_the_library():
    assert reference_draw(3, 7, "w", (2, 3)) == drawn(3, 7, "w", (2, 3)).flatten().tolist()


# --- values that are nearly zero ------------------------------------------------------------------------------------

TINY = [0.0, 1e-31, 3e-45, 1e-38, 0.0, 1e-40, 1e-31, 2e-45, 1e-31, 0.0]  # the smallest are denormal


def on_a_device(scores, counts, among, draw):
    return _tiers_torch(scores, counts, draw)


PATHS = pytest.mark.parametrize("select", [nested_top_k, in_one_part, on_a_device])


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_values_are_ranked_by_size_and_drawn_only_where_they_are_zero(select, dtype):
    scores = torch.tensor(TINY, dtype=dtype)
    lots = torch.arange(1.0, 11) / 16  # against the order of the index
    for updated in range(11):
        for active in range(updated + 1):
            expected = by_sorting(scores.tolist(), lots.tolist(), [True] * 10, (updated, active))
            assert torch.equal(select(scores, (updated, active), None, lambda: lots), expected)


@PATHS
def test_a_large_weight_of_denormal_values_is_selected_exactly(select):
    scores = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) * 1e-39
    assert scores.max() < torch.finfo(torch.float32).tiny
    order = torch.sort(scores, descending=True, stable=True).indices
    expected = torch.zeros(1 << 20, dtype=torch.uint8)
    for count in (200_000, 100_000):
        expected[order[:count]] += 1
    assert torch.equal(select(scores, (200_000, 100_000), None, lambda: torch.rand(1 << 20)), expected)


@pytest.mark.parametrize("select", [nested_top_k, in_one_part])
def test_members_with_tiny_values_come_before_all_that_are_none(select):
    scores = torch.tensor([9.0, 2e-45, 9.0, 0.0, 1e-40, 9.0])
    members = torch.tensor([False, True, False, True, True, False])
    for count, chosen in ((1, [4]), (2, [1, 4]), (3, [1, 3, 4])):
        for draw in (None, lambda: torch.zeros(6)):
            assert select(scores, (count,), among=members, draw=draw).nonzero().flatten().tolist() == chosen


def test_rules_see_tiny_values():
    scores, active = torch.tensor([2e-45, 9.0, 1e-40, 0.0, 1e-35]), torch.tensor([True, False, True, True, False])
    assert drop_and_grow(scores, active, torch.tensor([0.0, 0, 0, 2e-45, 1e-40]), 2, 1).tolist() == [1, 0, 1, 0, 1]
    lots = torch.tensor([0.9, 0.9, 0.9, 2e-45, 1e-40])
    assert top_k_then_random(scores, 2, 3, lots).tolist() == [1, 2, 0, 0, 2]


def test_groups_of_n_of_m_rank_tiny_values_and_draw_among_zeros_only():
    scores = torch.tensor([[1e-31, 1e-38, 1e-31, 2e-45], [0.0, 2e-45, 0.0, 0.0], [1e-31, 1e-31, 1e-31, 0.0]])
    lots = torch.tensor([[0.1, 0.8, 0.2, 0.9], [0.1, 0.0, 0.2, 0.9], [0.1, 0.2, 0.3, 0.9]])
    assert NOfM(2, 4)._winners(scores, lambda: lots).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("storage", ["masked", "packed", "compact"])
@pytest.mark.parametrize("structure", ["unstructured", Block(4, 4), NOfM(1, 4)], ids=str)
def test_sets_of_a_tiny_weight_are_those_of_the_same_weight_made_larger(structure, storage):
    values = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    tiny = start_of(values * 2.0**-112, structure=structure, storage=storage)
    assert tiny.magnitudes().max() < 1e-30
    assert torch.equal(tiny.tiers, start_of(values, structure=structure, storage=storage).tiers)


# --- whole weights -------------------------------------------------------------------------------------------------


def start_of(values, name="0.weight", **options):
    model = nn.Sequential(nn.Linear(values.shape[1], values.shape[0]))
    with torch.no_grad():
        model[0].weight.copy_(values)
    return TopKast(model, 0.75, 0.5, targets=ALL, **options).weights[name]


SPARSE = torch.where(torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.1, 1.0, 0.0)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({}, torch.zeros(32, 32)),
        ({}, SPARSE),
        ({"structure": Block(4, 4)}, torch.zeros(32, 32)),
        ({"rule": Magnitude(exploration="random")}, SPARSE),
        ({"distribution": "global"}, SPARSE),
        ({"distribution": "global_normalized"}, SPARSE),
    ],
    ids=["zeros", "sparse", "blocks", "random exploration", "global", "normalized"],
)
def test_every_storage_draws_the_same_sets(options, values):
    storages = ("masked",) if "distribution" in options else ("masked", "packed", "compact")
    made = [start_of(values, storage=storage, **options) for storage in storages]
    tiers = made[0].tiers
    assert all(torch.equal(weight.tiers, tiers) for weight in made)
    assert (int((tiers == 2).sum()), int((tiers > 0).sum())) == (256, 512)
    assert tiers[values != 0].eq(2).all()
    for tier, what in ((2, "A"), (1, "B outside A")):
        assert ((tiers == tier) & (values == 0)).any(1).sum() >= 16, f"{what} is a corner of the weight"
    assert not torch.equal(start_of(values, seed=1, **options).tiers, tiers), "the seed decides"


@pytest.mark.filterwarnings("ignore:0.weight was sparse already, and zero outside B")
@pytest.mark.parametrize("storage", ["masked", "packed", "compact"])
def test_a_run_from_zeros_is_that_of_the_reference(storage):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    nn.init.zeros_(plain[2].weight)
    with torch.no_grad():
        plain[0].weight[:, :4] = 0
    model = copy.deepcopy(plain)
    topkast = TopKast(
        model, 0.8, 0.6, targets=ALL, schedule=Schedule(1), penalty=L2(strength=0.0), storage=storage, seed=5
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    topkast.attach(optimizer)
    counts = {"0.weight": (19, 38), "2.weight": (26, 51)}
    run = Reference(
        dict(plain.named_parameters()), counts, dict.fromkeys(counts, 0.0),
        lambda parameters: torch.optim.SGD(parameters.values(), 0.1), update_every=1, seed=5,
    )  # fmt: skip
    for step in range(6):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        run.train_step(
            lambda alpha, x=x: (torch.func.functional_call(plain, alpha, x) - x.sum(1, keepdim=True)).square().mean()
        )
        for name, weight in topkast.weights.items():
            assert torch.equal(weight.active, run.sets[name][0]), f"{name} after step {step}"
            assert torch.equal(weight.updated, run.sets[name][1]), f"{name} after step {step}"


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_a_zero_initialised_layer_learns_in_all_of_its_rows(storage):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32, bias=False))
    nn.init.zeros_(model[2].weight)
    target, optimizer = torch.randn(32, 6), torch.optim.AdamW
    topkast = TopKast(model, 0.9, 0.8, update_every=3, targets=Targets(include=["2.weight"]), storage=storage)
    optimizer = optimizer(model.parameters(), lr=0.02)
    topkast.attach(optimizer)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(300):
        x = torch.randn(32, 6, generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), torch.tanh(x @ target.T) / 4)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    rows = topkast.weights["2.weight"].alpha().ne(0).any(1)
    assert rows.sum() >= 28
    assert sum(losses[-20:]) < 0.5 * sum(losses[:5]) * 4


@pytest.mark.parametrize("storage", ["packed", "compact"])
def test_sparse_weights_that_are_loaded_have_the_sets_of_a_weight_made_of_them(storage):
    model = nn.Sequential(nn.Linear(32, 32))
    topkast = TopKast(model, 0.75, 0.5, targets=ALL, storage=storage, seed=2)
    torch.manual_seed(1)
    dense = torch.randn(32, 32)
    dense[:, 8:] = 0  # exactly as many values as A has, so B outside A is drawn
    model.load_state_dict({"0.weight": dense * 2, "0.bias": torch.zeros(32)})
    weight = topkast.weights["0.weight"]
    assert torch.equal(weight.active, dense != 0)
    zeros = torch.zeros(32, 32)
    zeros[3, 5:9] = 1  # fewer than A has
    other = nn.Sequential(nn.Linear(32, 32))
    nn.init.zeros_(other[0].weight)
    engine = TopKast(other, 0.75, 0.5, targets=ALL, storage=storage, seed=2)
    other.load_state_dict({"0.weight": zeros, "0.bias": torch.zeros(32)})
    assert torch.equal(engine.weights["0.weight"].tiers, start_of(zeros, seed=2).tiers)


def test_set_and_rigl_draw_where_what_they_grow_by_is_zero():
    for rule in (RigL(), SET()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32, bias=False))
        topkast = TopKast(model, 0.75, 0.75, rule=rule, update_every=2, targets=ALL)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        topkast.attach(optimizer, total_steps=100)
        before = topkast.weights["0.weight"].active.clone()
        for _ in range(2):  # no output depends on the input: every gradient is zero
            optimizer.zero_grad()
            (model(torch.zeros(4, 32)).sum() * 0).backward()
            optimizer.step()
        grown = topkast.weights["0.weight"].active & ~before
        assert grown.sum() > 30
        assert grown.any(1).sum() > 16, "what has grown is a corner of the weight"


@pytest.mark.parametrize("delay", [0, 1])
def test_a_run_from_zeros_resumes_bit_for_bit(tmp_path, delay):
    def zeroed():
        net = make_net()
        nn.init.zeros_(net.layers[2].weight)
        return net

    def trainer(epochs, name):
        callback = make_callback(update_every=2, delay=delay)
        return callback, make_trainer(tmp_path / name, callback, max_epochs=epochs)

    whole, one = trainer(4, "one")
    fit(one, net := zeroed())
    _, half = trainer(2, "two")
    fit(half, zeroed())
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest, again = trainer(4, "two")
    fit(again, resumed := zeroed(), ckpt_path=tmp_path / "half.ckpt")
    assert same(net.state_dict(), resumed.state_dict())
    assert same(whole.topkast.state_dict()["weights"], rest.topkast.state_dict()["weights"])


def test_the_summary_names_weights_that_are_zero_and_reservoirs_that_are():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight[:, 1:] = 0
    topkast = TopKast(model, 0.5, 0.25, targets=ALL)
    topkast.attach(torch.optim.SGD(model.parameters(), 0.1))
    text = str(topkast.summary())
    assert "all zeros: 0.weight; the sets are drawn at random" in text
    assert "all zeros outside B: 1.weight; exploration draws at random" in text
    assert "2.weight;" not in text
