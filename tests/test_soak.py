"""The soak: a slice of it, proof that its oracle sees broken code, and what it has found."""

import copy
import logging
import os
import pickle
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_topkast import Block, TopKast
from lightning_topkast.engine.refresh import Refresher
from lightning_topkast.weights import MaskedWeight, PackedWeight
from tests import processes
from tests.helpers import nouns

RELIABILITY = Path(__file__).parents[1] / "reliability"

OPTIONS = {
    "forward_sparsity": 0.75, "backward_sparsity": 0.5, "keep_first_dense": False, "keep_last_dense": False,
    "update_every": 50, "kernels": "torch",
}  # fmt: skip


def train(model, topkast, optimizer, steps, shape) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(shape, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


# --- a slice of it ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_few_cases_of_every_kind_break_no_rule():
    arguments = ["--seed", "80", "--cases", "14", "--minutes", "60"]  # more than the test has, however busy the machine
    command = [sys.executable, RELIABILITY / "soak.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = processes.run(command, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "soak: 14 cases" in done.stdout
    assert " 0 failures" in done.stdout
    for kind in ("loop", "trainer", "killed", "sharded"):
        assert f" 0 {kind}" not in done.stdout
        assert f"(0 {kind}" not in done.stdout


@contextmanager
def _quiet():
    """Without the warnings that drawn settings earn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def soak(monkeypatch):
    """Run so many cases in this process; what failed is counted and printed."""
    monkeypatch.syspath_prepend(str(RELIABILITY))
    from soak import soak

    def run(cases: int = 30, kind: str = "loop") -> Counter[str]:
        return soak(range(cases), 3, time.monotonic() + 600, kind, failures=1)

    return run


def break_masking(monkeypatch):
    monkeypatch.setattr(MaskedWeight, "mask_gradient", lambda self: None)


def break_ties(monkeypatch):
    from lightning_topkast.method import structure

    def to_the_highest_index(scores, counts, among=None, draw=None, select=structure.nested_top_k):
        turned = None if among is None else among.flatten().flip(0)
        return select(scores.flatten().flip(0), counts, turned).flip(0).view(scores.shape)

    monkeypatch.setattr(structure, "nested_top_k", to_the_highest_index)


def break_norms(monkeypatch):
    """Blocks go by the sum of their magnitudes."""

    monkeypatch.setattr(Block, "scores", lambda self, values, sharding: self._sums(values.float(), sharding))


def break_groups(monkeypatch):
    """Groups begin anew at every second neighbour."""
    from lightning_topkast.method.structure import NOfM

    winners = NOfM._winners
    monkeypatch.setattr(
        NOfM, "_winners", lambda self, scores, draw: winners(self, scores.roll(2, -1), draw).roll(-2, -1)
    )


def break_closing(monkeypatch):
    """θ on what is exploring is not stored back."""
    close = MaskedWeight.close

    def forgetful(self, lr):
        explored = self._explored.clone()
        close(self, lr)
        self._explored.copy_(explored)

    monkeypatch.setattr(MaskedWeight, "close", forgetful)


def break_penalty(monkeypatch):
    """1/D is left out."""
    monkeypatch.setattr(MaskedWeight, "forward_density_target", 1.0)


def break_promotion(monkeypatch):
    """Promoted entries start at zero."""
    apply = MaskedWeight.apply

    def from_zero(self, tiers, state=()):
        before = self.active
        apply(self, tiers, state)
        self._alpha[self.active & ~before] = 0

    monkeypatch.setattr(MaskedWeight, "apply", from_zero)


def break_state(monkeypatch):
    """Optimizer state stays where it was."""
    for kind in (MaskedWeight, PackedWeight):
        monkeypatch.setattr(kind, "apply", lambda self, tiers, state=(), apply=kind.apply: apply(self, tiers))


def break_decay(monkeypatch):
    """The reservoir drifts."""
    opened = MaskedWeight.open

    def drifting(self):
        opened(self)
        self._latent[~self._mask.bool()] *= 0.999

    monkeypatch.setattr(MaskedWeight, "open", drifting)


def break_saving(monkeypatch):
    """What was demoted is not saved."""
    saved = MaskedWeight.state_dict

    def lossy(self, gathered=False):
        state = saved(self, gathered)
        return state | {"latent": state["latent"].masked_fill(state["tiers"] == 0, 0)}

    monkeypatch.setattr(MaskedWeight, "state_dict", lossy)


def break_schedule(monkeypatch):
    after_step = Refresher.after_step
    monkeypatch.setattr(Refresher, "after_step", lambda self, weights, step: after_step(self, weights, step + 1))


BREAKS = [value for name, value in list(globals().items()) if name.startswith("break_")]


@pytest.mark.slow
@pytest.mark.parametrize("breaks", BREAKS, ids=lambda breaks: breaks.__name__)
def test_the_oracle_sees_broken_code(soak, monkeypatch, capsys, breaks):
    with _quiet():
        breaks(monkeypatch)
        counts = soak()
    assert counts["failures"] > 0
    assert "Violation" in capsys.readouterr().out


def test_the_soak_leaves_its_process_as_it_was(monkeypatch):
    monkeypatch.syspath_prepend(str(RELIABILITY))
    from soak import main

    def present():
        level = logging.getLogger("lightning.pytorch").level
        limit, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGTERM)
        return level, limit, handler, list(warnings.filters)

    before = present()
    main(["--seed", "0", "--case", "0", "--minutes", "0"])
    assert present() == before


@pytest.mark.slow
def test_a_failure_can_be_seen_again_by_its_seed_and_number(soak, monkeypatch, capsys):
    break_masking(monkeypatch)
    with _quiet():
        soak()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED"))
    from soak import main

    with _quiet():
        assert main([*line.split()[1:], "--minutes", "1"]) == 1
        monkeypatch.undo()
        monkeypatch.syspath_prepend(str(RELIABILITY))
        assert main([*line.split()[1:], "--minutes", "1"]) == 0


# --- what it has found --------------------------------------------------------------------------------------------


def dense_momentum(topkast, optimizer):
    """The momentum of the first sparse weight, spread out."""
    weight = next(iter(topkast.weights.values()))
    order = torch.cat([torch.nonzero((weight.tiers == tier).flatten()).flatten() for tier in (2, 1)])
    dense = torch.zeros(weight.size)
    dense[order] = optimizer.state_dict()["state"][0]["momentum_buffer"][: order.numel()]  # as it is saved
    return dense.view(weight.shape), weight.updated


@pytest.mark.parametrize("way", ["step", "save", "detach", "copy", "pickle"])
@pytest.mark.filterwarnings("ignore:.* was copied while it is trained")
def test_momenta_of_a_packed_weight_follow_others_that_are_loaded_whatever_comes_next(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16))
    topkast = TopKast(model, **nouns(storage="packed", strength=0.0, **OPTIONS))
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
        topkast = TopKast(model, **nouns(storage="packed", strength=0.0, **OPTIONS))
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


def test_state_that_was_lost_when_weights_were_loaded_does_not_come_back_with_a_refresh():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16))
    topkast = TopKast(model, **nouns(storage="packed", strength=0.0, exploration="random", **OPTIONS))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    topkast.attach(optimizer)
    train(model, topkast, optimizer, 3, (4, 6))
    _, before = dense_momentum(topkast, optimizer)
    model.load_state_dict({"0.weight": torch.randn(16, 6), "0.bias": torch.zeros(16)})
    between = topkast.weights["0.weight"].updated.clone()
    topkast.refresh()  # explores elsewhere
    momentum, after = dense_momentum(topkast, optimizer)
    came_back = before & ~between & after
    assert came_back.any()
    assert not momentum[came_back].any()


def test_state_spread_out_for_masked_mode_has_the_weights_memory_format():
    """A fused optimizer walks through memory, and would give entries each other's momenta."""

    def parts(storage):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3)).to(memory_format=torch.channels_last)
        topkast = TopKast(model, **nouns(storage=storage, **OPTIONS))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
        topkast.attach(optimizer)
        return model, topkast, optimizer

    saved = parts("compact")
    train(*saved, 3, (2, 3, 5, 5))
    resumed = parts("masked")
    for part in (0, 2, 1):
        resumed[part].load_state_dict(copy.deepcopy(saved[part].state_dict()))
    weight = resumed[1].weights["0.weight"]
    train(*saved, 2, (2, 3, 5, 5))
    train(*resumed, 2, (2, 3, 5, 5))
    assert resumed[2].state[weight.parameter]["momentum_buffer"].stride() == weight.parameter.stride()
    torch.testing.assert_close(weight.theta().contiguous(), saved[1].weights["0.weight"].theta())


def test_sets_to_come_that_other_weights_have_outdated_are_outdated_after_a_save_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16))
    options = OPTIONS | {"storage": "packed", "update_every": 4, "delay": 2}
    topkast = TopKast(model, **nouns(**options))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    topkast.attach(optimizer)
    train(model, topkast, optimizer, 5, (4, 6))  # chosen after 4, for after 6
    model.load_state_dict({"0.weight": torch.randn(16, 6), "0.bias": torch.zeros(16)})
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, topkast)])
    other = nn.Sequential(nn.Linear(6, 16))
    resumed = TopKast(other, **nouns(**options))
    second = torch.optim.SGD(other.parameters(), 0.1)
    resumed.attach(second)
    for part, state in zip((other, second, resumed), states, strict=True):
        part.load_state_dict(state)
    for engine, net, trained in ((topkast, model, optimizer), (resumed, other, second)):
        train(net, engine, trained, 1, (4, 6))
        assert engine.refresh_count == 1  # at once
    assert torch.equal(topkast.weights["0.weight"].tiers, resumed.weights["0.weight"].tiers)
