"""More than one run, more than one callback, and the Trainer's other entry points."""

import csv

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_topkast import Targets, TopKast, TopKastError
from lightning_topkast.layers import packed_weights
from tests.helpers import (
    MIDDLE,
    Net,
    batches,
    check_sparse,
    fit,
    make_callback,
    make_net,
    make_trainer,
    parameters_of,
    same,
    thetas,
    zero_outside,
)

pytestmark = pytest.mark.usefixtures("storage")


class Start(Callback):
    """Notes what training starts from."""

    def __init__(self, callback) -> None:
        self.callback = callback

    def on_train_start(self, trainer, pl_module):
        self.thetas, self.steps = thetas(self.callback.topkast), self.callback.topkast.step_count
        self.parameters = parameters_of(pl_module)
        self.engine = self.callback.topkast


# --- a model that an earlier run has trained --------------------------------------------------------------------------


class Around(Net):
    """Another module around the same layers, as a notebook's cell makes when it runs twice."""

    @classmethod
    def of(cls, layers):
        module = cls()
        module.layers = layers
        return module


def test_cell_that_runs_twice_trains_on_from_theta(tmp_path):
    layers, before = make_net().layers, None
    for _ in range(3):
        callback = make_callback()
        start = Start(callback)
        fit(make_trainer(tmp_path, callback, start), Around.of(layers))
        if before is not None:
            assert same(start.thetas, before)
            assert start.steps == 0
        before = thetas(callback.topkast)
        check_sparse(callback.topkast)
        assert int((before[MIDDLE] == 0).sum()) == 0


def test_later_engine_takes_weights_over_from_an_earlier_one(storage):
    model = make_net().layers
    first = TopKast(model, 0.75, 0.5, storage=storage, penalty=None, targets=Targets(keep_last_dense=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first.attach(optimizer)
    model(torch.ones(4, 6)).square().mean().backward()
    optimizer.step()
    theta = first.weights["2.weight"].theta()
    with pytest.warns(UserWarning, match="an earlier TopKast kept the weights 4.weight sparse, and this one does not"):
        second = TopKast(model, 0.9, 0.8, penalty=None)
    assert torch.equal(second.weights["2.weight"].theta(), theta)
    assert type(model[2]) is type(model[4]) is nn.Linear
    assert (model[4].weight != 0).all()
    assert not first.is_attached
    assert not first.is_intact


def test_values_written_into_the_model_after_a_run_are_those_of_the_next_one():
    """And not mixed with θ of the run before."""
    model, values = make_net().layers, torch.randn(16, 16)
    first = TopKast(model, 0.75, 0.5, penalty=None)
    with torch.no_grad():
        model[2].weight.copy_(values)
    with pytest.warns(UserWarning, match="this one begins with what the model holds now"):
        second = TopKast(model, 0.75, 0.5, penalty=None)
    assert torch.equal(second.weights["2.weight"].theta(), values)
    model.load_state_dict(model.state_dict() | {"2.weight": -values})
    assert torch.equal(TopKast(model, 0.75, 0.5, penalty=None).weights["2.weight"].theta(), -values)
    assert not first.is_intact


# --- two fits -----------------------------------------------------------------------------------------------------


def test_same_trainer_goes_on_where_it_stopped(tmp_path):
    callback, model = make_callback(update_every=3), make_net()
    trainer = fit(make_trainer(tmp_path, callback, max_epochs=1), model)
    theta, engine = thetas(callback.topkast), callback.topkast
    trainer.fit_loop.max_epochs = 3
    start = Start(callback)
    trainer.callbacks.append(start)
    fit(trainer, model)
    assert start.engine is engine is callback.topkast
    assert same(start.thetas, theta)
    assert start.steps == 4
    assert callback.topkast.step_count == 12
    check_sparse(callback.topkast)


def test_two_fits_of_one_trainer_equal_one_long_fit(tmp_path):
    """With plain SGD, which has no state to lose between the fits."""
    one, two = make_net(), make_net()
    long, short = make_callback(strength=1e-2), make_callback(strength=1e-2)
    fit(make_trainer(tmp_path, long, max_epochs=3), one)
    trainer = fit(make_trainer(tmp_path, short, max_epochs=1), two)
    trainer.fit_loop.max_epochs = 3
    fit(trainer, two)
    assert same(parameters_of(one), parameters_of(two))
    assert same(long.topkast.state_dict(), short.topkast.state_dict())


def test_new_trainer_with_the_same_callback_keeps_theta_and_counts_anew(tmp_path):
    callback, model = make_callback(update_every=3), make_net(optimizer="adamw", lr=0.02)
    fit(make_trainer(tmp_path, callback, max_epochs=1), model)
    theta = thetas(callback.topkast)
    start = Start(callback)
    fit(make_trainer(tmp_path, callback, start, max_epochs=2), model)
    assert same(start.thetas, theta)
    assert start.steps == 0
    assert callback.topkast.step_count == 8
    check_sparse(callback.topkast)


def test_same_callback_takes_up_a_new_model(tmp_path):
    callback, first, second = make_callback(), make_net(seed=0), make_net(seed=1)
    fit(make_trainer(tmp_path, callback), first)
    frozen = parameters_of(first)
    fit(make_trainer(tmp_path, callback), second)
    assert callback.topkast.model is second
    check_sparse(callback.topkast)
    assert same(parameters_of(first), frozen)

    fresh, third = make_callback(), make_net(seed=1)
    fit(make_trainer(tmp_path, fresh), third)
    assert same(parameters_of(second), parameters_of(third)), "nothing of the first model is left in the second run"


# packed weights are written by load_state_dict only
@pytest.mark.parametrize("storage", ["masked"], indirect=True)
def test_weights_rewritten_between_fits_are_selected_afresh(tmp_path):
    callback, model = make_callback(update_every=100), make_net()
    fit(make_trainer(tmp_path, callback), model)
    values = torch.randn(16, 16)
    with torch.no_grad():
        model.layers[2].weight.copy_(values)
    start = Start(callback)
    with pytest.warns(UserWarning, match="this one begins with what the model holds now"):
        fit(make_trainer(tmp_path, callback, start), model)
    assert torch.equal(start.thetas[MIDDLE], values)
    check_sparse(callback.topkast)


def test_weight_frozen_after_a_fit_stays_sparse_in_the_next(tmp_path):
    callback, model = make_callback(keep_last_dense=False), make_net()
    fit(make_trainer(tmp_path, callback), model)
    weight = callback.topkast.weights[MIDDLE]
    theta = weight.theta()
    weight.parameter.requires_grad_(False)
    fit(make_trainer(tmp_path, callback), model)
    assert callback.topkast.weights[MIDDLE] is weight
    assert torch.equal(weight.theta(), theta)
    assert torch.count_nonzero(parameters_of(model)[MIDDLE]) == weight.active_count


def test_fit_after_an_interrupted_fit_masks_its_gradients(tmp_path):
    class Stop(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            raise RuntimeError("between masking and step")

    callback, model = make_callback(), make_net(optimizer="momentum")
    with pytest.raises(RuntimeError, match="between masking"):
        fit(make_trainer(tmp_path, callback, Stop()), model)
    fit(make_trainer(tmp_path, callback), model)
    check_sparse(callback.topkast)


def test_new_run_explores_from_its_start_though_the_last_one_had_stopped(tmp_path):
    callback, model = make_callback(update_every=100, stop_exploring_at=4), make_net()
    fit(make_trainer(tmp_path, callback, max_epochs=1), model)
    assert torch.equal(callback.topkast.weights[MIDDLE].updated, callback.topkast.weights[MIDDLE].active)

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            check_sparse(callback.topkast)
            self.updated = int(callback.topkast.weights[MIDDLE].updated.sum())

    look = Look()
    fit(make_trainer(tmp_path, callback, look, max_epochs=1), model)
    assert look.updated == 128


def test_fraction_of_the_run_follows_a_raised_length(tmp_path):
    callback, model = make_callback(stop_exploring_at=0.5), make_net()
    trainer = fit(make_trainer(tmp_path, callback, max_epochs=1), model)
    assert callback.topkast.timeline.schedule.stop_exploring_at == 2
    trainer.fit_loop.max_epochs = 4
    fit(trainer, model)
    assert callback.topkast.timeline.schedule.stop_exploring_at == 8
    check_sparse(callback.topkast)


# --- several callbacks --------------------------------------------------------------------------------------------


class Wide(Net):
    """Two middle weights, for two callbacks."""

    def __init__(self) -> None:
        super().__init__(width=8)
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
        )


def test_callbacks_with_disjoint_targets_train_side_by_side(tmp_path):
    torch.manual_seed(0)
    first = make_callback(include=["layers.2.*"], update_every=2)
    second = make_callback(forward_sparsity=0.5, backward_sparsity=0.25, include=["layers.4.*"], update_every=4)
    model = Wide()
    trainer = fit(make_trainer(tmp_path, first, second), model)
    for callback, name, active, updated in ((first, "layers.2.weight", 16, 32), (second, "layers.4.weight", 32, 48)):
        assert list(callback.topkast.weights) == [name]
        assert (
            int(callback.topkast.weights[name].active.sum()),
            int(callback.topkast.weights[name].updated.sum()),
        ) == (active, updated)
        check_sparse(callback.topkast)
        assert callback.topkast.step_count == 8
    assert (first.topkast.refresh_count, second.topkast.refresh_count) == (4, 2)
    assert trainer.callback_metrics["topkast/forward_sparsity"].item() == pytest.approx(1 - (16 + 32) / 128)
    assert trainer.callback_metrics["topkast/forward_sparsity/layers.2.weight"].item() == pytest.approx(0.75)
    assert trainer.callback_metrics["topkast/forward_sparsity/layers.4.weight"].item() == pytest.approx(0.5)


def test_two_callbacks_equal_one_over_both_weights(tmp_path):
    results = []
    for parts in ([["layers.2.*"], ["layers.4.*"]], [["layers.2.*", "layers.4.*"]]):
        torch.manual_seed(0)
        model = Wide()
        callbacks = [make_callback(include=part, strength=1e-2) for part in parts]
        fit(make_trainer(tmp_path, *callbacks, gradient_clip_val=0.1), model)
        results.append(parameters_of(model))
    assert same(*results)


def test_callbacks_that_share_a_target_are_refused(tmp_path):
    torch.manual_seed(0)
    first, second = make_callback(include=["layers.2.*"]), make_callback(include=["layers.[24].*"])
    with pytest.raises(
        TopKastError, match=r"'layers.2.weight' is already sparse through another TopKast.*include and exclude"
    ):
        fit(make_trainer(tmp_path, first, second), Wide())


def test_two_callbacks_with_the_same_targets_are_refused(tmp_path):
    """Lightning itself sees to it: their states could not be told apart."""
    with pytest.raises(RuntimeError, match=r"`callback\.state_key` must be unique"):
        make_trainer(tmp_path, make_callback(), make_callback())


def test_two_callbacks_log_each_step_once_also_in_their_second_fit(tmp_path):
    torch.manual_seed(0)
    callbacks = [make_callback(include=["layers.2.*"]), make_callback(include=["layers.4.*"])]
    model, rows = Wide(), []
    for version in ("first", "second"):
        logger = CSVLogger(tmp_path, version=version)
        fit(make_trainer(tmp_path, *callbacks, logger=logger, max_epochs=1), model)
        logger.save()
        with open(logger.experiment.metrics_file_path) as file:
            rows.append([row["step"] for row in csv.DictReader(file) if row["topkast/penalty"]])
    assert rows[0] == ["0", "0", "1", "2", "3", "4"]
    assert rows[1] == rows[0]


def test_callbacks_resume_each_with_its_own_state(tmp_path):
    def parts():
        torch.manual_seed(0)
        callbacks = [
            make_callback(include=["layers.2.*"], update_every=3),
            make_callback(include=["layers.4.*"], update_every=5),
        ]
        return Wide(), callbacks

    model, callbacks = parts()
    fit(make_trainer(tmp_path, *callbacks, max_epochs=3), model)
    halfway, saved = parts()
    trainer = fit(make_trainer(tmp_path, *saved, max_epochs=1), halfway)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, others = parts()
    fit(make_trainer(tmp_path, *reversed(others), max_epochs=3), resumed, ckpt_path=tmp_path / "half.ckpt")
    assert same(parameters_of(model), parameters_of(resumed))
    for one, other in zip(callbacks, others, strict=True):
        assert same(one.topkast.state_dict(), other.topkast.state_dict())


# --- validate, test, predict --------------------------------------------------------------------------------------


def test_evaluation_before_any_fit_leaves_the_model_as_it_is(tmp_path):
    callback, model = make_callback(), make_net()
    before = parameters_of(model)
    trainer = make_trainer(tmp_path, callback)
    trainer.validate(model, batches(), verbose=False)
    trainer.test(model, batches(), verbose=False)
    trainer.predict(model, batches())
    assert callback.topkast is None
    assert same(parameters_of(model), before)
    fit(trainer, model)
    check_sparse(callback.topkast)


def test_evaluation_after_fit_sees_the_sparse_model(tmp_path):
    callback, model = make_callback(), make_net()
    trainer = fit(make_trainer(tmp_path, callback), model)
    data = batches(2, seed=5)
    expected = sum(model.loss(batch).item() for batch in data) / 2
    before = parameters_of(model)
    assert trainer.validate(model, data, verbose=False)[0]["val_loss"] == pytest.approx(expected)
    assert trainer.test(model, data, verbose=False)[0]["test_loss"] == pytest.approx(expected)
    torch.testing.assert_close(torch.cat(trainer.predict(model, data)), model(torch.cat([x for x, _ in data])))
    assert same(parameters_of(model), before)
    check_sparse(callback.topkast)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.parametrize("with_callback", [True, False])
def test_evaluation_of_a_checkpoint_sees_its_sparse_model(tmp_path, with_callback):
    callback, model = make_callback(), make_net()
    trainer = fit(make_trainer(tmp_path, callback), model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    data = batches(2, seed=5)
    # packed layers and a dense one add up in different orders
    expected = pytest.approx(trainer.validate(model, data, verbose=False)[0]["val_loss"], rel=1e-6)

    other = make_net(seed=3)
    trainer = make_trainer(tmp_path, *([make_callback()] if with_callback else []))
    assert trainer.validate(other, data, ckpt_path=tmp_path / "model.ckpt", verbose=False)[0]["val_loss"] == expected
    assert trainer.test(other, data, ckpt_path=tmp_path / "model.ckpt", verbose=False)[0]["test_loss"] == expected
    trainer.predict(other, data, ckpt_path=tmp_path / "model.ckpt")
    assert zero_outside(other.layers[2].weight, callback.topkast.weights[MIDDLE].active)


def test_state_of_a_validated_checkpoint_does_not_leak_into_a_fresh_fit(tmp_path):
    callback = make_callback()
    trainer = fit(make_trainer(tmp_path, callback), make_net())
    trainer.save_checkpoint(tmp_path / "model.ckpt")

    other, reference = make_callback(), make_callback()
    trainer = make_trainer(tmp_path, other)
    trainer.validate(make_net(seed=3), batches(2), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    one, two = make_net(seed=4), make_net(seed=4)
    fit(trainer, one)
    fit(make_trainer(tmp_path, reference), two)
    assert same(parameters_of(one), parameters_of(two))


def test_validation_inside_fit_sees_the_sparse_model(tmp_path):
    seen = []

    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen.append(zero_outside(pl_module.layers[2].weight, callback.topkast.weights[MIDDLE].active))

    callback = make_callback()
    fit(make_trainer(tmp_path, callback, Look(), val_check_interval=2), make_net())
    assert seen == [True] * 8


# --- the tuner (it takes all callbacks away for its trials) ----------------------------------------------------------


def whole_parameters_of(model):
    """Every parameter, θ of those that are packed."""
    return parameters_of(model) | {name: weight.theta() for name, weight in packed_weights(model).items()}


class Tunable(Net):
    """Takes the batch size and learning rate that the tuner sets."""

    def __init__(self) -> None:
        super().__init__(lr=0.05)
        self.batch_size, self.lr = 4, 0.05

    def train_dataloader(self):
        x, y = (torch.cat(parts) for parts in zip(*batches(8), strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)

    def val_dataloader(self):
        return batches(2, seed=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


TUNER_WARNINGS = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:`isinstance.treespec, LeafSpec.",
    "ignore:.*torch.jit",
)


@TUNER_WARNINGS
def test_learning_rate_finder_restores_the_model_and_training_follows(tmp_path):
    torch.manual_seed(0)
    callback, model = make_callback(), Tunable()
    before = parameters_of(model)
    trainer = make_trainer(tmp_path, callback, enable_checkpointing=True)
    found = Tuner(trainer).lr_find(model, num_training=12)
    assert found is not None
    assert len(found.results["loss"]) > 5
    assert same(whole_parameters_of(model), before)
    trainer.fit(model)
    assert callback.topkast.step_count == trainer.global_step
    check_sparse(callback.topkast)


@TUNER_WARNINGS
@pytest.mark.parametrize("mode", ["power", "binsearch"])
@pytest.mark.slow
def test_batch_size_finder_restores_the_model_and_training_follows(tmp_path, mode):
    plain = Tunable()
    Tuner(make_trainer(tmp_path, enable_checkpointing=True)).scale_batch_size(
        plain, mode=mode, steps_per_trial=2, init_val=4, max_trials=2
    )
    torch.manual_seed(0)
    callback, model = make_callback(update_every=1), Tunable()
    before = parameters_of(model)
    trainer = make_trainer(tmp_path, callback, enable_checkpointing=True)
    Tuner(trainer).scale_batch_size(model, mode=mode, steps_per_trial=2, init_val=4, max_trials=2)
    assert model.batch_size == plain.batch_size > 4
    assert same(whole_parameters_of(model), before)
    trainer.fit(model)
    assert callback.topkast.step_count == trainer.global_step
    check_sparse(callback.topkast)


# --- callbacks that monitor ---------------------------------------------------------------------------------------


def test_early_stopping_monitors_sparsity_metrics(tmp_path):
    """The forward sparsity never changes, so a patience of two ends the run in its third epoch."""
    callback = make_callback()
    stop = EarlyStopping("topkast/forward_sparsity", mode="max", patience=2, check_on_train_epoch_end=True)
    trainer = fit(make_trainer(tmp_path, callback, stop, max_epochs=10), make_net())
    assert trainer.current_epoch == 3
    assert stop.best_score == pytest.approx(0.75)


def test_model_checkpoint_monitors_mask_change(tmp_path):
    callback = make_callback(update_every=3)
    changes = []

    class Note(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if callback.topkast.refresh_count > len(changes):
                weight = callback.topkast.weights[MIDDLE]
                changes.append(int((weight.active & ~self.before).sum()) / weight.active_count)
            self.before = callback.topkast.weights[MIDDLE].active

        def on_train_start(self, trainer, pl_module):
            self.before = callback.topkast.weights[MIDDLE].active

    save = ModelCheckpoint(tmp_path, "{step}", "topkast/mask_change", mode="max", every_n_train_steps=3, save_top_k=1)
    model = make_net(optimizer="adamw", lr=0.05)
    fit(make_trainer(tmp_path, callback, Note(), save, enable_checkpointing=True, max_epochs=3), model)
    assert len(changes) == 4
    assert max(changes) > 0
    assert save.best_model_score == pytest.approx(max(changes))
    assert torch.load(save.best_model_path, weights_only=True)["global_step"] == 3 * (1 + changes.index(max(changes)))


# --- models built late, strategies refused ------------------------------------------------------------------------


def test_model_built_in_configure_model_trains_sparse(tmp_path):
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers = None

        def configure_model(self):
            if self.layers is None:
                torch.manual_seed(0)
                self.layers = Net().layers

    callback, model = make_callback(), Late()
    fit(make_trainer(tmp_path, callback), model)
    check_sparse(callback.topkast)
    assert list(callback.topkast.weights) == [MIDDLE]


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_flatten_weights_are_refused(strategy):
    class Trainer:
        pass

    Trainer.strategy = strategy.__new__(strategy)
    with pytest.raises(TopKastError, match=rf"{strategy.__name__} is not supported.*use FSDP2.*strategy='ddp'"):
        make_callback().setup(Trainer(), make_net(), "fit")
    make_callback().setup(Trainer(), make_net(), "validate")
