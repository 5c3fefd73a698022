"""DART: exact sets at wide gaps, bounded regret, and the same sets again after a resume."""

import json
import math
import random

import pytest

from lightning_topkast import Dart, TopKastError

REWARDS = {
    "mean": lambda worths: sum(worths) / len(worths),
    "any": lambda worths: 1 - math.prod(1 - worth for worth in worths),
    "square": lambda worths: (sum(worths) / len(worths)) ** 2,
}


def worths_of(arms, k, seed, wide):
    generator = random.Random(seed)
    if wide:
        return generator.sample([0.9] * k + [0.1] * (arms - k), arms)
    return [generator.uniform(0.05, 0.95) for _ in range(arms)]


def play(dart, worths, reward, rounds, seed=0):
    """Regret of so many rounds, whose rewards are 0 or 1."""
    generator, regret = random.Random(seed), 0.0
    best = reward(sorted(worths)[-dart.k :])
    for _ in range(rounds):
        expected = reward([worths[arm] for arm in dart.ask()])
        regret += best - expected
        dart.tell(float(generator.random() < expected))
    return regret


def best_of(worths, k):
    return tuple(sorted(sorted(range(len(worths)), key=lambda arm: -worths[arm])[:k]))


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(("arms", "k"), [(10, 2), (12, 3), (20, 4)])
@pytest.mark.parametrize("wide", [False, True])
def test_regret_is_within_its_bound(name, arms, k, wide):
    horizon = 10_000
    worths = worths_of(arms, k, 7 * arms + k, wide)
    regret = play(Dart(arms, k, horizon, seed=1), worths, REWARDS[name], horizon)
    assert 0 < regret <= 1.5 * k * math.sqrt(k * arms * horizon)


@pytest.mark.parametrize(("name", "arms", "k"), [("mean", 10, 2), ("mean", 20, 4), ("any", 10, 2), ("square", 12, 3)])
@pytest.mark.parametrize("seed", range(2))
def test_the_exact_set_is_accepted_at_wide_gaps(name, arms, k, seed):
    worths = worths_of(arms, k, seed, wide=True)
    dart = Dart(arms, k, 10_000, seed)
    play(dart, worths, REWARDS[name], 9_999, seed)
    assert dart.is_decided
    assert dart.best() == dart.ask() == best_of(worths, k)


def test_random_play_would_not_be_within_the_bound():
    """So that the bound is a test at all: the same sets, but rewards that say nothing."""
    dart, regret, worths = Dart(10, 2, 10_000), 0.0, worths_of(10, 2, 0, wide=True)
    for _ in range(10_000):
        regret += 0.9 - REWARDS["mean"]([worths[arm] for arm in dart.ask()])
        dart.tell(0.5)
    assert regret > 1.5 * 2 * math.sqrt(2 * 10 * 10_000)


def test_equal_arms_are_hardly_ever_decided():
    decided = 0
    for seed in range(20):
        dart = Dart(8, 2, 2000, seed)
        play(dart, [0.5] * 8, REWARDS["mean"], 2000, seed)
        decided += len(dart._active) < 8
    assert decided <= 2  # which has a probability of 1/√T = 0.02 for each


def test_a_pass_plays_every_undecided_arm_as_often():
    dart, played = Dart(7, 3, 100), []
    for _ in range(3):  # groups of 3, 3 and 1, which two others fill up
        arms = dart.ask()
        assert arms == tuple(sorted(set(arms)))
        assert len(arms) == 3
        played += arms
        dart.tell(0.5)
    assert set(played) == set(range(7))
    assert dart.state_dict()["counts"] == [1] * 7


def test_accepted_arms_are_in_every_set():
    dart = Dart(6, 2, 5000)
    worths = [0.95, 0.5, 0.45, 0.5, 0.45, 0.5]
    play(dart, worths, REWARDS["mean"], 3000)
    assert dart.state_dict()["accepted"] == [0]
    assert all(0 in dart.ask() and dart.tell(0.5) is None for _ in range(20))
    assert 0 in dart.best()


def test_asking_twice_returns_the_same_arms():
    dart = Dart(10, 3, 100)
    first = dart.ask()
    assert dart.ask() == first
    dart.tell(1.0)
    assert dart.ask() != first


def test_seeds_give_sets_of_their_own():
    assert Dart(50, 5, 10, seed=0).ask() != Dart(50, 5, 10, seed=1).ask()


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("rounds", [0, 1, 4, 777])
def test_a_saved_state_is_plain_and_resumes_bit_for_bit(rounds, asked):
    worths = worths_of(7, 2, 0, wide=True)
    dart, other = Dart(7, 2, 5000, seed=3), Dart(7, 2, 5000, seed=3)
    play(dart, worths, REWARDS["mean"], rounds)
    if asked:
        dart.ask()
    state = dart.state_dict()
    saved = json.loads(json.dumps(state))
    other.load_state_dict(saved)
    assert other.best() == dart.best()
    if asked:
        for each in (dart, other):
            each.tell(0.25)
    sets = []
    for each in (dart, other):
        generator, drawn = random.Random(1), []
        for _ in range(500):
            drawn.append(each.ask())
            each.tell(generator.random() * 0.1 + 0.8 * (0 in drawn[-1]))
        sets.append(drawn)
    assert sets[0] == sets[1]
    assert dart.state_dict() == other.state_dict()
    assert state == saved, "a saved state does not change with what it was saved of"


def test_a_state_of_another_problem_is_refused():
    with pytest.raises(TopKastError, match="the state's k to be 3, got 2"):
        Dart(7, 3, 100).load_state_dict(Dart(7, 2, 100).state_dict())


@pytest.mark.parametrize("name", Dart(7, 2, 100).state_dict())
def test_a_state_that_is_not_whole_is_refused_and_nothing_changes(name):
    dart, saved = Dart(7, 2, 100), Dart(7, 2, 100)
    play(saved, worths_of(7, 2, 0, wide=True), REWARDS["mean"], 20)
    before, state = dart.state_dict(), saved.state_dict()
    del state[name]
    with pytest.raises(TopKastError, match=f"lacks {name}; it is damaged"):
        dart.load_state_dict(state)
    assert dart.state_dict() == before


def test_telling_before_asking_is_refused():
    dart = Dart(4, 2, 10)
    with pytest.raises(TopKastError, match=r"call ask\(\) first"):
        dart.tell(0.5)
    dart.ask()
    dart.tell(0.5)
    with pytest.raises(TopKastError, match=r"call ask\(\) first"):
        dart.tell(0.5)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -0.1, 1.1, True, "1", None])
def test_rewards_out_of_range_are_refused_and_may_be_told_again(reward):
    dart = Dart(4, 2, 10)
    dart.ask()
    with pytest.raises(TopKastError, match=r"reward to be a number in \[0, 1\]; scale other rewards"):
        dart.tell(reward)
    dart.tell(0.5)


def test_the_horizon_ends_the_rounds():
    dart = Dart(4, 2, 1)
    dart.ask()
    dart.tell(0.5)
    with pytest.raises(TopKastError, match=r"horizon of 1 rounds is reached; use best\(\)"):
        dart.ask()
    assert len(dart.best()) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1, 1, 10), "arms to be an int of at least 2"),
        ((4, 0, 10), r"k to be an int in \[1, 4\)"),
        ((4, 4, 10), r"k to be an int in \[1, 4\)"),
        ((4, 2.0, 10), r"k to be an int in \[1, 4\)"),
        ((4, 2, 0), "horizon to be an int of at least 1"),
        ((4, 2, 10, 0.5), "seed to be an int"),
    ],
)
def test_arguments_out_of_range_are_refused(given, message):
    with pytest.raises(TopKastError, match=message):
        Dart(*given)
