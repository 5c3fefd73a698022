"""When refreshes happen and exploration stops."""

import pytest
import torch
from torch import nn

from lightning_topkast import TopKast, TopKastError
from lightning_topkast.method.schedule import Schedule, Timeline
from tests.helpers import nouns


def test_refreshes_come_every_n_steps_and_when_exploration_stops():
    timeline = Timeline(Schedule(update_every=10, stop_exploring_at=25))
    assert [step for step in range(1, 41) if timeline.refreshes_after(step)] == [10, 20, 25, 30, 40]
    assert timeline.explores_at(24)
    assert not timeline.explores_at(25)


@pytest.mark.parametrize(("moment", "step"), [(None, None), (7, 7), (0, 0), (0.5, 100), (1.0, 200), (0.0, 0)])
def test_an_int_is_a_step_and_a_float_a_fraction_of_the_run(moment, step):
    timeline = Timeline.of(Schedule(stop_exploring_at=moment), None, total_steps=200)
    assert timeline.schedule.stop_exploring_at == step


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
