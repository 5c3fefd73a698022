"""DP-SGD by Opacus, where it is installed: it clips and adds noise everywhere, and Top-KAST trains on B alone."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_topkast import TopKast, TopKastError
from lightning_topkast.weights import MaskedWeight

pytestmark = pytest.mark.filterwarnings("ignore")  # of theirs there are many
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    opacus = pytest.importorskip("opacus")

NAME = "2.weight"


def private(attach_to, made=torch.optim.Adam, prepares=False, width=32, noise=1.0, parts=1, **settings):
    """An engine on a network, and a function that takes one private step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    data = torch.utils.data.TensorDataset(torch.randn(64, 20), torch.randint(4, (64,)))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    topkast = TopKast(model, 0.8, **({"backward_sparsity": 0.5, "update_every": 3} | settings))
    inner = made(model.parameters(), lr=1e-2)
    wrapped, outer, _ = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=inner,
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=0.5,
        poisson_sampling=False,
    )
    topkast.attach(inner if attach_to == "inner" else outer, total_steps=12)

    def step():
        for part in range(parts):  # as BatchMemoryManager does
            outer.signal_skip_step(part < parts - 1)
            outer.zero_grad()
            F.cross_entropy(wrapped(data.tensors[0][16 * part :][:16]), data.tensors[1][16 * part :][:16]).backward()
            if prepares:
                topkast.prepare_step(outer)
            outer.step()

    return topkast, step


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("width", [32, 600], ids=["by hooks", "in one pass"])
@pytest.mark.parametrize("prepares", [False, True])
@pytest.mark.parametrize("made", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("attach_to", ["inner", "outer"])
def test_private_steps_move_the_updated_set_only(attach_to, made, prepares, width, parts):
    topkast, step = private(attach_to, made, prepares, width, parts=parts)
    weight, size = topkast.weights[NAME], width * width
    for count in range(1, 8):
        before, tiers = weight.theta().clone(), weight.tiers.clone()
        step()
        assert topkast.step_count == count
        moved = weight.theta() != before
        assert not bool(moved[tiers == 0].any()), "noise has reached the reservoir"
        assert float(moved[tiers > 0].float().mean()) > 0.99, "noise moves every entry of B"
        active = weight.tiers == 2
        assert (int(active.sum()), int((weight.tiers > 0).sum())) == (round(0.2 * size), round(0.5 * size))
        assert torch.equal(weight.parameter != 0, active), "the network computes with α"
    assert topkast.refresh_count == 2


def test_it_does_not_matter_which_of_the_two_is_attached():
    (one, step_one), (other, step_other) = private("inner"), private("outer")
    for step in (step_one, step_other):
        torch.manual_seed(1)
        for _ in range(5):
            step()
    assert torch.equal(one.weights[NAME].theta(), other.weights[NAME].theta())


def test_packed_weights_are_refused():
    with pytest.raises(TopKastError, match="PackedLinear holds packed weights"):
        private("inner", storage="packed")


@pytest.mark.parametrize(("prepares", "sees"), [(False, "noise"), (True, "the data")])
def test_rules_that_look_at_gradients_see_noise_only_without_prepare_step(prepares, sees, monkeypatch):
    """What docs/neighbours.md warns of: masks of RigL are private in a plain loop alone."""
    seen, record = [], MaskedWeight.record_gradient

    def noting(weight):
        seen.append(float(weight.parameter.grad.abs().max()))
        record(weight)

    monkeypatch.setattr(MaskedWeight, "record_gradient", noting)
    _, step = private("outer", prepares=prepares, noise=1e6, rule="rigl", backward_sparsity=0.8)
    for _ in range(3):
        step()
    assert ("noise" if min(seen) > 1e3 else "the data") == sees
