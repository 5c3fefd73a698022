"""The best items of which no two are alike, beside all subsets."""

import itertools
import math
import sys

import pytest
import torch

from lightning_topkast import TopKastError, diverse_top_k
from lightning_topkast.top_k.diverse import _cliques


def graph(count, density, seed):
    generator = torch.Generator().manual_seed(seed)
    edges = (torch.rand(count, count, generator=generator) < density).triu(1)
    return edges | edges.T


def best(weights, conflicts, k):
    """The largest sum of all subsets that are allowed, one after the other."""
    weights, conflicts, found = weights.tolist(), conflicts.tolist(), 0.0
    for size in range(k + 1):
        for chosen in itertools.combinations(range(len(weights)), size):
            if not any(conflicts[one][other] for one, other in itertools.combinations(chosen, 2)):
                found = max(found, math.fsum(weights[i] for i in chosen))
    return found


@pytest.mark.parametrize("kind", ["any", "few values", "nearly equal", "tiny", "float32"])
def test_the_sum_is_that_of_the_best_of_all_subsets(kind):
    solved = 0
    for seed in range(80):
        generator = torch.Generator().manual_seed(seed)
        count = int(torch.randint(1, 11, (), generator=generator))
        k = int(torch.randint(count + 1, (), generator=generator))
        weights = torch.rand(count, generator=generator, dtype=torch.float64)
        if kind == "few values":
            weights = (3 * weights).floor()
        elif kind == "nearly equal":
            weights = 1 + 1e-9 * weights
        elif kind == "tiny":
            weights = 1e-30 * weights
        elif kind == "float32":
            weights = weights.float()
        conflicts = graph(count, float(torch.rand((), generator=generator)), seed)
        chosen = diverse_top_k(weights, conflicts, k)
        assert chosen.dtype == torch.bool
        assert chosen.shape == weights.shape
        assert int(chosen.sum()) <= k
        assert not conflicts[chosen][:, chosen].any()
        scale = float(weights.max())
        assert float(weights[chosen].double().sum()) >= best(weights, conflicts, k) - 1e-11 * scale, seed
        solved += bool(conflicts[weights.argsort(descending=True)[:k]].any())
        assert torch.equal(chosen, diverse_top_k(weights, conflicts, k))
    assert solved > 40


def test_greedy_choices_are_beaten():
    """A star: its middle is the heaviest item, but two of its ends together are heavier."""
    conflicts = torch.zeros(4, 4, dtype=torch.bool)
    conflicts[0, 1:] = conflicts[1:, 0] = True
    assert diverse_top_k(torch.tensor([3.0, 2, 2, 1]), conflicts, 2).tolist() == [False, True, True, False]
    assert diverse_top_k(torch.tensor([3.0, 2, 2, 1]), conflicts, 1).tolist() == [True, False, False, False]
    assert diverse_top_k(torch.tensor([9.0, 2, 2, 1]), conflicts, 3).tolist() == [True, False, False, False]


@pytest.mark.parametrize("scale", [1e308, 1e-307, 1e-310])
def test_weights_at_the_ends_of_the_range_are_chosen_like_others(scale):
    conflicts = torch.zeros(3, 3, dtype=torch.bool)
    conflicts[0, 1] = conflicts[1, 0] = True
    weights = scale * torch.tensor([1.0, 1.5, 0.5], dtype=torch.float64)
    assert diverse_top_k(weights, conflicts, 2).tolist() == [False, True, True]


def test_of_equal_items_without_conflicts_the_first_are_chosen_and_scipy_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    conflicts = torch.zeros(5, 5, dtype=torch.bool)
    conflicts[3, 4] = conflicts[4, 3] = True
    assert diverse_top_k(torch.tensor([1, 2, 1, 1, 1]), conflicts, 3).tolist() == [True, True, True, False, False]
    with pytest.raises(TopKastError, match="pip install scipy"):
        diverse_top_k(torch.ones(5), conflicts, 5)


def test_the_diagonal_is_ignored():
    same = torch.eye(3, dtype=torch.bool)
    assert diverse_top_k(torch.tensor([1.0, 2, 3]), same, 3).all()
    everything = torch.ones(3, 3, dtype=torch.bool)
    assert diverse_top_k(torch.tensor([1.0, 3, 2]), everything, 3).tolist() == [False, True, False]


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_is_chosen_of_nothing(count):
    assert not diverse_top_k(torch.ones(count), torch.zeros(count, count, dtype=torch.bool), 0).any()
    assert diverse_top_k(torch.zeros(3), torch.ones(3, 3, dtype=torch.bool), 2).sum() <= 1


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_cliques_cover_every_conflict_and_nothing_else(density):
    adjacent = graph(20, density, 0).numpy()
    covered = torch.zeros(20, 20, dtype=torch.bool).numpy()
    for members in _cliques(adjacent):
        for one, other in itertools.permutations(members.tolist(), 2):
            assert adjacent[one, other]
            covered[one, other] = True
    assert (covered == adjacent).all()


def test_groups_of_many_alike_items_are_quick():
    group = torch.arange(2000) % 500
    weights = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    chosen = diverse_top_k(weights, group[:, None] == group, 200)
    heaviest = torch.stack([weights[group == each].max() for each in range(500)])
    assert torch.equal(weights[chosen].sort().values, heaviest.sort().values[-200:])


GOOD = torch.zeros(3, 3, dtype=torch.bool)
ONE_WAY = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("weights", "conflicts", "k", "message"),
    [
        (torch.ones(3, 1), GOOD, 1, r"weights to be of one dimension, got \(3, 1\)"),
        (torch.tensor([1, math.nan, 1]), GOOD, 1, r"every weight to be finite and at least 0, got \[nan\]"),
        (torch.tensor([1, math.inf, 1]), GOOD, 1, r"every weight to be finite and at least 0, got \[inf\]"),
        (torch.tensor([1, -0.5, 1]), GOOD, 1, r"every weight to be finite and at least 0, got \[-0.5\]"),
        (torch.ones(3), GOOD.int(), 1, r"conflicts to be of \(torch.bool, \(3, 3\)\).* got \(torch.int32"),
        (torch.ones(3), GOOD[:2], 1, r"conflicts to be of \(torch.bool, \(3, 3\)\).* got \(torch.bool, \(2, 3\)\)"),
        (torch.ones(3), ONE_WAY, 1, r"conflicts to be symmetric; pass conflicts \| conflicts.T"),
        (torch.ones(3), GOOD, 4, r"k to be an int in \[0, 3\], got 4"),
        (torch.ones(3), GOOD, -1, r"k to be an int in \[0, 3\], got -1"),
        (torch.ones(3), GOOD, 1.0, r"k to be an int in \[0, 3\], got 1.0"),
        (torch.ones(3), GOOD, True, r"k to be an int in \[0, 3\], got True"),
    ],
)
def test_bad_input_is_refused(weights, conflicts, k, message):
    with pytest.raises(TopKastError, match=f"expected {message}"):
        diverse_top_k(weights, conflicts, k)
