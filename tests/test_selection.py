"""Exact top-k selection against a sorting reference, on both code paths."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_topkast.method import selection
from lightning_topkast.method.selection import (
    SAMPLE,
    NonFiniteScoresError,
    _tiers_torch,
    drawn,
    drop_and_grow,
    nested_top_k,
    top_k_then_random,
)

SHAPES = [(1,), (5,), (4, 5), (2, 9, 1), (2, 2, 4, 4), (2, 3, 2, 2, 2)]


def reference_tiers(scores: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Sort by (score descending, flat index ascending) and take prefixes."""
    flat = scores.flatten().double()
    order = sorted(range(flat.numel()), key=lambda i: (-float(flat[i]), i))
    tiers = torch.zeros(flat.numel(), dtype=torch.uint8)
    for count in counts:
        tiers[order[:count]] += 1
    return tiers.view(scores.shape)


def device_path(scores: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The path for accelerators, run on CPU."""
    return _tiers_torch(scores.flatten(), counts).view(scores.shape)


@pytest.mark.parametrize("select", [nested_top_k, device_path])
def test_largest_entries_are_selected(select):
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    assert select(scores, (3, 1)).tolist() == [0, 2, 1, 1, 0]


@pytest.mark.parametrize("select", [nested_top_k, device_path])
def test_ties_go_to_the_lowest_flat_index(select):
    assert select(torch.ones(2, 3), (4, 2)).tolist() == [[2, 2, 1], [1, 0, 0]]
    assert select(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]), (4, 1)).tolist() == [1, 2, 1, 1, 0]


@pytest.mark.parametrize("select", [nested_top_k, device_path])
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_exact_for_an_all_zero_weight(select, shape):
    size = int(np.prod(shape))
    active, updated = max(size // 4, 1), max(size // 2, 1)
    tiers = select(torch.zeros(shape), (updated, active))
    assert tiers.shape == shape
    assert (tiers == 2).sum() == active
    assert (tiers >= 1).sum() == updated
    assert torch.equal(tiers, reference_tiers(torch.zeros(shape), (updated, active)))


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_selection_equals_sorting_whatever_the_ties(data):
    shape = data.draw(st.sampled_from([*SHAPES, (64,), (7, 13)]))
    size = int(np.prod(shape))
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]))  # few levels: mostly ties
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    values = data.draw(st.lists(st.integers(0, levels - 1), min_size=size, max_size=size))
    scores = (torch.tensor(values, dtype=torch.float64) / levels).to(dtype).view(shape)
    updated = data.draw(st.integers(0, size))
    active = data.draw(st.integers(0, updated))
    expected = reference_tiers(scores, (updated, active))
    assert torch.equal(nested_top_k(scores, (updated, active)), expected)
    assert torch.equal(
        device_path(scores.float(), (updated, active)), reference_tiers(scores.float(), (updated, active))
    )


@pytest.mark.parametrize("select", [nested_top_k, device_path])
@pytest.mark.parametrize("counts", [(200_001, 100_003), (1 << 20, 1), ((1 << 20) - 1, 0)])
@pytest.mark.parametrize(
    "kind",
    ["random", "ascending", "sampled entries are the smallest", "sampled entries are the largest", "all alike",
     "mostly zeros", "few levels"],
)  # fmt: skip
def test_a_large_weight_is_selected_exactly_whatever_its_sample_says(kind, counts, select):
    size, (updated, active) = 1 << 20, counts
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0))
    if kind == "ascending":
        scores = scores.sort().values
    elif kind.startswith("sampled"):
        scores[:: size // SAMPLE | 1] = 0.0 if "smallest" in kind else 2.0
    elif kind == "all alike":
        scores = torch.full((size,), 0.5)
    elif kind == "mostly zeros":
        scores[scores < 0.95] = 0.0
    elif kind == "few levels":
        scores = (scores * 7).floor() / 7
    order = torch.sort(scores, descending=True, stable=True).indices  # stable: ties to the lowest index
    expected = torch.zeros(size, dtype=torch.uint8)
    expected[order[:updated]] += 1
    expected[order[:active]] += 1
    assert torch.equal(select(scores, counts), expected)


@pytest.mark.parametrize("select", [nested_top_k, device_path])
@pytest.mark.parametrize("size", [6, 1 << 20])
def test_a_minus_zero_ties_with_zero(select, size):
    scores = torch.zeros(size)
    scores[::2] = -0.0
    assert torch.equal(select(scores, (4, 3)).nonzero().flatten(), torch.arange(4))


@pytest.mark.parametrize("select", [nested_top_k, device_path])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_wherever_it_is_in_a_large_weight(select, bad):
    for place in (0, 77_777, (1 << 20) - 1):
        scores = torch.rand(1 << 20)
        scores[place] = bad
        with pytest.raises(NonFiniteScoresError):
            select(scores, (200_000, 100_000))


def test_a_bfloat16_weight_with_a_thousand_ties_at_the_threshold_is_exact():
    scores = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).abs().bfloat16()
    tiers = nested_top_k(scores, (200_000, 100_000))
    threshold = scores[tiers == 2].min()
    assert (scores == threshold).sum() > 1000  # or the test shows nothing
    assert (tiers == 2).sum() == 100_000
    assert (tiers >= 1).sum() == 200_000
    assert scores[tiers == 0].max() <= scores[tiers == 1].min() <= scores[tiers == 1].max() <= threshold


def test_scores_in_any_memory_layout_give_the_same_sets():
    scores = torch.rand(4, 3, 5, 5)
    expected = nested_top_k(scores, (100, 50))
    assert torch.equal(nested_top_k(scores.to(memory_format=torch.channels_last), (100, 50)), expected)
    assert torch.equal(nested_top_k(scores.permute(3, 1, 0, 2), (0, 0)), torch.zeros(5, 3, 4, 5, dtype=torch.uint8))


def test_selection_leaves_the_scores_alone():
    scores = torch.rand(1000)
    before = scores.clone()
    nested_top_k(scores, (200, 100))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("select", [nested_top_k, device_path])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("counts", [(2, 1), (5, 5), (5, 1)])
def test_non_finite_scores_are_refused(select, bad, counts):
    scores = torch.tensor([0.1, bad, 0.5, 0.7, 0.3])
    with pytest.raises(NonFiniteScoresError):
        select(scores, counts)


def test_one_nan_among_many_entries_is_found():
    scores = torch.rand(100_000)
    scores[77_777] = float("nan")
    with pytest.raises(NonFiniteScoresError):
        nested_top_k(scores, (20_000, 10_000))


def test_a_count_out_of_range_is_refused():
    with pytest.raises(ValueError, match="cannot select 6 of 5"):
        nested_top_k(torch.rand(5), (6, 1))


def test_an_empty_weight_has_empty_sets():
    assert nested_top_k(torch.empty(0, 3), (0, 0)).shape == (0, 3)


def test_random_exploration_keeps_the_largest_active_and_draws_the_rest():
    scores = torch.arange(1000).float()
    lotteries = [torch.rand(1000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    draws = [top_k_then_random(scores, 100, 300, lottery) for lottery in lotteries]
    for tiers in draws:
        assert torch.equal(tiers == 2, scores >= 900)
        assert (tiers == 1).sum() == 200
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    # by magnitude the mean rank would be 800; a fair draw from 0..899 has 450 ± 20
    assert 380 < scores[draws[0] == 1].mean() < 520


def test_random_exploration_never_draws_what_is_active():
    tiers = top_k_then_random(torch.tensor([3.0, 2.0, 1.0, 0.0]), 2, 4, torch.zeros(4))
    assert tiers.tolist() == [2, 2, 1, 1]


def test_drop_and_grow_keeps_the_largest_of_a_and_adds_the_largest_growth_outside():
    generator = torch.Generator().manual_seed(0)
    scores, growth = torch.rand(2, 20, 30, generator=generator)
    active = torch.rand(20, 30, generator=generator) < 0.3
    size, dropped = int(active.sum()), 40
    chosen = drop_and_grow(scores, active, growth, size - dropped, dropped)
    assert chosen.dtype == torch.uint8
    assert chosen.shape == scores.shape
    kept = active & (scores >= scores[active].sort(descending=True).values[size - dropped - 1])
    entered = chosen.bool() & ~kept
    assert chosen[kept].all()
    assert (int(kept.sum()), int(entered.sum()), int(chosen.max())) == (size - dropped, dropped, 1)
    assert growth[entered].min() > growth[~chosen.bool()].max()


@pytest.mark.parametrize(("kept", "grown"), [(0, 3), (3, 0), (2, 1), (3, 3), (1, 4)])
def test_drop_and_grow_has_exactly_the_counts_asked_for(kept, grown):
    active = torch.tensor([True, False, True, False, True, False])
    for scores in (torch.zeros(6), torch.ones(6), torch.arange(6.0)):
        for growth in (torch.zeros(6), scores):
            chosen = drop_and_grow(scores, active, growth, kept, grown)
            assert int(chosen.sum()) == kept + grown
            assert int(chosen[active].sum()) >= kept


# --- numbers that are drawn ----------------------------------------------------------------------------------------


def test_drawn_numbers_follow_from_seed_step_and_name_alone():
    numbers = drawn(1, 23, "w", (40, 50))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(drawn(1, 23, "w", [40, 50]), numbers)
    assert torch.equal(torch.get_rng_state(), before), "the run's own generator is left alone"
    others = [drawn(2, 23, "w", (40, 50)), drawn(1, 24, "w", (40, 50)), drawn(1, 23, "v", (40, 50))]
    others += [drawn(12, 3, "w", (40, 50)), drawn(1, 2, "3w", (40, 50))]  # also where the digits are the same
    for other in others:
        assert (other == numbers).float().mean() < 0.01


def test_rows_of_drawn_numbers_are_those_of_all(monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", 7)
    for shape in ((40, 5), (9,), (6, 3, 2)):
        numbers = drawn(1, 23, "w", shape)
        for rows in ((0, shape[0]), (0, 4), (3, 6), (5, 5), (4, shape[0])):
            assert torch.equal(drawn(1, 23, "w", shape, rows), numbers[slice(*rows)])


def test_drawn_numbers_are_uniform_and_below_one():
    numbers = drawn(0, 0, "w", (200, 500))
    assert numbers.shape == (200, 500)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert torch.histc(numbers, bins=10, min=0, max=1).sub(10_000).abs().max() < 500
    assert drawn(0, 0, "w", ()).shape == ()
