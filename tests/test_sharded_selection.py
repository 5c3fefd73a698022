"""Selection over parts that see each other's counts only: the sets are those of the whole, entry for entry.

And training of weights that are sharded over a single process, which needs no others.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from lightning_topkast import TopKast, TopKastError, Unstructured
from lightning_topkast.baselines import RigL
from lightning_topkast.method import sharded_selection
from lightning_topkast.method.selection import SAMPLE, NonFiniteScoresError, nested_top_k
from lightning_topkast.method.sharded_selection import nested_top_k_of_shards
from tests.helpers import same
from tests.shards import Bag, Experts, gathered, run, shard


class Parts:
    """Sums over threads that stand for the processes."""

    def __init__(self, count):
        self.count, self.values, self.calls = count, [None] * count, 0
        self.barrier = threading.Barrier(count, timeout=200)

    def total(self, rank):
        def total(value):
            self.values[rank] = value.clone()
            self.barrier.wait()
            summed = torch.stack(self.values).sum(0)
            self.calls += rank == 0
            self.barrier.wait()
            return summed

        return total


def select(scores, counts, owner):
    """Tiers of flat `scores` whose entry i is held by part owner[i]."""
    held = [torch.nonzero(owner == rank).flatten() for rank in range(int(owner.max()) + 1)]
    parts = Parts(len(held))

    def work(rank):
        total, mine = parts.total(rank), held[rank]
        return nested_top_k_of_shards(scores[mine], counts, scores.numel(), total, lambda positions: mine[positions])

    tiers = torch.full_like(scores, 99, dtype=torch.uint8)
    with ThreadPoolExecutor(len(held)) as pool:
        for mine, chosen in zip(held, pool.map(work, range(len(held))), strict=True):
            tiers[mine] = chosen
    return tiers, parts.calls


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_parts_choose_what_the_whole_would(data):
    size = data.draw(st.integers(1, 200))
    kind = data.draw(st.sampled_from(["few values", "all equal", "any", "tiny", "bfloat16", "float64"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scores = torch.rand(size, generator=generator)
    if kind == "few values":
        scores = torch.randint(3, (size,), generator=generator).float()
    elif kind == "all equal":
        scores = torch.full((size,), 0.5)
    elif kind == "tiny":
        scores = scores * 1e-40  # denormal
    elif kind == "bfloat16":
        scores = scores.bfloat16()
    elif kind == "float64":
        scores = scores.double() * 1e-200
    updated = data.draw(st.integers(0, size))
    active = data.draw(st.integers(0, updated))
    owner = torch.randint(data.draw(st.integers(1, 4)), (size,), generator=generator)
    tiers, _ = select(scores, (updated, active), owner)
    assert torch.equal(tiers, nested_top_k(scores, (updated, active)))


@pytest.mark.parametrize("size", [4 * SAMPLE + 1, 7 * SAMPLE])
@pytest.mark.parametrize("kind", ["normal", "sorted", "few values", "all equal", "misleading sample", "float64"])
def test_parts_of_a_large_weight_choose_what_the_whole_would(kind, size):
    """Large enough that a sample brackets the thresholds; where it misleads, all entries are searched."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(size, generator=generator).abs()
    if kind == "sorted":
        scores = scores.sort().values
    elif kind == "few values":
        scores = scores.round()
    elif kind == "all equal":
        scores = torch.ones(size)
    elif kind == "float64":
        scores = scores.double()
    owner = torch.arange(size) * 3 // size
    if kind == "misleading sample":
        for rank in range(3):
            mine = torch.nonzero(owner == rank).flatten()
            scores[mine[:: size // SAMPLE | 1]] = 100.0
    for counts in ((size // 5, size // 10), (size, size // 2), (3, 0)):
        tiers, _ = select(scores, counts, owner)
        assert torch.equal(tiers, nested_top_k(scores, counts)), counts


@pytest.mark.parametrize("size", [10, 5 * SAMPLE])
def test_a_part_may_be_empty(size):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0))
    owner = torch.full((size,), 2)
    owner[0] = 0
    tiers, _ = select(scores, (size // 2, size // 4), owner)
    assert torch.equal(tiers, nested_top_k(scores, (size // 2, size // 4)))


def test_few_candidates_are_left_to_be_searched(monkeypatch):
    searched = []
    largest = sharded_selection._largest

    def noting(keys, *arguments):
        searched.append(keys.numel())
        return largest(keys, *arguments)

    monkeypatch.setattr(sharded_selection, "_largest", noting)
    size = 16 * SAMPLE
    select(torch.randn(size, generator=torch.Generator().manual_seed(0)).abs(), (size // 5,), torch.arange(size) % 2)
    assert 0 < sum(searched) < size // 8


def test_ties_go_to_the_lowest_index_of_the_whole():
    tiers, _ = select(torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0, 0.0]), (3, 2), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert tiers.tolist() == [0, 2, 2, 1, 0, 0]


def test_minus_zero_is_zero():
    tiers, _ = select(torch.tensor([-0.0, 0.0, 1.0]), (2,), torch.tensor([0, 1, 1]))
    assert tiers.tolist() == [1, 0, 1]


def test_distinct_scores_take_three_rounds_a_set_and_ties_a_few_more():
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    owner = torch.arange(5000) % 3
    assert select(scores, (1000, 500), owner)[1] <= 1 + 2 * 3
    assert select(torch.ones(5000), (1000, 500), owner)[1] <= 1 + 2 * (3 + 2)


@pytest.mark.parametrize("size", [4, 3 * SAMPLE])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_part_refuses_what_is_not_finite_in_one(value, size):
    scores, parts, refused = torch.ones(2, size), Parts(2), []
    scores[1, 2] = value

    def work(rank):
        try:
            nested_top_k_of_shards(scores[rank], (2, 1), 2 * size, parts.total(rank), lambda places: places)
        except NonFiniteScoresError:
            refused.append(rank)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert sorted(refused) == [0, 1]


@pytest.fixture
def mesh(tmp_path):
    """Of this process alone; tests/test_shards.py has several."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [Bag, lambda: nn.Sequential(Experts())], ids=["matrices", "experts"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"penalty": "norm"},
        {"structure": "block", "block": [2, 3]},
        {"structure": "2:4", "forward_sparsity": 0.5, "backward_sparsity": 0.25},
        {"structure": Unstructured(fan_in=(0.5, 1.5))},
        {"rule": RigL(0.6), "backward_sparsity": 0.75, "strength": None, "stop_updating_at": 100},
    ],
    ids=str,
)
def test_weights_that_are_sharded_over_one_process_train_as_whole_ones(options, make, mesh):
    whole, _ = run(make(), 8, **options)
    sharded, _ = run(shard(make(), mesh, lambda dims: [Shard(0)]), 8, **options)
    assert all(weight.sharding.is_sharded for weight in sharded.weights.values())
    assert same(gathered(whole), gathered(sharded))


@pytest.mark.parametrize("distribution", ["global", "global_normalized"])
def test_sharded_weights_do_not_compete(mesh, distribution):
    model = shard(nn.Sequential(nn.Linear(6, 4)), mesh, lambda dims: [Shard(0)])
    with pytest.raises(TopKastError, match=f"is sharded .* which distribution='{distribution}' does not support"):
        TopKast(model, 0.5, 0.25, include=["0.weight"], distribution=distribution)


def test_experts_whose_matrices_are_sharded_are_refused(mesh):
    with pytest.raises(TopKastError, match=r"'0.weight' of shape .* is a stack of matrices .* shard only its first"):
        run(shard(nn.Sequential(Experts()), mesh, lambda dims: [Shard(1)]), 0)
