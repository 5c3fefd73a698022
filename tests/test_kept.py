"""What outlives a fit: sets and reservoir are lost by no run, whoever makes the callback and wherever it trains."""

import copy
import sys
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_topkast import TopKastError
from lightning_topkast.training.kept import Handover
from tests.helpers import (
    MIDDLE,
    Net,
    batches,
    check_sparse,
    fit,
    make_callback,
    make_net,
    make_trainer,
    plain_path,
    same,
    thetas,
)


def saved(path, callback) -> dict:
    return torch.load(path, weights_only=True)["callbacks"][callback.state_key]["weights"]


def test_finished_run_that_is_started_again_loses_nothing(tmp_path, storage):
    callback = make_callback()
    fit(make_trainer(tmp_path, callback), make_net()).save_checkpoint(tmp_path / "a.ckpt")
    again = make_callback()
    trainer = fit(make_trainer(tmp_path, again), make_net(seed=3), ckpt_path=tmp_path / "a.ckpt")
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert same(saved(tmp_path / "a.ckpt", callback), saved(tmp_path / "b.ckpt", again))
    longer = make_callback()
    fit(make_trainer(tmp_path, longer, max_epochs=3), make_net(seed=4), ckpt_path=tmp_path / "b.ckpt")
    whole = make_callback()
    fit(make_trainer(tmp_path, whole, max_epochs=3), make_net())
    assert same(thetas(longer.topkast), thetas(whole.topkast))


def test_checkpoint_of_before_the_first_step_is_resumed(tmp_path, storage):
    class Early(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    callback = make_callback()
    fit(make_trainer(tmp_path, callback, Early()), make_net(optimizer="adam", lr=0.01))
    resumed = make_callback()
    fit(make_trainer(tmp_path, resumed), make_net(seed=5, optimizer="adam", lr=0.01), ckpt_path=tmp_path / "early.ckpt")
    assert same(thetas(resumed.topkast), thetas(callback.topkast))


class Makes(Net):
    """Makes its callback by itself, a new one for every fit."""

    def configure_callbacks(self):
        self.made = make_callback()
        return self.made


def test_callback_of_the_module_goes_on_with_its_engine(tmp_path, storage):
    torch.manual_seed(0)
    model = Makes()
    fit(make_trainer(tmp_path), model)
    first = model.made
    theta = thetas(first.topkast)
    start = {}

    class Start(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            start.update(start or thetas(pl_module.made.topkast))

    fit(make_trainer(tmp_path, Start()), model)
    assert model.made is not first
    assert model.made.topkast is first.topkast
    assert same(start, theta)


def test_second_stage_with_other_settings_begins_with_theta(tmp_path, storage):
    model = make_net()
    first = make_callback()
    fit(make_trainer(tmp_path, first), model)
    theta = thetas(first.topkast)
    start = {}

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            start.update(thetas(second.topkast))

    second = make_callback(forward_sparsity=0.9, backward_sparsity=0.8)
    fit(make_trainer(tmp_path, second, Start()), model)
    assert same({name: value.float() for name, value in start.items()}, theta)
    assert int((start[MIDDLE] == 0).sum()) == 0
    check_sparse(second.topkast)
    assert second.topkast.weights[MIDDLE].active_count == 26


class TwoHidden(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers.insert(3, nn.Linear(16, 16))


@pytest.mark.parametrize("frozen", [True, False])
def test_second_stage_with_other_weights_leaves_the_first_ones_sparse_or_says_so(tmp_path, storage, frozen):
    torch.manual_seed(0)
    model, first = TwoHidden(), make_callback(include=["layers.2.weight"])
    fit(make_trainer(tmp_path, first), model)
    before = model.state_dict()["layers.2.weight"].clone()
    if frozen:
        first.topkast.weights["layers.2.weight"].parameter.requires_grad_(False)
    second = make_callback(include=["layers.3.weight"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make_trainer(tmp_path, second), model)
    told = [str(each.message) for each in caught if "were kept sparse in an earlier fit" in str(each.message)]
    assert len(told) == (not frozen)
    assert all("layers.2.weight" in each for each in told)
    if frozen:
        assert torch.equal(model.state_dict()["layers.2.weight"], before)
    check_sparse(second.topkast)


def test_callback_of_an_earlier_run_resumes_another_model_as_a_new_one_does(tmp_path, storage):
    callback = make_callback()
    fit(make_trainer(tmp_path, callback), make_net()).save_checkpoint(tmp_path / "a.ckpt")
    fit(make_trainer(tmp_path, callback), callback.topkast.model)  # on, past the checkpoint
    found = []
    for each in (callback, make_callback()):
        fit(make_trainer(tmp_path, each, max_epochs=4), make_net(seed=3), ckpt_path=tmp_path / "a.ckpt")
        found.append((thetas(each.topkast), each.topkast.step_count, each.topkast.refresh_count))
    assert same(*found)


def test_setup_of_another_callback_that_fails_leaves_the_module_as_it_was(tmp_path):
    class Bad(Callback):
        def setup(self, trainer, pl_module, stage):
            raise RuntimeError("no such device")

    model = make_net()
    with pytest.raises(RuntimeError, match="no such device"):
        fit(make_trainer(tmp_path, make_callback(storage="packed"), Bad()), model)
    assert "setup" not in model.__dict__
    fit(make_trainer(tmp_path), model)
    assert type(model.layers[2]) is nn.Linear


def test_copies_of_a_trained_module_hold_no_engine(tmp_path):
    callback, model = make_callback(), make_net()
    fit(make_trainer(tmp_path, callback), model)
    assert not copy.deepcopy(model)._topkast_engines
    torch.save(model, tmp_path / "model.pt")
    assert b"lightning_topkast" not in (tmp_path / "model.pt").read_bytes()


def test_what_a_launched_process_leaves_is_taken_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    handover = Handover()
    assert handover.fetch() is None
    handover._folder.mkdir(mode=0o700)
    torch.save({"a": torch.ones(2)}, handover._folder / "state.pt")
    assert same(handover.fetch(), {"a": torch.ones(2)})
    assert handover.fetch() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_run_in_launched_processes_leaves_its_state_to_their_parent(tmp_path, storage, strategy, monkeypatch):
    monkeypatch.setattr(sys, "path", plain_path())
    callback, model = make_callback(), make_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(tmp_path, callback, strategy=strategy, devices=2, use_distributed_sampler=False)
        fit(trainer, model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    whole = make_callback()
    alone = make_net()
    fit(make_trainer(tmp_path, whole), alone).save_checkpoint(tmp_path / "b.ckpt")
    one, two = saved(tmp_path / "a.ckpt", callback)[MIDDLE], saved(tmp_path / "b.ckpt", whole)[MIDDLE]
    assert torch.equal(one["tiers"], two["tiers"])
    assert torch.allclose(one["latent"], two["latent"], atol=1e-6)
    # and so does another run of the same callback in launched processes, in which nobody asks for the state in between
    if strategy == "ddp_fork":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                fit(make_trainer(tmp_path, callback, strategy=strategy, devices=1), model)
        assert int((callback.state_dict()["weights"][MIDDLE]["latent"] != 0).sum()) == 256 - 64
    # and a fit in this process goes on from there
    again = make_trainer(tmp_path, callback)
    start = {}

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            start.update(thetas(callback.topkast))

    again.callbacks.append(Start())
    fit(again, model)
    assert torch.equal(start[MIDDLE] == 0, torch.zeros(16, 16, dtype=torch.bool))


# --- packed layers are made when the module is complete ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masked", "packed", "compact"])
def test_weights_written_in_setup_are_those_that_train(tmp_path, kind):
    class Constant(Net):
        def setup(self, stage):
            self.apply(lambda m: nn.init.constant_(m.weight, 0.123) if isinstance(m, nn.Linear) else None)

    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(callback.topkast.weights[MIDDLE].theta())

    changes = {"storage": kind} if kind != "compact" else {"storage": kind, "kernels": None}
    callback = make_callback(**{k: v for k, v in changes.items() if v is not None or k != "kernels"})
    model = Constant()
    fit(make_trainer(tmp_path, callback, Look()), model)
    assert torch.equal(seen[0], torch.full((16, 16), 0.123))
    assert "setup" not in model.__dict__, "the module is left as it was"


def test_setup_is_called_as_lightning_calls_it(tmp_path):
    """By the name of its argument, so a module may take nothing else."""
    found = []

    class Named(Net):
        def setup(self, *arguments, **options):
            found.append((arguments, options))

    for storage in ("masked", "packed"):
        torch.manual_seed(0)
        fit(make_trainer(tmp_path, make_callback(storage=storage)), Named())
    masked, packed = found
    assert packed == masked == ((), {"stage": "fit"})


def test_module_whose_setup_fails_is_left_as_it_was(tmp_path):
    class Fails(Net):
        def setup(self, stage):
            raise RuntimeError("no data")

    model = Fails()
    with pytest.raises(RuntimeError, match="no data"):
        fit(make_trainer(tmp_path, make_callback(storage="packed")), model)
    assert "setup" not in model.__dict__
    assert type(model.layers[2]) is nn.Linear


class Tuned(Net):
    def __init__(self) -> None:
        super().__init__(lr=0.02)
        self.layers = None

        def make(inputs, outputs):
            return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs))

        self.backbone, self.head = make(6, 16), make(16, 2)

    def forward(self, x):
        return self.head(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


@pytest.mark.parametrize("ours_first", [True, False])
def test_finetuning_of_a_backbone_does_not_depend_on_the_order_and_resumes(tmp_path, storage, ours_first):
    def callbacks():
        made = [make_callback(), BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)]
        return made if ours_first else made[::-1]

    def ours(made):
        return made[0 if ours_first else 1]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.pytorch")
        warnings.filterwarnings("ignore", message="backbone.0.weight, .* were frozen when training began")
        torch.manual_seed(0)
        first = callbacks()
        fit(make_trainer(tmp_path, *first), Tuned()).save_checkpoint(tmp_path / "a.ckpt")
        assert list(ours(first).topkast.weights) == ["head.2.weight"]
        second = callbacks()
        fit(make_trainer(tmp_path, *second, max_epochs=3), Tuned(), ckpt_path=tmp_path / "a.ckpt")
    assert ours(second).topkast.step_count == 12
    check_sparse(ours(second).topkast)


class Freeze(Callback):
    def __init__(self, *names) -> None:
        self.names = names

    def on_fit_start(self, trainer, pl_module):  # after packing
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(name not in self.names)


@pytest.mark.parametrize("ours_first", [True, False])
def test_weights_that_another_callback_freezes_stay_dense_and_as_they_are(tmp_path, storage, ours_first):
    def train(model, epochs, ckpt_path=None):
        callback = make_callback(keep_last_dense=False)
        callbacks = [callback, Freeze(MIDDLE)] if ours_first else [Freeze(MIDDLE), callback]
        trainer = fit(make_trainer(tmp_path, *callbacks, max_epochs=epochs), model, ckpt_path=ckpt_path)
        assert list(callback.topkast.weights) == ["layers.4.weight"]
        assert (callback.topkast.step_count, callback.topkast.refresh_count) == (4 * epochs, 4 * epochs // 3)
        check_sparse(callback.topkast)
        assert torch.equal(model.layers[2].weight, frozen)
        return trainer

    model = make_net(optimizer="adamw", lr=0.02)
    frozen = model.layers[2].weight.detach().clone()
    train(model, 2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_net(seed=3, optimizer="adamw", lr=0.02)
    train(resumed, 4, tmp_path / "half.ckpt")
    whole = make_net(optimizer="adamw", lr=0.02)
    train(whole, 4)
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))


def test_run_whose_sparse_weights_another_callback_has_frozen_is_refused(tmp_path):
    with pytest.raises(TopKastError, match="all weights chosen to be sparse are frozen"):
        fit(make_trainer(tmp_path, make_callback(storage="packed"), Freeze(MIDDLE)), make_net())


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_picture_of_the_network_can_be_logged(tmp_path, kind):
    model, callback = make_net(), make_callback(storage=kind)
    model.example_input_array = batches()[0][0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.trace.*")
        fit(make_trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path, log_graph=True)), model)
    check_sparse(callback.topkast)


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_loss_over_parameters_is_warned_of_where_it_differs(tmp_path, kind):
    class Decay(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) + 0.05 * sum((p**2).sum() for p in self.parameters())

    class DecayOfWeights(Net):
        def training_step(self, batch, batch_idx):
            weights = [m.weight for m in self.layers if isinstance(m, nn.Linear)]
            return self.loss(batch) + 0.05 * sum((w**2).sum() for w in weights)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make_trainer(tmp_path, make_callback(storage=kind)), Decay())
    told = [str(each.message) for each in caught if "uses the parameters of packed weights" in str(each.message)]
    assert len(told) == (kind == "packed")
    assert all("layers.2.weight" in each and "`weight` of the layers" in each for each in told)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        callback = make_callback(storage=kind)
        fit(make_trainer(tmp_path, callback), DecayOfWeights())
    assert not [each for each in caught if "uses the parameters of packed weights" in str(each.message)]


def test_way_out_of_a_loss_over_parameters_gives_the_masked_training(tmp_path):
    class Decay(Net):
        def training_step(self, batch, batch_idx):
            weights = [m.weight for m in self.layers if isinstance(m, nn.Linear)]
            return self.loss(batch) + 0.05 * sum((w**2).sum() for w in weights)

    found = {}
    for kind in ("masked", "packed"):
        torch.manual_seed(0)
        callback = make_callback(storage=kind)
        fit(make_trainer(tmp_path, callback), Decay())
        found[kind] = callback.topkast.weights[MIDDLE].theta()
    assert torch.allclose(found["masked"], found["packed"], atol=1e-6)


def test_copy_of_packed_layers_in_mid_run_is_warned_of(tmp_path):
    class Average(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.average = copy.deepcopy(pl_module.layers)

    with pytest.warns(UserWarning, match="PackedLinear was copied while it is trained"):
        fit(make_trainer(tmp_path, make_callback(storage="packed"), Average()), make_net())
    callback, model = make_callback(storage="packed"), make_net()
    fit(make_trainer(tmp_path, callback), model)
    copy.deepcopy(model)  # after the run it is only a copy


def test_checkpoint_of_another_model_may_be_tested_with_the_callback_of_a_run(tmp_path, storage):
    other = make_callback(forward_sparsity=0.9, backward_sparsity=0.8)
    fit(make_trainer(tmp_path, other), make_net(width=24)).save_checkpoint(tmp_path / "other.ckpt")
    callback, model = make_callback(), make_net()
    trainer = fit(make_trainer(tmp_path, callback), model)
    trainer.test(make_net(width=24), batches(2), ckpt_path=tmp_path / "other.ckpt", verbose=False)
    fit(make_trainer(tmp_path, callback), model)
    check_sparse(callback.topkast)


def test_resuming_with_a_state_that_does_not_fit_is_still_refused(tmp_path, storage):
    fit(make_trainer(tmp_path, make_callback()), make_net()).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(TopKastError, match="expected"):
        fit(
            make_trainer(tmp_path, make_callback(forward_sparsity=0.9, backward_sparsity=0.8), max_epochs=3),
            make_net(),
            ckpt_path=tmp_path / "a.ckpt",
        )
