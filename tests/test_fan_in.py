"""Bounds for the number of entries in a row: which entries are chosen, and that the method holds with them."""

import copy
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from lightning_topkast import (
    L2,
    SET,
    Block,
    Magnitude,
    NonFiniteWeightError,
    Packed,
    Ramp,
    Rule,
    Schedule,
    Settings,
    Targets,
    TopKast,
    TopKastError,
    Unstructured,
)  # fmt: skip
from lightning_topkast.distributed import Sharding
from lightning_topkast.method.fan_in import bounds
from lightning_topkast.method.selection import NonFiniteScoresError, drawn, nested_top_k
from lightning_topkast.reference import Reference, mask
from tests.helpers import Net, check_sparse, fit, make_callback, make_net, make_trainer

EVERYWHERE = Targets(keep_first_dense=False, keep_last_dense=False)
PAIRS = [(1, 1), (0, 2), (0.5, 1.5), (0.25, 100), (1, 3), (0, 1)]


def selection(fan_in, shape, draw=None):
    return Unstructured(fan_in).selection(Sharding("w", torch.empty(shape)), draw)


def ranks_of(scores, lots=None):
    """Return each entry's place in the order of all: by score, by lot where it is zero, by index."""
    values = scores.flatten().tolist()
    lots = lots.flatten().tolist() if lots is not None else [0.0] * len(values)
    order = sorted(range(len(values)), key=lambda i: (-values[i], -lots[i] if values[i] == 0 else 0, i))
    return {index: rank for rank, index in enumerate(order)}


def limits(fan_in, count, rows, length):
    """The bounds by hand: rounded down and up, and at most a row."""
    least, most = (Fraction(str(each)) * count / rows for each in fan_in)
    return least.__floor__(), min(most.__ceil__(), length)


def brute_force(scores, fan_in, counts, lots=None):
    """The best of all subsets: the largest sum, and of equal ones that with the first entries of the order."""
    rows, length = scores.shape
    ranks, values = ranks_of(scores, lots), scores.flatten().tolist()
    tiers, inside = torch.zeros(rows * length, dtype=torch.uint8), frozenset()
    for count in sorted(counts):
        least, most = limits(fan_in, count, rows, length)
        best = None
        while best is None:  # where no set around the smaller one has enough in each row, one less is asked for
            for extra in itertools.combinations(set(range(rows * length)) - inside, count - len(inside)):
                members = sorted([*inside, *extra], key=ranks.get)
                in_rows = [sum(i // length == row for i in members) for row in range(rows)]
                if min(in_rows) >= least and max(in_rows) <= most:
                    worth = sum(values[i] for i in members), [-ranks[i] for i in members]
                    best = max(best or worth, worth)
            least -= best is None
        inside = frozenset(index for index, rank in ranks.items() if -rank in best[1])
        tiers[sorted(inside)] += 1
    return tiers.view(rows, length)


def greedy(scores, fan_in, counts, lots=None):
    """The same by the greedy choice, one entry after the other."""
    rows, length = scores.shape
    ranks, inside = ranks_of(scores, lots), set()
    tiers = torch.zeros(rows * length, dtype=torch.uint8)
    in_order = sorted(ranks, key=ranks.get)
    for count in sorted(counts):
        least, most = limits(fan_in, count, rows, length)
        numbers = [sum(i // length == row for i in inside) for row in range(rows)]
        least -= sum(max(least - number, 0) for number in numbers) > count - len(inside)
        for limit in (least, most):
            for index in in_order:
                row = index // length
                if index not in inside and numbers[row] < limit and len(inside) < count:
                    inside.add(index)
                    numbers[row] += 1
        tiers[sorted(inside)] += 1
    return tiers.view(rows, length)


# --- which entries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fan_in", PAIRS)
@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (4, 2), (1, 6)])
@pytest.mark.parametrize("drawing", [False, True])
def test_sets_are_the_best_of_all_subsets(fan_in, shape, drawing):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(4 - seed % 2, shape, generator=generator).float()  # many ties, some of zeros
        lots = torch.randint(3, shape, generator=generator) / 3 if drawing else None
        select = selection(fan_in, shape, (lambda lots=lots: lots) if drawing else None)
        for counts in ((5, 2), (6, 4), (4, 3), (3, 3)):
            expected = brute_force(scores, fan_in, counts, lots)
            assert torch.equal(select(scores, counts), expected), (seed, counts)
            assert torch.equal(greedy(scores, fan_in, counts, lots), expected), "the other reference"


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_bounds_hold_sizes_are_exact_and_the_sets_nested(data):
    rows, length = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12))
    size = rows * length
    fan_in = data.draw(st.tuples(st.floats(0, 1), st.floats(1, 5)))
    updated = data.draw(st.integers(0, size))
    active = data.draw(st.integers(0, updated))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    kind = data.draw(st.sampled_from(["any", "few values", "zeros", "skewed", "bfloat16", "float64"]))
    scores = torch.rand(rows, length, generator=generator)
    if kind == "few values":
        scores = (scores * 3).floor()
    elif kind == "zeros":
        scores = scores * (scores > 0.7)
    elif kind == "skewed":
        scores = scores * torch.logspace(-3, 3, rows)[:, None]
    elif kind == "bfloat16":
        scores = scores.bfloat16()
    elif kind == "float64":
        scores = 1 + 1e-12 * scores.double()  # all the same in float32
    lots = torch.rand(rows, length, generator=generator)
    select = selection(fan_in, scores.shape, lambda: lots)
    tiers = select(scores, (updated, active))
    assert tiers.dtype == torch.uint8
    assert (int((tiers > 0).sum()), int((tiers == 2).sum())) == (updated, active) or updated == active
    for members, count in ((tiers > 0, updated), (tiers > 1, active)):
        least, most = bounds(fan_in, count, rows, length)
        assert int(members.sum()) == count
        assert int(members.sum(1).max()) <= most
        assert int(members.sum(1).min()) >= least - (count == updated), "one less where rounding leaves no place"
    assert torch.equal(tiers, greedy(scores, fan_in, (updated, active), lots))
    assert torch.equal(select(scores, (active,)).bool(), tiers == 2), "A does not depend on B"


def test_by_hand():
    scores = torch.tensor([[9.0, 8, 7, 6], [5, 4, 3, 2], [1, 0, 0, 0]])
    assert nested_top_k(scores, (6, 3)).tolist() == [[2, 2, 2, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert selection((0, 2), (3, 4))(scores, (6, 3)).tolist() == [[2, 2, 1, 1], [2, 1, 0, 0], [0, 0, 0, 0]]
    assert selection((0.5, 4), (3, 4))(scores, (6, 3)).tolist() == [[2, 2, 2, 1], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert selection((1, 1), (3, 4))(scores, (6, 3)).tolist() == [[2, 1, 0, 0], [2, 1, 0, 0], [2, 1, 0, 0]]


def test_zeros_are_drawn_and_other_ties_go_to_the_first():
    scores = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])
    lots = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.4, 0.3, 0.2]])
    select = selection((1, 1), (2, 4), lambda: lots)
    assert select(scores, (6, 4)).tolist() == [[2, 2, 1, 0], [0, 2, 2, 1]]

    def refuse():
        raise AssertionError("no zeros compete here")

    assert selection((1, 1), (2, 4), refuse)(scores + 1, (6, 4)).tolist() == [[2, 2, 1, 0], [2, 2, 1, 0]]


def test_bounds_are_rounded_from_decimals():
    assert bounds((0.7, 1.1), 100, 10, 50) == (7, 11)  # in binary 0.7 × 10 < 7 and 1.1 × 10 > 11
    assert bounds((1, 1), 11, 4, 50) == (2, 3)
    assert bounds((0, 1e9), 11, 4, 50) == (0, 50)


def test_a_vector_is_one_row():
    scores = torch.rand(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(selection((1, 1), (40,))(scores, (20, 7)), nested_top_k(scores, (20, 7)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value):
    scores = torch.ones(4, 5)
    scores[1, 2] = value
    with pytest.raises(NonFiniteScoresError):
        selection((0, 2), (4, 5))(scores, (4, 2))


def test_rows_of_a_large_weight_are_sorted_part_by_part():
    scores = torch.randn(200, 2000, generator=torch.Generator().manual_seed(0)).abs().mul(20).round()
    scores *= torch.arange(200)[:, None] % 3
    tiers = selection((0.25, 2), scores.shape)(scores, (40_000, 20_000))
    assert torch.equal(tiers, greedy(scores, (0.25, 2), (40_000, 20_000)))


# --- sharded -------------------------------------------------------------------------------------------------------


class Rows(Sharding):
    """Some rows of a weight, whose other rows other threads have."""

    def __init__(self, shape, coordinates, total):
        self.shape, self._coordinates, self._total = torch.Size(shape), {0: coordinates}, total

    def sum(self, value):
        return self._total(value)

    @property
    def is_sharded(self):
        return True


@pytest.mark.parametrize("split", ["halves", "interleaved", "one has none"])
@pytest.mark.parametrize("kind", ["any", "ties", "zeros"])
@pytest.mark.parametrize("fan_in", PAIRS)
def test_rows_of_several_processes_choose_what_the_whole_would(split, kind, fan_in):
    for shape, step in itertools.product(((9, 7), (5, 3, 2, 2)), (1, 12)):
        generator = torch.Generator().manual_seed(len(shape))
        scores = torch.rand(shape, generator=generator) * torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
        scores = {"any": scores, "ties": scores.floor(), "zeros": scores * (scores > shape[0] / 2)}[kind]
        lots = torch.randint(8, shape, generator=generator) / 8
        updated = scores.numel() // 20 * 10  # a whole number of rows' means
        counts = updated, updated - step
        owner = torch.arange(shape[0]) % 2 if split == "interleaved" else (torch.arange(shape[0]) > 4).int()
        owner = torch.ones_like(owner) if split == "one has none" else owner
        shared, barrier, tiers = [None, None], threading.Barrier(2, timeout=60), torch.full(shape, 9).byte()

        def work(rank, scores=scores, lots=lots, owner=owner, tiers=tiers, counts=counts, barrier=barrier, held=shared):
            def total(value):
                held[rank] = value.clone()
                barrier.wait()
                summed = held[0] + held[1]
                barrier.wait()
                return summed

            mine = torch.nonzero(owner == rank).flatten()
            select = Unstructured(fan_in).selection(Rows(scores.shape, mine, total), lambda: lots[mine])
            tiers[mine] = select(scores[mine], counts)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, range(2)))
        assert torch.equal(tiers, selection(fan_in, shape, lambda lots=lots: lots)(scores, counts))


def test_rows_that_are_cut_are_refused():
    cut = Rows((4, 6), torch.arange(4), None)
    cut._coordinates = {1: torch.arange(3)}
    with pytest.raises(TopKastError, match=r"fan_in=\(0.0, 2.0\) needs whole rows .* shape \(4, 6\) are sharded"):
        Unstructured((0, 2)).selection(cut)
    assert Block(2, 3, fan_in=(0, 2)).selection(cut), "every process chooses among all blocks"


# --- in training ---------------------------------------------------------------------------------------------------


def in_bounds(members, fan_in):
    rows = members.flatten(1)
    least, most = bounds(fan_in, int(rows.sum()), *rows.shape)
    return least <= int(rows.sum(1).min()) and int(rows.sum(1).max()) <= most


def grow(net):
    """Make some rows much larger, so that a free choice would be skewed."""
    with torch.no_grad():
        for layer in net:
            if hasattr(layer, "weight"):
                layer.weight *= torch.linspace(0.1, 4, len(layer.weight)).view(-1, *[1] * (layer.weight.dim() - 1))
    return net


def train(net, storage="masked", steps=12, **options):
    given = {"penalty": L2(strength=0.1), "schedule": Schedule(3), "targets": EVERYWHERE}
    given["storage"] = Packed(kernels="torch") if storage == "packed" else storage
    topkast = TopKast(net, 0.8, 0.6, **(given | options))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    topkast.attach(optimizer, total_steps=steps)
    seen = []
    for step in range(steps):
        x = torch.randn(5, *net.shape, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        seen.append({name: weight.tiers.clone() for name, weight in topkast.weights.items()})
    return topkast, seen


def mlp():
    torch.manual_seed(0)
    net = grow(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)))
    net.shape = (8,)
    return net


def cnn():
    torch.manual_seed(0)
    net = grow(nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten()))
    net.shape = (2, 6, 6)
    return net


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("storage", ["masked", "packed", "compact"])
@pytest.mark.parametrize("fan_in", [(1, 1), (0, 1.5), (0.5, 50)])
def test_every_step_of_every_storage_keeps_the_bounds(fan_in, storage, make):
    topkast, seen = train(make(), storage, structure=Unstructured(fan_in))
    check_sparse(topkast)
    for tiers in seen:
        for name, weight in topkast.weights.items():
            assert int((tiers[name] == 2).sum()) == weight.active_count
            assert int((tiers[name] > 0).sum()) == weight.updated_count
            assert in_bounds(tiers[name] == 2, fan_in)
            assert in_bounds(tiers[name] > 0, fan_in)
    assert any(not torch.equal(seen[0][name], seen[-1][name]) for name in topkast.weights), "sets never changed"
    assert any(not in_bounds(tiers == 2, fan_in) for tiers in train(make())[1][0].values()), "a free choice is in, too"


@pytest.mark.parametrize("storage", ["packed", "compact"])
@pytest.mark.parametrize("structure", [Unstructured((0.5, 1.5)), Block(2, 2, fan_in=(1, 1))], ids=str)
def test_other_storages_choose_the_sets_of_masked_ones(storage, structure):
    masked, other = (train(mlp(), each, structure=structure)[1] for each in ("masked", storage))
    for one, two in zip(masked, other, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("storage", ["masked", "packed"])
@pytest.mark.parametrize("fan_in", [(1, 1), (0.5, 1.5)])
def test_training_is_that_of_the_reference_with_its_choice_bounded(storage, fan_in):
    class Bounded(Reference):
        def choose_for(self, name):
            theta, counts = self.parameters[name].detach(), self.counts[name]
            lots = drawn(self.seed, self.step, name, theta.shape)
            tiers = greedy(theta.abs(), fan_in, counts, lots).flatten()
            return tuple(mask(torch.nonzero(tiers >= tier).flatten().tolist(), theta.shape) for tier in (2, 1))

    net = mlp().double()
    plain, net.shape = copy.deepcopy(net), (8,)
    packed = Packed(kernels="torch") if storage == "packed" else storage
    topkast = TopKast(
        net, 0.8, 0.6, targets=EVERYWHERE, update_every=3, penalty=L2(strength=0.02), storage=packed,
        structure=Unstructured(fan_in),
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    topkast.attach(optimizer)
    counts = {name: (weight.active_count, weight.updated_count) for name, weight in topkast.weights.items()}
    run = Bounded(
        dict(plain.named_parameters()), counts, dict.fromkeys(counts, 0.02),
        lambda parameters: torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9), update_every=3,
    )  # fmt: skip
    for step in range(12):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        run.train_step(lambda alpha, x=x: functional_call(plain, alpha, x).square().mean())
        for name, weight in topkast.weights.items():
            assert torch.equal(weight.active, run.sets[name][0])
            assert torch.equal(weight.updated, run.sets[name][1])


@pytest.mark.parametrize("shape", [(12, 16), (10, 15), (8, 6, 3, 3)])
@pytest.mark.parametrize("fan_in", [(1, 1), (0, 1.5)])
def test_rows_of_blocks_keep_the_bounds(shape, fan_in):
    net = nn.Module()
    net.theta = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        net.theta *= torch.linspace(0.1, 4, shape[0]).view(-1, *[1] * (len(shape) - 1))
    block = Block(2, 4, fan_in=fan_in)
    weight = TopKast(net, 0.75, 0.5, include=["theta"], structure=block).weights["theta"]
    values, sharding = net.theta.detach().abs(), Sharding("w", net.theta)
    units = block.units_of(weight.tiers)
    counts = int((units > 0).sum()), int((units == 2).sum())
    dense = weight.theta().abs()
    scores = block.scores(dense, sharding)
    assert torch.equal(units.flatten(1), greedy(scores.flatten(1), fan_in, counts))
    assert in_bounds(units == 2, fan_in)
    assert values.shape == torch.Size(shape)


def test_every_expert_keeps_the_bounds():
    module = nn.Module()
    module.theta = nn.Parameter(torch.randn(3, 8, 10, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        module.theta *= torch.linspace(0.1, 4, 24).view(3, 8, 1)
    weight = TopKast(module, 0.75, 0.5, include=["theta"], structure=Unstructured((1, 1))).weights["theta"]
    assert str(type(weight.structure).__name__) == "Stack"
    for tiers in weight.tiers:
        assert in_bounds(tiers == 2, (1, 1))
        assert in_bounds(tiers > 0, (1, 1))


def test_a_ramp_keeps_the_bounds_of_its_present_sizes():
    topkast, seen = train(mlp(), structure=Unstructured((0.5, 1.5)), ramp=Ramp(0.2, 0.1, begin=0, end=9))
    sizes = [int((tiers["2.weight"] == 2).sum()) for tiers in seen]
    assert sizes[0] > sizes[5] > sizes[-1] == topkast.weights["2.weight"].active_count
    assert all(in_bounds(tiers["2.weight"] == 2, (0.5, 1.5)) for tiers in seen)


def test_sets_chosen_in_the_background_keep_the_bounds():
    topkast, seen = train(mlp(), "packed", structure=Unstructured((1, 1)), schedule=Schedule(4, delay=2))
    assert topkast.refresh_count > 1
    assert all(in_bounds(tier == 2, (1, 1)) for tiers in seen for tier in tiers.values())


def test_a_network_with_zeros_learns_everywhere():
    """The entries of rows of zeros are drawn, rather than those on the left."""
    net = mlp()
    nn.init.zeros_(net[2].weight)
    weight = TopKast(net, 0.8, 0.6, targets=EVERYWHERE, structure=Unstructured((1, 1))).weights["2.weight"]
    assert in_bounds(weight.active, (1, 1))
    assert int(weight.active.any(0).sum()) > 8


def test_weights_that_are_loaded_get_sets_within_the_bounds():
    topkast, _ = train(mlp(), steps=4, structure=Unstructured((0.5, 1.5)))
    other = {name: torch.randn_like(value) for name, value in topkast.model.state_dict().items()}
    topkast.model.load_state_dict(other)
    assert all(in_bounds(weight.active, (0.5, 1.5)) for weight in topkast.weights.values())
    assert all(in_bounds(weight.updated, (0.5, 1.5)) for weight in topkast.weights.values())


def test_non_finite_weights_are_named():
    net = mlp()
    topkast, _ = train(net, steps=1, structure=Unstructured((0, 2)))
    with torch.no_grad():
        net[2].weight[topkast.weights["2.weight"].active] = math.nan
    with pytest.raises(NonFiniteWeightError, match=r"'2.weight' holds NaN"):
        topkast.refresh()


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [Unstructured, Block])
@pytest.mark.parametrize(
    "wrong",
    [(2, 0.5), (1.5, 2), (0, 0.5), (-0.5, 2), (math.nan, 2), (0, math.nan), (0, math.inf), (0.5,), (0, 1, 2), 2, "02",
     (True, 2), ("0", "2"), []],
)  # fmt: skip
def test_bounds_that_make_no_sense_are_refused(structure, wrong):
    with pytest.raises(TopKastError, match=r"expected fan_in to be \(least, most\) with 0 <= least <= 1 <= most"):
        structure(fan_in=wrong)


class Mine(Rule):
    def choose(self, candidates):
        return candidates.select(candidates.scores, (candidates.updated_count, candidates.active_count))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": "global"}, "needs distribution='uniform' or 'erk'"),
        ({"distribution": "global_normalized"}, "needs distribution='uniform' or 'erk'"),
        ({"rule": Magnitude("random")}, r"needs rule=Magnitude\(exploration='magnitude'\)"),
        ({"rule": Mine()}, "needs rule=Magnitude"),
        ({"rule": SET(), "backward_sparsity": 0.9, "penalty": None}, "needs rule=Magnitude"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    for structure in (Unstructured((0, 2)), Block(4, 4, fan_in=(0, 2))):
        with pytest.raises(TopKastError, match=r"fan_in=\(0.0, 2.0\) " + message):
            Settings(**({"forward_sparsity": 0.9, "backward_sparsity": 0.8, "structure": structure} | options))
    Settings(0.9, 0.8, structure=Unstructured((0, 2)), distribution="erk")


def test_bounds_are_plain_data_in_the_settings():
    given = Settings(0.9, 0.8, structure=Unstructured((0.25, 2))).as_dict()["structure"]
    assert given == {"name": "Unstructured", "fan_in": [0.25, 2.0]}
    assert Settings(0.9, 0.8).as_dict()["structure"] == {"name": "Unstructured", "fan_in": None}
    assert Settings(0.9, 0.8, structure=Block(4, 2, (1, 1))).as_dict()["structure"]["fan_in"] == [1.0, 1.0]


@pytest.mark.parametrize("convert", ["none", "all", "object"])
def test_bounds_come_from_yaml_as_a_list(convert):
    for target, expected in (("Unstructured", Unstructured((0.25, 2))), ("Block", Block(fan_in=(0.25, 2)))):
        given = {"_target_": f"lightning_topkast.{target}", "fan_in": [0.25, 2], "_convert_": convert}
        assert instantiate(given) == expected


def test_the_table_at_the_start_says_the_bounds():
    def said_of(**options):
        return " ".join(str(TopKast(mlp(), 0.8, 0.6, **options).summary()).split())

    said = said_of(structure=Unstructured((0.25, 2)))
    assert "each row has 0.25 to 2 times the mean number of entries" in said
    said = said_of(structure=Block(2, 2, (0, 2)))
    assert "blocks of 2×2 entries; each row has 0 to 2 times the mean number of blocks" in said
    assert "each row" not in said_of()


def test_a_run_may_go_on_with_other_bounds(tmp_path):
    """The saved sets are valid for any bounds, and the next refresh chooses by the new ones."""
    arguments = {"update_every": 4, "strength": 0.0}
    skewed = make_callback(**arguments)
    fit(trainer := make_trainer(tmp_path, skewed, max_epochs=1), grown(make_net()))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    bounded = make_callback(**arguments, structure=Unstructured((1, 1)))
    fit(make_trainer(tmp_path, bounded, max_epochs=2), make_net(1), ckpt_path=tmp_path / "one.ckpt")
    (first,), (second,) = (callback.topkast.weights.values() for callback in (skewed, bounded))
    assert not in_bounds(first.active, (1, 1))
    assert in_bounds(second.active, (1, 1))


def grown(net: Net) -> Net:
    grow(net.layers)
    return net
