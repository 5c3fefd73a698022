"""Code that steps, writes, swaps or loads beside us: the network stays sparse as it is logged, or the run says so."""

import copy
import gc
import pickle
import random
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import nn

from lightning_topkast import (
    SET,
    NonFiniteWeightError,
    Packed,
    Ramp,
    RigL,
    Schedule,
    Static,
    Targets,
    TopKast,
    TopKastError,
)
from tests.helpers import (
    MIDDLE,
    Batches,
    Net,
    batches,
    check_sparse,
    fit,
    make_callback,
    make_net,
    make_trainer,
    same,
    thetas,
    zero_outside,
)

WRITTEN = "other code wrote to sparse weights between optimizer steps"
COMPUTED = "the network has computed with entries outside the active sets"


def logged(trainer) -> float:
    return float(trainer.callback_metrics["topkast/forward_sparsity"])


def measured(model) -> float:
    weight = model.state_dict()[MIDDLE]
    return 1 - int(torch.count_nonzero(weight)) / weight.numel()


def weight_of(callback):
    return callback.topkast.weights[MIDDLE]


class AtBatchEnd(Callback):
    """Calls a function after one batch, counted from 0, or after every batch."""

    def __init__(self, function, at: int | None = None) -> None:
        self.function, self.at, self.count = function, at, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.at in (None, self.count):
            self.function(trainer, pl_module)
        self.count += 1


# --- writes between steps ---------------------------------------------------------------------------------------------


@torch.no_grad()
def add_noise(trainer, pl_module):
    for parameter in pl_module.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))


def add_noise_to_data(trainer, pl_module):
    for parameter in pl_module.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))


def replace_data(trainer, pl_module):
    for parameter in pl_module.parameters():
        parameter.data = parameter.data + 0.01


@pytest.mark.parametrize("write", [add_noise, add_noise_to_data, replace_data])
def test_noise_is_warned_of_and_trains_no_dense_network(tmp_path, storage, write):
    callback, model = make_callback(), make_net()
    seen = []

    class Look(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(zero_outside(pl_module.state_dict()[MIDDLE], weight_of(callback).active))

    trainer = make_trainer(tmp_path, callback, AtBatchEnd(write), Look(), limit_val_batches=0)
    if storage == "masked":
        with pytest.warns(UserWarning, match=rf"{WRITTEN}.*'layers.2.weight' \(192\)"):
            fit(trainer, model)
    else:
        fit(trainer, model)  # only values of B can be written
    assert seen == [True] * 8
    assert logged(trainer) == 0.75


def test_write_within_the_active_set_is_kept_without_a_word(tmp_path, storage):
    """Clipping of weights, as in a Wasserstein GAN."""

    @torch.no_grad()
    def clip(trainer, pl_module):
        for parameter in pl_module.parameters():
            parameter.clamp_(-0.05, 0.05)

    callback, model = make_callback(), make_net(lr=1e-6)
    fit(make_trainer(tmp_path, callback, AtBatchEnd(clip)), model)
    check_sparse(callback.topkast)
    assert float(model.state_dict()[MIDDLE].abs().max()) < 0.0501


def test_validation_with_dense_weights_is_warned_of(tmp_path):
    class Swap(Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            self.backup = pl_module.layers[2].weight.detach().clone()
            pl_module.layers[2].weight.data.copy_(torch.randn(16, 16))

        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.layers[2].weight.data.copy_(self.backup)

    callback = make_callback()
    with pytest.warns(UserWarning, match=COMPUTED):
        fit(make_trainer(tmp_path, callback, Swap()), make_net())
    check_sparse(callback.topkast)


def test_engine_in_a_plain_loop_undoes_and_reports_writes():
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5, update_every=3, penalty=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    before = topkast.weights["2.weight"].theta()
    model[2].weight.data.add_(1.0)
    model(torch.randn(4, 6)).square().mean().backward()
    with pytest.warns(UserWarning, match=WRITTEN):
        optimizer.step()
    weight = topkast.weights["2.weight"]
    assert zero_outside(model[2].weight, weight.active)
    assert torch.equal(weight.theta()[~weight.updated], before[~weight.updated])


def test_saved_weights_are_sparse_although_they_were_written_to(tmp_path, storage):
    callback, model = make_callback(), make_net()
    paths = [tmp_path / "a.ckpt"]

    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                add_noise(trainer, pl_module)
                trainer.save_checkpoint(paths[0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(make_trainer(tmp_path, callback, Save()), model)
    checkpoint = torch.load(paths[0], weights_only=True)
    state = checkpoint["callbacks"][callback.state_key]["weights"][MIDDLE]
    assert zero_outside(checkpoint["state_dict"][MIDDLE], state["tiers"] == 2)
    fit(make_trainer(tmp_path, make_callback(), max_epochs=3), make_net(), ckpt_path=paths[0])


def test_weights_that_are_saved_alone_are_sparse_although_they_were_written_to(tmp_path, storage):
    """A checkpoint with `weights_only` calls no callback."""
    callback, model, path = make_callback(), make_net(), tmp_path / "weights.ckpt"
    seen = {}

    def save(trainer, pl_module):
        add_noise(trainer, pl_module)
        trainer.save_checkpoint(path, weights_only=True)
        seen["active"] = weight_of(callback).active

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(make_trainer(tmp_path, callback, AtBatchEnd(save, at=5)), model)
    assert zero_outside(torch.load(path, weights_only=True)["state_dict"][MIDDLE], seen["active"])


# --- weights that are loaded ------------------------------------------------------------------------------------------


class Back(Callback):
    """Remembers the state after the first epoch, and loads it after the third."""

    def __init__(self, how) -> None:
        self.how = how

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.best = copy.deepcopy(pl_module.state_dict())
        if trainer.current_epoch == 2:
            self.how(pl_module, self.best)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 3 and batch_idx == 0:
            self.after = copy.deepcopy(pl_module.state_dict())


def test_best_state_loaded_in_mid_run_trains_on_from_there(tmp_path, storage):
    callback, back = make_callback(update_every=2), Back(lambda module, best: module.load_state_dict(best))
    trainer = fit(make_trainer(tmp_path, callback, back, max_epochs=5), make_net(lr=0.01))
    loaded, after = back.best[MIDDLE], back.after[MIDDLE]
    assert not bool(((loaded != 0) & (after == 0)).any()), "loaded entries were dropped in silence"
    assert torch.allclose(after, loaded, atol=0.02)
    check_sparse(callback.topkast)
    assert logged(trainer) == 0.75


def test_loaded_state_is_taken_over_alike_by_both_storages(tmp_path):
    """And the reservoir is kept where the loaded weights are zero."""
    runs = {}
    for kind in ("masked", "packed"):
        callback, back = make_callback(storage=kind), Back(lambda module, best: module.load_state_dict(best))
        fit(make_trainer(tmp_path, callback, back, max_epochs=5), make_net(optimizer="adam", lr=0.01))
        runs[kind] = weight_of(callback).theta()
    assert torch.allclose(runs["masked"], runs["packed"], atol=1e-6)
    assert int((runs["masked"] == 0).sum()) == 0


def test_sparse_weights_copied_into_the_parameter_are_taken_over(tmp_path):
    def copy_in(module, best):
        with torch.no_grad():
            module.layers[2].weight.copy_(best[MIDDLE])

    callback, back = make_callback(update_every=2), Back(copy_in)
    fit(make_trainer(tmp_path, callback, back, max_epochs=5), make_net(lr=0.01))
    assert not bool(((back.best[MIDDLE] != 0) & (back.after[MIDDLE] == 0)).any())


def test_dense_weights_loaded_in_mid_run_are_chosen_from_by_magnitude(tmp_path, storage):
    values = torch.randn(16, 16, generator=torch.Generator().manual_seed(7))
    callback, model = make_callback(update_every=100), make_net(lr=1e-8)

    def load(trainer, pl_module):
        pl_module.load_state_dict(pl_module.state_dict() | {MIDDLE: values})

    fit(make_trainer(tmp_path, callback, AtBatchEnd(load, at=2)), model)
    largest = torch.topk(values.abs().flatten(), 64).indices.sort().values
    assert torch.equal(weight_of(callback).active.flatten().nonzero().flatten(), largest)
    assert torch.allclose(weight_of(callback).theta(), values, atol=1e-5)


@pytest.mark.parametrize("storage", ["masked"], indirect=True)
def test_weights_with_nan_that_are_loaded_are_refused_by_name(tmp_path, storage):
    def load(trainer, pl_module):
        pl_module.load_state_dict(pl_module.state_dict() | {MIDDLE: torch.full((16, 16), torch.nan)})

    with pytest.raises(TopKastError, match=r"NaN or infinity were to be loaded into 'layers.2.weight'"):
        fit(make_trainer(tmp_path, make_callback(), AtBatchEnd(load, at=2)), make_net())


def test_loading_that_replaces_the_parameter_is_refused(tmp_path):
    def load(trainer, pl_module):
        pl_module.load_state_dict(copy.deepcopy(pl_module.state_dict()), assign=True)

    with pytest.raises(
        TopKastError, match=r"assign=True\) would replace the parameter of the sparse weight 'layers.2.weight'"
    ):
        fit(make_trainer(tmp_path, make_callback(), AtBatchEnd(load, at=2)), make_net())


def test_copy_and_pickle_of_a_trained_module_load_without_the_engine(tmp_path):
    copies = []

    def take(trainer, pl_module):
        copies.append(copy.deepcopy(pl_module.layers))
        copies.append(pickle.loads(pickle.dumps(pl_module.layers)))
        assert b"lightning_topkast" not in pickle.dumps(pl_module.layers)

    callback, model = make_callback(), make_net()
    fit(make_trainer(tmp_path, callback, AtBatchEnd(take, at=1)), model)
    for each in copies:
        each.load_state_dict(model.layers.state_dict())
    assert weight_of(callback).load_count == 0


class Tuned(Net):
    lr = 0.02

    def train_dataloader(self):
        return batches()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    validation_step = None


@pytest.mark.parametrize("epoch", [0, 1])
def test_learning_rate_finder_inside_a_run_leaves_no_trace(tmp_path, storage, epoch):
    class Finder(LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == epoch:
                topkast = callback.topkast
                before, steps, refreshes = thetas(topkast), topkast.step_count, topkast.refresh_count
                self.lr_find(trainer, pl_module)
                assert same(thetas(topkast), before)
                assert (topkast.step_count, topkast.refresh_count) == (steps, refreshes)
                check_sparse(topkast)

    callback = make_callback()
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path, callback, Finder(num_training_steps=20), enable_checkpointing=True, limit_val_batches=0
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.pytorch")
        trainer.fit(Tuned())
    check_sparse(callback.topkast)
    assert callback.topkast.step_count == 8


def test_test_of_the_best_checkpoint_changes_what_is_saved_and_trained_as_one(tmp_path, storage):
    """Its weights, sets, reservoir and momenta belong together afterwards."""
    callback, model = make_callback(), make_net(optimizer="momentum", lr=0.05)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, every_n_epochs=1, monitor=None)
    trainer = make_trainer(tmp_path, callback, checkpoint, max_epochs=3, enable_checkpointing=True)
    fit(trainer, model)
    first = next((tmp_path / "checkpoints").glob("epoch=0*"))
    expected = torch.load(first, weights_only=True)["callbacks"][callback.state_key]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.pytorch")
        trainer.test(model, batches(2), ckpt_path=first, verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert same(saved["callbacks"][callback.state_key]["weights"], expected["weights"])

    tiers = expected["weights"][MIDDLE]["tiers"]
    state = saved["optimizer_states"][0]["state"][2]["momentum_buffer"]
    assert bool((state if storage == "packed" else state[tiers > 0]).any())
    assert storage == "packed" or zero_outside(state, tiers > 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        resumed = make_trainer(tmp_path, make_callback(), max_epochs=5)
        fit(resumed, make_net(optimizer="momentum"), ckpt_path=tmp_path / "after.ckpt")
    fit(make_trainer(tmp_path, callback), model)
    check_sparse(callback.topkast)


def test_load_that_fails_leaves_nothing_to_take_over():
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5, penalty=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    before = topkast.weights["2.weight"].active
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(model.state_dict() | {"2.weight": torch.ones(3, 3)})
    with torch.no_grad():
        model[2].weight.add_(1.0)
    with pytest.warns(UserWarning, match=WRITTEN):
        topkast.accept_writes()
    assert torch.equal(topkast.weights["2.weight"].active, before)


def test_dense_weights_loaded_while_detached_are_chosen_from_by_magnitude():
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5, penalty=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer).detach()
    values = torch.randn(16, 16)
    model.load_state_dict(model.state_dict() | {"2.weight": values})
    topkast.attach(optimizer)
    largest = torch.topk(values.abs().flatten(), 64).indices.sort().values
    assert torch.equal(topkast.weights["2.weight"].active.flatten().nonzero().flatten(), largest)


@pytest.mark.parametrize("kind", ["masked", "packed", "compact"])
@pytest.mark.filterwarnings("ignore:the network has computed with entries")
def test_weights_swapped_in_for_validation_and_back_leave_no_trace(tmp_path, kind):
    class Swap(Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            self.backup = copy.deepcopy(pl_module.state_dict())
            generator = torch.Generator().manual_seed(trainer.current_epoch)
            pl_module.load_state_dict(self.backup | {MIDDLE: torch.randn(16, 16, generator=generator)})

        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.load_state_dict(self.backup)

    found = []
    for others in ([], [Swap()]):
        storage = {"storage": kind} if kind != "compact" else {"storage": Packed(products="dense")}
        callback = make_callback(**({"kernels": "torch"} if kind == "packed" else {}), **storage)
        fit(make_trainer(tmp_path, callback, *others, max_epochs=4), make_net(optimizer="adam", lr=0.01))
        found.append((thetas(callback.topkast), weight_of(callback).tiers))
    assert same(*found)


def test_reloaded_state_is_taken_over_beside_an_average(tmp_path):
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    callback, back = make_callback(update_every=2), Back(lambda module, best: module.load_state_dict(best))
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=4, annealing_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.pytorch|torch.optim")
        fit(make_trainer(tmp_path, back, callback, average, max_epochs=5), make_net(lr=0.01))
    assert not bool(((back.best[MIDDLE] != 0) & (back.after[MIDDLE] == 0)).any())


def test_memory_with_gaps_is_refused():
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5, penalty=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    wide = torch.zeros(16, 32)
    wide[:, :16] = model[2].weight.detach()
    model[2].weight.data = wide[:, :16]
    model(torch.randn(4, 6)).square().mean().backward()
    with pytest.raises(TopKastError, match=r"gave its parameter memory with gaps"):
        optimizer.step()


@pytest.mark.parametrize("what", ["layer", "parameter"])
def test_replaced_parameter_is_refused_by_name(tmp_path, storage, what):
    def replace(trainer, pl_module):
        if what == "layer":
            pl_module.layers[2] = nn.Linear(16, 16)
        else:
            pl_module.layers[2]._parameters["weight"] = nn.Parameter(torch.randn(16, 16))
        trainer.strategy.setup_optimizers(trainer)

    ours = r"no longer holds the parameters of the sparse weights layers\.2\.weight"
    with pytest.raises((TopKastError, ValueError, RuntimeError), match=f"{ours}|expected 1-D values"):
        fit(make_trainer(tmp_path, make_callback(), AtBatchEnd(replace, at=2)), make_net())


def test_step_on_a_parameter_that_the_layer_has_lost_is_refused(storage):
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5, storage=storage)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    model[2]._parameters["weight"] = nn.Parameter(torch.zeros_like(model[2]._parameters["weight"]))
    before = topkast.weights["2.weight"].theta()
    with pytest.raises(TopKastError, match=r"the layer of '2\.weight' no longer holds the parameter"):
        optimizer.step()
    assert same(topkast.weights["2.weight"].theta(), before)


def test_step_on_a_parameter_that_a_late_weight_norm_has_replaced_is_refused():
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(TopKastError, match=r"the layer of '2\.weight' no longer holds the parameter"):
        optimizer.step()


# --- optimizers -------------------------------------------------------------------------------------------------------


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware minimization in two steps, around an optimizer of its own."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)
        self.moved = {}

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                move = 0.05 * parameter.grad
                self.state[parameter]["e_w"] = move
                parameter.add_(move)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(self.state[parameter]["e_w"])
        self.base.step()
        self.zero_grad()

    def step(self, closure=None):
        raise NotImplementedError


class SAM(Sharp):
    pass


class TwoSteps(Net):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.first_step()
        self.after_first_step()
        self.manual_backward(self.loss(batch))
        optimizer.second_step()

    def after_first_step(self):
        pass

    def configure_optimizers(self):
        return SAM(self.parameters())


def test_sharpness_aware_minimization_trains_sparse_and_says_what_it_computed_with(tmp_path):
    callback, model = make_callback(), TwoSteps()
    with pytest.warns(UserWarning, match=rf"{COMPUTED}: 'layers.2.weight' \(64\).*restore_sparsity"):
        trainer = fit(make_trainer(tmp_path, callback), model)
    assert callback.topkast.step_count == 8
    assert callback.topkast.refresh_count == 2
    check_sparse(callback.topkast)
    assert logged(trainer) == measured(model) == 0.75


def test_way_out_of_the_perturbation_works(tmp_path):
    callback = make_callback()

    class Restored(TwoSteps):
        def after_first_step(self):
            callback.topkast.restore_sparsity()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make_trainer(tmp_path, callback), Restored())
    assert not [each for each in caught if COMPUTED in str(each.message)]
    check_sparse(callback.topkast)


def test_optimizer_made_anew_in_mid_run_is_followed(tmp_path, storage):
    class Again(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.strategy.setup_optimizers(trainer)

    callback = make_callback()
    trainer = fit(make_trainer(tmp_path, callback, Again(), max_epochs=3), make_net(optimizer="adam", lr=0.01))
    assert callback.topkast.step_count == trainer.global_step == 12
    assert callback.topkast.refresh_count == 4
    check_sparse(callback.topkast)


def test_optimizer_made_anew_in_a_plain_loop_is_followed():
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5, update_every=3, penalty=None)
    topkast.attach(torch.optim.Adam(model.parameters(), lr=0.01))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    assert (topkast.step_count, topkast.refresh_count) == (6, 2)
    check_sparse(topkast)


class Silent(torch.optim.SGD):
    """Steps without calling the hooks."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)
        return loss


@pytest.mark.parametrize("when", ["always", "later"])
def test_step_without_hooks_is_refused(tmp_path, storage, when):
    class Model(Net):
        def configure_optimizers(self):
            return Silent(self.parameters(), lr=0.1)

    def silence(trainer, pl_module):
        hooked = type(trainer.optimizers[0]).step
        if getattr(hooked, "hooked", False):
            Silent.step = hooked.__wrapped__

    original = Silent.__dict__["step"]
    try:
        if when == "always":

            class Bare(Silent):
                def __init__(self, parameters, lr):
                    self.param_groups, self.state, self.defaults = [{"params": list(parameters), "lr": lr}], {}, {}

            Model.configure_optimizers = lambda self: Bare(self.parameters(), lr=0.1)
            with pytest.raises(TopKastError, match=r"Bare calls no hooks on its steps"):
                fit(make_trainer(tmp_path, make_callback()), Model())
        else:
            with pytest.raises(TopKastError, match=r"an optimizer step \(Silent\) that changed sparse weights without"):
                fit(make_trainer(tmp_path, make_callback(), AtBatchEnd(silence, at=2)), Model())
    finally:
        Silent.step = original


def test_manual_clipping_sees_the_masked_gradient(tmp_path):
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()

    manual, automatic = {}, {}
    for kind in ("masked", "packed"):
        callback = make_callback(storage=kind, update_every=100)
        torch.manual_seed(0)
        fit(make_trainer(tmp_path, callback), Manual(lr=1.0))
        manual[kind] = weight_of(callback).theta()
        callback = make_callback(storage=kind, update_every=100)
        fit(make_trainer(tmp_path, callback, gradient_clip_val=0.05), make_net(lr=1.0))
        automatic[kind] = weight_of(callback).theta()
    assert torch.allclose(manual["masked"], automatic["masked"], atol=1e-6)
    assert torch.allclose(manual["packed"], manual["masked"], atol=1e-6)


def test_step_that_was_interrupted_does_not_hide_those_of_another_optimizer():
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5, update_every=3, penalty=None)
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(first)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.step(interrupted)
    second = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, _ in batches(6):
        second.zero_grad()
        model(x).square().mean().backward()
        second.step()
    assert (topkast.step_count, topkast.refresh_count) == (6, 2)
    check_sparse(topkast)


def test_compiled_step_trains_sparse():
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5, update_every=3, penalty=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    topkast.attach(optimizer)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for x, _ in batches(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        step()
    assert (topkast.step_count, topkast.refresh_count) == (6, 2)
    check_sparse(topkast)


# --- anything at random -----------------------------------------------------------------------------------------------


class Adversary(Callback):
    """Writes, swaps, steps, reloads or re-makes the optimizer at random moments."""

    def __init__(self, seed: int) -> None:
        self.random, self.saved, self.done = random.Random(seed), [], []

    def act(self, trainer, pl_module):
        if self.random.random() < 0.5:
            return
        action = self.random.choice([self.noise, self.data, self.load, self.dense, self.zero, self.step, self.remake])
        self.done.append(action.__name__)
        action(trainer, pl_module)

    def noise(self, trainer, pl_module):
        add_noise(trainer, pl_module)

    def data(self, trainer, pl_module):
        add_noise_to_data(trainer, pl_module)

    def load(self, trainer, pl_module):
        self.saved.append(copy.deepcopy(pl_module.state_dict()))
        pl_module.load_state_dict(self.random.choice(self.saved))

    def dense(self, trainer, pl_module):
        pl_module.load_state_dict(pl_module.state_dict() | {MIDDLE: torch.randn(16, 16)})

    def zero(self, trainer, pl_module):
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter[: len(parameter) // 4] = 0

    def step(self, trainer, pl_module):
        optimizer = torch.optim.SGD(pl_module.parameters(), lr=0.01)
        for parameter in pl_module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()

    def remake(self, trainer, pl_module):
        trainer.strategy.setup_optimizers(trainer)

    def on_train_epoch_start(self, trainer, pl_module):
        self.act(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.act(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.act(trainer, pl_module)


@pytest.mark.parametrize("seed", range(6))
def test_logged_sparsity_is_the_measured_one_whatever_others_do(tmp_path, storage, seed):
    checked = []

    class Check(Callback):
        """Follows our callback: what was logged at this moment is what the weight is."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            checked.append((logged(trainer), measured(pl_module)))

    callback, model, adversary = make_callback(update_every=2), make_net(optimizer="adam", lr=0.01), Adversary(seed)
    # before ours, and after ours but for what reads the log
    trainer = make_trainer(tmp_path, adversary, callback, Check(), max_epochs=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(trainer, model, Batches(batches(4)))
    assert len(checked) == 16
    for said, is_now in checked:
        assert said == pytest.approx(is_now, abs=1e-6)
        assert said >= 0.75 - 1e-6
    assert logged(trainer) == pytest.approx(measured(model), abs=1e-6)
    assert len(adversary.done) > 5


@pytest.mark.parametrize("seed", range(3))
def test_adversary_after_our_callback_is_noticed_before_the_next_pass(tmp_path, seed):
    seen = []

    class Look(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(measured(pl_module))

    class After(Adversary):
        on_train_batch_start = Callback.on_train_batch_start

    callback, model = make_callback(update_every=2), make_net(optimizer="adam", lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(make_trainer(tmp_path, callback, After(seed), Look(), max_epochs=4), model, Batches(batches(4)))
    assert len(seen) == 16
    assert min(seen) >= 0.75 - 1e-6


def test_a_weight_of_another_package_stays_out_of_it():
    """Optimizers of other models step as ever."""
    other = nn.Linear(4, 4)
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5, penalty=None)
    topkast.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(4)).sum().backward()
    before = other.weight.detach().clone()
    optimizer.step()
    assert torch.equal(other.weight, before - 0.1)
    assert topkast.step_count == 0


# --- θ and sets that would be lost ------------------------------------------------------------------------------------


def plain_run(kind="masked", **options):
    torch.manual_seed(0)
    model = make_net().layers
    topkast = TopKast(model, 0.75, **{"backward_sparsity": 0.5, "penalty": None, "storage": kind} | options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    topkast.attach(optimizer)
    return model, topkast, optimizer


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["load_state_dict", "copy_", "copy_ of more entries"])
def test_weights_swapped_in_and_saved_meanwhile_leave_no_trace(how):
    found = []
    for swaps in (False, True):
        model, topkast, optimizer = plain_run(schedule=Schedule(3, delay=2))
        train(model, optimizer, 4)  # a selection is under way
        weight = topkast.weights["2.weight"]
        if how == "copy_ of more entries":
            with torch.no_grad():
                weight.parameter[:8] = 0
        if swaps:
            backup = copy.deepcopy(model.state_dict())
            other = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
            if how == "load_state_dict":
                model.load_state_dict(backup | {"2.weight": other})
            else:  # other entries, as sparse
                added = other.masked_fill(weight.active, 0) * (other > 1.2)
                with torch.no_grad():
                    weight.parameter.copy_(added + (backup["2.weight"] if how == "copy_ of more entries" else 0))
            saved = model.state_dict()["2.weight"]
            assert 0 < int(torch.count_nonzero(saved)) <= 64
            assert bool((saved != 0)[backup["2.weight"] == 0].any())
            if how == "load_state_dict":
                model.load_state_dict(backup)
            else:
                with torch.no_grad():
                    weight.parameter.copy_(backup["2.weight"])
        train(model, optimizer, 4, seed=2)
        found.append({name: weight.theta() for name, weight in topkast.weights.items()})
    assert same(*found)


@pytest.mark.parametrize("kind", ["masked", "packed", "compact"])
def test_weights_swapped_in_while_detached_leave_no_trace(kind):
    model, topkast, optimizer = plain_run(kind)
    train(model, optimizer, 3)
    before = {name: (weight.theta(), weight.tiers) for name, weight in topkast.weights.items()}
    topkast.detach()
    backup = copy.deepcopy(model.state_dict())
    model.load_state_dict({name: torch.randn(value.shape) for name, value in backup.items()})
    model.load_state_dict(backup)
    topkast.attach(optimizer)
    assert same(before, {name: (weight.theta(), weight.tiers) for name, weight in topkast.weights.items()})


@pytest.mark.parametrize("kind", ["masked", "packed"])
@pytest.mark.parametrize("write", [lambda p: p.mul_(1), lambda p: p.share_memory_()], ids=["in place", "moved"])
def test_theta_of_dense_weights_that_are_loaded_outlives_a_write(kind, write):
    model, topkast, optimizer = plain_run(kind)
    train(model, optimizer, 2)
    values = torch.randn(16, 16)
    model.load_state_dict(model.state_dict() | {"2.weight": values})
    weight = topkast.weights["2.weight"]
    with torch.no_grad():
        write(weight.parameter)
    topkast.accept_writes()
    assert torch.equal(weight.theta(), values)


@pytest.mark.parametrize("rule", [SET(), RigL(), Static()], ids=str)
def test_dense_weights_that_are_loaded_leave_nothing_outside_b_where_entries_return_as_zeros(rule):
    found = []
    for kind in ("masked", "packed") if not isinstance(rule, RigL) else ("masked",):
        model, topkast, optimizer = plain_run(
            kind, rule=rule, backward_sparsity=0.75, schedule=Schedule(3, stop_updating_at=90)
        )
        train(model, optimizer, 2)
        values = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
        model.load_state_dict(model.state_dict() | {"2.weight": values})
        weight = topkast.weights["2.weight"]
        assert zero_outside(weight.theta(), weight.updated)
        train(model, optimizer, 5, seed=2)
        found.append(weight.theta())
    torch.testing.assert_close(found[0], found[-1])


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_group_that_is_added_in_mid_run_has_the_penalty(kind):
    torch.manual_seed(0)
    model = make_net().layers
    topkast = TopKast(model, 0.75, 0.5, storage=kind, targets=Targets(keep_last_dense=False, keep_first_dense=False))
    late = topkast.weights["2.weight"].parameter
    first = [parameter for parameter in model.parameters() if parameter is not late]
    optimizer = torch.optim.SGD(first, lr=0.1)
    topkast.attach(optimizer)
    expected = topkast.weights["4.weight"].strength
    optimizer.add_param_group({"params": [late], "lr": 0.05})
    train(model, optimizer, 1)
    assert topkast.weights["2.weight"].strength == pytest.approx(2 * expected)
    assert topkast.weights["4.weight"].strength == expected > 0


def test_write_after_a_load_does_not_pass_for_the_load():
    model, topkast, optimizer = plain_run()
    train(model, optimizer, 2)
    theta, tiers = topkast.weights["2.weight"].theta(), topkast.weights["2.weight"].tiers
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        model[2].weight.add_(1.0)
    with pytest.warns(UserWarning, match=WRITTEN):
        topkast.accept_writes()
    weight = topkast.weights["2.weight"]
    assert torch.equal(weight.tiers, tiers)
    torch.testing.assert_close(weight.theta(), theta + weight.active)


def test_refresh_after_a_write_does_not_choose_from_it():
    model, topkast, optimizer = plain_run()
    train(model, optimizer, 2)
    weight = topkast.weights["2.weight"]
    theta = weight.theta()
    with torch.no_grad():
        model[2].weight.add_(100 * ~weight.active)
    with pytest.warns(UserWarning, match=WRITTEN):
        topkast.refresh()
    assert torch.equal(weight.theta(), theta)
    check_sparse(topkast)


def test_run_with_a_ramp_is_put_back_to_where_it_was_less_sparse():
    model, topkast, optimizer = plain_run(schedule=Schedule(2), ramp=Ramp(end=10))
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), topkast.state_dict()))
    entries = int(topkast.weights["2.weight"].active_entries)
    train(model, optimizer, 3, seed=5)
    expected = topkast.weights["2.weight"].theta()
    train(model, optimizer, 7)
    for part, state in zip((model, optimizer, topkast), saved, strict=True):
        part.load_state_dict(state)
    assert entries == int(topkast.weights["2.weight"].active_entries) > 64
    train(model, optimizer, 3, seed=5)
    assert torch.equal(topkast.weights["2.weight"].theta(), expected)


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_detached_engine_leaves_weights_that_are_loaded_alone(kind):
    model, topkast, optimizer = plain_run(kind)
    topkast.detach()
    values = torch.randn(16, 16)
    model.load_state_dict(model.state_dict() | {"2.weight": values})
    if kind == "masked":
        assert torch.equal(model[2].weight, values)
    topkast.attach(optimizer)
    check_sparse(topkast)
    assert torch.equal(topkast.weights["2.weight"].theta(), values)


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_run_that_goes_on_without_its_engine_or_its_state_says_so(kind):
    model, topkast, optimizer = plain_run()
    train(model, optimizer, 2)
    del topkast, optimizer
    gc.collect()
    model = copy.deepcopy(model)
    topkast = TopKast(model, 0.75, 0.5, penalty=None, storage=kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    topkast.attach(optimizer)
    with pytest.warns(UserWarning, match="2.weight was sparse already, and zero outside B.*load_state_dict"):
        train(model, optimizer, 1)
    train(model, optimizer, 1)  # once


def test_run_that_goes_on_with_its_state_or_by_a_rule_that_grows_zeros_does_not():
    model, topkast, optimizer = plain_run()
    train(model, optimizer, 2)
    weights, state = copy.deepcopy((model.state_dict(), topkast.state_dict()))
    for options in ({}, {"rule": SET()}):
        model, topkast, optimizer = plain_run(**({"backward_sparsity": 0.75} if options else {}) | options)
        topkast.detach()
        model.load_state_dict(weights)
        if not options:
            topkast.load_state_dict(state)
        topkast.attach(optimizer)
        train(model, optimizer, 1)


def test_gradient_that_is_written_to_after_it_was_masked_is_masked_again():
    model, topkast, optimizer = plain_run()
    weight = topkast.weights["2.weight"]
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        topkast.prepare_step(optimizer)
        weight.parameter.grad.add_(torch.randn(16, 16))
        optimizer.step()
    assert zero_outside(optimizer.state[weight.parameter]["exp_avg"], weight.updated)
    assert bool(optimizer.state[weight.parameter]["exp_avg"][weight.updated].all())


def test_released_engine_is_not_attached_again():
    model, topkast, optimizer = plain_run()
    TopKast(model, 0.5, 0.25, penalty=None)
    with pytest.raises(TopKastError, match="a later one has taken over its weights"):
        topkast.attach(optimizer)


def test_step_of_a_wrapper_that_fails_does_not_hide_those_of_the_optimizer_inside():
    model, topkast, _ = plain_run()
    topkast.detach()

    class Fails(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            raise RuntimeError("out of memory")

    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = Fails(inner)
    topkast.attach(outer)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, outer, 1)
    topkast.recover()
    train(model, inner, 2)
    assert topkast.step_count == 2
    check_sparse(topkast)


# --- weights that are thawed ------------------------------------------------------------------------------------------


def test_weight_that_is_thawed_in_mid_run_is_named(tmp_path, storage):
    class Thaw(Callback):
        def __init__(self, name):
            self.name = name

        def on_fit_start(self, trainer, pl_module):
            pl_module.get_parameter(self.name).requires_grad_(False)

        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.get_parameter(self.name).requires_grad_(trainer.current_epoch > 0)

    layers = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 2)]

    def run(name, **options):
        model = make_net()
        model.layers = nn.Sequential(*copy.deepcopy(layers))
        fit(make_trainer(tmp_path, make_callback(update_every=2, **options), Thaw(name), max_epochs=3), model)

    if storage == "masked":
        with pytest.warns(UserWarning, match=r"layers.4.weight was frozen when training began and trained now"):
            run("layers.4.weight")
    run("layers.4.weight", exclude=["layers.4*"])
    run("layers.4.bias")


# --- what is said, and how often --------------------------------------------------------------------------------------


def trained_stack(layers=7, backward_sparsity=0.5, **options):
    """A stack of sparse layers after two steps, as a plain loop."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    every = Targets(keep_first_dense=False, keep_last_dense=False)
    topkast = TopKast(model, 0.75, backward_sparsity, targets=every, **{"schedule": Schedule(100), **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)

    def train(steps):
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.full((4, 8), 0.1 * (step + 1))).square().mean().backward()
            optimizer.step()

    train(2)
    return model, topkast, train


def write_everywhere(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)


def test_many_written_weights_are_counted_and_said_once():
    model, _, train = trained_stack()
    write_everywhere(model)
    with pytest.warns(UserWarning, match=WRITTEN) as caught:
        train(1)
    assert "'4.weight' (48) and 2 more" in str(caught[0].message)
    write_everywhere(model)
    train(1)


def test_dense_pass_is_said_once():
    model, topkast, _ = trained_stack()
    write_everywhere(model)
    with pytest.warns(UserWarning, match=COMPUTED):
        topkast.warn_if_dense()
    topkast.warn_if_dense()


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_loaded_weights_that_are_not_finite_are_refused_by_name(storage):
    model = trained_stack(1, storage=storage)[0]
    state = {name: torch.full_like(value, torch.nan) for name, value in model.state_dict().items()}
    # load_state_dict makes one RuntimeError of what packed weights say
    with pytest.raises((NonFiniteWeightError, RuntimeError), match=r"NaN or infinity.*'0\.weight'|0\.weight holds NaN"):
        model.load_state_dict(state)


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_sets_that_were_being_chosen_do_not_become_those_of_weights_that_are_loaded_meanwhile(storage):
    model, topkast, train = trained_stack(1, storage=storage, schedule=Schedule(2, delay=1))
    weight = topkast.weights["0.weight"]
    generator = torch.Generator().manual_seed(5)
    state = model.state_dict().items()
    model.load_state_dict({name: torch.randn(value.shape, generator=generator) for name, value in state})
    train(1)
    theta, active = weight.theta().abs(), weight.active
    assert theta[active].min() >= theta[~active].max()


def test_each_optimizers_own_plan_says_when_gradients_outside_the_updated_set_are_needed():
    topkast = trained_stack(2, 0.75, rule=RigL(), schedule=Schedule(3, stop_updating_at=50))[1]
    refresher, weights = topkast._refresher, list(topkast.weights.values())
    assert [refresher.looks_at_gradients(weights, step) for step in (1, 2, 3)] == [False, True, False]
    refresher.replan(weights[:1], 2, 100)
    own = refresher.own_sizes["0.weight"].with_moments([None, 3, None, None, 100])  # refreshes stop at step 3
    refresher.own_sizes["0.weight"] = own
    assert [refresher.looks_at_gradients([weight], 2) for weight in weights] == [False, True]
