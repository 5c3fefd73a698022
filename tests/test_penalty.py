"""The exploration penalty: its closed form, its factor 1/D and its limits."""

import copy
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lightning_topkast import L1, L2, Norm, Targets, TopKast, TopKastError
from lightning_topkast.weights.shrinkage import Shrinkage
from tests.helpers import nouns
from tests.test_sharded_selection import Parts


@pytest.mark.parametrize("penalty", [L2(strength=1.0), L1(1.0), Norm(1.0)])
def test_the_closed_form_is_a_small_gradient_step(penalty):
    values = torch.tensor([0.5, -0.25, 1.0, -2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(penalty.value(values), values)
    stepped = penalty.shrink_(values.detach().clone(), amount=1e-3)
    torch.testing.assert_close(stepped, values.detach() - 1e-3 * gradient)


@pytest.mark.parametrize("penalty", [L2(strength=1.0), L1(1.0), Norm(1.0)])
@pytest.mark.parametrize("amount", [5.0, torch.tensor(5.0)])
def test_a_huge_step_stops_at_zero(penalty, amount):
    stepped = penalty.shrink_(torch.tensor([0.5, -0.25, 0.0]), amount=amount)
    assert stepped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("penalty", [L2(strength=1.0), L1(1.0), Norm(1.0)])
@pytest.mark.parametrize("values", [torch.zeros(3), torch.empty(0)])
def test_nothing_to_shrink_stays_as_it_is(penalty, values):
    assert torch.equal(penalty.shrink_(values.clone(), amount=0.1), values)


def one_step(penalty, strength, lr=0.5):
    """One SGD step whose gradient is zero, so that only the penalty acts; returns θ before and after."""
    torch.manual_seed(0)
    model = nn.Linear(10, 10, bias=False)
    topkast = TopKast(
        model, 0.8, 0.6, **nouns(penalty=penalty, strength=strength, keep_first_dense=False, keep_last_dense=False)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    topkast.attach(optimizer)
    weight = topkast.weights["weight"]
    before = weight.theta()
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    return weight, before, weight.theta()


def test_l2_shrinks_active_by_lambda_and_exploring_by_lambda_over_density():
    weight, before, after = one_step("l2", strength=0.1)
    exploring = weight.updated & ~weight.active
    density = 0.2  # not the sparsity 0.8
    torch.testing.assert_close(after[weight.active], before[weight.active] * (1 - 0.5 * 0.1))
    torch.testing.assert_close(after[exploring], before[exploring] * (1 - 0.5 * 0.1 / density))
    assert torch.equal(after[~weight.updated], before[~weight.updated])


def test_l1_takes_the_same_amount_from_every_entry():
    weight, before, after = one_step("l1", strength=0.01)
    exploring = weight.updated & ~weight.active
    torch.testing.assert_close(before[weight.active].abs() - after[weight.active].abs(), torch.full((20,), 0.005))
    torch.testing.assert_close(before[exploring].abs() - after[exploring].abs(), torch.full((20,), 0.025))


def test_norm_shortens_each_group_by_a_fixed_length():
    weight, before, after = one_step("norm", strength=0.01)
    for group, amount in ((weight.active, 0.005), (weight.updated & ~weight.active, 0.025)):
        assert float(before[group].norm() - after[group].norm()) == pytest.approx(amount, rel=1e-3)


def test_strength_zero_changes_nothing():
    _, before, after = one_step("l2", strength=0.0)
    assert torch.equal(before, after)


def test_the_penalty_uses_the_groups_current_learning_rate():
    _, before, at_half = one_step("l2", strength=0.1, lr=0.5)
    _, _, at_tenth = one_step("l2", strength=0.1, lr=0.1)
    assert (before - at_half).norm() == pytest.approx(5 * float((before - at_tenth).norm()), rel=1e-4)


def test_every_parameter_group_has_its_own_learning_rate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    topkast = TopKast(
        model, 0.8, 0.6, targets=Targets(keep_first_dense=False, keep_last_dense=False), penalty=L2(strength=0.1)
    )
    groups = [{"params": [model[0].weight], "lr": 0.5}, {"params": [model[1].weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    topkast.attach(optimizer)
    before = {name: weight.theta() for name, weight in topkast.weights.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, weight), lr in zip(topkast.weights.items(), (0.5, 0.1), strict=True):
        torch.testing.assert_close(weight.theta()[weight.active], before[name][weight.active] * (1 - lr * 0.1))


@pytest.mark.parametrize("penalty", ["l2", "l1", "norm"])
def test_a_learning_rate_in_a_tensor_is_the_same_as_a_number(penalty):
    _, _, number = one_step(penalty, strength=0.1, lr=0.25)
    _, _, tensor = one_step(penalty, strength=0.1, lr=torch.tensor(0.25))
    torch.testing.assert_close(number, tensor)


def test_an_adaptive_optimizer_does_not_divide_the_factor_away():
    torch.manual_seed(0)
    model = nn.Linear(10, 10, bias=False)
    topkast = TopKast(
        model, 0.8, 0.6, targets=Targets(keep_first_dense=False, keep_last_dense=False), penalty=L2(strength=0.1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    topkast.attach(optimizer)
    weight = topkast.weights["weight"]
    before, exploring = weight.theta(), weight.updated & ~weight.active
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    torch.testing.assert_close(weight.theta()[exploring], before[exploring] * (1 - 0.5 * 0.1 / 0.2))


def test_the_reported_penalty_is_half_lambda_theta_squared_with_the_density_factor():
    weight, _, after = one_step("l2", strength=0.1)
    active, exploring = after[weight.active], after[weight.updated & ~weight.active]
    expected = 0.05 * active.square().sum() + 0.05 / 0.2 * exploring.square().sum()
    torch.testing.assert_close(weight.penalty(), expected)


def attach(lr=0.1, scheduler=None, **options):
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4))
    topkast = TopKast(model, 0.9, 0.8, **nouns(**options))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if scheduler:
        scheduler(optimizer)
    return topkast.attach(optimizer), optimizer


def test_a_strength_that_overshoots_zero_is_refused_with_the_largest_that_does_not():
    with pytest.raises(TopKastError, match=r"choose a strength below 0\.0996"):
        attach(lr=1.0, strength=0.2)


def test_a_strength_that_just_reaches_zero_is_refused_and_the_next_smaller_one_is_not():
    at = 0.25 / 0.5  # learning rate · strength / density is exactly 1
    with pytest.raises(TopKastError, match=r"past zero: .* = 1, expected below 1"):
        L2(strength=at).strength_for("w", density=0.25, peak=0.5)
    below = math.nextafter(at, 0)
    assert L2(strength=below).strength_for("w", density=0.25, peak=0.5) == below


def test_a_rate_at_which_a_given_strength_just_reaches_zero_is_warned_of():
    weight, _, _ = one_step("l2", strength=0.1)
    weight.shrinkage.strength = 0.5
    assert weight.shrinkage.overshoots(0.4)
    assert not weight.shrinkage.overshoots(math.nextafter(0.4, 0))


@pytest.mark.parametrize("shrinkage", [1, 1.0, math.nextafter(1, 2), -1e-9, float("nan"), "0.5", True])
def test_a_shrinkage_that_leaves_nothing_is_refused(shrinkage):
    with pytest.raises(TopKastError, match=rf"expected L2\.shrinkage to be a number in \[0, 1\), got {shrinkage!r}$"):
        L2(shrinkage=shrinkage)


def test_a_shrinkage_just_below_one_leaves_next_to_nothing():
    shrinkage = math.nextafter(1, 0)
    topkast, optimizer = attach(lr=0.1, shrinkage=shrinkage)
    weight = topkast.weights["1.weight"]
    exploring = weight.updated & ~weight.active
    before = weight.theta()[exploring]
    weight.parameter.grad = torch.zeros_like(weight.parameter)
    optimizer.step()
    assert weight.theta()[exploring].abs().max() <= 1e-6 * before.abs().max()
    assert weight.theta()[weight.active].abs().min() > 0
    assert L2(shrinkage=0).shrinkage == 0


def test_a_learning_rate_that_rises_beyond_the_known_peak_is_capped_loudly():
    topkast, optimizer = attach(lr=0.01, strength=1.0)
    optimizer.param_groups[0]["lr"] = 1.0
    weight = topkast.weights["1.weight"]
    exploring = weight.updated & ~weight.active
    weight.parameter.grad = torch.zeros_like(weight.parameter)
    with pytest.warns(UserWarning, match="past zero"):
        optimizer.step()
    assert weight.theta()[exploring].abs().max() == 0


def test_shrinkage_is_the_share_lost_per_step_at_the_peak_learning_rate():
    warm_up = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # noqa: E731
    topkast, optimizer = attach(lr=0.1, shrinkage=1e-3, scheduler=warm_up)
    assert optimizer.param_groups[0]["lr"] == 0  # the peak is known all the same
    weight = topkast.weights["1.weight"]
    assert 0.1 * weight.strength / weight.forward_density == pytest.approx(1e-3, rel=1e-2)
    assert "shrinks by 0.001 per step, 9.5" in " ".join(topkast.summary().notes)


def test_the_summary_says_when_the_penalty_amounts_to_nothing():
    topkast, _ = attach(lr=1e-3, strength=1e-4)
    assert "too little to matter" in " ".join(topkast.summary().notes)


def test_shrinkage_without_a_learning_rate_is_refused():
    with pytest.raises(TopKastError, match=r"that of .* is 0"):
        attach(lr=0.0, shrinkage=1e-3)


# --- learning rates above the known peak ---------------------------------------------------------------------------

SHRINKAGE = 1e-3
lr_scheduler = torch.optim.lr_scheduler


def warm_up_by_hand(optimizer):
    """From 1e-6 to 0.1, without a scheduler."""
    for group in optimizer.param_groups:
        _set_lr(group, 1e-6)

    class Hand:
        step_count = 0

        def step(self):
            self.step_count += 1
            for group in optimizer.param_groups:
                _set_lr(group, 0.1 * min(1, self.step_count / 20))

    return Hand()


def _set_lr(group, lr):
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


SCHEDULES = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=90),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 0.1, step_size_up=20, cycle_momentum=False),
    "up to a thousandfold": lambda o: lr_scheduler.LambdaLR(o, lambda i: min(1 + 50 * i, 1000)),
    "warm-up by hand": warm_up_by_hand,
}


@pytest.mark.parametrize("kind", ["a number", "a tensor", "a tensor on another device"])
@pytest.mark.parametrize("storage", ["masked", "packed", "compact"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_takes_more_than_the_shrinkage_whatever_the_scheduler_does(monkeypatch, schedule, storage, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4))
    topkast = TopKast(model, 0.75, 0.5, penalty=L2(shrinkage=SHRINKAGE), storage=storage, update_every=7)
    lr = 1e-4 if kind == "a number" else torch.tensor(1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = SCHEDULES[schedule](optimizer)
    topkast.attach(optimizer)
    if kind == "a tensor on another device":
        pretend_a_gpu(monkeypatch)
    weight, shares, highest = topkast.weights["1.weight"], [], 0.0
    for _ in range(60):
        before, active, updated = weight.theta(), weight.active, weight.updated
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        lr = float(optimizer.param_groups[0]["lr"])
        highest = max(highest, lr)
        optimizer.step()
        scheduler.step()
        lost = 1 - weight.theta().double() / before.double()
        shares.append(float(lost[updated & ~active].max()))
        assert shares[-1] <= SHRINKAGE * (1 + 1e-3)
        assert lost[active].max() <= SHRINKAGE * 0.25 * (1 + 1e-3)
        # float32 rounds a share of 1e-3 to about 1e-7
        known = max(highest, 0.1 if schedule == "one cycle" else 0)
        assert shares[-1] == pytest.approx(SHRINKAGE * lr / known, abs=2e-7 + 1e-3 * SHRINKAGE)
    assert max(shares) == pytest.approx(SHRINKAGE, rel=1e-2)
    assert weight.strength == pytest.approx(SHRINKAGE * 0.25 / known, rel=1e-3)


def pretend_a_gpu(monkeypatch):
    """Let the learning rate take the way of one on a GPU, where reading a tensor is an error."""
    limit = Shrinkage.limit

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

        def _refuse(self, *args):
            raise AssertionError("the host has waited for the learning rate")

        __float__ = __bool__ = item = _refuse

    def limit_as_on_a_gpu(self, lr):
        limit(self, lr.as_subclass(OnGpu))
        self._strength = self._strength.as_subclass(torch.Tensor)

    monkeypatch.setattr(Shrinkage, "limit", limit_as_on_a_gpu)


@pytest.mark.parametrize("kind", ["a number", "a tensor"])
def test_a_lowered_strength_is_kept_by_a_saved_state(kind):
    def run(steps, state=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4))
        topkast = TopKast(model, 0.75, 0.5, penalty=L2(shrinkage=SHRINKAGE))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4 if kind == "a number" else torch.tensor(1e-4))
        topkast.attach(optimizer)
        if state is not None:
            model.load_state_dict(state[0])
            topkast.load_state_dict(state[1])
        for step in steps:
            _set_lr(optimizer.param_groups[0], 0.1 if step < 5 else 1e-3)
            model.zero_grad()
            model(torch.ones(2, 8)).square().mean().backward()
            optimizer.step()
        return topkast, (copy.deepcopy(model.state_dict()), topkast.state_dict())

    whole, _ = run(range(10))
    _, half = run(range(6))
    rest, _ = run(range(6, 10), half)
    assert rest.weights["1.weight"].strength == pytest.approx(SHRINKAGE * 0.25 / 0.1)
    assert torch.equal(rest.weights["1.weight"].theta(), whole.weights["1.weight"].theta())


@pytest.mark.parametrize("storage", ["masked", "packed"])
@pytest.mark.parametrize(("penalty", "lr"), [("l2", 2.0), ("l1", 100.0), ("norm", 100.0)])
def test_a_given_strength_that_empties_the_active_set_warns_and_stops_at_zero(penalty, lr, storage):
    topkast, optimizer = attach(lr=0.01, strength=1.0, penalty=penalty, storage=storage, kernels="torch")
    weight = topkast.weights["1.weight"]
    for rate, warned in ((0.02, False), (lr, True)):
        optimizer.param_groups[0]["lr"] = rate
        for parameter in topkast.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
        assert any("active entries of '1.weight' past zero" in str(one.message) for one in said) == warned
        assert bool(weight.alpha().any()) != warned


def test_a_resumed_summary_says_what_was_asked():
    topkast, optimizer = attach(lr=1e-6, shrinkage=1e-3)
    optimizer.param_groups[0]["lr"] = 0.1
    for parameter in topkast.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-5
    assert "shrinks by 0.001 per step, 9.5" in " ".join(topkast.summary().notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("penalty", [L2(), L1(1.0), Norm(1.0)], ids=lambda each: type(each).__name__)
def test_value_of_16_bit_parameters_is_finite(penalty, dtype):
    values = torch.full((1000,), 300.0, dtype=dtype)
    assert float(penalty.value(values)) == pytest.approx(float(penalty.value(values.double())), rel=1e-2)
    assert float(penalty.value(values, lambda part: part)) == pytest.approx(float(penalty.value(values)))
    shrunk = penalty.shrink_(values.clone(), 1.0, lambda part: part) if isinstance(penalty, Norm) else None
    assert shrunk is None or torch.isfinite(shrunk).all()


@pytest.mark.parametrize("penalty", [L2(strength=0.2), L1(strength=0.2), Norm(strength=0.2)], ids=str)
def test_parts_of_a_sharded_weight_lose_what_the_whole_would(penalty):
    """The first part loses all of its active values by L1, but the weight does not."""
    active, exploring = torch.tensor([[0.01, -0.01], [3.0, 4.0]]), torch.tensor([[1.0, -2.0], [0.5, 0.25]])

    def shrunk(active, exploring, total=None):
        shrinkage = Shrinkage(penalty, 0.5)
        shrinkage.strength = penalty.strength
        value = shrinkage.value(active, exploring, total)
        for values, explores in ((active, False), (exploring, True)):
            shrinkage.apply_(values, explores, 0.1, total)
        return value, active, exploring, shrinkage.was_emptied

    value, *whole, _ = shrunk(active.flatten().clone(), exploring.flatten().clone())
    parts = Parts(2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda at: shrunk(active[at].clone(), exploring[at].clone(), parts.total(at)), range(2)))
    for each in found:
        torch.testing.assert_close(each[0], value)
        assert not each[3]
    torch.testing.assert_close([torch.cat(halves) for halves in list(zip(*found, strict=True))[1:3]], whole)
