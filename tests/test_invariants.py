"""The invariants of the method, over plain and adaptive optimizers with weight decay."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_topkast import NonFiniteWeightError, TopKast, TopKastError
from lightning_topkast.method.selection import nested_top_k
from tests.helpers import nouns

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}
optimizers = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


class Run:
    """A small network in training; every step's batch follows from the step number."""

    def __init__(self, make_optimizer=OPTIMIZERS["adamw"], update_every=5, forward=0.9, backward=0.8, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 4))
        self.optimizer = make_optimizer(self.model.parameters())
        options.setdefault("strength", 1e-2)
        self.topkast = TopKast(self.model, forward, backward, **nouns(update_every=update_every, **options))
        self.topkast.attach(self.optimizer)
        self.weight = self.topkast.weights["2.weight"]
        self.done = 0

    def backward(self):
        generator = torch.Generator().manual_seed(self.done)
        x, y = torch.randn(16, 12, generator=generator), torch.randint(0, 4, (16,), generator=generator)
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    def step(self, count=1):
        for _ in range(count):
            self.optimizer.zero_grad()
            self.backward()
            self.optimizer.step()
            self.done += 1


# 1 ------------------------------------------------------------------------------------------------------------------


@optimizers
def test_sets_are_exact_and_nested_at_every_step(make_optimizer):
    run = Run(make_optimizer)
    for _ in range(20):
        run.step()
        assert run.weight.active.sum() == 120
        assert run.weight.updated.sum() == 240
        assert not (run.weight.active & ~run.weight.updated).any()


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple),
    forward=st.floats(0, 0.95),
    share=st.floats(0, 1),
    levels=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_sets_are_exact_for_any_shape_with_ties_and_zeros(shape, forward, share, levels):
    module = nn.Module()
    module.theta = nn.Parameter(torch.randint(-levels, levels, shape).float())
    backward = forward * share
    matrices = shape[0] if len(shape) == 3 and min(shape) > 1 else 1  # each has sets of its own
    size = torch.Size(shape).numel() // matrices
    active, updated = round((1 - forward) * size), round((1 - backward) * size)
    if active == 0:
        with pytest.raises(TopKastError, match="too few for one active entry"):
            TopKast(module, forward, backward, include=["theta"])
        return
    theta = module.theta.detach().clone()
    weight = TopKast(module, forward, backward, include=["theta"]).weights["theta"]
    for members, count in ((weight.active, active), (weight.updated, max(updated, active))):
        assert members.view(matrices, -1).sum(1).tolist() == [count] * matrices
    assert not (weight.active & ~weight.updated).any()
    assert torch.equal(weight.theta(), theta)
    assert torch.equal(weight.parameter.detach(), theta * weight.active)


# 2 ------------------------------------------------------------------------------------------------------------------


@optimizers
def test_between_steps_the_parameter_is_zero_outside_the_active_set(make_optimizer):
    run = Run(make_optimizer)
    for _ in range(12):
        run.step()
        parameter = run.weight.parameter.detach()
        assert not parameter[~run.weight.active].any()
        assert torch.equal(parameter, run.weight.theta() * run.weight.active)


def test_the_forward_pass_uses_active_entries_only():
    run = Run()
    run.step(7)
    x = torch.randn(5, 12)
    dense = copy.deepcopy(run.model)
    with torch.no_grad():
        dense[2].weight.copy_(run.weight.theta() * run.weight.active)
    assert torch.equal(run.model(x), dense(x))


# 3 ------------------------------------------------------------------------------------------------------------------


@optimizers
@pytest.mark.parametrize("reset", [True, False])
def test_the_reservoir_is_bitwise_unchanged_between_refreshes(make_optimizer, reset):
    run = Run(make_optimizer, update_every=5, reset_optimizer_state=reset)
    run.step(5)  # momentum has built up, and a refresh has moved entries out of B
    for _ in range(3):
        reservoir = ~run.weight.updated
        before = run.weight.theta()
        run.step(4)
        after = run.weight.theta()
        assert torch.equal(after[reservoir].view(torch.int32), before[reservoir].view(torch.int32))
        assert (after[~reservoir] != before[~reservoir]).float().mean() > 0.9  # the rest does train
        run.step(1)  # the refresh


@optimizers
def test_exploring_entries_train_though_they_are_zero_in_the_forward_pass(make_optimizer):
    run = Run(make_optimizer)
    exploring = run.weight.updated & ~run.weight.active
    before = run.weight.theta()
    run.step(3)
    assert (run.weight.theta() != before)[exploring].float().mean() > 0.9


# 4 ------------------------------------------------------------------------------------------------------------------


@optimizers
def test_promoted_entries_enter_with_their_stored_value_and_demoted_keep_theirs(make_optimizer):
    run = Run(make_optimizer, update_every=1000)
    moved = 0
    for _ in range(5):
        run.step(4)
        before, active_before = run.weight.theta(), run.weight.active
        run.topkast.refresh()
        after, active = run.weight.theta(), run.weight.active
        assert torch.equal(after, before)
        promoted = active & ~active_before
        assert torch.equal(run.weight.parameter.detach()[promoted], before[promoted])
        assert before[promoted].all()  # not the zeros they were in the forward pass
        moved += int(promoted.sum())
    assert moved


# 5 ------------------------------------------------------------------------------------------------------------------


@optimizers
def test_the_optimizer_updates_the_models_own_tensors_after_many_refreshes(make_optimizer):
    run = Run(make_optimizer, update_every=2)
    identity = id(run.model[2].weight)
    storage = run.model[2].weight.data_ptr()
    run.step(30)
    assert id(run.model[2].weight) == identity
    assert run.model[2].weight.data_ptr() == storage
    assert any(p is run.model[2].weight for group in run.optimizer.param_groups for p in group["params"])
    before = run.model[2].weight.detach().clone()
    run.step()
    assert not torch.equal(run.model[2].weight, before)


def test_training_learns():
    run = Run()
    first = run.backward().item()
    for _ in range(150):
        run.step()
        run.done = 0  # one batch, again and again
    assert run.backward().item() < 0.2 * first


# 6 ------------------------------------------------------------------------------------------------------------------


def test_clipping_sees_the_masked_gradient_and_leaves_the_penalty_alone():
    """With a tiny clipping norm only the penalty moves entries, by its full amount."""
    run = Run(OPTIMIZERS["sgd"], strength=0.02)
    run.optimizer.param_groups[0]["weight_decay"] = 0
    run.backward()
    dense = run.weight.parameter.grad.clone()
    run.topkast.mask_gradients()
    masked = run.weight.parameter.grad
    assert torch.equal(masked, dense * run.weight.updated)
    assert masked.norm() < dense.norm()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1e-12)
    before = run.weight.theta()
    exploring = run.weight.updated & ~run.weight.active
    run.optimizer.step()
    torch.testing.assert_close(run.weight.theta()[exploring], before[exploring] * (1 - 0.1 * 0.02 / 0.1))


# 7 ------------------------------------------------------------------------------------------------------------------


def same_shaped_state(run):
    state = run.optimizer.state[run.weight.parameter]
    return [value for value in state.values() if torch.is_tensor(value) and value.shape == run.weight.parameter.shape]


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "adamw_fused", "amsgrad", "rmsprop"])
def test_optimizer_state_of_entries_that_leave_is_reset(name):
    run = Run(OPTIMIZERS[name], update_every=1000)
    run.step(10)
    before = run.weight.updated
    run.topkast.refresh()
    left = before & ~run.weight.updated
    assert left.any()
    assert same_shaped_state(run)
    for value in same_shaped_state(run):
        assert not value[~run.weight.updated].any()
        assert value[run.weight.active & before].any()  # what stays is kept
    run.step(3)
    for value in same_shaped_state(run):
        assert not value[~run.weight.updated].any()  # so nothing decays into denormal floats


def test_optimizer_state_is_kept_when_asked():
    run = Run(OPTIMIZERS["adamw"], update_every=1000, reset_optimizer_state=False)
    run.step(10)
    before, moments = run.weight.updated, [value.clone() for value in same_shaped_state(run)]
    run.topkast.refresh()
    left = before & ~run.weight.updated
    for value, moment in zip(same_shaped_state(run), moments, strict=True):
        assert torch.equal(value, moment)
        assert value[left].any()


# 8 ------------------------------------------------------------------------------------------------------------------


@optimizers
@pytest.mark.parametrize("exploration", ["magnitude", "random"])
def test_saving_and_resuming_in_mid_interval_is_bitwise_the_same_run(make_optimizer, exploration, tmp_path):
    whole = Run(make_optimizer, exploration=exploration)
    whole.step(23)

    first = Run(make_optimizer, exploration=exploration)
    first.step(12)  # two steps after a refresh
    saved = {"model": first.model, "optimizer": first.optimizer, "topkast": first.topkast}
    torch.save({name: part.state_dict() for name, part in saved.items()}, tmp_path / "c.pt")

    resumed = Run(make_optimizer, exploration=exploration)
    resumed.step(3)  # whatever it held before must not matter
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    for name in ("model", "optimizer", "topkast"):
        getattr(resumed, name).load_state_dict(state[name])
    resumed.done = 12
    resumed.step(11)

    assert resumed.topkast.step_count == whole.topkast.step_count == 23
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(resumed.weight.theta(), whole.weight.theta())
    assert torch.equal(resumed.weight.tiers, whole.weight.tiers)
    assert resumed.weight.never_active_entries == whole.weight.never_active_entries
    assert resumed.weight.promoted == whole.weight.promoted
    for ours, theirs in zip(same_shaped_state(resumed), same_shaped_state(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_accumulated_gradients_step_as_one():
    run, twin = Run(OPTIMIZERS["adamw"], update_every=2), Run(OPTIMIZERS["adamw"], update_every=2)
    for _ in range(6):
        run.optimizer.zero_grad()
        run.backward()
        run.backward()
        run.optimizer.step()
        run.done += 1
        twin.optimizer.zero_grad()
        twin.backward()
        for parameter in twin.model.parameters():
            parameter.grad *= 2
        twin.optimizer.step()
        twin.done += 1
    assert run.topkast.step_count == 6
    assert torch.equal(run.weight.theta(), twin.weight.theta())


# 10 -----------------------------------------------------------------------------------------------------------------


def test_a_step_skipped_by_a_gradient_scaler_changes_nothing():
    run = Run(OPTIMIZERS["adamw"])
    run.step(3)
    scaler = torch.amp.GradScaler("cpu")
    theta, alpha = run.weight.theta(), run.weight.parameter.detach().clone()
    run.optimizer.zero_grad()
    run.backward()
    scaler.scale(torch.ones(()))  # the scaler starts up at its first loss
    run.weight.parameter.grad[0, 0] = float("inf")
    scaler.step(run.optimizer)
    scaler.update()
    assert run.topkast.step_count == 3
    assert torch.equal(run.weight.theta(), theta)
    assert torch.equal(run.weight.parameter, alpha)
    run.step(3)
    assert run.topkast.step_count == 6


def test_a_step_skipped_inside_a_fused_kernel_changes_nothing():
    run = Run(OPTIMIZERS["adamw_fused"])
    run.step(3)
    theta, alpha = run.weight.theta(), run.weight.parameter.detach().clone()
    run.optimizer.zero_grad()
    run.backward()
    run.optimizer.grad_scale, run.optimizer.found_inf = torch.ones(()), torch.ones(())  # as GradScaler.step does
    run.optimizer.step()
    del run.optimizer.grad_scale, run.optimizer.found_inf
    assert run.topkast.step_count == 3
    assert torch.equal(run.weight.theta(), theta)
    assert torch.equal(run.weight.parameter, alpha)


def test_a_step_without_gradients_changes_nothing():
    run = Run()
    run.step(3)
    theta = run.weight.theta()
    run.optimizer.zero_grad()
    run.optimizer.step()
    assert run.topkast.step_count == 3
    assert torch.equal(run.weight.theta(), theta)


# The whole step against an independent account of it -----------------------------------------------------------------


def reference_adamw(model, steps, batches, forward, backward, every, lr, decay, strength):
    """Top-KAST with AdamW written out on dense tensors with masks, sharing nothing but the selection's definition."""
    weight = model[2].weight
    theta = weight.detach().clone()
    size = theta.numel()
    active_count, updated_count = round((1 - forward) * size), round((1 - backward) * size)
    density = active_count / size

    def choose():
        order = sorted(range(size), key=lambda i: (-abs(float(theta.flatten()[i])), i))
        active, updated = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
        active[order[:active_count]] = True
        updated[order[:updated_count]] = True
        return active.view_as(theta), updated.view_as(theta)

    active, updated = choose()
    others = [p for p in model.parameters() if p is not weight]
    optimizer = torch.optim.AdamW(others, lr=lr, weight_decay=decay)
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    for step in range(1, steps + 1):
        with torch.no_grad():
            weight.copy_(theta * active)
        optimizer.zero_grad()
        weight.grad = None
        x, y = batches(step - 1)
        nn.functional.cross_entropy(model(x), y).backward()
        gradient = weight.grad * updated
        optimizer.step()
        mean = torch.where(updated, 0.9 * mean + 0.1 * gradient, 0)
        square = torch.where(updated, 0.999 * square + 0.001 * gradient**2, 0)
        direction = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        moved = theta * (1 - lr * decay) - lr * direction
        moved = moved * torch.where(active, 1 - lr * strength, 1 - lr * strength / density)
        theta = torch.where(updated, moved, theta)
        if step % every == 0:
            active, updated = choose()
            mean, square = mean * updated, square * updated
    return theta, active, updated


def test_two_hundred_steps_agree_with_the_method_written_out_on_dense_tensors():
    run = Run(OPTIMIZERS["adamw"], update_every=10)

    def batches(step):
        generator = torch.Generator().manual_seed(step)
        return torch.randn(16, 12, generator=generator), torch.randint(0, 4, (16,), generator=generator)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 4))
    theta, active, updated = reference_adamw(model, 200, batches, 0.9, 0.8, 10, lr=1e-2, decay=0.1, strength=1e-2)
    run.step(200)
    assert torch.equal(run.weight.active, active)
    assert torch.equal(run.weight.updated, updated)
    torch.testing.assert_close(run.weight.theta(), theta, rtol=1e-4, atol=1e-6)


# The straight-through baseline, and what else `attach` has to bear ---------------------------------------------------


def test_backward_sparsity_zero_without_penalty_is_the_straight_through_estimator():
    run = Run(OPTIMIZERS["sgd"], update_every=1, forward=0.9, backward=0.0, strength=0.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 4))
    dense = model[2].weight.detach().clone().requires_grad_()
    optimizer = OPTIMIZERS["sgd"]([p for p in model.parameters() if p is not model[2].weight] + [dense])
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 12, generator=generator), torch.randint(0, 4, (16,), generator=generator)
        optimizer.zero_grad()
        mask = nested_top_k(dense.detach().abs(), (120,))
        straight_through = dense + (dense * mask - dense).detach()
        hidden = torch.tanh(nn.functional.linear(torch.tanh(model[0](x)), straight_through, model[2].bias))
        nn.functional.cross_entropy(model[4](hidden), y).backward()
        optimizer.step()
    run.step(20)
    torch.testing.assert_close(run.weight.theta(), dense.detach())


def test_a_step_with_a_closure_is_the_same_step():
    run, twin = Run(update_every=3), Run(update_every=3)
    for step in range(7):
        run.step()

        def closure(twin=twin):
            twin.optimizer.zero_grad()
            return twin.backward()

        loss = twin.optimizer.step(closure) if step % 2 else twin.optimizer.step(closure=closure)
        assert loss is not None
        twin.done += 1
    assert torch.equal(run.weight.theta(), twin.weight.theta())


def test_lbfgs_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(TopKastError, match="LBFGS cannot train sparse weights: it evaluates its closure many times"):
        TopKast(model, 0.9, 0.8).attach(torch.optim.LBFGS(model.parameters()))


def test_an_optimizer_that_evaluates_its_closure_twice_is_stopped():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            with torch.enable_grad():
                closure()
                return closure()

    run = Run(lambda p: Twice(p, lr=0.1))
    with pytest.raises(TopKastError, match="more than once"):
        run.optimizer.step(run.backward)
    run.topkast.recover()
    assert run.weight.is_sparse


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_named_and_nothing_is_overwritten(bad):
    run = Run(keep_first_dense=False)
    run.step(2)
    position = tuple(run.weight.active.nonzero()[0])
    with torch.no_grad():
        run.weight.parameter[position] = bad
    before = {name: (weight.theta(), weight.tiers) for name, weight in run.topkast.weights.items()}
    with pytest.raises(NonFiniteWeightError, match=r"'2\.weight' holds NaN or infinity"):
        run.topkast.refresh()
    for name, weight in run.topkast.weights.items():
        assert torch.equal(weight.theta().nan_to_num(), before[name][0].nan_to_num())
        assert torch.equal(weight.tiers, before[name][1])


def test_a_model_moved_after_construction_is_followed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    topkast = TopKast(model, 0.9, 0.8)
    weight = topkast.weights["1.weight"]
    theta, tiers = weight.theta(), weight.tiers
    model.to(memory_format=torch.channels_last).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    assert torch.equal(weight.theta(), theta.double())
    assert torch.equal(weight.tiers, tiers)
    model(torch.randn(2, 3, 12, 12).double()).square().mean().backward()
    optimizer.step()
    assert weight.is_sparse
    reservoir = tiers == 0
    assert torch.equal(weight.theta()[reservoir], theta.double()[reservoir])


def test_memory_layout_does_not_change_the_run():
    def train(memory_format):
        torch.manual_seed(0)
        model = (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
            .double()
            .to(memory_format=memory_format)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        topkast = TopKast(model, 0.9, 0.8, update_every=2).attach(optimizer)
        for step in range(7):
            optimizer.zero_grad()
            x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            model(x.to(memory_format=memory_format)).square().mean().backward()
            optimizer.step()
        return topkast.weights["1.weight"]

    plain, last = train(torch.contiguous_format), train(torch.channels_last)
    assert torch.equal(plain.tiers, last.tiers)
    torch.testing.assert_close(plain.theta(), last.theta())


def test_detach_lets_the_optimizer_go_and_keeps_the_model_sparse():
    run = Run()
    run.step(3)
    run.topkast.detach()
    assert run.weight.is_sparse
    run.step(1)
    assert run.topkast.step_count == 3


def test_a_second_optimizer_continues_where_the_first_was_detached():
    run = Run()
    run.step(3)
    run.topkast.detach()
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    run.topkast.attach(run.optimizer)
    run.step(4)
    assert run.topkast.step_count == 7
    assert run.weight.is_sparse


def test_two_optimizers_count_their_own_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    one = torch.optim.SGD(model[:2].parameters(), lr=0.1)
    two = torch.optim.Adam(model[2:].parameters(), lr=0.1)
    topkast = TopKast(model, 0.9, 0.8, update_every=4).attach(one, two)
    before = topkast.weights["2.weight"].theta()
    for step in range(6):
        model.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        one.step()
        if step % 3 == 0:
            two.step()
    assert topkast.step_count == 6
    assert topkast.state_dict()["steps"] == [6, 2]
    assert not torch.equal(topkast.weights["2.weight"].theta(), before)


def test_the_wrong_optimizer_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    topkast = TopKast(model, 0.9, 0.8)
    with pytest.raises(TopKastError, match="holds none of the sparse weights"):
        topkast.attach(torch.optim.SGD(nn.Linear(4, 4).parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    with pytest.raises(TopKastError, match="already attached"):
        topkast.attach(optimizer)
