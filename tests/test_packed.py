"""Packed and compact weights train as masked ones do, and hold nothing dense."""

import copy
import gc
import os
import pickle
import signal
import sys
import threading
import weakref
from itertools import permutations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_topkast import Block, Packed, Targets, TopKast, TopKastError, dense_copy, to_csr, to_dense
from lightning_topkast.engine import install, refresh
from lightning_topkast.engine.materialize import materialize
from lightning_topkast.layers import packed_weights
from lightning_topkast.layers.csr import CsrLinear
from lightning_topkast.method.selection import nested_top_k
from lightning_topkast.ops import MATRIX_KERNELS, CsrPattern, EntryPattern
from lightning_topkast.weights import EntryState, PackedWeight, Traits
from lightning_topkast.weights.layouts import MatrixLayout, Product
from tests.helpers import needs_compiler, nouns, same

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, fused=True),
}
optimizers = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
executions = pytest.mark.parametrize("storage", ["packed", "compact"])


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 24), nn.Tanh(), nn.Linear(24, 4)
    )


csr_kernels = pytest.mark.parametrize("kernels", ["torch", pytest.param("compiled", marks=needs_compiler)])


UNITS = {"entry": {}, "block": {"structure": "block", "block": (2, 2)}}


class Run:
    """A small network in training in float64; every step's batch follows from the step number."""

    units = UNITS["entry"]

    def __init__(self, storage, make_optimizer=OPTIMIZERS["adamw"], make_model=mlp, inputs=(12,), **options):
        torch.manual_seed(0)
        self.model = make_model().double()
        settings = {"update_every": 9, "strength": 1e-2, "kernels": "torch"} | self.units | options
        self.topkast = TopKast(self.model, 0.8, 0.6, **nouns(storage=storage, **settings))
        self.optimizer = make_optimizer(self.model.parameters())
        self.topkast.attach(self.optimizer)
        self.inputs, self.done = inputs, 0

    def backward(self, part=0):
        generator = torch.Generator().manual_seed(1000 * part + self.done)
        x = torch.randn(16, *self.inputs, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 4, (16,), generator=generator)
        loss = nn.functional.cross_entropy(self.model(x).flatten(1)[:, :4], y)
        loss.backward()
        return loss

    def step(self, count=1, parts=1, clip=None):
        losses = []
        for _ in range(count):
            self.optimizer.zero_grad()
            losses.append(float(sum(self.backward(part).detach() for part in range(parts))))
            if clip:
                self.topkast.mask_gradients()
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
            self.done += 1
        return losses


@pytest.fixture(params=UNITS, autouse=True)
def units(request, monkeypatch):
    """What the sets of every `Run` are made of."""
    monkeypatch.setattr(Run, "units", UNITS[request.param])
    return request.param


def largest(weight, values, *counts: int) -> torch.Tensor:
    """Nested sets of the largest of a weight's entries, or blocks."""
    units, sharding = weight.structure, weight.sharding
    chosen = nested_top_k(units.scores(values.abs(), sharding), [units.units(c, weight.shape) for c in counts])
    return units.tiers(chosen, sharding)


def check_alike(run: Run, other: Run) -> None:
    """Same sets, same θ in and outside them, same network."""
    for name, weight in run.topkast.weights.items():
        twin = other.topkast.weights[name]
        assert torch.equal(weight.tiers, twin.tiers), name
        torch.testing.assert_close(weight.theta(), twin.theta(), rtol=1e-9, atol=1e-11)
        assert weight.promoted == twin.promoted
        assert int(weight.never_active_entries) == int(twin.never_active_entries)
    one, two = run.model.state_dict(), other.model.state_dict()
    assert list(one) == list(two)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-9, atol=1e-11)


# --- the same training ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@executions
@optimizers
def test_200_steps_give_the_masked_weights(make_optimizer, storage):
    masked, packed = Run("masked", make_optimizer), Run(storage, make_optimizer)
    assert {weight.storage for weight in packed.topkast.weights.values()} == {storage}
    before = packed.topkast.weights["2.weight"].tiers
    for _ in range(10):
        assert packed.step(20) == pytest.approx(masked.step(20), rel=1e-9)
        check_alike(packed, masked)
    assert packed.topkast.refresh_count == 22
    assert not torch.equal(packed.topkast.weights["2.weight"].tiers, before)


@executions
@pytest.mark.parametrize("penalty", ["l2", "l1", "norm"])
@pytest.mark.parametrize("changes", [{}, {"exploration": "random"}, {"distribution": "erk"}], ids=str)
@pytest.mark.slow
def test_other_settings_give_the_masked_weights(storage, penalty, changes):
    runs = [Run(kind, penalty=penalty, **changes) for kind in ("masked", storage)]
    for run in runs:
        run.step(40)
    check_alike(*runs)
    torch.testing.assert_close(*(run.topkast.penalty() for run in runs))


@executions
@optimizers
@pytest.mark.slow
def test_accumulation_and_clipping_give_the_masked_weights(make_optimizer, storage):
    runs = [Run(kind, make_optimizer) for kind in ("masked", storage)]
    for run in runs:
        run.step(30, parts=3, clip=0.5)
    check_alike(*runs)


@executions
@optimizers
@pytest.mark.slow
def test_exploration_stops_as_in_masked_mode(make_optimizer, storage):
    runs = [Run(kind, make_optimizer, stop_exploring_at=14) for kind in ("masked", storage)]
    for run in runs:
        run.step(14)
    check_alike(*runs)
    weight = runs[1].topkast.weights["2.weight"]
    assert not weight.is_exploring
    outside = weight.theta()[~weight.active]
    for run in runs:
        run.step(20)
    check_alike(*runs)
    kept = ~weight.active
    assert torch.equal(weight.tiers == 1, torch.zeros_like(kept))
    assert not weight.parameter.detach()[weight.active_count :].any()
    assert outside.abs().sum() > 0


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.last = nn.Linear(12, 4)

    def forward(self, x):
        h = self.first(x)
        return self.last((h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.rnn = nn.LSTM(12, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.rnn(self.first(x))[0].mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.one, self.two, self.last = (
            nn.Linear(6, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 4),
        )
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.last(self.two(self.one(self.first(x)).tanh()).mean(1))


class Shared(nn.Module):
    """A weight shared by a linear layer and an embedding, which has no packed product."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.table = nn.Embedding(12, 12)
        self.table.weight = self.one.weight

    def forward(self, x):
        return self.last((self.one(self.first(x)).tanh() + self.table(torch.arange(5))).mean(1))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 12, 3), nn.Tanh(), nn.Conv2d(12, 10, 1, stride=2), nn.Tanh(),
        nn.Conv2d(10, 8, 1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 4),
    )  # fmt: skip


def gpt2_like():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return nn.Sequential(nn.Linear(12, 20), conv1d(28, 20), nn.Tanh(), conv1d(20, 28), nn.Tanh(), nn.Linear(20, 4))


def encoder():
    layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(6, 12), nn.TransformerEncoder(layer, 2), nn.Linear(12, 4))


MODELS = {
    "convolutions": (
        convolutional,
        (3, 9, 9),
        {"4.weight": "packed", "6.weight": "compact"},  # the other is packed in blocks only
        {"block": (2, 1)},
    ),
    "attention": (Attention, (5, 6), {"attention.in_proj_weight": "packed", "attention.out_proj.weight": "packed"}, {}),
    "lstm": (Recurrent, (5, 6), {"rnn.weight_hh_l1_reverse": "compact"}, {}),
    "tied": (Tied, (5, 6), {"one.weight": "packed"}, {}),
    "shared": (Shared, (5, 6), {"one.weight": "compact"}, {"include": ["one.weight"]}),
    "gpt2": (gpt2_like, (12,), {"1.weight": "packed", "3.weight": "packed"}, {"include": ["1.weight", "3.weight"]}),
    "encoder": (encoder, (5, 6), {"1.layers.0.linear1.weight": "packed"}, {}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_layer_gives_the_masked_weights(kind):
    make_model, inputs, expected, options = MODELS[kind]
    masked, packed = (Run(e, make_model=make_model, inputs=inputs, **options) for e in ("masked", "packed"))
    kept = {name: weight.storage for name, weight in packed.topkast.weights.items()}
    assert kept.items() >= expected.items()
    for _ in range(3):
        assert packed.step(10) == pytest.approx(masked.step(10), rel=1e-8)
        check_alike(packed, masked)
    for run in (masked, packed):
        run.model.eval()
    with torch.no_grad():
        x = torch.randn(4, *inputs, dtype=torch.float64)
        torch.testing.assert_close(packed.model(x), masked.model(x))


# --- what a packed model is -------------------------------------------------------------------------------------------


@executions
def test_parameter_gradient_and_state_are_as_long_as_B(storage):
    run = Run(storage)
    run.step(12)
    weight = run.topkast.weights["2.weight"]
    assert dict(run.model.named_parameters())["2.weight"] is weight.parameter
    assert weight.parameter.shape == weight.parameter.grad.shape == (weight.updated_count,)
    assert all(v.numel() <= weight.updated_count for v in run.optimizer.state[weight.parameter].values())


@executions
def test_weight_reads_as_alpha_and_its_gradient_reaches_the_values(storage):
    run = Run(storage)
    run.step(3)
    layer, weight = run.model[2], run.topkast.weights["2.weight"]
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight.detach(), weight.alpha())
    target = torch.randn_like(weight.alpha())
    (gradient,) = torch.autograd.grad((layer.weight * target).sum(), weight.parameter)
    expected = target.flatten()[weight.layout.indices().long()]
    assert torch.equal(gradient, expected)


@executions
def test_state_dict_is_dense_and_loads_into_the_plain_model(storage):
    run = Run(storage)
    run.step(12)
    plain = mlp().double()
    plain.load_state_dict(run.model.state_dict())
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(plain(x), run.model(x))
    assert torch.count_nonzero(plain[2].weight) == run.topkast.weights["2.weight"].active_count


@executions
def test_plain_state_dict_loads_into_a_packed_model(storage):
    run, other = Run(storage), mlp().double()
    state = other.state_dict()
    run.model.load_state_dict(state)
    weight = run.topkast.weights["2.weight"]
    assert torch.equal(weight.theta(), state["2.weight"])
    assert torch.equal(weight.active, largest(weight, state["2.weight"], weight.active_count).bool())
    with pytest.raises(RuntimeError, match=r"size mismatch for 2.weight"):
        run.model.load_state_dict(state | {"2.weight": torch.ones(3, 3)})
    with pytest.raises(RuntimeError, match=r"2.weight holds NaN"):
        run.model.load_state_dict(state | {"2.weight": torch.full((30, 40), torch.nan)})
    assert torch.equal(weight.theta(), state["2.weight"])


@pytest.mark.parametrize("missing", ["2.weight", "2.bias"])
@executions
def test_what_a_state_dict_lacks_is_named(missing, storage):
    run = Run(storage)
    state = run.model.state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{missing}"'):
        run.model.load_state_dict(state)
    assert run.model.load_state_dict(state, strict=False).missing_keys == [missing]


def test_weights_that_are_not_finite_are_refused_also_where_the_sets_would_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    weight = TopKast(model, 0.75, 0.5, storage=Packed(kernels="torch")).weights["1.weight"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["1.weight"][weight.active.nonzero()[0].unbind()] = float("nan")
    before = weight.alpha()
    with pytest.raises(RuntimeError, match=r"1.weight holds NaN"):
        model.load_state_dict(state)
    assert torch.equal(weight.alpha(), before)


@pytest.mark.parametrize("storage", ["masked", "packed", "compact"])
def test_model_that_is_converted_before_training_keeps_theta_in_its_dtype(storage):
    model = mlp()
    topkast = TopKast(model, 0.8, 0.5, storage=storage, penalty=None)
    before = {name: weight.theta() for name, weight in topkast.weights.items()}
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    topkast.attach(optimizer)
    model(torch.ones(4, 12, dtype=torch.float64)).sum().backward()
    optimizer.step()
    topkast.refresh()
    for name, weight in topkast.weights.items():
        assert weight.theta().dtype == torch.float64
        assert torch.equal(weight.theta(), before[name].double())


@pytest.mark.parametrize("kind", MODELS)
def test_to_dense_gives_the_ordinary_layers_back(kind):
    make_model, inputs, _, options = MODELS[kind]
    run = Run("packed", make_model=make_model, inputs=inputs, **options)
    run.step(4)
    x = torch.randn(4, *inputs, dtype=torch.float64)
    before, state = run.model(x), run.model.state_dict()
    assert to_dense(run.model) is run.model
    torch.testing.assert_close(run.model(x), before)
    plain = make_model()
    assert [type(module) for module in run.model.modules()] == [type(module) for module in plain.modules()]
    assert [(n, p.shape) for n, p in run.model.named_parameters()] == [
        (n, p.shape) for n, p in plain.named_parameters()
    ]
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.filterwarnings("ignore:.* was copied while it is trained")
def test_a_copy_is_a_model_of_its_own(kind, way):
    make_model, inputs, _, options = MODELS[kind]
    run = Run("packed", make_model=make_model, inputs=inputs, **options)
    run.step(4)
    x = torch.randn(4, *inputs, dtype=torch.float64)
    other = way(run.model)
    expected = run.model(x).detach()
    run.step(9)  # over a refresh
    assert torch.equal(other(x), expected)
    assert not torch.equal(run.model(x), expected)
    other(x).sum().backward()
    assert all(p.grad is not None for n, p in other.named_parameters() if n in run.topkast.weights)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.filterwarnings("ignore:.* was copied while it is trained")
@executions
def test_tied_weights_are_one_packed_weight_in_a_copy_too(way, storage):
    model = Run(storage, make_model=Tied, inputs=(5, 6)).model
    for each in (model, way(model)):
        assert "two.weight" not in dict(each.named_parameters())
        assert list(packed_weights(each)) == ["one.weight"]


@pytest.mark.parametrize("kind", ["convolutions", "gpt2", "encoder"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_a_trace_computes_what_the_layers_do(kind):
    make_model, inputs, _, options = MODELS[kind]
    run = Run("packed", make_model=make_model, inputs=inputs, **options)
    run.step(4)
    x, other = torch.randn(2, 4, *inputs, dtype=torch.float64)
    traced = torch.jit.trace(run.model, x)
    torch.testing.assert_close(traced(other), run.model(other))


@executions
@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("many", [0, 1 << 60])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_a_trace_holds_no_operators_of_ours_and_calls_no_functions(kernels, many, storage, monkeypatch):
    monkeypatch.setattr("lightning_topkast.ops.passes.MANY", many)
    run = Run(storage, kernels=kernels)
    traced = torch.jit.trace(run.model, torch.randn(5, 12, dtype=torch.float64))
    assert "topkast::" not in str(traced.inlined_graph)
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(traced(x), run.model(x))


@executions
def test_the_meta_device_is_refused_and_a_dense_copy_goes_there(storage):
    run = Run(storage)
    run.step(2)
    before = list(run.model.parameters())
    with pytest.raises(TopKastError, match=r"holds packed weights, .* move dense_copy"):
        run.model[2].to("meta")
    assert [*map(id, run.model.parameters())] == [*map(id, before)]
    assert dense_copy(run.model).to("meta")(torch.empty(3, 12, dtype=torch.float64, device="meta")).shape == (3, 4)
    run.step(2)


def test_release_gives_theta_back():
    run = Run("packed")
    run.step(12)
    theta = run.topkast.weights["2.weight"].theta()
    run.topkast.release()
    assert type(run.model[2]) is nn.Linear
    assert torch.equal(run.model[2].weight.detach(), theta)


def test_summary_and_printed_model_say_how_each_weight_is_kept():
    run = Run("packed", make_model=convolutional, inputs=(3, 9, 9), block=(2, 1))
    lines = str(run.topkast.summary()).splitlines()
    assert {line.split()[-1] for line in lines if ".weight " in line and "dense" not in line} == {"packed", "compact"}
    assert "(4): PackedConv2d(" in str(run.model)
    assert "(6): CompactConv2d(" in str(run.model)


# --- weights that are loaded in the middle -------------------------------------------------------------------------


@executions
def test_loading_the_present_weights_changes_nothing(storage):
    run, other = Run(storage), Run(storage)
    for each in (run, other):
        each.step(12)
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
    for each in (run, other):
        each.step(20)
    check_alike(run, other)


@executions
def test_loading_earlier_weights_keeps_the_reservoir_and_aligns_the_optimizers_state(storage):
    run = Run(storage)
    run.step(3)
    earlier = copy.deepcopy(run.model.state_dict())
    run.step(17)
    weight = run.topkast.weights["2.weight"]
    before, theta = weight.tiers, weight.theta()
    dense = torch.zeros(30, 40, dtype=torch.float64)
    momentum = run.optimizer.state[weight.parameter]["exp_avg"]
    dense.view(-1)[weight.layout.indices()] = momentum
    run.model.load_state_dict(earlier)
    assert torch.equal(weight.alpha(), earlier["2.weight"])
    elsewhere = earlier["2.weight"] == 0
    assert torch.equal(weight.theta()[elsewhere], theta[elsewhere])
    assert not torch.equal(weight.tiers, before)
    run.optimizer.param_groups[0]["lr"] = 0.0
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    stayed = (before > 0).flatten()[weight.layout.indices()]
    aligned = 0.9 * dense.view(-1)[weight.layout.indices()]
    torch.testing.assert_close(momentum, torch.where(stayed, aligned, 0))


def test_a_choice_by_weights_that_were_replaced_is_made_again():
    run = Run("packed", delay=4)
    run.step(10)
    weight = run.topkast.weights["2.weight"]
    fresh = {key: torch.randn_like(value) for key, value in run.model.state_dict().items()}
    run.model.load_state_dict(fresh)
    expected = largest(weight, fresh["2.weight"], weight.active_count).bool()
    run.step(3)
    assert (weight.active & expected).sum() > 0.9 * weight.active_count


def test_assigning_a_state_dict_keeps_the_packed_parameter():
    run = Run("packed")
    run.step(3)
    weight, names = run.topkast.weights["2.weight"], [name for name, _ in run.model.named_parameters()]
    run.model.load_state_dict(mlp().double().state_dict(), assign=True)
    assert run.model[2]._parameters["weight"] is weight.parameter
    assert [name for name, _ in run.model.named_parameters()] == names
    state = run.model.state_dict()
    del state["2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*2.weight"):
        run.model.load_state_dict(state)


@executions
def test_masked_state_may_be_loaded_in_any_order(storage):
    masked = Run("masked")
    masked.step(12)
    states = [copy.deepcopy(each.state_dict()) for each in (masked.model, masked.optimizer, masked.topkast)]
    masked.step(15)

    def resumed(*order):
        run = Run(storage)
        run.topkast.detach()
        run.model.load_state_dict(states[0])
        for act in order:
            act(run)
        run.done = 12
        run.step(15)
        return run

    def optimizer(run):
        run.optimizer.load_state_dict(copy.deepcopy(states[1]))

    def engine(run):
        run.topkast.load_state_dict(copy.deepcopy(states[2]))

    def attach(run):
        run.topkast.attach(run.optimizer)

    for order in permutations((optimizer, engine, attach)):
        check_alike(resumed(*order), masked)


def test_a_dense_checkpoint_with_its_optimizer_goes_on_packed():
    plain = mlp().double()
    optimizer = OPTIMIZERS["adamw"](plain.parameters())
    plain(torch.randn(4, 12, dtype=torch.float64)).sum().backward()
    optimizer.step()
    run = Run("packed")
    run.model.load_state_dict(plain.state_dict())
    run.topkast.detach()
    run.optimizer.load_state_dict(optimizer.state_dict())
    run.topkast.attach(run.optimizer)
    weight = run.topkast.weights["2.weight"]
    expected = optimizer.state[plain[2].weight]["exp_avg"].flatten()[weight.layout.indices()]
    number = [id(p) for group in run.optimizer.param_groups for p in group["params"]].index(id(weight.parameter))
    assert torch.equal(run.optimizer.state_dict()["state"][number]["exp_avg"], expected)
    run.step(3)


# --- what else holds of a packed model -------------------------------------------------------------------------------


def test_the_dense_parameter_is_let_go():
    model = mlp()
    dense = weakref.ref(model[2].weight)
    topkast = TopKast(model, 0.8, 0.6, storage=Packed(kernels="torch"))
    gc.collect()
    assert dense() is None
    assert topkast.weights["2.weight"].parameter.numel() == 480


def test_marks_on_the_parameter_stay():
    model = mlp()
    model[2].weight.no_decay = True
    TopKast(model, 0.8, 0.6, storage=Packed(kernels="torch"))
    assert model[2]._parameters["weight"].no_decay


def test_weight_decay_lost_by_dimension_is_warned_of():
    model = mlp()
    topkast = TopKast(model, 0.8, 0.6, storage=Packed(kernels="torch"))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    with pytest.warns(UserWarning, match=r"packed weights \(2.weight, 4.weight\) are in a group without weight decay"):
        topkast.attach(torch.optim.AdamW(groups))


def test_subclasses_and_replaced_forwards_are_not_packed():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(8, 8), Doubling(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].forward = lambda x: nn.functional.linear(x, model[2].weight) * 3
    x = torch.randn(2, 8)
    topkast = TopKast(model, 0.5, 0.25, storage=Packed(kernels="torch"))
    assert {weight.storage for weight in topkast.weights.values()} == {"compact"}
    h = model[0](x)
    h = 2 * nn.functional.linear(h, topkast.weights["1.weight"].alpha(), model[1].bias)
    h = 3 * nn.functional.linear(h, topkast.weights["2.weight"].alpha())
    torch.testing.assert_close(model(x), model[3](h))


def test_pointwise_convolution_keeps_its_strides():
    model = nn.Sequential(nn.Conv2d(6, 8, 1, stride=(2, 3)))
    TopKast(
        model,
        0.5,
        0.25,
        targets=Targets(keep_first_dense=False, keep_last_dense=False),
        storage=Packed(kernels="torch"),
    )
    x = torch.randn(2, 6, 7, 8)
    expected = nn.functional.conv2d(x, model[0].weight, model[0].bias, stride=(2, 3))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[0]), expected[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_packed_attention_drops_out_in_training_only(need_weights):
    model = nn.Sequential(nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=True))
    TopKast(
        model, 0.8, 0.6, targets=Targets(keep_first_dense=False, keep_last_dense=False), storage=Packed(kernels="torch")
    )
    x = torch.randn(2, 5, 12)
    assert not torch.equal(*(model[0](x, x, x, need_weights=need_weights)[0] for _ in range(2)))
    model.eval()
    plain = to_dense(copy.deepcopy(model))[0]
    assert torch.equal(*(model[0](x, x, x, need_weights=need_weights)[0] for _ in range(2)))
    torch.testing.assert_close(model[0](x, x, x)[0], plain(x, x, x)[0])


@pytest.mark.parametrize("options", [{"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_every_kind_of_attention_computes_what_the_plain_one_does(options):
    model = nn.Sequential(nn.MultiheadAttention(12, 3, batch_first=True, **options)).double()
    TopKast(model, 0.8, 0.6, include=["0.in_proj_weight", "0.out_proj.weight"], storage=Packed(kernels="torch"))
    plain = to_dense(copy.deepcopy(model))[0]
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(model[0](x, x, x)[0], plain(x, x, x)[0])


@pytest.mark.parametrize(
    ("width", "pair", "kept"),
    [(256, (0.8, 0.5), "compact"), (256, (0.9, 0.8), "packed"), (64, (0.98, 0.95), "compact")],
)
def test_auto_packs_where_it_is_faster(width, pair, kept):
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))
    topkast = TopKast(model, *pair, storage=Packed(kernels="torch", products="auto"))
    assert {weight.storage for weight in topkast.weights.values()} == {kept}


def test_auto_packs_denser_weights_where_compiled_kernels_are_to_be_had(monkeypatch):
    """PyTorch's kernels are slower than a dense product at these densities."""
    if install.MATRIX_KERNELS.choose("auto", torch.device("cpu")) != "compiled":  # which loads them
        pytest.skip("needs a C++ compiler")
    kept = {}
    for kernels in ("torch", "compiled"):
        monkeypatch.setattr(install.MATRIX_KERNELS, "choose", lambda *_, chosen=kernels: chosen)
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
        (weight,) = TopKast(model, 0.8, 0.6, storage="auto").weights.values()
        kept[kernels] = weight.storage
    assert kept == {"torch": "compact", "compiled": "packed"}


def test_kernels_for_blocks_that_were_asked_for_are_those_of_the_layer():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    TopKast(model, 0.75, 0.5, structure=Block(16, 16), storage=Packed(kernels="triton"))
    with pytest.raises(TopKastError, match="kernels='triton' is not available"):  # on a CPU
        model(torch.ones(16, 64))


def test_frozen_weights_stay_frozen():
    run = Run("packed")
    run.topkast.weights["2.weight"].parameter.requires_grad_(False)
    run.topkast.exclude(["2.weight"])
    assert type(run.model[2]) is nn.Linear
    assert not run.model[2].weight.requires_grad
    assert list(run.topkast.weights) == ["4.weight"]
    run.step(10)


def test_saving_in_the_middle_of_a_refresh_is_whole():
    """A signal handler may save at any line."""
    run = Run("packed")
    run.step(3)
    weight = run.topkast.weights["2.weight"]
    theta, saved = weight.theta(), []

    def trace(frame, event, _):
        if frame.f_code not in {PackedWeight.apply.__code__, PackedWeight._settle.__code__}:
            return None
        if event == "line":
            sys.settrace(None)
            state = weight.state_dict()
            assert not state["latent"][state["tiers"] == 2].any()
            assert not state["never_active"][state["tiers"] == 2].any()
            saved.append(state["latent"] + weight.alpha())
            sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        tiers = largest(weight, torch.rand(30, 40), weight.updated_count, weight.active_count)
        weight.apply(tiers, [EntryState(torch.zeros(weight.updated_count, dtype=torch.float64))])
    finally:
        sys.settrace(before)
    assert len(saved) > 15
    assert all(torch.equal(each, theta) for each in saved)
    assert torch.equal(weight.tiers, tiers)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def hooked():
    model = mlp()
    model[2].weight.register_hook(lambda gradient: gradient)
    return model


def test_weights_with_hooks_stay_masked_with_a_warning():
    with pytest.warns(UserWarning, match=r"leaves '2.weight' \(it has hooks, which expect"):
        topkast = TopKast(hooked(), 0.8, 0.6, storage=Packed(kernels="torch"))
    assert {n: w.storage for n, w in topkast.weights.items()} == {"2.weight": "masked", "4.weight": "packed"}
    with pytest.raises(TopKastError, match="unsupported='error' refuses"):
        TopKast(hooked(), 0.8, 0.6, storage=Packed(kernels="torch", unsupported="error"))


def test_parametrized_weights_stay_masked():
    model = mlp()
    nn.utils.parametrizations.orthogonal(model[2])
    name = "2.parametrizations.weight.original"
    with pytest.warns(UserWarning, match=f"leaves '{name}' \\(it is parametrized"):
        topkast = TopKast(model, 0.8, 0.6, include=[name, "4.weight"], storage=Packed(kernels="torch"))
    assert topkast.weights[name].storage == "masked"


def test_optimizer_made_before_the_layers_were_packed_is_refused():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TopKastError, match=r"holds none of the sparse weights.*made after"):
        TopKast(model, 0.8, 0.6, storage=Packed(kernels="torch")).attach(optimizer)


def test_state_outside_B_cannot_be_kept():
    with pytest.raises(TypeError, match="unexpected keyword argument 'reset_optimizer_state'"):
        Packed(reset_optimizer_state=False)


def test_nan_leaves_a_model_as_it_was():
    model = mlp()
    model[4].weight.data[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TopKastError, match=r"'4.weight' holds NaN"):
        TopKast(model, 0.8, 0.6, storage=Packed(kernels="torch"))
    assert type(model[2]) is nn.Linear
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items())


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", ["masked", "packed", "compact"])
@pytest.mark.parametrize("resumed", ["masked", "packed", "compact"])
@pytest.mark.parametrize("steps", [7, 9, 30])
def test_a_run_resumes_in_every_execution(saved, resumed, steps):
    whole, first = Run("masked"), Run(saved)
    first.step(steps)
    state = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict(), first.topkast.state_dict()))
    second = Run(resumed)
    second.model.load_state_dict(state[0])
    second.optimizer.load_state_dict(state[1])
    second.topkast.load_state_dict(state[2])
    second.done = steps
    second.step(25)
    whole.step(steps + 25)
    check_alike(second, whole)
    assert all(isinstance(w, PackedWeight) == (resumed != "masked") for w in second.topkast.weights.values())


# --- nothing dense ----------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.entries = max(self.entries, tensor.numel())
        return result


def test_a_packed_step_makes_no_tensor_of_the_weights_size():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    topkast = TopKast(
        model, 0.8, 0.6, targets=Targets(keep_first_dense=False, keep_last_dense=False), storage=Packed(kernels="torch")
    )
    optimizer = torch.optim.AdamW(model.parameters())
    topkast.attach(optimizer)
    with Largest() as largest:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 64)).sum().backward()
            optimizer.step()
    assert largest.entries == topkast.weights["0.weight"].updated_count == 1638
    with Largest() as largest:
        assert model[0].weight.shape == (64, 64)
    assert largest.entries == 64 * 64, "the recorder sees a dense weight"


@executions
def test_reservoir_and_sets_are_not_registered_with_the_model(storage):
    run = Run(storage)
    run.step(3)
    sizes = {name: tensor.numel() for name, tensor in [*run.model.named_parameters(), *run.model.named_buffers()]}
    assert sizes["2.weight"] == run.topkast.weights["2.weight"].updated_count
    assert len(sizes) == 8


# --- birth ------------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("transposed", [False, True])
def test_a_layout_computes_with_compiled_kernels_on_cpu_only(transposed):
    MATRIX_KERNELS.choose("compiled", torch.device("cpu"))
    sets = torch.tensor([1, 4, 30]), torch.tensor([0, 5])
    layout = MatrixLayout.of(torch.Size((6, 8)), *sets, Product(transposed=transposed, kernels="compiled"), "compiled")
    assert isinstance(layout.pattern, EntryPattern)
    elsewhere = layout.to(torch.device("meta"))
    assert isinstance(elsewhere.pattern, CsrPattern)
    assert elsewhere.device.type == "meta"
    moved = MatrixLayout.of(layout.shape, *sets, layout.how, "torch")  # as on the other device
    x, values = torch.randn(4, 6 if transposed else 8), torch.randn(5)
    torch.testing.assert_close(layout.product(x, values, None), moved.product(x, values, None))
    assert torch.equal(layout.indices(), moved.indices())


def test_model_on_the_meta_device_is_drawn_on_the_host():
    torch.manual_seed(5)
    expected = nn.Linear(40, 30)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(40, 30))
    torch.manual_seed(5)
    topkast = TopKast(
        model, 0.8, 0.6, targets=Targets(keep_first_dense=False, keep_last_dense=False), storage=Packed(kernels="torch")
    )
    assert torch.equal(topkast.weights["0.weight"].theta(), expected.weight.detach())
    assert torch.equal(model[0].bias, expected.bias)
    assert model(torch.randn(3, 40)).shape == (3, 30)


def test_tied_and_real_weights_survive_a_draw():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False))
        model[2].weight = model[0].weight
    model[1].weight = nn.Parameter(torch.full((8, 8), 9.0))
    materialize(model)
    assert model[2].weight is model[0].weight
    assert torch.equal(model[1].weight, torch.full((8, 8), 9.0))
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_torchs_transformer_is_born_on_the_meta_device():
    with torch.device("meta"):
        model = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
    TopKast(model, 0.8, 0.6, storage=Packed(kernels="torch"))
    assert torch.isfinite(model(torch.randn(2, 5, 12))).all()


def test_meta_module_that_cannot_be_drawn_is_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), Own())
    with pytest.raises(TopKastError, match=r"'1' \(Own\) is on the meta device and has no reset_parameters\(\)"):
        TopKast(model, 0.8, 0.6, storage="packed", include=["0.weight"])


def test_an_error_of_a_reset_method_changes_nothing():
    class Broken(nn.Linear):
        def reset_parameters(self):
            if not self.weight.is_meta:
                raise ValueError("not today")

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), Broken(8, 8), nn.BatchNorm1d(8))
    tensors = [*model.parameters(), *model.buffers()]
    with pytest.raises(ValueError, match="not today"):
        TopKast(model, 0.8, 0.6, storage="packed", include=["0.weight"])
    for before, after in zip(tensors, [*model.parameters(), *model.buffers()], strict=True):
        assert after is before


def test_a_draw_keeps_what_other_code_has_set_on_parameters():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 8))
    for parameter in model.parameters():
        parameter.no_decay = True
    TopKast(model, 0.8, 0.6, storage=Packed(kernels="torch"), include=["0.weight"])
    assert all(parameter.no_decay for parameter in model.parameters())


# --- choosing in the background ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["masked", "packed", "compact"])
def test_delayed_choice_is_that_of_its_own_step(storage):
    run = Run(storage, delay=4)
    run.step(9)
    weight = run.topkast.weights["2.weight"]
    chosen, before = largest(weight, weight.magnitudes(), weight.updated_count, weight.active_count), weight.tiers
    assert not torch.equal(chosen, before)
    run.step(3)
    assert torch.equal(weight.tiers, before)
    run.step(1)
    assert torch.equal(weight.tiers, chosen)
    assert run.topkast.refresh_count == 1


@pytest.mark.parametrize("storage", ["masked", "packed"])
@pytest.mark.parametrize("steps", [8, 9, 11, 13, 20])
def test_delayed_choice_is_saved_and_resumed(storage, steps):
    options = {"delay": 4, "stop_exploring_at": 31}
    whole, first = Run(storage, **options), Run(storage, **options)
    first.step(steps)
    state = pickle.loads(
        pickle.dumps((first.model.state_dict(), first.optimizer.state_dict(), first.topkast.state_dict()))
    )
    second = Run(storage, **options)
    second.model.load_state_dict(state[0])
    second.optimizer.load_state_dict(state[1])
    second.topkast.load_state_dict(state[2])
    second.done = steps
    second.step(30)
    whole.step(steps + 30)
    for name, weight in whole.topkast.weights.items():
        assert torch.equal(weight.tiers, second.topkast.weights[name].tiers)
        assert torch.equal(weight.theta(), second.topkast.weights[name].theta())


def test_nan_found_in_the_background_is_reported_when_it_would_take_effect():
    run = Run("packed", delay=2)
    run.step(8)
    weight = run.topkast.weights["2.weight"]
    run.backward()
    weight.parameter.data[0] = torch.nan
    run.optimizer.step()
    before = weight.tiers
    run.optimizer.step()
    with pytest.raises(TopKastError, match=r"'2.weight' holds NaN or infinity at step 9"):
        run.optimizer.step()
    assert torch.equal(weight.tiers, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_process_that_is_forked_while_sets_are_chosen_goes_on_as_its_parent(storage, busy, monkeypatch):
    """It has none of its parent's threads; `ddp_fork` and `ddp_notebook` start so."""
    go_on, original = threading.Event(), refresh.choose

    def choose(*args):
        if threading.current_thread() is not threading.main_thread():
            go_on.wait()
        return original(*args)

    run = Run(storage, delay=4)
    run.step(8)
    monkeypatch.setattr(refresh, "choose", choose)
    if not busy:
        go_on.set()
    run.step(1)
    if not busy:
        (selection,) = run.topkast._refresher.selections
        selection.result()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        go_on.set()
        run.step(20)
        os.write(writer, pickle.dumps({name: weight.theta() for name, weight in run.topkast.weights.items()}))
        os._exit(0)
    go_on.set()
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    run.step(20)
    assert same(pickle.loads(found), {name: weight.theta() for name, weight in run.topkast.weights.items()})


# --- interruption -----------------------------------------------------------------------------------------------------


def test_refresh_interrupted_anywhere_is_finished_or_has_not_begun():
    """Line by line: afterwards the sets are the old or the new ones, and every value and its state are in place."""
    torch.manual_seed(0)
    codes = {PackedWeight.apply.__code__, PackedWeight._settle.__code__}
    outcomes = set()
    for line in range(1, 60):
        weight = PackedWeight("weight", nn.Parameter(torch.arange(1.0, 21).view(4, 5)), 5, 9, Traits(), Product())
        weight.apply(nested_top_k(weight.magnitudes(), (9, 5)))
        weight.parameter.data.mul_(-1)
        theta, state = weight.theta(), weight.parameter.detach() * 10
        scores = torch.rand(4, 5)
        tiers, before = nested_top_k(scores, (9, 5)), weight.tiers
        seen = 0

        def trace(frame, event, _, line=line):
            nonlocal seen
            if frame.f_code not in codes:
                return None
            if event == "line":
                seen += 1
                if seen == line:
                    raise KeyboardInterrupt
            return trace

        old = sys.gettrace()
        sys.settrace(trace)
        try:
            weight.apply(tiers, [EntryState(state)])
            finished = True
        except KeyboardInterrupt:
            finished = False
        finally:
            sys.settrace(old)
        weight.recover()
        assert torch.equal(weight.theta(), theta)
        new = torch.equal(weight.tiers, tiers)
        assert new or torch.equal(weight.tiers, before)
        places = weight.layout.indices()
        stayed = (before.flatten()[places] > 0) if new else torch.ones(9, dtype=torch.bool)
        assert torch.equal(state, torch.where(stayed, theta.flatten()[places] * 10, 0))
        outcomes.add((finished, new))
    assert outcomes == {(False, False), (False, True), (True, True)}


# --- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["masked", "packed"])
@pytest.mark.parametrize("make_model", [mlp, gpt2_like])
def test_to_csr_computes_the_same_from_compressed_weights(storage, make_model):
    run = Run(storage, make_model=make_model, include=["*.weight"])
    run.step(4)
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = run.model(x).detach()
    counts = {name: weight.active_count for name, weight in run.topkast.weights.items()}
    assert to_csr(run.model, kernels="torch") is run.model
    torch.testing.assert_close(run.model(x), expected)
    for name, count in counts.items():
        layer = run.model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, CsrLinear)
        assert layer.values.numel() == count
    other = copy.deepcopy(run.model)
    other.load_state_dict(run.model.state_dict())
    assert torch.equal(other(x), run.model(x))


def test_to_csr_keeps_layers_shared_and_weights_readable():
    layer = nn.Linear(8, 8)
    layer.weight.data[torch.rand(8, 8) < 0.8] = 0
    dense = layer.weight.detach().clone()
    model = to_csr(nn.Sequential(layer, nn.ReLU(), layer), kernels="torch")
    assert model[0] is model[2]
    assert torch.equal(model[0].weight, dense)
    with pytest.raises(TopKastError, match="single layer"):
        to_csr(layer)


@csr_kernels
def test_a_compressed_layer_computes_with_the_places_that_it_loads(kernels):
    weights = [torch.zeros(6, 8), torch.zeros(6, 8)]
    for seed, weight in enumerate(weights):
        weight.view(-1)[torch.randperm(48, generator=torch.Generator().manual_seed(seed))[:9]] = torch.arange(1.0, 10)
    layer, other = (CsrLinear(weight, kernels=kernels) for weight in weights)
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), F.linear(x, weights[0]))
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), F.linear(x, weights[1]))
    torch.testing.assert_close(copy.deepcopy(layer)(x), F.linear(x, weights[1]))


@csr_kernels
def test_a_compressed_layer_says_what_of_a_state_dict_does_not_fit_it(kernels):
    weight = torch.eye(6, 8)
    layer = CsrLinear(weight, kernels=kernels)
    fewer = CsrLinear(weight * (torch.arange(6) < 3)[:, None]).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for col"):
        layer.load_state_dict(fewer)
    state = CsrLinear(weight).state_dict()
    shifted, cut = {"col": state["col"] + 8}, {"crow": fewer["crow"]}
    falling, double = (
        {"crow": torch.tensor([0, 9, 2, 3, 4, 5, 6])},
        {"crow": state["crow"].clone(), "col": state["col"] * 0},
    )
    double["crow"][1:] = 6
    for wrong, message in (
        (shifted, "expected columns below 8, got 8 to 13"),
        (cut, "expected 3 columns in 6 rows, got 6"),
        (falling, "expected 6 columns in 6 rows, got 6"),
        (double, "expected strictly increasing indices"),
    ):
        with pytest.raises(RuntimeError, match=f"crow and col are no compressed rows: {message}"):
            CsrLinear(weight, kernels=kernels).load_state_dict(state | wrong)


def compressed(seed, kernels):
    weight = torch.zeros(6, 8)
    weight.view(-1)[torch.randperm(48, generator=torch.Generator().manual_seed(seed))[:9]] = torch.arange(1.0, 10)
    return weight, CsrLinear(weight, kernels=kernels)


@csr_kernels
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_compressed_layer_computes_with_what_was_written_to_its_places(kernels, copied):
    (_, layer), (weight, other) = compressed(0, kernels), compressed(1, kernels)
    x = torch.randn(5, 8)
    layer(x)
    for name in ("crow", "col", "values"):
        getattr(layer, name).copy_(getattr(other, name))
    for each in (copied(layer), layer):  # the copy of one that does not know yet
        torch.testing.assert_close(each(x), F.linear(x, weight))
    layer.crow, layer.col, layer.values = (
        getattr(compressed(2, kernels)[1], name) for name in ("crow", "col", "values")
    )
    torch.testing.assert_close(layer(x), F.linear(x, compressed(2, kernels)[0]))
    layer.col[0] = 8
    with pytest.raises(ValueError, match="expected columns below 8"):
        layer(x)


@csr_kernels
def test_a_compressed_layer_follows_moves(kernels):
    weight, layer = compressed(0, kernels)
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer.double()(x.double()), F.linear(x.double(), weight.double()))
    assert layer.float()(x).dtype == torch.float32
    state = {name: buffer.clone() for name, buffer in layer.state_dict().items()}
    layer.to("meta")
    if kernels == "torch":
        assert layer(x.to("meta")).shape == (5, 6)
    layer.to_empty(device="cpu")
    for buffer in layer.buffers():
        buffer.fill_(9)
    for each in (layer, copy.deepcopy(layer)):
        with pytest.raises(ValueError, match="expected 9 columns"):
            each(x)
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), F.linear(x, weight))


@csr_kernels
@pytest.mark.slow
def test_a_compiled_graph_follows_the_state_dict_of_a_compressed_layer(kernels):
    (_, layer), (weight, other) = compressed(0, kernels), compressed(1, kernels)
    x = torch.randn(5, 8)
    graph = torch.compile(layer, fullgraph=True)
    graph(x)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(graph(x), F.linear(x, weight))


@csr_kernels
def test_a_compressed_layer_that_is_made_for_inference_only_computes(kernels):
    x = torch.randn(5, 8)
    with torch.inference_mode():
        weight, layer = compressed(0, kernels)
        torch.testing.assert_close(layer(x), F.linear(x, weight))
    torch.testing.assert_close(layer(x), F.linear(x, weight))


@csr_kernels
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_trace_of_a_compressed_layer_holds_no_operators_of_ours(kernels):
    weight, layer = compressed(0, kernels)
    traced = torch.jit.trace(layer, torch.randn(5, 8))
    assert "topkast::" not in str(traced.inlined_graph)
    x = torch.randn(3, 8)
    torch.testing.assert_close(traced(x), F.linear(x, weight))


def test_to_csr_leaves_dense_layers_alone():
    model = to_csr(mlp())
    assert all(type(layer) is nn.Linear for layer in model if not isinstance(layer, nn.Tanh))


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "per head", "padding", "both"])
def test_packed_attention_computes_what_the_plain_one_does(batch_first, need_weights, average, masks):
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(12, 3, batch_first=batch_first)).double()
    topkast = TopKast(
        model, 0.8, 0.6, targets=Targets(keep_first_dense=False, keep_last_dense=False), storage=Packed(kernels="torch")
    )
    assert {weight.storage for weight in topkast.weights.values()} == {"packed"}
    plain = to_dense(copy.deepcopy(model))[0]
    x = torch.randn((4, 5, 12) if batch_first else (5, 4, 12), dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4], [5]])
    given = {
        "none": {},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(5, 5, dtype=torch.float64)},
        "per head": {"attn_mask": torch.randn(12, 5, 5, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
    }[masks]
    given |= {"need_weights": need_weights, "average_attn_weights": average}
    for module in (model[0], plain):
        module.train()
    for one, other in zip(model[0](x, x, x, **given), plain(x, x, x, **given), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    if masks in ("none", "bool"):
        single = x[0] if batch_first else x[:, 0]
        torch.testing.assert_close(
            model[0](single, single, single, **given)[0], plain(single, single, single, **given)[0]
        )


def test_attention_between_sequences_takes_the_ordinary_way():
    model = nn.Sequential(nn.MultiheadAttention(12, 3, batch_first=True)).double()
    TopKast(
        model, 0.8, 0.6, targets=Targets(keep_first_dense=False, keep_last_dense=False), storage=Packed(kernels="torch")
    )
    plain = to_dense(copy.deepcopy(model))[0]
    query, memory = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(model[0](query, memory, memory)[0], plain(query, memory, memory)[0])
    assert model[0]._parameters["in_proj_weight"].grad is None
    model[0](query, memory, memory)[0].sum().backward()
    assert model[0]._parameters["in_proj_weight"].grad.abs().sum() > 0


def test_vector_updated_as_a_whole_stays_in_its_execution():
    def engine(storage):
        module = nn.Module()
        module.theta = nn.Parameter(torch.arange(1.0, 9))
        return TopKast(module, 0.5, 0.0, **nouns(storage=storage, kernels="torch", include=["theta"]))

    masked, packed = engine("masked"), engine("compact")
    packed.load_state_dict(packed.state_dict())
    with pytest.raises(TopKastError, match=r"'theta' is 1-D and all of it is updated.*resume with storage='masked'"):
        packed.load_state_dict(masked.state_dict())


def test_only_an_output_that_the_next_layer_takes_has_the_batch_last():
    """Others are contiguous, as dense layers and losses want them."""
    model = nn.Sequential(
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 8),
        nn.Conv1d(8, 8, 1),
    )
    targets = Targets(include=["0.weight", "3.weight", "5.weight"])
    topkast = TopKast(model, 0.5, 0.25, targets=targets, storage=Packed(kernels="torch"))
    x = torch.randn(5, 8)
    assert [model[index](x).stride() for index in (0, 3, 5)] == [(1, 5), (8, 1), (8, 1)]
    topkast.exclude(["0.weight"])
    assert "batch_last" not in vars(model[0])
