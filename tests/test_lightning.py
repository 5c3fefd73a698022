"""The callback inside a Trainer: what happens around the optimizer's step."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_topkast import TopKast, TopKastError
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
    nouns,
    parameters_of,
    same,
    thetas,
    zero_outside,
)

pytestmark = pytest.mark.usefixtures("storage")


class Watch(Callback):
    """Checks after every batch that the model is sparse and that θ on C rests between refreshes."""

    def __init__(self, callback) -> None:
        self.callback = callback
        self.checked = 0
        self.moved = 0
        self.before = None

    def setup(self, trainer, pl_module, stage):
        self.start = parameters_of(pl_module)

    def on_train_start(self, trainer, pl_module):
        for name, theta in thetas(self.callback.topkast).items():
            if self.callback.topkast.weights[name].storage != "masked":
                continue  # packed at `setup` already
            assert torch.equal(theta, self.start[name].to(theta.dtype)), "the first selection lost stored values"
        self.remember()

    def remember(self):
        topkast = self.callback.topkast
        self.before = thetas(topkast), {name: ~w.updated for name, w in topkast.weights.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        topkast = self.callback.topkast
        check_sparse(topkast)
        theta, reservoir = self.before
        for name, value in thetas(topkast).items():
            assert torch.equal(value[reservoir[name]], theta[name][reservoir[name]])
            self.moved += not torch.equal(value, theta[name])
        self.checked += 1
        self.remember()


def watched_fit(folder, model, callback, *others, data=None, **changes) -> Watch:
    """Fit while watching; return the watch."""
    watch = Watch(callback)
    trainer = fit(make_trainer(folder, callback, *others, watch, **changes), model, data)
    assert watch.checked == trainer.fit_loop.total_batch_idx + 1
    return watch


@pytest.mark.parametrize("reset", [True, False], ids=["state reset", "state kept"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_training_moves_b_and_leaves_the_reservoir_alone(tmp_path, optimizer, reset, storage):
    """Without the reset the momentum of entries that left B pulls on, and must not reach them."""
    if storage == "packed" and not reset:
        with pytest.raises(TypeError, match="unexpected keyword argument 'reset_optimizer_state'"):
            make_callback(reset_optimizer_state=reset)  # there is no state outside B that could be kept
        return
    callback = make_callback(**({"reset_optimizer_state": reset} if storage == "masked" else {}))
    watch = watched_fit(tmp_path, make_net(optimizer=optimizer, lr=0.02), callback, max_epochs=3)
    assert (watch.checked, watch.moved) == (12, 12)
    assert callback.topkast.step_count == 12
    assert callback.topkast.refresh_count == 4
    assert list(callback.topkast.weights) == [MIDDLE]


def test_callback_trains_exactly_as_the_engine_in_a_plain_loop(tmp_path, storage):
    callback = make_callback(strength=1e-2)
    model = make_net(optimizer="adamw", lr=0.02)
    watched_fit(tmp_path, model, callback, max_epochs=3)

    plain = make_net(optimizer="adamw", lr=0.02)
    topkast = TopKast(plain, 0.75, 0.5, **nouns(update_every=3, strength=1e-2, storage=storage, kernels="torch"))
    optimizer = plain.configure_optimizers()
    topkast.attach(optimizer)
    for batch in batches() * 3:
        optimizer.zero_grad()
        plain.loss(batch).backward()
        optimizer.step()
    assert same(parameters_of(model), parameters_of(plain))
    assert same(callback.topkast.state_dict(), topkast.state_dict())


def test_accumulated_gradients_count_as_one_step(tmp_path):
    callback = make_callback(update_every=2)
    watch = watched_fit(tmp_path, make_net(), callback, max_epochs=2, accumulate_grad_batches=2)
    assert watch.checked == 8
    assert watch.moved == callback.topkast.step_count == 4
    assert callback.topkast.refresh_count == 2


def test_accumulation_equals_one_large_batch(tmp_path):
    """So the mask is laid on the whole sum of gradients, once."""
    small, large = make_net().double(), make_net().double()
    data = Batches((x.double(), y.double()) for x, y in batches(4))
    joined = Batches((torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in (data[:2], data[2:]))
    for model in (small, large):
        model.loss = lambda batch, model=model: nn.functional.mse_loss(model(batch[0]), batch[1])
    kwargs = {"precision": "64-true", "max_epochs": 2}
    one, other = make_callback(update_every=2), make_callback(update_every=2)
    watched_fit(tmp_path, small, one, data=data, accumulate_grad_batches=2, limit_val_batches=0, **kwargs)
    watched_fit(tmp_path, large, other, data=joined, limit_val_batches=0, **kwargs)
    assert torch.equal(one.topkast.weights[MIDDLE].tiers, other.topkast.weights[MIDDLE].tiers)
    torch.testing.assert_close(one.topkast.weights[MIDDLE].theta(), other.topkast.weights[MIDDLE].theta())


# --- clipping -----------------------------------------------------------------------------------------------------


def hand_computed_step(callback_options, clip) -> tuple[nn.Module, torch.Tensor]:
    """One SGD step by hand: B-masked gradient, then `clip`, then the update of θ on B, then α."""
    model = make_net()
    topkast = TopKast(copy.deepcopy(model), 0.75, 0.5, **nouns(**callback_options))
    weight = topkast.weights[MIDDLE]
    theta, active, updated = weight.theta(), weight.active, weight.updated
    model.load_state_dict(topkast.model.state_dict())
    model.loss(batches()[0]).backward()
    model.get_parameter(MIDDLE).grad[~updated] = 0
    clip(list(model.parameters()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == MIDDLE:
                theta = theta - 0.1 * parameter.grad
                parameter.copy_(theta * active)
            else:
                parameter -= 0.1 * parameter.grad
    return model, theta


# packed: a gradient has no other entries (tests/test_packed.py clips)
@pytest.mark.parametrize("storage", ["masked"], indirect=True)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_sees_the_masked_gradient(tmp_path, algorithm):
    """Clipping by norm before masking would count the gradient on C; by value both orders come to the same."""
    bound = {"norm": 0.05, "value": 0.002}[algorithm]
    options = {"update_every": 100, "strength": 0.0}
    clip = {
        "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, bound),
        "value": lambda parameters: nn.utils.clip_grad_value_(parameters, bound),
    }[algorithm]
    expected, theta = hand_computed_step(options, clip)
    unclipped, _ = hand_computed_step(options, lambda parameters: None)
    assert not torch.allclose(expected.layers[2].weight, unclipped.layers[2].weight, atol=1e-7), (
        "the bound clips nothing"
    )

    callback = make_callback(**options)
    model = make_net()
    trainer = make_trainer(tmp_path, callback, max_steps=1, gradient_clip_val=bound, gradient_clip_algorithm=algorithm)
    fit(trainer, model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(callback.topkast.weights[MIDDLE].theta(), theta, rtol=1e-5, atol=1e-8)


# packed: a gradient has no other entries
@pytest.mark.parametrize("storage", ["masked"], indirect=True)
def test_other_callbacks_see_the_masked_gradient_before_clipping(tmp_path):
    seen = []

    class Norm(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            weight = callback.topkast.weights[MIDDLE]
            seen.append((weight.parameter.grad[~weight.updated].abs().max(), weight.parameter.grad.norm()))

    callback = make_callback()
    watched_fit(tmp_path, make_net(), callback, Norm(), gradient_clip_val=1e-3)
    assert len(seen) == 8
    assert all(outside == 0 and norm > 1e-3 for outside, norm in seen)


def test_penalty_is_not_clipped(tmp_path):
    """With every gradient clipped to nothing, the penalty alone moves the weights, by its closed form."""
    callback = make_callback(update_every=100, strength=0.2)
    model = make_net(lr=0.1)
    start = {}

    class Remember(Callback):
        def on_train_start(self, trainer, pl_module):
            start["theta"] = callback.topkast.weights[MIDDLE].theta()

    trainer = make_trainer(tmp_path, callback, Remember(), max_steps=1, gradient_clip_val=1e-30)
    fit(trainer, model)
    weight = callback.topkast.weights[MIDDLE]
    factor = torch.ones_like(start["theta"])
    factor[weight.active] = 1 - 0.1 * 0.2
    factor[weight.updated & ~weight.active] = 1 - 0.1 * 0.2 / 0.25
    torch.testing.assert_close(weight.theta(), start["theta"] * factor)


# --- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_stay_sparse(tmp_path, precision):
    class AnyPrecision(Net):
        def loss(self, batch):
            x, y = batch
            return nn.functional.mse_loss(self(x), y.to(self.layers[0].weight.dtype))

    torch.manual_seed(0)
    callback = make_callback()
    model = AnyPrecision(optimizer="adamw", lr=0.05)
    watch = watched_fit(tmp_path, model, callback, precision=precision)
    assert watch.moved == 8
    expected = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert callback.topkast.weights[MIDDLE].theta().dtype == model.layers[2].weight.dtype == expected


class Overflows(Net):
    """Its gradient is infinite at the batches it is told."""

    def __init__(self, at=(), fused: bool = False) -> None:
        super().__init__()
        self.at, self.fused = at, fused
        self.seen = 0

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.seen in self.at:
            loss = loss + (self.layers[2].weight * math.inf).sum()
        self.seen += 1
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1, fused=self.fused)


class EveryStep(Callback):
    """Keeps a copy of everything after every batch."""

    def __init__(self, callback) -> None:
        self.callback, self.states = callback, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        self.states.append((parameters_of(pl_module), copy.deepcopy(self.callback.topkast.state_dict()), optimizer))


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_step_skipped_by_the_gradient_scaler_changes_nothing(tmp_path, fused):
    torch.manual_seed(0)
    callback = make_callback(strength=1e-2)
    model, states = Overflows(at=(4,), fused=fused), EveryStep(callback)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    watched_fit(tmp_path, model, callback, states, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    states = states.states
    assert scaler.get_scale() == 2.0**7, "the scaler saw no overflow"
    for part, (before, after) in enumerate(zip(states[3], states[4], strict=True)):
        assert same(before, after), ("parameters", "sets and latent values", "optimizer state")[part]
    assert not same(states[4][0], states[5][0])
    assert callback.topkast.step_count == 7


def test_scaled_training_equals_unscaled_training(tmp_path):
    """The scale is a power of two and nothing overflows: masks, penalty and updates are the same bit for bit."""
    results = []
    for scale in (1.0, 2.0**6):
        torch.manual_seed(0)
        callback = make_callback(strength=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        model = Overflows()
        model.forward = lambda x, model=model: model.layers.float()(x.float())
        with torch.autocast("cpu", enabled=False):
            plugin = MixedPrecision("16-mixed", "cpu", scaler)
            plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
            watched_fit(tmp_path, model, callback, plugins=plugin)
        results.append(thetas(callback.topkast))
    assert same(results[0], results[1])


# --- optimizers ---------------------------------------------------------------------------------------------------


class Gan(LightningModule):
    """Two optimizers in manual optimization, the second stepped every other batch, through Lightning or raw."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw
        self.generator = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2))
        self.critic = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1))

    def training_step(self, batch, batch_idx):
        x, real = batch
        critic, generator = self.optimizers(use_pl_optimizer=not self.raw)
        fake = self.generator(x)
        critic.zero_grad()
        self.backward((self.critic(fake.detach()) - self.critic(real)).mean())
        critic.step()
        if batch_idx % 2:
            generator.zero_grad()
            self.backward(-self.critic(fake).mean())
            generator.step()

    def configure_optimizers(self):
        critic = torch.optim.RMSprop(self.critic.parameters(), lr=0.01)
        return critic, torch.optim.Adam(self.generator.parameters(), lr=0.01)


@pytest.mark.parametrize("raw", [False, True], ids=["Lightning's optimizers", "raw optimizers"])
def test_each_optimizer_refreshes_its_own_weights_at_its_own_steps(tmp_path, raw):
    torch.manual_seed(0)
    callback = make_callback(update_every=3)
    watch = watched_fit(tmp_path, Gan(raw), callback, max_epochs=3)
    assert callback.topkast.state_dict()["steps"] == [12, 6]
    assert callback.topkast.step_count == 12
    assert callback.topkast.refresh_count == 4 + 2
    generator = [name for name in callback.topkast.weights if name.startswith("generator")]
    assert generator == ["generator.2.weight", "generator.4.weight"]
    assert len(callback.topkast.weights) == 4, "first and last dense count once a model"
    assert watch.moved == 12 * 2 + 6 * 2


def test_lr_scheduler_moves_the_penalty_with_it(tmp_path):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    torch.manual_seed(0)
    callback = make_callback(strength=0.5, update_every=100)
    states = EveryStep(callback)
    watched_fit(tmp_path, Scheduled(), callback, states)
    assert same(states.states[0][1]["weights"], states.states[-1][1]["weights"])
    assert same(states.states[0][0], states.states[-1][0])


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_lr_schedulers_run_beside_it(tmp_path, schedule):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            scheduler = {
                "one_cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=8),
                "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8),
            }[schedule]()
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    torch.manual_seed(0)
    callback = make_callback(strength=1e-2)
    assert watched_fit(tmp_path, Scheduled(), callback).moved >= 7


@pytest.mark.parametrize("whole", [True, False], ids=["LightningModule", "submodule"])
def test_compiled_modules_train_sparse(tmp_path, whole):
    model = make_net(optimizer="adamw", lr=0.02)
    callback = make_callback()
    plain_callback, plain = make_callback(), make_net(optimizer="adamw", lr=0.02)
    if whole:
        compiled = torch.compile(model, backend="eager")
    else:
        model.layers = torch.compile(model.layers, backend="eager")
        compiled = model
    trainer = make_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(compiled, batches(), batches(2, seed=2))
    assert list(callback.topkast.weights) == [MIDDLE]
    watched_fit(tmp_path, plain, plain_callback)
    assert same(thetas(callback.topkast), thetas(plain_callback.topkast))


def test_lbfgs_is_refused_with_the_way_out(tmp_path):
    class Quasi(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(
        TopKastError, match=r"LBFGS cannot train sparse weights: it evaluates its closure many times.*use an optimizer"
    ):
        fit(make_trainer(tmp_path, make_callback()), Quasi())


def test_an_optimizer_that_evaluates_its_closure_twice_is_stopped_at_its_first_step(tmp_path):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    class Searching(Net):
        def configure_optimizers(self):
            return Twice(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    callback = make_callback()
    with pytest.raises(TopKastError, match="Twice evaluates its closure more than once"):
        fit(make_trainer(tmp_path, callback), Searching())
    check_sparse(callback.topkast)


def test_sparse_weights_without_an_optimizer_are_refused(tmp_path):
    class Forgetful(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.layers[0].parameters(), lr=0.1)

    with pytest.raises(TopKastError, match=rf"no optimizer holds the sparse weights {MIDDLE}.*freeze|exclude"):
        fit(make_trainer(tmp_path, make_callback()), Forgetful())


def test_frozen_weights_stay_dense_and_are_named_when_they_are_unfrozen_later(tmp_path):
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.extra.weight.requires_grad_(True)

    class Partly(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(6, 6)
            self.extra.weight.requires_grad_(False)

        def forward(self, x):
            return self.layers(x + self.extra(x))

    torch.manual_seed(0)
    callback, model = make_callback(keep_last_dense=False), Partly()
    start = model.extra.weight.detach().clone()
    with pytest.warns(UserWarning, match="extra.weight was frozen when training began and trained now, so dense"):
        watched_fit(tmp_path, model, callback, Unfreeze())
    rows = {row.name: row.reason for row in callback.topkast.summary().rows}
    assert rows["extra.weight"] == "frozen"
    assert (model.extra.weight != 0).all()
    assert not torch.equal(model.extra.weight, start)
    assert set(callback.topkast.weights) == {MIDDLE, "layers.4.weight"}


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_training_step_that_returns_none_changes_nothing(tmp_path):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else self.loss(batch)

    torch.manual_seed(0)
    callback = make_callback(strength=1e-2)
    states = EveryStep(callback)
    watched_fit(tmp_path, Skips(optimizer="adamw", lr=0.02), callback, states, max_epochs=1)
    assert same(states.states[0][:2], states.states[1][:2])
    assert callback.topkast.step_count == 3


# packed: a gradient has no other entries
@pytest.mark.parametrize("storage", ["masked"], indirect=True)
def test_infinite_gradient_outside_b_does_not_touch_the_weight(tmp_path):
    """Without a scaler nobody skips the step, but what is masked has no say whatever its value."""

    class Spikes(Net):
        def on_after_backward(self):
            weight = callback.topkast.weights[MIDDLE]
            weight.parameter.grad[~weight.updated] = math.inf

    torch.manual_seed(0)
    callback = make_callback()
    watched_fit(tmp_path, Spikes(), callback)
    assert torch.isfinite(callback.topkast.weights[MIDDLE].theta()).all()


# --- interruptions ------------------------------------------------------------------------------------------------


class Breaks(torch.optim.SGD):
    """Is interrupted in the middle of a step: half of the parameters have moved, none is closed."""

    error: type[BaseException] = RuntimeError
    at = 3
    steps = 0

    def step(self, closure=None):
        result = closure()
        self.steps += 1
        with torch.no_grad():
            for group in self.param_groups:
                for index, parameter in enumerate(group["params"]):
                    parameter -= 0.1
                    if self.steps == self.at and index == 2:
                        raise self.error("in the middle of a step")
        return result


class Interrupted(Net):
    error: type[BaseException] = RuntimeError

    def configure_optimizers(self):
        optimizer = Breaks(self.parameters(), lr=0.1)
        optimizer.error = self.error
        return optimizer


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interruption_in_the_middle_of_a_step_leaves_a_sparse_model(tmp_path, error):
    torch.manual_seed(0)
    callback, model = make_callback(update_every=100), Interrupted()
    model.error = error
    seen = []

    class Look(Callback):
        def on_exception(self, trainer, pl_module, exception):
            weight = callback.topkast.weights[MIDDLE]
            seen.append(int(torch.count_nonzero(pl_module.layers[2].weight)) <= weight.active_count)

    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(make_trainer(tmp_path, callback, Look()), model)
    assert seen == [True]
    assert callback.topkast.step_count == 2
    check_sparse(callback.topkast)


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=.*")
def test_checkpoint_on_exception_is_sparse(tmp_path):
    torch.manual_seed(0)
    callback = make_callback(update_every=100)
    save = OnExceptionCheckpoint(tmp_path, "broken")
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(make_trainer(tmp_path, save, callback, enable_checkpointing=True), Interrupted())
    saved = torch.load(tmp_path / "broken.ckpt", weights_only=True)
    weight = callback.topkast.weights[MIDDLE]
    assert zero_outside(saved["state_dict"][MIDDLE], weight.active)
    assert torch.equal(saved["callbacks"][callback.state_key]["weights"][MIDDLE]["tiers"], weight.tiers)


# --- the Trainer's short cuts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"fast_dev_run": True}, {"overfit_batches": 1}], ids=["fast_dev_run", "overfit_batches"]
)
def test_short_runs(tmp_path, changes):
    callback = make_callback(update_every=1)
    watch = watched_fit(tmp_path, make_net(), callback, **changes)
    assert watch.checked == (1 if "fast_dev_run" in changes else 2)
    assert callback.topkast.refresh_count == watch.checked


def test_barebones_trainer(tmp_path):
    callback = make_callback(update_every=1)
    model = make_net()
    model.validation_step = None
    Trainer(barebones=True, accelerator="cpu", devices=1, max_epochs=1, callbacks=[callback]).fit(model, batches())
    assert callback.topkast.refresh_count == 4
    check_sparse(callback.topkast)
