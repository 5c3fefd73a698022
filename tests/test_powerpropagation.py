"""Powerpropagation: the optimizer updates φ where the network computes with θ = φ|φ|^(a-1)."""

import copy

import pytest
import torch
from torch import nn

from lightning_topkast import TopKast, TopKastError
from lightning_topkast.method.powerpropagation import Powerpropagation
from lightning_topkast.settings import Settings
from tests.helpers import OPTIMIZERS, nouns, same


class Powers(nn.Module):
    """The reparametrisation as the paper has it: φ is the parameter, and autograd does the rest."""

    def __init__(self, linear: nn.Linear, exponent: float) -> None:
        super().__init__()
        theta = linear.weight.detach()
        self.exponent = exponent
        self.phi = nn.Parameter(theta.sign() * theta.abs() ** (1 / exponent))
        self.bias = nn.Parameter(linear.bias.detach().clone())

    @property
    def theta(self):
        return self.phi * self.phi.abs() ** (self.exponent - 1)

    def forward(self, x):
        return nn.functional.linear(x, self.theta, self.bias)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 8, generator=generator), torch.randn(16, 6, generator=generator)


def train(layer, optimizer, steps):
    for step in range(steps):
        x, y = (part.to(next(layer.parameters()).dtype) for part in batch(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("storage", ["masked", "packed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("exponent", [1.5, 2.0, 4.0])
def test_training_is_that_of_the_reparametrised_layer(optimizer, exponent, storage):
    torch.manual_seed(0)
    layer = nn.Linear(8, 6).double()
    model = nn.Sequential(nn.Linear(8, 6).double())
    model.load_state_dict({f"0.{name}": value for name, value in layer.state_dict().items()})
    reference = Powers(layer, exponent)
    train(reference, OPTIMIZERS[optimizer](reference.parameters(), 0.01), 12)
    # without sparsity, so that there is nothing but the reparametrisation
    options = {"include": ["0.weight"], "strength": 0.0, "update_every": 5, "storage": storage}
    topkast = TopKast(model, 0.0, 0.0, **nouns(powerpropagation=exponent, kernels="torch", **options))
    ours = OPTIMIZERS[optimizer](model.parameters(), 0.01)
    topkast.attach(ours)
    train(model, ours, 12)
    torch.testing.assert_close(topkast.weights["0.weight"].theta(), reference.theta.detach(), rtol=1e-9, atol=1e-11)


def sparse_run(storage="masked", exponent=2.0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 6))
    options = {"update_every": 4, "strength": 1e-2, "kernels": "torch"} | options
    topkast = TopKast(model, 0.9, 0.7, **nouns(powerpropagation=exponent, storage=storage, **options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return model, topkast.attach(optimizer), optimizer


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_the_reservoir_stands_still_and_the_parameter_is_zero_outside_the_active_set(storage):
    model, topkast, optimizer = sparse_run(storage)
    weight = topkast.weights["2.weight"]
    for step in range(11):
        before, outside = weight.theta(), ~weight.updated
        train(model, optimizer, 1)
        if (step + 1) % 4:
            assert torch.equal(weight.theta()[outside], before[outside])
        assert not model.state_dict()["2.weight"][~weight.active].any()
        assert (int(weight.active.sum()), int(weight.updated.sum())) == (40, 120)


def test_masked_and_packed_training_agree():
    results = []
    for storage in ("masked", "packed"):
        model, topkast, optimizer = sparse_run(storage)
        train(model, optimizer, 15)
        results.append(topkast.weights["2.weight"])
    assert torch.equal(results[0].tiers, results[1].tiers)
    torch.testing.assert_close(results[0].theta(), results[1].theta(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_what_the_optimizer_leaves_alone_is_not_touched_by_rounding(storage):
    model, topkast, _ = sparse_run(storage, strength=0.0, exponent=3.0)
    topkast.detach()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    topkast.attach(still)
    before = topkast.weights["2.weight"].theta()
    train(model, still, 3)
    assert torch.equal(topkast.weights["2.weight"].theta(), before)


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_a_resumed_run_equals_the_whole_one_bit_for_bit(storage):
    whole, topkast, optimizer = sparse_run(storage)
    train(whole, optimizer, 6)
    saved = copy.deepcopy([part.state_dict() for part in (whole, optimizer, topkast)])
    resumed, other, fresh = sparse_run(storage)
    for part, state in zip((resumed, fresh, other), saved, strict=True):
        part.load_state_dict(state)
    for model, steps in ((whole, optimizer), (resumed, fresh)):
        train(model, steps, 6)
    assert same(topkast.state_dict(), other.state_dict())


def test_interrupted_anywhere_in_the_exchange_theta_is_what_it_was():
    theta = torch.tensor([-2.0, 0.0, 0.3, 1.0])
    exchanged = Powerpropagation(theta, 2.0)
    assert torch.equal(exchanged.theta_of(theta.clone()), theta), "before φ is in its place"
    assert torch.equal(exchanged.theta_of(exchanged.phi.clone()), theta), "and after"
    values = exchanged.phi * 2
    exchanged.leave_(values)
    torch.testing.assert_close(values, theta * 4)
    assert torch.equal(exchanged.theta_of(values), values), "and once θ is back"


@pytest.mark.parametrize("exponent", [0.5, 0, -1, "2", True, float("nan")])
def test_an_exponent_below_one_is_refused(exponent):
    with pytest.raises(
        TopKastError, match=r"expected powerpropagation to be a number of at least 1 \(1 turns it off\)"
    ):
        Settings(0.9, 0.8, powerpropagation=exponent)
