"""Steps that one compiled pass takes in the optimizer's place: the same bits, and only where nobody can tell."""

import sys
from types import MethodType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_topkast import L1, TopKast
from lightning_topkast.engine import one_pass
from lightning_topkast.ops import flat, passes, step
from lightning_topkast.weights import masked
from tests.helpers import check_sparse, needs_compiler, same
from tests.test_flat import SIZES, Neither, bits, both, sets

pytestmark = needs_compiler

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, dampening=0.1),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01),
    "adam with decay, quick": lambda p: Adam(p, lr=0.01, weight_decay=0.01, betas=(0.3, 0.9)),
    "adam, fused": lambda p: Adam(p, lr=0.01, weight_decay=0.01, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw, fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}


@pytest.fixture
def taken(monkeypatch):
    """The steps that were taken in one pass, by the name of the pass."""
    names = []

    def counting(entries, gradient, masks, update):
        done = step.step_(entries, gradient, masks, update)
        names.extend([update.pass_name] * done)
        return done

    monkeypatch.setattr(passes, "MANY", 0)
    monkeypatch.setattr(masked, "step_", counting)
    return names


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 33), nn.ReLU(), nn.Linear(33, 40), nn.ReLU(), nn.Linear(40, 3))


def begun(make_optimizer, **arguments):
    model = net()
    topkast = TopKast(model, 0.9, 0.7, **arguments)
    optimizer = make_optimizer(model.parameters())
    topkast.attach(optimizer)
    return model, topkast, optimizer


def train(model, optimizer, steps, start=0):
    for turn in range(start, start + steps):
        optimizer.zero_grad()
        x = torch.randn(16, 9, generator=torch.Generator().manual_seed(turn))
        model(x).square().mean().backward()
        optimizer.step()


def trained(make_optimizer, steps=10, **arguments):
    model, topkast, optimizer = begun(make_optimizer, update_every=4, **arguments)
    train(model, optimizer, steps)
    gradients = [parameter.grad for parameter in model.parameters()]
    state = [[*each.values()] for each in optimizer.state_dict()["state"].values()]
    return [*model.state_dict().values()], topkast.state_dict(), gradients, state


@pytest.mark.parametrize("penalty", ["l2", None])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_has_the_same_bits_with_and_without_the_pass(make_optimizer, penalty, taken):
    both(lambda: trained(make_optimizer, penalty=penalty))
    first = 0 if make_optimizer is OPTIMIZERS["sgd"] else 1  # which makes the state
    assert len(taken) == 10 - first


@given(size=st.sampled_from(SIZES), seed=st.integers(0, 99), threads=st.sampled_from([1, 3]), masks=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_pass_is_what_the_parts_of_a_step_do_one_by_one(size, seed, threads, masks):
    tiers, members, places, theta = sets(size, seed)
    generator = torch.Generator().manual_seed(seed)
    gradient, average, squares = torch.randn(3, size, generator=generator)
    average, squares = average * (tiers != 0), squares.square() * (tiers != 0)
    gradient[:: seed + 3] = float("nan") if masks else 0.0
    gradient = torch.where(members.bool(), torch.nan_to_num(gradient), gradient)
    factors = [(0.999, 1 - 1e-4), (1.0, 1.0)][seed % 2]
    options = (0.99, 0.0, 0.1, 0.999, 0.001, 0.5, 1e-8, -0.01)
    alpha, explored = theta * (tiers == 2), theta[places]

    def parts():
        entries = step.Entries(alpha.clone(), members, places, explored.clone(), factors)
        moments, change = (average.clone(), squares.clone()), gradient.clone()
        return entries, change, moments

    entries, change, moments = parts()
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "MANY", 0)
        assert step.step_(entries, change, masks, step.Update("adam", options, moments))
        torch.set_num_threads(1)
        one_by_one, masked_change, others = parts()
        if masks:
            flat.mask_outside_(masked_change, members)
        flat.put_(one_by_one.values, places, one_by_one.explored)
        everything = step.Entries(one_by_one.values, torch.full_like(members, -1), places[:0], explored[:0], (1.0, 1.0))
        assert step.step_(everything, masked_change, False, step.Update("adam", options, others))
        assert step.close_(one_by_one, bytearray(1))
    assert same(bits([*entries[:4], change, *moments]), bits([*one_by_one[:4], masked_change, *others]))


def test_tensors_in_another_memory_order_are_left_to_the_optimizer(monkeypatch):
    monkeypatch.setattr(passes, "MANY", 0)
    values, gradient, momentum = torch.ones(3, 4, 5, 3, 3).unbind()
    members, nothing = torch.full((4, 5, 3, 3), -1, dtype=torch.int8), torch.empty(0)
    entries = step.Entries(values, members, nothing.long(), nothing, (1.0, 1.0))
    options = (0.0, 0.9, 1.0, -0.1, 0.0)
    for which in (0, 1, None):
        others = [
            each.contiguous(memory_format=torch.channels_last if at == which else torch.contiguous_format)
            for at, each in enumerate((gradient, momentum))
        ]
        done = step.step_(entries, others[0], False, step.Update("sgd", options, (others[1],)))
        assert done == (which is None)
        assert torch.equal(values, torch.ones_like(values)) != done


def test_whoever_looks_after_the_step_sees_the_masked_gradient_and_the_count_of_steps(taken):
    model, topkast, optimizer = begun(lambda p: AdamW(p))
    train(model, optimizer, 3)
    weight = topkast.weights["2.weight"]
    assert len(taken) == 2
    assert (weight.parameter.grad[~weight.updated] == 0).all()
    assert weight.parameter.grad.any()
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
    check_sparse(topkast)


def subclass(parameters):
    class Own(AdamW):
        pass

    return Own(parameters)


def hooked(parameters):
    optimizer = AdamW(parameters)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


OTHERS = {
    "a subclass": subclass,
    "watched by a hook": hooked,
    "foreach": lambda p: AdamW(p, foreach=True),
    "maximize": lambda p: SGD(p, lr=0.01, maximize=True),
    "amsgrad": lambda p: Adam(p, amsgrad=True),
    "a tensor as learning rate": lambda p: Adam(p, lr=torch.tensor(0.01)),
    "fused SGD": lambda p: SGD(p, lr=0.01, momentum=0.9, fused=True),
    "another optimizer": lambda p: torch.optim.RMSprop(p),
}


@pytest.mark.parametrize("make_optimizer", OTHERS.values(), ids=OTHERS)
def test_what_is_not_plain_takes_its_own_steps(make_optimizer, taken):
    both(lambda: trained(make_optimizer))
    assert not taken


@pytest.mark.parametrize("make_optimizer", [SGD, Adam, AdamW])
def test_an_option_that_the_pass_does_not_know_is_left_to_the_optimizer(make_optimizer, taken):
    model, _, optimizer = begun(lambda p: make_optimizer(p, lr=0.01))
    train(model, optimizer, 2)
    before = len(taken)
    assert before
    for options in (optimizer.defaults, *optimizer.param_groups):  # as in an optimizer of a newer PyTorch
        options["of_tomorrow"] = False
    train(model, optimizer, 2, start=2)
    assert len(taken) == before


def test_what_others_note_in_a_group_is_no_option(taken):
    model, _, optimizer = begun(lambda p: SGD(p, lr=0.01))
    optimizer.param_groups[0]["initial_lr"] = 0.1  # as learning rate schedulers do
    train(model, optimizer, 2)
    assert len(taken) == 2


def test_neither_does_the_pass_replace_what_it_cannot_do(taken):
    both(lambda: trained(OPTIMIZERS["adamw"], penalty=L1(strength=1e-3)))
    both(lambda: trained(OPTIMIZERS["adamw"], powerpropagation=2.0))
    assert not taken


def test_found_overflows_are_left_to_a_fused_optimizer(taken):
    model, topkast, optimizer = begun(lambda p: AdamW(p, fused=True))
    train(model, optimizer, 2)
    before = topkast.weights["2.weight"].theta()
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())  # as a gradient scaler does
    train(model, optimizer, 1)
    assert len(taken) == 1
    assert torch.equal(topkast.weights["2.weight"].theta(), before)


def test_a_pass_that_rounds_otherwise_than_pytorch_is_not_used(taken, monkeypatch):
    def rounding(entries, gradient, masks, update):
        done = step.step_(entries, gradient, masks, update)
        entries.values[-1] *= 1 + 2**-23
        return done

    monkeypatch.setattr(one_pass, "step_", rounding)
    one_pass._gives_the_same.cache_clear()
    try:
        both(lambda: trained(OPTIMIZERS["adamw"]))
    finally:
        one_pass._gives_the_same.cache_clear()
    assert not taken


def test_a_step_that_fails_gives_the_gradients_back_and_can_be_repeated(taken):
    model, topkast, optimizer = begun(lambda p: Adam(p))
    train(model, optimizer, 1)
    weight, bias = topkast.weights["2.weight"], model[0].bias
    for repeat in (False, True):
        gradient = weight.parameter.grad
        bias.grad = torch.ones(33).to_sparse()  # which the optimizer refuses
        with pytest.raises(RuntimeError):
            optimizer.step()
        if not repeat:
            topkast.recover()
            assert weight.parameter.grad is gradient
        bias.grad = torch.ones(33)
        optimizer.step()
        assert weight.parameter.grad is gradient
        assert topkast.optimizer_steps == [2 + repeat]
    check_sparse(topkast)


def test_saving_after_a_step_that_failed_is_no_step(taken):
    model, topkast, optimizer = begun(lambda p: SGD(p, lr=0.1, weight_decay=0.1))
    train(model, optimizer, 1)
    model[0].bias.grad = torch.ones(33).to_sparse()
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert len(taken) == 2
    optimizer.zero_grad()
    get_optimizer_state_dict(model, optimizer)  # which makes state by a step
    assert topkast.optimizer_steps == [1]


def replaced_step(optimizer):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.5)

    optimizer.step = MethodType(Optimizer.profile_hook_step(torch.no_grad()(step)), optimizer)


def one_count(optimizer):
    states = [*optimizer.state.values()]
    for state in states[1:]:
        state["step"] = states[0]["step"]


CHANGES = {
    "another step": replaced_step,
    "one count for all": one_count,
    "no memory of gradients": lambda optimizer: optimizer.param_groups[0].update(betas=(0.0, 0.9)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_changed_in_a_run_takes_its_own_steps(change, taken):
    after = []

    def run():
        model, topkast, optimizer = begun(lambda p: Adam(p, lr=0.01), update_every=4)
        train(model, optimizer, 3)
        before = len(taken)
        change(optimizer)
        train(model, optimizer, 3, start=3)
        after.append(len(taken) - before)
        return [*model.state_dict().values()], topkast.state_dict()

    both(run)
    assert taken
    assert after == [0, 0]


def test_a_gradient_that_two_parameters_share_is_left_to_the_optimizer(taken):
    model = net()
    other = nn.Parameter(torch.zeros_like(model[2].weight))
    topkast = TopKast(model, 0.9, 0.7)
    optimizer = SGD([*model.parameters(), other], lr=0.1)
    topkast.attach(optimizer)
    for shares in (False, True):
        model(torch.ones(2, 9)).sum().backward()
        other.grad = model[2].weight.grad if shares else torch.ones_like(other)
        optimizer.step()
        assert len(taken) == 1


def test_a_function_of_pytorch_that_was_replaced_is_used(taken, monkeypatch):
    module = sys.modules[SGD.__module__]
    original = module.sgd

    def clamping(params, gradients, *rest, **options):
        original(params, [each.clamp(-1e-4, 1e-4) for each in gradients], *rest, **options)

    monkeypatch.setattr(module, "sgd", clamping)
    both(lambda: trained(OPTIMIZERS["sgd"]))
    assert not taken


def test_denormal_numbers_that_only_some_threads_flush_are_left_to_pytorch(taken):
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush them")
    try:
        trained(OPTIMIZERS["sgd"], steps=2)
        assert len(taken) == 2
        torch.set_num_threads(2)
        trained(OPTIMIZERS["sgd"], steps=2)
        assert len(taken) == 2
    finally:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)


def test_the_trial_runs_no_hooks_of_others(taken):
    seen = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer))
    one_pass._gives_the_same.cache_clear()
    try:
        trained(OPTIMIZERS["sgd"], steps=2)
    finally:
        handle.remove()
        one_pass._gives_the_same.cache_clear()
    assert len(taken) == 2 == len(seen)
    assert len(set(map(id, seen))) == 1


def test_small_weights_need_no_pass_and_compile_nothing(monkeypatch):
    class Refuses:
        def functions(self):
            raise AssertionError("compiled for a small weight")

    monkeypatch.setattr(passes, "COMPILED", Refuses())
    trained(OPTIMIZERS["adamw"])


def test_a_run_without_a_compiler_does_not_forget_that_there_is_one(monkeypatch, taken):
    one_pass._gives_the_same.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "COMPILED", Neither())
        trained(OPTIMIZERS["adamw"])
    assert not taken
    trained(OPTIMIZERS["adamw"])
    assert taken
