"""The soak: a slice of it, proof that its oracle sees broken code, and what it has found."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_topkast import TopKast

OPTIONS = {
    "forward_sparsity": 0.75, "backward_sparsity": 0.5, "keep_first_dense": False, "keep_last_dense": False,
    "update_every": 50, "operators": "torch",
}  # fmt: skip


def train(model, topkast, optimizer, steps, shape) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(shape, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


# --- what it has found --------------------------------------------------------------------------------------------


def dense_momentum(topkast, optimizer):
    """The momentum of the first sparse weight, spread out."""
    weight = next(iter(topkast.weights.values()))
    order = torch.cat([torch.nonzero((weight.tiers == tier).flatten()).flatten() for tier in (2, 1)])
    dense = torch.zeros(weight.size)
    dense[order] = optimizer.state[weight.parameter]["momentum_buffer"][: order.numel()]
    return dense.view(weight.shape), weight.updated


@pytest.mark.parametrize("way", ["step", "save", "detach", "copy", "pickle"])
def test_momenta_of_a_packed_weight_follow_others_that_are_loaded_whatever_comes_next(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16))
    topkast = TopKast(model, **OPTIONS, execution="packed", penalty_strength=0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    topkast.attach(optimizer)
    train(model, topkast, optimizer, 3, (4, 6))
    momentum, updated = dense_momentum(topkast, optimizer)
    model.load_state_dict({"0.weight": torch.randn(16, 6), "0.bias": torch.zeros(16)})
    if way == "step":
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        momentum *= 0.9
    elif way == "save":
        states = copy.deepcopy([part.state_dict() for part in (model, topkast, optimizer)])
        model = nn.Sequential(nn.Linear(6, 16))
        topkast = TopKast(model, **OPTIONS, execution="packed", penalty_strength=0.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        topkast.attach(optimizer)
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[2])
        topkast.load_state_dict(states[1])
    else:
        if way == "detach":
            topkast.detach()
        elif way == "copy":
            model, topkast, optimizer = copy.deepcopy((model, topkast, optimizer))
        else:
            model, topkast, optimizer = pickle.loads(pickle.dumps((model, topkast, optimizer)))
        topkast.attach(optimizer)
    followed, now_updated = dense_momentum(topkast, optimizer)
    assert not torch.equal(updated, now_updated)
    assert torch.equal(followed, momentum * now_updated)


def test_state_spread_out_for_masked_mode_has_the_weights_memory_format():
    """A fused optimizer walks through memory, and would give entries each other's momenta."""

    def parts(execution):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3)).to(memory_format=torch.channels_last)
        topkast = TopKast(model, **OPTIONS, execution=execution)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
        topkast.attach(optimizer)
        return model, topkast, optimizer

    saved = parts("compact")
    train(*saved, 3, (2, 3, 5, 5))
    resumed = parts("masked")
    for part in (0, 2, 1):
        resumed[part].load_state_dict(copy.deepcopy(saved[part].state_dict()))
    weight = resumed[1].weights["0.weight"]
    assert resumed[2].state[weight.parameter]["momentum_buffer"].stride() == weight.parameter.stride()
    train(*saved, 2, (2, 3, 5, 5))
    train(*resumed, 2, (2, 3, 5, 5))
    torch.testing.assert_close(weight.theta().contiguous(), saved[1].weights["0.weight"].theta())


def test_sets_to_come_that_other_weights_have_outdated_are_outdated_after_a_save_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16))
    options = OPTIONS | {"execution": "packed", "update_every": 4, "refresh_delay": 2}
    topkast = TopKast(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    topkast.attach(optimizer)
    train(model, topkast, optimizer, 5, (4, 6))  # chosen after 4, for after 6
    model.load_state_dict({"0.weight": torch.randn(16, 6), "0.bias": torch.zeros(16)})
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, topkast)])
    other = nn.Sequential(nn.Linear(6, 16))
    resumed = TopKast(other, **options)
    second = torch.optim.SGD(other.parameters(), 0.1)
    resumed.attach(second)
    for part, state in zip((other, second, resumed), states, strict=True):
        part.load_state_dict(state)
    for engine, net, trained in ((topkast, model, optimizer), (resumed, other, second)):
        train(net, engine, trained, 1, (4, 6))
        assert engine.refresh_count == 1  # at once
    assert torch.equal(topkast.weights["0.weight"].tiers, resumed.weights["0.weight"].tiers)
