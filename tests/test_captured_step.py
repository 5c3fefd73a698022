"""Training steps that a graph takes: as if taken one by one, bit for bit, with a stand-in for a CUDA graph on CPU."""

from copy import deepcopy
from itertools import chain, pairwise
from unittest import mock

import pytest
import torch
from torch import nn

from lightning_topkast import L1, Block, Ramp, RigL, Schedule, TopKast, TopKastError
from lightning_topkast.engine import cuda_graph
from lightning_topkast.method.structure import Unstructured
from lightning_topkast.ops import MATRIX_KERNELS, addresses
from lightning_topkast.weights.layouts import Product, make_layout
from tests.recorded_graph import RecordedGraph

STORAGES = {
    "masked": {},
    "compact": {"storage": "compact"},
    "blocks": {"storage": "packed", "structure": Block(4, 4)},
}


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    monkeypatch.setattr(cuda_graph, "CudaGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "captures", 0)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def fused_adam(parameters):
    return torch.optim.Adam(parameters, lr=torch.tensor(0.01), fused=True)


class Run:
    """A network that is trained by a step which may be captured, with sets that then stay at their addresses."""

    def __init__(self, make_optimizer=sgd, captures=True, stays=True, backward=0.5, **options):
        self.stays = captures and stays
        torch.manual_seed(0)
        layers = (nn.Linear(*sizes) for sizes in pairwise((16, 32, 32, 32, 16)))  # the first and the last stay dense
        self.model = nn.Sequential(*chain(*([layer, nn.ReLU()] for layer in layers)))
        options = {"schedule": Schedule(update_every=4)} | options
        self.topkast = TopKast(self.model, 0.75, backward, **options)
        self.optimizer = make_optimizer(self.model.parameters())
        self.topkast.attach(self.optimizer, total_steps=40)
        self.batch = torch.zeros(8, 16)
        self.step = self.topkast.capture(self.take) if captures else self.take
        self.losses = []

    def take(self):
        self.optimizer.zero_grad()
        loss = (self.model(self.batch) - self.batch).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, steps, before_step=lambda run, step: None):
        generator = torch.Generator().manual_seed(1)
        with mock.patch.object(addresses, "stays", return_value=self.stays):
            for step in range(steps):
                before_step(self, step)
                self.batch.copy_(torch.randn(8, 16, generator=generator))
                self.losses.append(float(self.step()))
        return self

    def everything(self):
        weights = self.topkast.weights.items()
        state = [each for state in self.optimizer.state.values() for each in state.values()]
        return {
            "losses": torch.tensor(self.losses),
            "steps": torch.tensor([self.topkast.step_count, self.topkast.refresh_count]),
            **{f"{name}.theta": weight.theta() for name, weight in weights},
            **{f"{name}.tiers": weight.tiers for name, weight in weights},
            **{f"state {at}": torch.as_tensor(each) for at, each in enumerate(state)},
        } | {name: value.detach() for name, value in self.model.state_dict().items()}


def assert_same(one, other):
    one, other = one.everything(), other.everything()
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.mark.parametrize("optimizer", [sgd, fused_adam])
@pytest.mark.parametrize("storage", STORAGES)
def test_replayed_steps_train_as_steps_do_over_refreshes(storage, optimizer):
    """The graph reads the sets that a refresh has chosen since, without another capture."""
    run = Run(optimizer, **STORAGES[storage]).train(22)
    assert_same(run, Run(optimizer, captures=False, **STORAGES[storage]).train(22))
    assert run.topkast.refresh_count == 5
    assert RecordedGraph.captures == 1


@pytest.mark.parametrize("storage", STORAGES)
def test_a_graph_is_captured_again_where_the_places_have_moved(storage):
    run = Run(stays=False, **STORAGES[storage]).train(22)
    assert_same(run, Run(captures=False, **STORAGES[storage]).train(22))
    assert RecordedGraph.captures == 1 + run.topkast.refresh_count


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": Schedule(update_every=4, stop_exploring_at=10)},
        {"schedule": Schedule(update_every=4, delay=2)},
        {"penalty": L1(1e-3)},
        {"penalty": None},
        {"powerpropagation": 2.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_the_settings(storage, options):
    run = Run(**STORAGES[storage] | options).train(22)
    assert_same(run, Run(captures=False, **STORAGES[storage] | options).train(22))
    assert 1 <= RecordedGraph.captures <= 5


def test_a_graph_is_captured_again_for_sets_of_other_sizes():
    ramp = {"ramp": Ramp(end=12)}
    assert_same(Run(**ramp).train(22), Run(captures=False, **ramp).train(22))
    assert RecordedGraph.captures > 1


def test_rigl_looks_at_the_gradients_of_a_step_that_is_not_replayed():
    rigl = {"rule": RigL(), "backward": 0.75}
    run = Run(**rigl).train(22)
    assert_same(run, Run(captures=False, **rigl).train(22))
    assert run.topkast.refresh_count > 0
    assert RecordedGraph.captures == 1


def test_a_number_that_changes_is_not_held_fixed_and_warned_of_once():
    def decay(run, step):
        if step in (8, 14):
            run.optimizer.param_groups[0]["lr"] /= 2

    with pytest.warns(UserWarning, match=r"lr has changed from 0\.1 to 0\.05"):
        run = Run().train(20, decay)
    assert_same(run, Run(captures=False).train(20, decay))
    assert RecordedGraph.captures == 3


def test_a_rate_that_is_a_tensor_may_change():
    def decay(run, step):
        run.optimizer.param_groups[0]["lr"].mul_(1.2)

    run = Run(fused_adam).train(20, decay)
    assert_same(run, Run(fused_adam, captures=False).train(20, decay))
    assert RecordedGraph.captures == 1


def test_weights_that_are_loaded_between_replays_are_trained():
    other = nn.Linear(32, 32).weight.detach()

    def load(run, step):
        if step == 10:
            run.model.load_state_dict(run.model.state_dict() | {"2.weight": other})

    for storage in STORAGES.values():
        assert_same(Run(**storage).train(20, load), Run(captures=False, **storage).train(20, load))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_that_cannot_be_captured_changes_nothing(storage):
    run = Run(torch.optim.Adam, **STORAGES[storage]).train(3)  # which reads its count of steps
    before = run.everything()
    with pytest.raises(TopKastError, match=r"cannot be captured.*reads the device's values"):
        run.step()
    assert all(torch.equal(value, run.everything()[name]) for name, value in before.items())
    run.step = run.take
    run.train(6)


def test_an_engine_must_be_attached():
    with pytest.raises(TopKastError, match="attached to its optimizers"):
        TopKast(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), 0.5, 0.5).capture(lambda: None)


def test_without_a_device_that_has_graphs_every_step_is_taken(monkeypatch):
    monkeypatch.setattr(RecordedGraph, "supports", lambda tensor: False)
    assert_same(Run().train(6), Run(captures=False).train(6))
    assert RecordedGraph.captures == 0


def writes(how):
    def before_step(run, step):
        parameter = run.topkast.weights["2.weight"].parameter
        if step == 6:
            run.saved = parameter.detach().clone()
        if step in (10, 15):
            with torch.no_grad():
                how(run, parameter)

    return before_step


WRITES = {
    "put back": writes(lambda run, parameter: parameter.copy_(run.saved)),
    "scaled": writes(lambda run, parameter: parameter.mul_(0.5)),
    "optimizer loaded": writes(lambda run, _: run.optimizer.load_state_dict(deepcopy(run.optimizer.state_dict()))),
    "state cleared": writes(lambda run, _: run.optimizer.state.clear()),
    "bias frozen": writes(lambda run, _: run.model[2].bias.requires_grad_(not run.model[2].bias.requires_grad)),
    "all frozen": writes(
        lambda run, _: [
            weight.parameter.requires_grad_(not weight.parameter.requires_grad)
            for weight in run.topkast.weights.values()
        ]
    ),
    "weight frozen": writes(lambda run, parameter: parameter.requires_grad_(not parameter.requires_grad)),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", WRITES)
def test_what_other_code_does_between_replays_counts(storage, name):
    run = Run(**STORAGES[storage]).train(20, WRITES[name])
    assert_same(run, Run(captures=False, **STORAGES[storage]).train(20, WRITES[name]))
    assert RecordedGraph.captures > 0


def test_a_rate_that_changes_at_every_step_is_warned_of():
    def decay(run, step):
        run.optimizer.param_groups[0]["lr"] *= 0.9

    with pytest.warns(UserWarning, match="lr has changed from"):
        run = Run().train(8, decay)
    assert_same(run, Run(captures=False).train(8, decay))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_function_takes_one_step_at_a_call(steps):
    run = Run()

    def take():
        for _ in range(steps if len(run.losses) == 3 else 1):
            run.optimizer.step()
        return run.take() if len(run.losses) < 3 else torch.zeros(())

    run.step = run.topkast.capture(take)
    run.train(3)
    before = run.everything()
    with pytest.raises(TopKastError, match=f"took {steps} of SGD"):
        run.step()
    after = run.everything()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if not name.startswith("steps"))


def test_one_engine_acts_in_a_captured_step():
    run = Run()
    other = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    TopKast(other, 0.5, 0.5).attach(optimizer)

    def take():
        optimizer.zero_grad()
        other(run.batch).square().mean().backward()
        optimizer.step()
        return run.take()

    run.step = run.topkast.capture(take)
    run.train(3)
    with pytest.raises(TopKastError, match=r"let topkast\.capture\(step\) capture it, with one TopKast"):
        run.step()


@pytest.mark.parametrize("end", ["detach", "release", "another"])
def test_an_engine_that_has_ended_takes_no_step(end):
    run = Run().train(5)
    if end == "another":
        TopKast(run.model, 0.5, 0.5).attach(run.optimizer)
    else:
        getattr(run.topkast, end)()
    with pytest.raises(TopKastError, match="no longer attached"):
        run.step()


def layout(active=(1, 9, 20), exploring=(3, 40), **product):
    sets = (torch.tensor(each) for each in (active, exploring))
    return make_layout(*sets, torch.Size((8, 8)), Unstructured(), Product(**product), torch.device("cpu"))


@pytest.mark.parametrize(
    ("before", "stays"),
    [
        ({"active": (0, 2, 5), "exploring": (7, 8)}, True),
        ({"active": (1, 9), "exploring": (3, 20, 40)}, False),
        ({"active": (1, 9, 20, 40), "exploring": (3,)}, False),
        ({"transposed": True}, False),
        ({"kernels": "compiled"}, False),  # whose pattern consists of other tensors
    ],
)
def test_places_go_into_the_memory_of_those_before_if_nothing_else_differs(before, stays, monkeypatch):
    monkeypatch.setattr(addresses, "stays", lambda device: True)
    if "kernels" in before:
        MATRIX_KERNELS.choose(before["kernels"], torch.device("cpu"))
    before, after = layout(**before), layout()
    placed = after.placed(torch.device("cpu"), before)
    assert (placed.pattern is before.pattern) == stays
    assert torch.equal(placed.indices(), after.indices())
