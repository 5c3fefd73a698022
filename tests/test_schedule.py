"""When refreshes happen and exploration stops."""

import re

import pytest
import torch
from torch import nn

from lightning_topkast import Ramp, TopKast, TopKastError
from lightning_topkast.method.schedule import Schedule, Timeline, needs_length
from tests.helpers import nouns


def test_refreshes_come_every_n_steps_and_when_exploration_stops():
    timeline = Timeline(Schedule(update_every=10, stop_exploring_at=25))
    assert [step for step in range(1, 41) if timeline.refreshes_after(step)] == [10, 20, 25, 30, 40]
    assert timeline.explores_at(24)
    assert not timeline.explores_at(25)


def test_sets_stay_from_the_very_step_at_which_updating_stops():
    """Also where that is a multiple of update_every, at which they would be chosen again otherwise."""
    timeline = Timeline(Schedule(update_every=10, stop_updating_at=30))
    assert [step for step in range(1, 51) if timeline.refreshes_after(step)] == [10, 20]
    assert train(stop=None, steps=25, stop_updating_at=20)[0].refresh_count == 1


def test_exploration_that_stops_at_a_multiple_of_update_every_takes_one_refresh():
    topkast, updated = train(stop=20, steps=25)
    assert updated == [512] * 20 + [102] * 6
    assert topkast.refresh_count == 2
    topkast, updated = train(stop=20, steps=25, stop_updating_at=20)
    assert updated == [512] * 20 + [102] * 6, "B becomes A even where the sets stay otherwise"


def test_exploration_that_stops_while_a_choice_is_pending_stops_for_good():
    """The choice is of step 10, with B larger than A, and would take effect after step 14."""
    topkast, updated = train(stop=12, steps=18, delay=4)
    assert updated == [512] * 12 + [102] * 7
    assert topkast.refresh_count == 1


def test_refresh_by_hand_replaces_a_choice_that_is_pending():
    topkast, _ = train(stop=None, steps=11, delay=4)
    (pending,) = topkast._refresher.selections
    with torch.no_grad():
        weight = topkast.weights["2.weight"]
        weight.parameter.copy_(weight.parameter.flip(0))  # so that the choice of now is another
    topkast.refresh()
    chosen = weight.tiers
    assert not torch.equal(chosen, pending.result()["2.weight"])
    assert topkast._refresher.selections == []
    topkast._refresher.after_step([weight], 14)
    assert torch.equal(weight.tiers, chosen)
    assert topkast.refresh_count == 1


@pytest.mark.parametrize(("moment", "step"), [(None, None), (7, 7), (0, 0), (0.5, 100), (1.0, 200), (0.0, 0)])
def test_an_int_is_a_step_and_a_float_a_fraction_of_the_run(moment, step):
    timeline = Timeline.of(Schedule(stop_exploring_at=moment), None, total_steps=200)
    assert timeline.schedule.stop_exploring_at == step


@pytest.mark.parametrize("delay", [100, 101, -1, 1.0, True, "1", None])
def test_a_delay_is_a_count_below_update_every(delay):
    assert Schedule(update_every=100, delay=99).delay == 99
    assert Schedule(update_every=1).update_every == 1
    with pytest.raises(TopKastError, match=rf"expected delay to be .* below update_every=100, got {delay!r}$"):
        Schedule(update_every=100, delay=delay)


def test_a_sparsity_of_a_ramp_is_refused_by_its_name():
    with pytest.raises(TopKastError, match=r"Ramp\.forward_sparsity.* got 1\.5"):
        Ramp(forward_sparsity=1.5)


@pytest.mark.parametrize("moment", ["0.5", True, -1, -0.1, 1.5, float("nan"), float("inf"), [3], 1j])
def test_a_moment_of_another_kind_is_refused_with_its_name_and_value(moment):
    shown = re.escape(f"a step (int of at least 0) or a fraction of the run (float in [0, 1]), or None, got {moment!r}")
    for name in ("stop_exploring_at", "stop_updating_at"):
        with pytest.raises(TopKastError, match=f"expected {name} to be {shown}$"):
            Schedule(**{name: moment})
    shown = shown.replace(", or None", "").replace(r",\ or\ None", "")
    for name in ("begin", "end"):
        with pytest.raises(TopKastError, match=rf"expected Ramp\.{name} to be {shown}$"):
            Ramp(**{name: moment})


@pytest.mark.parametrize(
    ("schedule", "ramp", "needs"),
    [
        (Schedule(), None, False),
        (Schedule(stop_exploring_at=30, stop_updating_at=40), None, False),
        (Schedule(stop_exploring_at=0.0, stop_updating_at=0.0), None, False),
        (Schedule(stop_exploring_at=30, stop_updating_at=0.5), None, True),
        (Schedule(stop_exploring_at=1.0), None, True),
        (Schedule(stop_exploring_at=30), Ramp(begin=5, end=20), False),
        (Schedule(), Ramp(begin=0.0, end=20), False),
        (Schedule(), Ramp(begin=0.1, end=20), True),
        (Schedule(), Ramp(begin=5, end=0.5), True),
    ],
)
def test_only_a_fraction_above_zero_needs_the_length_of_the_run(schedule, ramp, needs):
    assert needs_length(schedule, ramp) is needs


def test_a_timeline_is_made_again_from_its_moments():
    schedule, ramp = Schedule(stop_exploring_at=0.5, stop_updating_at=0.75), Ramp(begin=0.1, end=0.4)
    timeline = Timeline.of(schedule, ramp, 200)
    assert timeline.moments == [100, 150, 20, 80, 200]
    assert Timeline.of_moments(schedule, ramp, timeline.moments) == timeline
    for endless in (Timeline.of(Schedule(stop_updating_at=30), None, None), Timeline.of(Schedule(), None, -1)):
        assert Timeline.of_moments(endless.schedule, None, endless.moments) == endless


def test_sizes_with_moments_keep_each_of_them():
    options = {"stop_exploring_at": 0.5, "stop_updating_at": 0.75, "ramp": Ramp(begin=0.1, end=0.4), "penalty": None}
    sizes = TopKast(nn.Linear(8, 8), 0.5, 0.25, **nouns(include=["weight"], **options))._refresher.sizes
    again = sizes.with_moments([100, 150, 20, 80, 200])
    assert again == sizes.planned(200)
    assert (again.timeline.schedule.stop_updating_at, again.timeline.horizon) == (150, 150)


@pytest.mark.parametrize("unknown", [None, -1, float("inf")])
def test_a_fraction_of_an_unbounded_run_is_refused(unknown):
    with pytest.raises(TopKastError, match="the length of the run is not known"):
        Timeline.of(Schedule(stop_exploring_at=0.5), None, unknown)


def train(stop, steps=30, total_steps=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast = TopKast(model, 0.9, 0.5, **nouns(update_every=10, stop_exploring_at=stop, **options))
    topkast.attach(optimizer, total_steps=total_steps)
    updated = [int(topkast.weights["2.weight"].updated.sum())]
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 8)), torch.randint(0, 4, (16,))).backward()
        optimizer.step()
        updated.append(int(topkast.weights["2.weight"].updated.sum()))
    return topkast, updated


def test_from_the_stop_on_the_updated_set_is_the_active_set():
    topkast, updated = train(stop=15)
    assert updated == [512] * 15 + [102] * 16
    weight = topkast.weights["2.weight"]
    assert torch.equal(weight.active, weight.updated)
    assert not topkast.exploring


def test_a_stop_at_zero_never_explores():
    _, updated = train(stop=0)
    assert set(updated) == {102}


def test_a_fraction_stops_at_that_share_of_the_run():
    _, updated = train(stop=0.5, total_steps=30)
    assert updated == [512] * 15 + [102] * 16


def test_a_fraction_of_less_than_a_step_never_explores():
    topkast, updated = train(stop=0.01, total_steps=30)
    assert set(updated[1:]) == {102}
    assert topkast.refresh_count == 3


def test_a_fraction_without_a_known_run_is_refused_with_the_way_out():
    with pytest.raises(TopKastError, match="give a step"):
        train(stop=0.5)


def test_random_exploration_draws_anew_at_every_refresh():
    topkast, _ = train(stop=None, exploration="random", steps=0)
    weight = topkast.weights["2.weight"]
    before = weight.updated
    topkast._attached.hooks[0].steps = 10
    topkast.refresh()
    assert not torch.equal(weight.updated, before)
    assert weight.updated.sum() == 512
