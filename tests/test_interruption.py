"""Whatever breaks off a step, a refresh or a run: no value is lost, and training goes on."""

import copy
import pickle
import sys

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_topkast import L2, Schedule, Targets, TopKast, TopKastError
from lightning_topkast.method.selection import nested_top_k
from lightning_topkast.ops.step import Update
from lightning_topkast.weights import MaskedWeight, PackedWeight, SparseWeight, Traits
from tests.helpers import (
    MIDDLE,
    check_sparse,
    fit,
    make_callback,
    make_net,
    make_trainer,
    needs_compiler,
    same,
    zero_outside,
)

# --- inside one weight --------------------------------------------------------------------------------------------


@pytest.fixture(params=[pytest.param(0, marks=needs_compiler, id="compiled"), pytest.param(1 << 60, id="plain")])
def passes(request, monkeypatch):
    """The weight's entries are passed over by compiled functions, in which nothing is interrupted, or by PyTorch's."""
    monkeypatch.setattr("lightning_topkast.ops.passes.MANY", request.param)


def weight_in_training() -> MaskedWeight:
    """A weight after its first selection, with values outside A."""
    torch.manual_seed(0)
    weight = MaskedWeight("weight", nn.Parameter(torch.randn(12, 12)), 20, 50, Traits(penalty=L2(strength=0.1)))
    weight.apply(nested_top_k(weight.magnitudes(), (50, 20)))
    weight.shrinkage.strength = 0.1
    return weight


def interrupt_at(line: int, method, *arguments) -> bool:
    """Call `method`, and raise KeyboardInterrupt as its `line`-th line begins; return whether it got that far."""
    helpers = MaskedWeight._switch, MaskedWeight.end_step, SparseWeight.end_step
    codes, seen = {method.__func__.__code__, *(helper.__code__ for helper in helpers)}, 0

    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code not in codes:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()  # coverage tools trace too
    sys.settrace(trace)
    try:
        method(*arguments)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def check_recovered(weight: MaskedWeight) -> None:
    assert weight.is_sparse
    assert not weight.is_open
    assert int(weight.active.sum()) == weight.active_count
    assert int(weight.updated.sum()) == weight.updated_count
    assert int((weight.tiers == 1).sum()) == weight.updated_count - weight.active_count


def test_interrupted_refresh_loses_no_value(passes):
    line = 0
    while True:
        line += 1
        weight = weight_in_training()
        before = weight.theta()
        other = nested_top_k(torch.rand(12, 12, generator=torch.Generator().manual_seed(1)), (50, 20))
        if not interrupt_at(line, weight.apply, other):
            break
        weight.recover()
        check_recovered(weight)
        assert torch.equal(weight.theta(), before), f"line {line}"
    assert line > 10
    assert torch.equal(weight.tiers, other)


def test_interrupted_refresh_of_a_rule_that_clears_what_it_drops_leaves_nothing_outside_the_sets(passes):
    """SET and Static: a value that stayed would come back with its entry."""
    line, other = 0, nested_top_k(torch.rand(12, 12, generator=torch.Generator().manual_seed(1)), (20, 20))
    while True:
        line += 1
        torch.manual_seed(0)
        weight = MaskedWeight("weight", nn.Parameter(torch.randn(12, 12)), 20, 20, Traits(clears_dropped=True))
        weight.apply(nested_top_k(weight.magnitudes(), (20, 20)))
        before = weight.theta()
        if not interrupt_at(line, weight.apply, other):
            break
        weight.recover()
        check_recovered(weight)
        assert zero_outside(weight.theta(), weight.active), f"line {line}"
        kept = weight.active & (before != 0)
        assert torch.equal(weight.theta()[kept], before[kept]), f"line {line}"
    assert line > 10


@needs_compiler
def test_interrupted_step_in_one_pass_is_taken_or_not(monkeypatch):
    monkeypatch.setattr("lightning_topkast.ops.passes.MANY", 0)
    line, update = 0, Update("sgd", (0.0, 0.0, 1.0, -0.5, 0.0), ())
    while True:
        line += 1
        weight = weight_in_training()
        weight.parameter.grad = torch.ones(12, 12)
        before = weight.theta()
        if not interrupt_at(line, weight.step, update, 0.5, True):
            break
        weight.recover()
        check_recovered(weight)
        shrinkage = torch.where(weight.active, 0.5 * 0.1, 0.5 * 0.1 / weight.forward_density_target)
        after = torch.where(weight.updated, (before - 0.5) * (1 - shrinkage), before)
        theta = weight.theta()
        assert torch.equal(theta, before) or torch.allclose(theta, after), f"line {line}"
    assert torch.allclose(weight.theta(), after)
    assert line > 6


@pytest.mark.parametrize("rule", ["set", "static"])
def test_interrupted_step_of_a_baseline_is_made_sparse_again(rule):
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    topkast = TopKast(model, 0.75, 0.75, rule=rule)
    weight = topkast.weights["1.weight"]
    before = weight.theta()
    weight.open()
    weight.parameter.detach().add_(1.0)  # what an optimizer with momentum may write outside A too
    topkast.recover()
    check_sparse(topkast)
    assert zero_outside(weight.theta(), weight.active)
    assert torch.equal(weight.theta()[weight.active], before[weight.active] + 1)


def test_interrupted_opening_loses_no_value(passes):
    line = 0
    while True:
        line += 1
        weight = weight_in_training()
        before = weight.theta()
        if not interrupt_at(line, weight.open):
            break
        weight.recover()
        check_recovered(weight)
        assert torch.equal(weight.theta(), before), f"line {line}"
    assert line > 2


def test_interrupted_closing_keeps_the_update_of_every_entry(passes):
    line = 0
    while True:
        line += 1
        weight = weight_in_training()
        weight.open()
        weight.parameter.detach()[weight.updated] += 1.0
        updated = weight.theta()
        if not interrupt_at(line, weight.close, 0.5):
            break
        weight.recover()
        check_recovered(weight)
        shrinkage = torch.where(weight.active, 0.5 * 0.1, 0.5 * 0.1 / weight.forward_density_target)
        shrunk = torch.where(weight.updated, updated * (1 - shrinkage), updated)
        theta = weight.theta()
        assert ((theta == updated) | torch.isclose(theta, shrunk)).all(), f"line {line}"
    assert line > 6


def packed_in_training() -> PackedWeight:
    """The same, packed."""
    torch.manual_seed(0)
    weight = PackedWeight("weight", nn.Parameter(torch.randn(12, 12)), 20, 50, Traits(), product=None)
    weight.apply(nested_top_k(weight.magnitudes(), (50, 20)))
    return weight


@pytest.mark.parametrize("new_weight", [weight_in_training, packed_in_training])
def test_checkpoint_saved_at_any_line_of_a_refresh_holds_every_value(new_weight, passes):
    """As a signal handler does; the refresh goes on after it as if nothing had been."""
    whole, other = new_weight(), nested_top_k(torch.rand(12, 12, generator=torch.Generator().manual_seed(1)), (50, 20))
    before = whole.theta()
    whole.apply(other)
    methods = (type(whole).apply, getattr(type(whole), "_switch", None) or PackedWeight._settle)
    codes = {method.__code__ for method in methods}
    for line in range(1, 100):
        weight, saved, seen = new_weight(), [], 0

        def trace(frame, event, _):
            nonlocal seen
            if frame.f_code not in codes:
                return None
            seen += event == "line"
            if seen == line and not saved:  # noqa: B023
                saved.append((weight.alpha(), weight.state_dict()))  # noqa: B023
            return trace

        outer = sys.gettrace()
        sys.settrace(trace)
        try:
            weight.apply(other)
        finally:
            sys.settrace(outer)
        assert same(weight.state_dict(), whole.state_dict()), f"line {line}"
        assert torch.equal(weight.theta(), before), f"line {line}"
        if not saved:
            break
        ((alpha, state),) = saved
        resumed = new_weight()
        if resumed.storage == "masked":
            resumed.parameter.detach().copy_(alpha)
        else:
            resumed.load_alpha(alpha)
        resumed.check_state(state)
        resumed.load_state_dict(state)
        assert torch.equal(resumed.theta(), before), f"line {line}"
        assert resumed.is_sparse
    assert line > 15


# --- a run ----------------------------------------------------------------------------------------------------------


class Breaks(Callback):
    """Raises once, after a batch."""

    def __init__(self, after: int, error: type[BaseException] = RuntimeError) -> None:
        self.after, self.error = after, error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.after:
            self.after = -1
            raise self.error("broken off")


def broken_run(tmp_path, callback, model, error=RuntimeError):
    trainer = make_trainer(tmp_path, callback, Breaks(5, error))
    with pytest.raises((error, SystemExit)):
        fit(trainer, model)
    return trainer


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_callback_resumes_after_its_run_broke_off(tmp_path, error):
    callback, model = make_callback(), make_net()
    save = tmp_path / "whole.ckpt"
    whole = make_trainer(tmp_path, make_callback(), max_epochs=1)
    fit(whole, make_net())
    whole.save_checkpoint(save)

    broken_run(tmp_path, callback, model, error)
    fit(make_trainer(tmp_path, callback), model, ckpt_path=save)
    assert callback.topkast.step_count == 8
    check_sparse(callback.topkast)


def test_fit_after_a_broken_one_counts_the_steps_of_its_own_optimizer(tmp_path):
    callback, model = make_callback(), make_net()
    trainer = broken_run(tmp_path, callback, model)
    steps = trainer.global_step
    fit(trainer, model)
    assert callback.topkast.state_dict()["steps"] == [trainer.global_step]
    assert trainer.global_step > steps
    check_sparse(callback.topkast)


def test_state_of_a_run_that_never_began_does_not_reach_the_next(tmp_path):
    save = tmp_path / "other.ckpt"
    whole = make_trainer(tmp_path, make_callback(), max_epochs=1)
    fit(whole, make_net())
    whole.save_checkpoint(save)

    class Refuses(Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("not today")

    callback = make_callback()
    with pytest.raises(RuntimeError, match="not today"):
        fit(make_trainer(tmp_path, Refuses(), callback), make_net(), ckpt_path=save)
    fit(make_trainer(tmp_path, callback), make_net(seed=3))
    check_sparse(callback.topkast)


def test_refused_start_leaves_the_model_as_it_was(tmp_path):
    model = make_net()
    before = model.layers[2].weight.detach().clone()
    with pytest.raises(TopKastError, match="past zero"):
        fit(make_trainer(tmp_path, make_callback(strength=1e3)), model)
    assert torch.equal(model.layers[2].weight, before)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_checkpoint_written_in_the_middle_of_a_step_is_sparse_and_resumes(tmp_path):
    """As a signal handler writes it, Lightning's for SLURM for one."""
    callback, model, path = make_callback(update_every=100), make_net(optimizer="momentum"), tmp_path / "signal.ckpt"

    class Saves(Callback):
        def on_train_start(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            optimizer.register_step_post_hook(lambda *_: self.save(trainer))  # runs before ours, which closes

        def save(self, trainer):
            if trainer.global_step == 2:
                assert callback.topkast.weights[MIDDLE].is_open
                trainer.save_checkpoint(path)

    fit(make_trainer(tmp_path, Saves(), callback, max_epochs=1), model)
    saved = torch.load(path, weights_only=True)
    state = saved["callbacks"][callback.state_key]["weights"][MIDDLE]
    assert zero_outside(saved["state_dict"][MIDDLE], state["tiers"] == 2)
    assert not torch.equal(state["latent"], callback.topkast.weights[MIDDLE].state_dict()["latent"])

    resumed = make_callback(update_every=100)
    fit(make_trainer(tmp_path, resumed), make_net(optimizer="momentum"), ckpt_path=path)
    check_sparse(resumed.topkast)


# --- a plain loop ---------------------------------------------------------------------------------------------------


def plain(optimizer=torch.optim.SGD, **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    return model, optimizer(model.parameters(), **({"lr": 0.1} | arguments)), TopKast(model, 0.75, 0.5, update_every=3)


def step(model, optimizer, times: int = 1) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()


class Noisy(torch.optim.SGD):
    """Goes on after the step of its base class, whose hooks torch runs too once an SGD has been made."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter += 0.01
        return loss


def test_optimizer_that_goes_on_after_the_step_of_its_base_class_stays_sparse():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # from now on torch runs hooks in its step
    model, optimizer, topkast = plain(Noisy)
    topkast.attach(optimizer)
    reservoir = ~topkast.weights["1.weight"].updated
    before = topkast.weights["1.weight"].theta()
    step(model, optimizer, 2)
    check_sparse(topkast)
    assert topkast.step_count == 2
    assert torch.equal(topkast.weights["1.weight"].theta()[reservoir], before[reservoir])


def test_parameter_group_added_later_is_trained_sparse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    topkast = TopKast(model, 0.75, 0.5, targets=Targets(keep_first_dense=False), update_every=3).attach(optimizer)
    optimizer.add_param_group({"params": model[1].parameters()})
    assert topkast.unattached == []
    before = topkast.weights["1.weight"].theta()
    step(model, optimizer, 4)
    check_sparse(topkast)
    assert not torch.equal(topkast.weights["1.weight"].theta(), before)


def test_weights_that_no_attached_optimizer_holds_are_warned_of_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    TopKast(model, 0.75, 0.5, targets=Targets(keep_first_dense=False), update_every=2).attach(optimizer)
    with pytest.warns(UserWarning, match=r"no attached optimizer holds 0\.weight") as seen:
        step(model, optimizer, 6)
    assert len(seen) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_of_model_and_engine_is_attached_anew_and_goes_on(copied):
    model, optimizer, topkast = plain()
    topkast.attach(optimizer)
    step(model, optimizer, 4)
    model2, topkast2 = copied((model, topkast))
    assert not topkast2.is_attached
    assert topkast.is_attached
    assert same(topkast2.state_dict(), topkast.state_dict())
    optimizer2 = torch.optim.SGD(model2.parameters(), lr=0.1)
    topkast2.attach(optimizer2)
    step(model, optimizer, 3)
    step(model2, optimizer2, 3)
    check_sparse(topkast2)
    assert same(topkast2.state_dict(), topkast.state_dict())


def test_a_second_engine_on_the_same_optimizer_takes_over_from_the_first():
    model, optimizer, topkast = plain()
    topkast.attach(optimizer)
    second = TopKast(model, 0.75, 0.5).attach(optimizer)
    assert not topkast.is_attached
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (topkast.step_count, second.step_count) == (0, 1)


def test_attach_takes_all_optimizers_or_none():
    model, optimizer, topkast = plain()
    with pytest.raises(TopKastError, match="LBFGS"):
        topkast.attach(optimizer, torch.optim.LBFGS(model.parameters()))
    assert not topkast.is_attached
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(TopKastError, match="expected at least one optimizer"):
        topkast.attach()


def test_release_gives_the_dense_weights_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    before = model[1].weight.detach().clone()
    topkast = TopKast(model, 0.75, 0.5)
    assert not torch.equal(model[1].weight, before)
    topkast.release()
    assert torch.equal(model[1].weight, before)


def test_an_optimizer_without_learning_rate_is_refused():
    _, optimizer, topkast = plain()
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(TopKastError, match=r"scaled by the learning rate.*lr=None"):
        topkast.attach(optimizer)


def test_state_that_does_not_begin_at_zero_is_left_alone():
    model, optimizer, topkast = plain(torch.optim.Rprop, lr=0.01)
    topkast.attach(optimizer)
    step(model, optimizer, 7)
    assert (optimizer.state[model[1].weight]["step_size"] > 0).all()


def test_a_state_is_a_snapshot_that_training_does_not_change():
    model, optimizer, topkast = plain()
    topkast.attach(optimizer)
    step(model, optimizer, 2)
    state, parameters = topkast.state_dict(), copy.deepcopy(model.state_dict())
    copied = copy.deepcopy(state)
    step(model, optimizer, 7)
    assert same(state, copied)
    model.load_state_dict(parameters)
    topkast.load_state_dict(state)
    assert topkast.step_count == 2


def test_steps_of_a_state_loaded_before_attaching_are_kept():
    model, optimizer, topkast = plain()
    topkast.attach(optimizer)
    step(model, optimizer, 5)
    model2, optimizer2, topkast2 = plain()
    model2.load_state_dict(model.state_dict())
    topkast2.load_state_dict(topkast.state_dict())
    assert topkast2.step_count == 5
    topkast2.attach(optimizer2)
    assert topkast2.step_count == 5


def test_sets_follow_a_schedule_that_changes_on_resume():
    model, optimizer, topkast = plain()
    topkast.attach(optimizer)
    step(model, optimizer, 4)
    stopped = TopKast(model, 0.75, 0.5, schedule=Schedule(stop_exploring_at=2))
    stopped.load_state_dict(topkast.state_dict())
    assert not stopped.exploring
    check_sparse(stopped)
    assert not (stopped.weights["1.weight"].tiers == 1).any()


def test_another_shrinkage_on_resume_is_heard():
    model, optimizer, topkast = plain()
    topkast.attach(optimizer)
    other = TopKast(model, 0.75, 0.5, penalty=L2(shrinkage=5e-3))
    topkast.detach()
    other.attach(optimizer)
    other.load_state_dict(topkast.state_dict())
    assert other.weights["1.weight"].strength == pytest.approx(5e-3 * 0.25 / 0.1)


def test_summary_says_when_the_precision_rounds_the_penalty_away():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)).bfloat16()
    topkast = TopKast(model, 0.75, 0.5, penalty=L2(shrinkage=1e-3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    assert "lost to rounding" in str(topkast.summary())
