"""The private top-k: scales by hand, attacks that fail unless there is too little noise, one choice for all ranks."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import beta, gumbel_r, kstest, laplace

from lightning_topkast import TopKastError, private_top_k
from lightning_topkast.top_k import private
from tests import processes
from tests.helpers import plain_path

RUNS = 3000  # of each of two neighbours
DOUBT = 1e-9  # probability that either end of an interval is wrong


# --- scales -----------------------------------------------------------------------------------------------------------


def test_scale_of_gumbel_noise_by_hand():
    """√ρ = √(ε + L) - √L with L = log 1/δ; ρ = k η²/8 and η = 2 Δ / scale."""
    scale, delta = private.noise_scale(1000, 50, 0.5, math.exp(-12), 3.0, "gumbel")
    root = math.sqrt(12.5) - math.sqrt(12)  # 0.0714…
    assert scale == pytest.approx(3 * 5 / root, rel=1e-9)
    assert scale == pytest.approx(210.0, rel=1e-3)
    assert delta == math.exp(-12)
    loss = 50 * (2 * 3 / scale) ** 2 / 8
    assert loss + 2 * math.sqrt(loss * 12) == pytest.approx(0.5, rel=1e-9)


def test_scale_of_laplace_noise_by_hand():
    """8 · 3 · √(400 · 16) / 0.2 = 8 · 3 · 80 / 0.2."""
    scale, delta = private.noise_scale(1000, 400, 0.2, 1000 * math.exp(-16), 3.0, "laplace")
    assert scale == pytest.approx(9600, rel=1e-9)
    assert delta == 1000 * math.exp(-16)


@pytest.mark.parametrize("noise", ["gumbel", "laplace"])
def test_few_scores_are_chosen_with_the_noise_of_pure_privacy(noise):
    """2 · 1 · 3 / 0.2: the k chosen and the best of the others each move by Δ, in opposite directions."""
    assert private.noise_scale(10, 1, 0.2, 1e-6, 3.0, noise) == (pytest.approx(30), 0.0)
    assert private_top_k(torch.arange(10.0), 1, 0.2, 1e-6, 3.0, noise)[1:] == (0.2, 0.0)


def test_laplace_needs_seven_times_the_noise_of_gumbel_if_many_are_chosen():
    """By standard deviations, √2 and π / √6 times the scale: 8 √(2 · 21.8) √12 / (2 π √13.8), but for what ε adds."""
    (one, _), (other, _) = (private.noise_scale(3000, 1000, 0.2, 1e-6, 1.0, noise) for noise in ("laplace", "gumbel"))
    ratio = math.sqrt(2) * one / (math.pi / math.sqrt(6) * other)
    assert ratio == pytest.approx(8 * math.sqrt(2 * 21.82) * math.sqrt(12) / (2 * math.pi * math.sqrt(13.82)), rel=0.01)
    assert 7.7 < ratio < 7.9


def test_a_tiny_budget_loses_no_digits():
    one, other = (private.noise_scale(1000, 50, epsilon, 1e-6, 1.0, "gumbel")[0] for epsilon in (1e-14, 1e-12))
    assert one / other == pytest.approx(100, rel=1e-6)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draw", "law"), [(private._gumbel, gumbel_r), (private._laplace, laplace)])
def test_noise_has_its_distribution(draw, law):
    assert kstest(draw((20_000,)), law.cdf).pvalue > 1e-9


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_noise_is_finite_at_both_ends_of_the_entropy(byte, monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda count: byte * count)
    uniform = private._uniform((3,))
    assert ((uniform > 0) & (uniform < 1)).all()
    assert uniform[0] in (2.0**-53, 1 - 2.0**-53)
    assert np.isfinite(private._gumbel((3,))).all()
    assert np.isfinite(private._laplace((3,))).all()


def test_no_seed_repeats_the_choice():
    scores, choices = torch.zeros(200), []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        choices.append(private_top_k(scores, 100, 0.2, 1e-6, 1.0).mask)
    assert not torch.equal(*choices)


# --- attacks ----------------------------------------------------------------------------------------------------------


def lower_bound(hits, others, delta):
    """What ε is at least, if an event happened this often to two neighbours (Clopper & Pearson 1934)."""
    least = beta.ppf(DOUBT, hits, RUNS - hits + 1) if hits else 0.0
    most = beta.isf(DOUBT, others + 1, RUNS - others) if others < RUNS else 1.0
    return math.log((least - delta) / most) if least > delta else -math.inf


def attack(one, other, k, epsilon, delta, noise, event):
    """The bound that an attacker gets who knows both neighbours and looks at one event, chosen beforehand."""
    assert float((one - other).abs().max()) <= 1
    counts = []
    for scores in (one, other):
        choices = [private_top_k(scores, k, epsilon, delta, 1.0, noise) for _ in range(RUNS)]
        counts.append(sum(event(choice.mask) for choice in choices))
    return lower_bound(*counts, choices[0].delta)


def duel(noise):
    """One of two is chosen, and both move, so that they change places."""
    behind = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    epsilon = 1.0 if noise == "gumbel" else 0.2
    return -behind, behind, 1, epsilon, 1e-6, noise, lambda mask: bool(mask[0])


def halves():
    """Many equal scores, of which half rise and half fall: each of the 16 picks leans by half of its range."""
    change = torch.ones(320, dtype=torch.float64)
    change[160:] = -1
    return change, torch.zeros_like(change), 16, 2.0, 1e-2, "gumbel", lambda mask: int(mask[:160].sum()) >= 13


@pytest.mark.parametrize("given", [duel("gumbel"), duel("laplace"), halves()], ids=["gumbel", "laplace", "composed"])
def test_an_attack_finds_no_more_than_is_claimed_and_an_eighth_of_the_noise_is_caught(given, monkeypatch):
    epsilon = given[3]
    assert attack(*given) <= epsilon
    proven = private.noise_scale

    def an_eighth(*arguments):
        scale, delta = proven(*arguments)
        return scale / 8, delta

    monkeypatch.setattr(private, "noise_scale", an_eighth)
    assert attack(*given) > epsilon


# --- choices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["gumbel", "laplace"])
def test_clear_choices_are_exact_and_of_any_shape(noise):
    scores = 1e6 * torch.arange(12).reshape(3, 4).flip(0).to(torch.bfloat16)
    choice = private_top_k(scores, 5, 0.2, 1e-6, 1.0, noise)
    assert choice.mask.dtype == torch.bool
    assert choice.mask.tolist() == [[True] * 4, [False] * 3 + [True], [False] * 4]


def test_all_ranks_get_the_choice_of_the_first(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("ranks are forked")
    code = (
        "import os, sys, torch, torch.distributed as dist\n"
        "from lightning_topkast import private_top_k\n"
        "rank = 0 if os.fork() else 1\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[1] + '/meet', rank=rank, world_size=2)\n"
        "choice = private_top_k(torch.zeros(400), 200, 0.2, 1e-6, 1.0)\n"
        "torch.save(choice.mask, f'{sys.argv[1]}/{rank}.pt')\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
        "if rank == 0: os.wait()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"}
    processes.run([sys.executable, "-c", code, tmp_path], env=environment, cwd=tmp_path, check=True)
    one, other = (torch.load(Path(tmp_path) / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert int(one.sum()) == 200
    assert torch.equal(one, other)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 0}, r"k to be an int in \[1, 4\)"),
        ({"k": 4}, r"k to be an int in \[1, 4\)"),
        ({"k": 1.0}, "k to be an int"),
        ({"epsilon": 0.0}, "epsilon to be a positive number"),
        ({"epsilon": math.inf}, "epsilon to be a positive number"),
        ({"delta": 0.0}, r"delta to be a number in \(0, 1\)"),
        ({"delta": 1.0}, r"delta to be a number in \(0, 1\)"),
        ({"sensitivity": 0.0}, "sensitivity to be a positive number"),
        ({"sensitivity": math.nan}, "sensitivity to be a positive number"),
        ({"noise": "gauss"}, "noise to be one of 'gumbel', 'laplace'"),
        ({"noise": "laplace", "epsilon": 0.21}, "epsilon <= 0.2 .* use noise='gumbel'"),
        ({"noise": "laplace", "delta": 0.051}, "delta <= 0.05 .* use noise='gumbel'"),
        ({"scores": torch.tensor([1.0, math.nan, 0.0, 0.0])}, "NaN or infinity"),
        ({"scores": torch.tensor([1e30, 1.0, 0.0, 0.0])}, "would swallow noise of scale"),
    ],
)
def test_bad_input_is_refused(changed, message):
    given = {"scores": torch.zeros(4), "k": 2, "epsilon": 0.2, "delta": 1e-6, "sensitivity": 1.0}
    with pytest.raises(TopKastError, match=message):
        private_top_k(**(given | changed))
