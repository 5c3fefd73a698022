"""Moments that are fractions of a run, where the Trainer cannot say how many steps an optimizer will take."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch import nn

from lightning_topkast import Ramp, RigL, Schedule, TopKast, TopKastError
from lightning_topkast.method.schedule import Timeline
from tests.helpers import Net, Resumable, batches, check_sparse, fit, make_callback, make_net, make_trainer, same


class Accumulating(Net):
    """A step every fourth batch, by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 4)
        if batch_idx % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


def _mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs))


class Gan(LightningModule):
    """`critics` steps of the critic for each of the generator, which begins after `late` batches."""

    def __init__(self, critics=1, late=0):
        super().__init__()
        self.automatic_optimization = False
        self.critics, self.late, self.batches = critics, late, 0
        self.generator, self.critic = _mlp(6, 2), _mlp(2, 1)

    def training_step(self, batch, batch_idx):
        critic, generator = self.optimizers()
        for _ in range(self.critics):
            critic.zero_grad()
            self.manual_backward(self.critic(self.generator(batch[0]).detach()).mean() - self.critic(batch[1]).mean())
            critic.step()
        self.batches += 1
        if self.batches > self.late:
            generator.zero_grad()
            self.manual_backward(-self.critic(self.generator(batch[0])).mean())
            generator.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.critic, self.generator)]


class Watch(Callback):
    """For each optimizer, whether its weights explore and their forward density after each of its steps."""

    def __init__(self, callback):
        self.callback, self.explores, self.densities = callback, {}, {}

    def on_train_batch_end(self, trainer, *args):
        topkast = self.callback.topkast
        for place, hooks in enumerate(topkast._attached):
            weight = max(hooks.weights, key=lambda weight: weight.size)
            self.explores.setdefault(place, {})[hooks.steps] = weight.is_exploring
            self.densities.setdefault(place, {})[hooks.steps] = weight.forward_density

    def stopped_at(self, place):
        return min(step for step, explores in self.explores[place].items() if not explores)


RUNS = {
    "accumulating, epochs": (Accumulating, {"max_epochs": 8}, [16]),
    "accumulating, steps": (Accumulating, {"max_epochs": 100, "max_steps": 20}, [20]),
    "accumulating, limited batches": (Accumulating, {"max_epochs": 8, "limit_train_batches": 4}, [8]),
    "GAN, steps": (Gan, {"max_epochs": -1, "max_steps": 64}, [32, 32]),
    "GAN, epochs": (Gan, {"max_epochs": 5}, [40, 40]),
    "five critics, steps": (lambda: Gan(5), {"max_epochs": -1, "max_steps": 96}, [80, 16]),
    "five critics, epochs": (lambda: Gan(5), {"max_epochs": 3}, [120, 24]),
    "five critics, steps before epochs": (lambda: Gan(5), {"max_epochs": 30, "max_steps": 96}, [80, 16]),
    "a generator that begins late": (lambda: Gan(1, late=16), {"max_epochs": 10}, [80, 64]),
}
EVERY = 2


@pytest.mark.parametrize("name", RUNS)
def test_exploration_stops_at_the_share_of_each_optimizers_own_steps(tmp_path, name):
    make, limits, lengths = RUNS[name]
    torch.manual_seed(0)
    callback = make_callback(update_every=EVERY, stop_exploring_at=0.75)
    watch = Watch(callback)
    fit(make_trainer(tmp_path, callback, watch, **limits), make(), batches(8))
    assert callback.topkast.optimizer_steps == lengths
    for place, length in enumerate(lengths):
        per_batch = 5 if "five" in name and place == 0 else 1  # what Watch can see
        assert abs(watch.stopped_at(place) - 0.75 * length) < EVERY + per_batch
        explores = [explores for _, explores in sorted(watch.explores[place].items())]
        assert explores == sorted(explores, reverse=True), "exploration began again"


@pytest.mark.parametrize("name", [name for name in RUNS if "late" not in name])
def test_a_ramp_ends_at_the_share_of_each_optimizers_own_steps(tmp_path, name):
    make, limits, lengths = RUNS[name]
    torch.manual_seed(0)
    callback = make_callback(
        update_every=EVERY, backward_sparsity=0.75, ramp=Ramp(end=0.75, power=1.0), stop_updating_at=0.75, penalty=None
    )
    watch = Watch(callback)
    fit(make_trainer(tmp_path, callback, watch, **limits), make(), batches(8))
    for place, length in enumerate(lengths):
        densities = watch.densities[place]
        assert densities[max(densities)] == 0.25
        reached = min(step for step, density in densities.items() if density == 0.25)
        per_batch = 5 if "five" in name and place == 0 else 1
        assert abs(reached - 0.75 * length) < EVERY + per_batch
        assert all(one >= other for one, other in zip(densities.values(), list(densities.values())[1:], strict=False))


@pytest.mark.parametrize(
    ("limits", "length"), [({"max_epochs": 6}, 8 + 8 + 2 + 2 + 1 + 1), ({"max_epochs": 6, "max_steps": 10}, 10)]
)
def test_a_gradient_accumulation_scheduler_is_counted_exactly(tmp_path, limits, length):
    callback = make_callback(update_every=EVERY, stop_exploring_at=0.5)
    scheduler = GradientAccumulationScheduler({0: 1, 2: 4, 4: 8})
    fit(make_trainer(tmp_path, scheduler, callback, **limits), make_net(), batches(8))
    assert callback.topkast.optimizer_steps == [length]
    assert callback.topkast.timeline.schedule.stop_exploring_at == length // 2
    assert callback.topkast.timeline.total_steps == length


@pytest.mark.parametrize("name", ["accumulating, epochs", "five critics, epochs", "five critics, steps"])
@pytest.mark.parametrize("storage", ["masked", "packed"])
@pytest.mark.parametrize("stop_at", [4, 12])  # batches; gradients that are still being accumulated are not saved
@pytest.mark.slow
def test_a_resumed_run_plans_the_same(tmp_path, name, storage, stop_at):
    make, limits, _ = RUNS[name]

    class SaveAt(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == stop_at:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def run(*others, ckpt_path=None):
        torch.manual_seed(0)
        module, data = make(), Resumable(batches(8))
        callback = make_callback(update_every=EVERY, stop_exploring_at=0.5, storage=storage)
        trainer = make_trainer(tmp_path, *others, callback, **limits)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*resum.*|.*mid-epoch.*")
            fit(trainer, module, data, ckpt_path=ckpt_path)
        return module, callback.topkast.state_dict(), callback.topkast.refresh_count

    module, state, refreshes = run(SaveAt())
    again, resumed, resumed_refreshes = run(ckpt_path=tmp_path / "half.ckpt")
    assert state["steps"] == resumed["steps"], "the loop itself did not resume"
    assert state["plans"]
    assert state["plans"] == resumed["plans"]
    assert refreshes == resumed_refreshes
    assert same(state["weights"], resumed["weights"])
    assert same(module.state_dict(), again.state_dict())


def test_rigl_under_manual_optimization_resumes(tmp_path):
    """It depends on the length of the run, although no moment is a fraction of it."""
    make, limits, _ = RUNS["five critics, epochs"]

    def run(epochs, ckpt_path=None):
        torch.manual_seed(0)
        callback = make_callback(update_every=EVERY, backward_sparsity=0.75, rule=RigL())
        trainer = make_trainer(tmp_path, callback, **limits | {"max_epochs": epochs})
        return callback, fit(trainer, make(), batches(8), ckpt_path=ckpt_path)

    _, first = run(1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    callback, _ = run(2, ckpt_path=tmp_path / "half.ckpt")
    assert callback.topkast.state_dict()["plans"]
    check_sparse(callback.topkast)


@pytest.mark.parametrize("limits", [{"max_epochs": -1, "max_time": "00:00:00:01"}, {"max_epochs": -1}])
def test_a_run_without_an_end_is_refused(tmp_path, limits):
    callback = make_callback(stop_exploring_at=0.5)
    with pytest.raises(TopKastError, match="the length of the run is not known"):
        fit(make_trainer(tmp_path, callback, **limits), Accumulating(), batches(8))


@pytest.mark.parametrize(
    "damage",
    [3, {}, {"seen": [1, 2], "first": [None]}, {"seen": [-1], "first": [None]}, {"seen": [1], "first": [[1, "x", 2]]}],
)
def test_a_damaged_run_length_is_refused(tmp_path, damage):
    callback = make_callback(stop_exploring_at=0.5)
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    with pytest.warns(UserWarning, match="exploration was to stop at 0.5 of the run, and has not after 2 steps"):
        fit(trainer, Accumulating(), batches(8))  # too short to be known
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state = next(state for key, state in checkpoint["callbacks"].items() if key.startswith("TopKast"))
    assert state["run_length"] == {"seen": [1], "first": [[1, 1, 4]]}
    state["run_length"] = damage
    torch.save(checkpoint, tmp_path / "b.ckpt")
    callback = make_callback(stop_exploring_at=0.5)
    with pytest.raises(TopKastError, match="damaged"):
        fit(make_trainer(tmp_path, callback, max_epochs=2), Accumulating(), batches(8), ckpt_path=tmp_path / "b.ckpt")


# --- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop_exploring_at": 100}, "exploration was to stop at step 100, and has not after 8 steps"),
        (
            {"ramp": Ramp(end=100), "backward_sparsity": 0.75, "penalty": None},
            "the ramp was to end at step 100, and has not after 8 steps",
        ),
    ],
)
def test_a_run_that_ends_too_early_says_so(tmp_path, options, said):
    callback = make_callback(**options)
    with pytest.warns(UserWarning, match=said):
        fit(make_trainer(tmp_path, callback, max_epochs=1), make_net(), batches(8))


# --- a plan that changes -------------------------------------------------------------------------------------------


def timeline(total=100, **moments):
    schedule, ramp = Schedule(update_every=10, **moments), Ramp(begin=0.2, end=0.6)
    return schedule, ramp, Timeline.of(schedule, ramp, total)


def test_a_moment_that_is_still_to_come_moves_with_the_length():
    schedule, ramp, plan = timeline(stop_exploring_at=0.5, stop_updating_at=0.8)
    assert plan.replanned(schedule, ramp, 200, step=10).moments == [100, 160, 40, 120, 200]


def test_a_moment_that_would_have_passed_takes_effect_after_the_next_step_and_only_once():
    schedule, ramp, plan = timeline(stop_exploring_at=0.5)
    plan = plan.replanned(schedule, ramp, 40, step=33)
    assert plan.schedule.stop_exploring_at == 34
    assert [step for step in range(34, 60) if plan.refreshes_after(step)] == [34, 40, 50]
    plan = plan.replanned(schedule, ramp, 400, step=34)
    assert plan.schedule.stop_exploring_at == 34
    assert not plan.explores_at(34)
    assert plan.remaining_ramp(34) == 0


def test_moments_that_are_steps_stay():
    schedule = Schedule(update_every=10, stop_exploring_at=50)
    assert Timeline.of(schedule, None, 100).replanned(schedule, None, 10, 20).schedule.stop_exploring_at == 50


def test_moments_make_the_timeline_again():
    schedule, ramp, plan = timeline(stop_exploring_at=0.5)
    assert Timeline.of_moments(schedule, ramp, plan.moments) == plan


def test_run_that_ends_before_its_first_refresh_says_so_at_the_start(tmp_path):
    callback = make_callback(update_every=10)
    with pytest.warns(UserWarning, match="never chosen again in 8 steps, since they are for the first time after 10"):
        fit(make_trainer(tmp_path, callback, max_steps=8), make_net())
    assert callback.topkast.refresh_count == 0


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"update_every": 8}, 8),
        ({"schedule": Schedule(update_every=10, stop_exploring_at=4)}, 8),  # which chooses the sets
        ({"schedule": Schedule(update_every=10, stop_updating_at=0)}, 8),  # as the user asks
        ({"rule": "static", "backward_sparsity": 0.75, "penalty": None, "update_every": 10}, 8),
    ],
    ids=["just in time", "stops exploring", "static by schedule", "static by rule"],
)
def test_run_whose_sets_change_or_are_to_stay_says_nothing(tmp_path, options, steps):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the sets are never chosen again")
        fit(make_trainer(tmp_path, make_callback(**options), max_steps=steps), make_net())


def test_run_of_unknown_length_says_at_its_end_that_its_sets_have_never_changed(tmp_path):
    class Stops(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 4

    callback = make_callback(update_every=10)
    with pytest.warns(UserWarning, match="never chosen again in 4 steps") as caught:
        fit(make_trainer(tmp_path, callback, Stops(), max_epochs=-1), make_net())
    assert len([each for each in caught if "never chosen" in str(each.message)]) == 1


def test_plain_loop_that_is_too_short_is_warned_where_its_length_is_given():
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5, update_every=10)
    with pytest.warns(UserWarning, match="never chosen again in 9 steps"):
        topkast.attach(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9)
