"""The soft top-k: a transport plan with one unknown, its derivatives, its limits, and what it refuses."""

import math

import pytest
import torch
from scipy.optimize import linprog

from lightning_topkast import TopKastError, soft_top_k
from lightning_topkast.top_k import soft

TEMPERATURES = (1e-12, 1e-3, 0.1, 1.0, 30.0, 1e6)


def scores_of(kind, n=60, dtype=torch.float64):
    normal = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = {
        "normal": normal,
        "ties": normal.round(),
        "equal": torch.zeros(n),
        "one low": torch.arange(n).clamp_max(1),
        "heavy tails": normal**7,
        "two heaps": (normal > 1.5) * 50 + 0.01 * normal,
        "huge": normal * 1e30,
    }
    return made[kind].to(dtype)


KINDS = ("normal", "ties", "equal", "one low", "heavy tails", "two heaps", "huge")


def sinkhorn(scores, k, temperature):
    """The mass that goes to the target 1: log-domain Sinkhorn with squared distances, as in the paper."""
    n = len(scores)
    kernel = -((scores[:, None] - torch.tensor([0.0, 1.0], dtype=torch.float64)) ** 2) / (2 * temperature)
    to_rows, to_columns = torch.zeros(n, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    masses = torch.tensor([n - k, k], dtype=torch.float64).log()
    for _ in range(20_000):
        before = to_columns
        to_rows = -torch.logsumexp(kernel + to_columns, 1)
        to_columns = masses - torch.logsumexp(kernel + to_rows[:, None], 0)
        if (to_columns - before).abs().max() < 1e-14:
            return (kernel + to_rows[:, None] + to_columns).exp()[:, 1]
    raise AssertionError("Sinkhorn has not settled")


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "one low"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("k", [1, 7, 59])
def test_it_is_the_transport_plan_that_sinkhorn_finds(kind, temperature, k):
    scores = scores_of(kind)
    assert (soft_top_k(scores, k, temperature) - sinkhorn(scores, k, temperature)).abs().max() < 1e-9


@pytest.mark.parametrize("k", [1, 4, 11])
def test_at_a_low_temperature_it_solves_the_linear_programme(k):
    scores = scores_of("normal", 12)
    solved = linprog(-scores.numpy(), A_eq=[[1.0] * 12], b_eq=[k], bounds=(0, 1))
    assert torch.allclose(soft_top_k(scores, k, 1e-12), torch.tensor(solved.x), atol=1e-9)


def test_ties_at_the_threshold_share_what_is_left():
    assert soft_top_k(torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]), 3, 1e-6).tolist() == pytest.approx(
        [1, 2 / 3, 2 / 3, 2 / 3, 0]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_is_k_after_ten_iterations_at_most(kind, temperature, dtype, monkeypatch):
    calls = []
    imbalance = soft._imbalance
    monkeypatch.setattr(soft, "_imbalance", lambda *given: calls.append(given) or imbalance(*given))
    for n in (2, 60, 5000):
        scores = scores_of(kind, n, dtype)
        for k in {1, n // 2, n - 1}:
            calls.clear()
            chosen = soft_top_k(scores, k, temperature)
            assert 1 <= len(calls) <= 10
            assert float(chosen.double().sum()) == pytest.approx(k, rel=100 * torch.finfo(dtype).eps)
            assert 0 <= chosen.min() <= chosen.max() <= 1
            order = scores.sort().indices
            steps = chosen[order].diff()  # rounding: vectors and what is left of them take sigmoids in two ways
            assert steps.min() >= -2 * torch.finfo(dtype).eps, "a larger score never gets less"


@pytest.mark.parametrize("temperature", [0.2, 1.0, 100.0])
def test_first_and_second_derivatives_are_exact(temperature):
    scores = (scores_of("normal", 12).view(2, 6) * temperature).requires_grad_()
    for k in (1, 3, 5):
        assert torch.autograd.gradcheck(lambda s, k=k: soft_top_k(s, k, temperature), scores, eps=1e-6 * temperature)
        assert torch.autograd.gradgradcheck(
            lambda s, k=k: soft_top_k(s, k, temperature) * temperature, scores, eps=1e-6 * temperature
        )


def test_the_gradient_is_that_of_hand():
    """σ' = y (1 - y); what one score gains, all lose in proportion to their σ'."""
    scores = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64, requires_grad=True)
    chosen = soft_top_k(scores, 1, 0.5)
    chosen[0].backward()
    slopes = (chosen * (1 - chosen)).detach()
    shares = slopes / slopes.sum()
    expected = slopes[0] * (torch.tensor([1.0, 0, 0], dtype=torch.float64) - shares) / 0.5
    assert torch.allclose(scores.grad, expected, atol=1e-14)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_are_finite_at_every_temperature(kind, temperature, dtype):
    scores = scores_of(kind, dtype=dtype).requires_grad_()
    chosen = soft_top_k(scores, 7, temperature)
    assert chosen.dtype == dtype
    (chosen.float() * torch.arange(60)).sum().backward()
    assert bool(torch.isfinite(scores.grad).all())


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    scores = scores_of("normal").bfloat16()
    assert torch.equal(soft_top_k(scores, 7, 0.3), soft_top_k(scores.float(), 7, 0.3).bfloat16())


def test_rows_are_problems_of_their_own():
    scores = torch.stack([scores_of("normal"), scores_of("ties"), scores_of("huge")]).view(3, 1, 60)
    whole = soft_top_k(scores, 5, 0.3)
    for row in range(3):
        assert torch.equal(whole[row, 0], soft_top_k(scores[row, 0], 5, 0.3))
    assert soft_top_k(torch.zeros(0, 4), 2, 1.0).shape == (0, 4)


def test_adding_a_number_to_all_scores_changes_nothing():
    scores = scores_of("normal").round(decimals=2)
    assert torch.allclose(soft_top_k(scores + 4096, 5, 0.3), soft_top_k(scores, 5, 0.3), atol=1e-9)


def test_all_of_n_are_chosen_whole_and_without_a_gradient():
    for n in (1, 3):
        scores = torch.full((n,), 1e30, requires_grad=True)
        chosen = soft_top_k(scores, n, 0.1)
        assert chosen.tolist() == [1.0] * n
        chosen.sum().backward()
        assert scores.grad.tolist() == [0.0] * n


@pytest.mark.parametrize("k", [0, -1, 5, 2.0, True, None])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(TopKastError, match=r"k to be an int in \[1, 4\]"):
        soft_top_k(torch.zeros(4), k, 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, 1e-300, "1"])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(TopKastError, match=r"temperature to be .* use torch\.topk"):
        soft_top_k(torch.zeros(4), 2, temperature)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(value):
    with pytest.raises(TopKastError, match="NaN or infinity"):
        soft_top_k(torch.tensor([1.0, value, 0.0]), 1, 1.0)


@pytest.mark.parametrize("scores", [torch.arange(4), torch.tensor(1.0), torch.zeros(3, 0)])
def test_what_is_no_row_of_numbers_is_refused(scores):
    with pytest.raises(TopKastError):
        soft_top_k(scores, 1, 1.0)
