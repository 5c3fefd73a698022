"""A plan says what training really allocates, sends and multiplies: each figure against a measured one."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from lightning_topkast import Block, Ramp, TopKast, TopKastError, TopKGradients
from lightning_topkast.baselines import RigL
from lightning_topkast.costs import OptimizerState, Parallel, Plan, make_plan
from lightning_topkast.method.density import SetSizes
from lightning_topkast.settings import Settings
from tests.helpers import nouns

SPARSITY = {"forward_sparsity": 0.9, "backward_sparsity": 0.7, "kernels": "torch"}


class Mixed(nn.Module):
    """A layer of every kind that weights are kept for: products, convolutions, attention, recurrence; and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 16, 3, stride=2)
        self.point = nn.Conv2d(16, 24, 1)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.memory = nn.LSTM(24, 20, batch_first=True)
        self.hidden = nn.Linear(20, 30)
        self.output = nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.mix(self.norm(self.stem(x)))).flatten(2).mT
        x = x + self.attention(x, x, x)[0]
        return self.output(self.hidden(self.memory(x)[0][:, -1]))


IMAGES = (4, 3, 11, 11)


def plan_of(
    build, shape, *, optimizer=torch.optim.SGD, parallel=None, dtype=torch.float32, dense=False, **sparsity
) -> Plan:
    with torch.device("meta"):
        model = build().to(dtype)
        settings = None if dense else Settings(**nouns(**(SPARSITY | sparsity)))
        state = OptimizerState(partial(optimizer, lr=0.01))
        return make_plan(model, [torch.zeros(*shape, dtype=dtype)], settings, state, parallel or Parallel())


def measured(model: nn.Module, topkast: TopKast, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """True bytes of everything that training keeps between two steps, by kind."""
    parameters, weights = list(model.parameters()), list(topkast.weights.values())
    masked = [weight for weight in weights if weight.storage == "masked"]
    packed = [weight for weight in weights if weight.storage != "masked"]
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return {
        "weights": sum(tensor.nbytes for tensor in (*parameters, *model.buffers())),
        "gradients": sum(parameter.grad.nbytes for parameter in parameters),
        "optimizer": sum(tensor.nbytes for tensor in state),
        "masks": sum(weight._mask.nbytes + weight._never_active.nbytes for weight in masked),
        "latent": sum(weight._latent.nbytes for weight in masked),
        "indices": sum(weight._exploring.nbytes + weight._explored.nbytes for weight in masked)
        + sum(weight.layout.nbytes for weight in packed),
        "host": sum(
            tensor.nbytes
            for weight in packed
            for tensor in (weight._theta, weight._tiers, weight._never_active, weight._scores, weight.layout.units)
            if tensor is not None
        ),
    }


@pytest.mark.filterwarnings("ignore:storage=.* leaves .* masked:UserWarning")
@pytest.mark.parametrize(
    ("storage", "optimizer", "dtype"),
    [
        ("masked", torch.optim.SGD, torch.float32),
        ("masked", partial(torch.optim.SGD, momentum=0.9), torch.float32),
        ("masked", partial(torch.optim.Adam, amsgrad=True), torch.float32),
        ("masked", torch.optim.Adafactor, torch.float32),
        ("masked", torch.optim.AdamW, torch.bfloat16),
        ("packed", partial(torch.optim.SGD, momentum=0.9), torch.float32),
        ("packed", torch.optim.AdamW, torch.float32),
        ("compact", torch.optim.RMSprop, torch.float32),
        ("auto", torch.optim.Adam, torch.float32),
    ],
)
@pytest.mark.parametrize(
    "units",
    [{}, {"kernels": "auto"}, {"structure": "block", "block": (2, 4)}],
    ids=["entry", "entry, fastest kernels", "block"],
)
def test_planned_bytes_are_those_that_training_holds(storage, optimizer, dtype, units):
    model = Mixed().to(dtype)
    topkast = TopKast(model, **nouns(**(SPARSITY | {"storage": storage, "update_every": 2} | units)))
    trained = optimizer(model.parameters(), lr=0.01)
    topkast.attach(trained)
    for _ in range(3):  # with a refresh between
        trained.zero_grad()
        model(torch.randn(IMAGES, dtype=dtype)).float().square().mean().backward()
        trained.step()

    planned = plan_of(Mixed, IMAGES, optimizer=optimizer, dtype=dtype, storage=storage, **units).bytes
    for kind, true in measured(model, topkast, trained).items():
        assert getattr(planned, kind) == true, kind


def test_stopped_exploration_holds_no_exploring_indices():
    stopped = plan_of(Mixed, IMAGES, stop_exploring_at=0)
    assert stopped.bytes.indices == 0
    layer = next(layer for layer in stopped.layers if layer.name == "hidden.weight")
    assert layer.updated == layer.active == 60
    assert layer.training_flops == pytest.approx(0.1 * layer.dense_training_flops)


@pytest.mark.parametrize("storage", ["masked", "packed", "compact", "auto"])
@pytest.mark.filterwarnings("ignore:storage=.* leaves .* masked:UserWarning")
def test_plan_keeps_every_weight_as_training_does(storage):
    options = {"storage": storage, "distribution": "erk", "exclude": ["memory.weight_hh*"]}
    rows = TopKast(Mixed(), **nouns(**(SPARSITY | options))).summary().rows
    layers = {layer.name: layer for layer in plan_of(Mixed, IMAGES, **options).layers}
    assert {row.name for row in rows} == {name for name, layer in layers.items() if layer.shape}
    for row in rows:
        layer = layers[row.name]
        why_dense = layer.reason if layer.storage == "dense" else ""
        assert (layer.active, layer.updated, why_dense) == (row.active, row.updated, row.reason)
        assert layer.storage == (row.storage or "dense")


# --- arithmetic ---------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention by one fused operator, as transformers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.output = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        return self.output(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class CrossAttention(nn.Module):
    """Keys and values come from another sequence, which makes the input projection two products."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.attention(x, x[:, :3], x[:, :3])[0]


class Twice(nn.Module):
    """One layer used twice, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(12, 12)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.output = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.frozen(self.shared(self.shared(x))))


def recurrent() -> nn.Module:
    class Last(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    return Last(7, 9, num_layers=2, bidirectional=True)


def upsampling() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 4, stride=2))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)), (6, 20)),
    "convolutions": (upsampling, (2, 3, 9, 9)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, dilation=2)), (2, 4, 12)),
    "fused attention": (Attention, (2, 5, 16)),
    "multi-head attention": (CrossAttention, (2, 5, 16)),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 5, 16)),
    "lstm": (recurrent, (4, 3, 7)),
    "twice and frozen": (Twice, (5, 12)),
    "mixed": (Mixed, IMAGES),
}


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")  # of restoring mkldnn's flags
@pytest.mark.parametrize("name", MODELS)
def test_dense_flops_are_those_that_torch_counts_in_a_real_step(name):
    build, shape = MODELS[name]
    model = build()
    # one kernel each for attention and recurrence would hide their products from torch's counter
    with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        with FlopCounterMode(display=False) as forward:
            result = model(torch.randn(shape))
        with FlopCounterMode(display=False) as backward:
            result.sum().backward()
    totals = plan_of(build, shape, dense=True).totals()
    assert totals["forward_flops"] * shape[0] == forward.get_total_flops() > 0
    assert totals["training_flops"] * shape[0] == forward.get_total_flops() + backward.get_total_flops()


def test_sparsity_zero_costs_what_dense_does():
    totals = plan_of(Mixed, IMAGES, forward_sparsity=0.0, backward_sparsity=0.0).totals()
    assert totals["forward_flops_ratio"] == totals["training_flops_ratio"] == 1
    assert totals["forward_flops"] == plan_of(Mixed, IMAGES, dense=True).totals()["forward_flops"]


def test_sparse_weight_costs_d_forward_and_for_the_input_and_d_plus_m_for_itself():
    build = lambda: nn.Sequential(nn.Linear(20, 40), nn.Linear(40, 50), nn.Linear(50, 10))  # noqa: E731
    first, middle, last = (layer for layer in plan_of(build, (8, 20)).layers if len(layer.shape) == 2)
    one = 2 * 40 * 50
    assert (middle.dense_forward_flops, middle.dense_training_flops) == (one, 3 * one)
    assert middle.forward_flops == pytest.approx(0.1 * one)
    assert middle.training_flops == pytest.approx((2 * 0.1 + 0.3) * one)
    assert first.training_flops == 2 * 2 * 20 * 40  # dense; nobody wants its input's gradient
    assert last.training_flops == 3 * 2 * 50 * 10


def test_products_of_activations_stay_dense_and_are_named_by_their_module():
    plan = plan_of(Mixed, IMAGES)
    (attention,) = [layer for layer in plan.layers if layer.name == "attention (activations)"]
    length, width = 16, 24
    assert attention.forward_flops == attention.dense_forward_flops == 2 * 2 * length * length * width


def test_masked_and_compact_execute_dense_products_and_packed_fewer():
    masked, compact, packed = (plan_of(Mixed, IMAGES, storage=e).totals() for e in ("masked", "compact", "packed"))
    assert masked["executed_training_flops"] == masked["dense_training_flops"] == compact["executed_training_flops"]
    assert packed["training_flops"] < packed["executed_training_flops"] < packed["dense_training_flops"]
    assert masked["training_flops"] == packed["training_flops"]


def test_products_under_no_grad_have_no_backward_pass():
    class Teacher(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    totals = plan_of(lambda: Teacher(8, 8), (3, 8), dense=True).totals()
    assert totals["training_flops"] == totals["forward_flops"] == 2 * 8 * 8


def test_copy_of_a_weight_is_still_that_weight():
    class Narrow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x.bfloat16(), self.weight.bfloat16().clone()).float()

    build = lambda: nn.Sequential(nn.Linear(8, 8), Narrow(8, 8), nn.Linear(8, 8))  # noqa: E731
    (narrow,) = [layer for layer in plan_of(build, (2, 8)).layers if layer.name == "1.weight"]
    assert narrow.dense_forward_flops == 2 * 8 * 8
    assert narrow.forward_flops == pytest.approx(2 * 6)


def test_bilinear_and_matrix_vector_products_are_not_lost():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Bilinear(4, 5, 6)
            self.vector = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x[:, :4], x[:, 4:]) @ self.vector

    layers = {layer.name: layer.forward_flops for layer in plan_of(Net, (3, 9), dense=True).layers}
    assert layers["pair.weight"] == 2 * 4 * 5 * 6
    assert layers["vector"] == 2 * 6


def test_sparse_weight_without_a_product_is_noted():
    class Lookup(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight[: x.shape[0]].sum() + x

    build = lambda: nn.Sequential(nn.Linear(8, 8), Lookup(8, 8), nn.Linear(8, 8))  # noqa: E731
    assert any("no product was counted for 1 sparse weights: 1.weight" in note for note in plan_of(build, (2, 8)).notes)


# --- devices ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranks():
    """Collectives of many ranks that go nowhere: this process is rank 0 of them."""

    def start(world: int):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        return dist.device_mesh.init_device_mesh("cpu", (world,))

    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3, 7])
def test_fsdp2_shards_are_those_of_fully_shard(world, ranks):
    model = Mixed()
    fully_shard(model, mesh=ranks(world))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    planned = plan_of(Mixed, IMAGES, optimizer=torch.optim.Adam, parallel=Parallel(world, "fsdp2"), dense=True).bytes
    local = [parameter.to_local().nbytes for parameter in model.parameters()]
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    assert planned.weights == sum(local) + sum(buffer.nbytes for buffer in model.buffers())
    assert planned.gradients == sum(local)
    assert planned.optimizer == sum(getattr(value, "_local_tensor", value).nbytes for value in state)


@pytest.mark.parametrize("as_view", [True, False])
def test_ddp_holds_and_reduces_the_gradients_in_buckets(as_view, ranks):
    ranks(4)
    wrapped = DistributedDataParallel(Mixed(), gradient_as_bucket_view=as_view)
    buckets = sum(bucket.buffer().nbytes for bucket in wrapped.reducer._get_zeros_like_grad_buckets())
    planned = plan_of(Mixed, IMAGES, parallel=Parallel(4, "ddp", buckets=not as_view), dense=True).bytes
    assert planned.payload == planned.gradients == buckets
    assert planned.buckets == (0 if as_view else buckets)
    assert planned.sent == pytest.approx(2 * 3 / 4 * buckets, abs=20)


def test_packed_weights_and_a_sparse_all_reduce_send_b_only():
    layers = {
        name: next(layer for layer in plan_of(Mixed, IMAGES, **options).layers if layer.name == "hidden.weight")
        for name, options in {
            "dense": {"parallel": Parallel(8, "ddp")},
            "sparse": {"parallel": Parallel(8, "ddp", all_reduce="sparse")},
            "sparse_bf16": {"parallel": Parallel(8, "ddp", all_reduce="sparse_bf16")},
            "packed": {"parallel": Parallel(8, "ddp"), "storage": "packed"},
            "largest": {"parallel": Parallel(8, "ddp", all_reduce=TopKGradients(0.1))},
            "largest, packed": {"parallel": Parallel(8, "ddp", all_reduce=TopKGradients(0.1)), "storage": "packed"},
        }.items()
    }
    updated = round(0.3 * 20 * 30)
    payloads = {name: layer.bytes.payload for name, layer in layers.items()}
    values = {"dense": 2400, "sparse": 4 * updated, "sparse_bf16": 2 * updated, "packed": 4 * updated}
    largest = 8 * (8 * round(0.1 * updated) + 4)  # a value and its place, of every rank, and whether it has used it
    assert payloads == values | {"largest": largest, "largest, packed": largest}
    assert layers["largest"].bytes.sent == largest * 7 / 8
    assert layers["largest"].bytes.buckets - layers["dense"].bytes.buckets == 4 * updated
    # the hook keeps B's flat indices, 64 bits each
    assert layers["sparse"].bytes.indices - layers["dense"].bytes.indices == 8 * updated


def test_fsdp2_gathers_twice_and_scatters_once_a_batch():
    plan = plan_of(Mixed, IMAGES, parallel=Parallel(4, "fsdp2", accumulate=2), dense=True)
    parameters = 4 * sum(math.prod(layer.shape) for layer in plan.layers if layer.shape)
    assert plan.bytes.payload == 2 * 3 * parameters
    assert plan.bytes.sent == pytest.approx(plan.bytes.payload * 3 / 4, abs=100)


def test_strategies_are_what_each_would_plan_as_its_own_run():
    run = plan_of(Mixed, IMAGES, optimizer=torch.optim.Adam, parallel=Parallel(4, "ddp", all_reduce="sparse"))
    storages = ("dense", "masked", "packed")
    assert list(run.strategies) == [f"{storage}_{kind}" for kind in ("ddp", "fsdp2") for storage in storages]
    assert run.strategies["masked_ddp"] == run.bytes
    for name, options in {
        "dense_ddp": {"dense": True, "parallel": Parallel(4, "ddp")},
        "packed_ddp": {"storage": "packed", "kernels": "auto", "parallel": Parallel(4, "ddp")},
        "masked_fsdp2": {"parallel": Parallel(4, "fsdp2")},
        "packed_fsdp2": {"storage": "packed", "kernels": "auto", "parallel": Parallel(4, "fsdp2")},
    }.items():
        assert run.strategies[name] == plan_of(Mixed, IMAGES, optimizer=torch.optim.Adam, **options).bytes


# --- refusals -----------------------------------------------------------------------------------------------------


def test_model_that_does_not_fit_its_input_is_refused_by_shape():
    with pytest.raises(TopKastError, match=r"Mixed fails on an input of shape \(4, 5, 11, 11\)"):
        plan_of(Mixed, (4, 5, 11, 11))


def test_optimizer_that_takes_no_step_alone_is_refused():
    with pytest.raises(TopKastError, match="the size of the optimizer's state is not known"):
        plan_of(Mixed, IMAGES, optimizer=torch.optim.LBFGS)


@pytest.mark.parametrize(
    ("structure", "side", "storage"),
    [("unstructured", 2**16, "compact"), ("unstructured", 2**15, "packed"), (Block(2, 1), 2**16, "compact"),
     (Block(4, 4), 2**16, "packed")],
)  # fmt: skip
def test_weights_with_too_many_entries_for_the_kernels_are_planned_as_they_would_be_stored(structure, side, storage):
    """At most 2³¹ - 1 entries of A, or blocks; others would fail when the model is built, after an hour of waiting."""

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(each, out, bias=False) for each, out in ((4, side), (side, side), (side, 4))))

    sparsity = {"forward_sparsity": 0.4, "backward_sparsity": 0.2, "storage": "packed", "structure": structure}
    stored = {layer.name: layer.storage for layer in plan_of(build, (1, 4), **sparsity).layers}
    assert stored["1.weight"] == storage


def test_strict_refuses_weights_left_masked():
    class Absolute(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        nn.utils.parametrize.register_parametrization(model[1], "weight", Absolute())
        return model

    options = {"include": ["1.parametrizations*", "2.weight"], "storage": "packed"}
    assert any("leaves 1 weights masked" in note for note in plan_of(build, (2, 8), **options).notes)
    with pytest.raises(TopKastError, match=r"it is parametrized.* masked, which unsupported='error' refuses"):
        plan_of(build, (2, 8), **options, unsupported="error")


# --- sets that change -------------------------------------------------------------------------------------------------


def training_share(total_steps=None, **options):
    """FLOPs of training with the one sparse weight, which needs no gradient of its input, as a share of dense ones."""
    settings = Settings(
        **nouns(**({"forward_sparsity": 0.9, "backward_sparsity": 0.9, "include": ["0.weight"]} | options))
    )
    plan = make_plan(
        nn.Sequential(nn.Linear(20, 50)), [torch.zeros(2, 20)], settings, OptimizerState(torch.optim.SGD), Parallel(),
        total_steps,
    )  # fmt: skip
    layer = plan.layers[0]
    assert layer.forward_flops == pytest.approx(0.1 * layer.dense_forward_flops)
    return layer.training_flops / layer.dense_training_flops, plan.notes


def test_training_flops_are_averages_over_a_ramp():
    ramp = Ramp(0.5, 0.5, begin=0, end=200, power=1)
    # refreshes after 50, 100, 150 and 200 of 400 steps; before the first the network is as it began
    shares = [0.5, 0.4, 0.3, 0.2] + [0.1] * 4
    share, notes = training_share(400, ramp=ramp, update_every=50)
    assert share == pytest.approx(sum(shares) / 8)
    assert "averages over the run" in notes[0]


@pytest.mark.parametrize("distribution", ["global", "global_normalized"])
def test_weights_that_compete_are_planned_as_if_uniform(distribution):
    share, notes = training_share(distribution=distribution)
    uniform, _ = training_share()
    assert share == uniform
    assert f"planned as if uniform: with distribution='{distribution}' training decides" in notes[0]


def test_of_a_run_of_unknown_length_fractions_are_averaged_and_steps_are_not():
    half = Ramp(0.0, 0.0, begin=0.0, end=0.5, power=1)
    assert training_share(ramp=half)[0] == pytest.approx(0.5 * 0.55 + 0.5 * 0.1, abs=2e-3)
    share, notes = training_share(ramp=Ramp(0.0, 0.0, begin=0, end=500))
    assert share == 1.0
    assert "those of the run's first step" in notes[0]


def test_the_whole_gradient_that_rigl_looks_at_is_counted():
    # one of 100 steps until the middle of the run; half the arithmetic is the gradient's
    share, _ = training_share(rule=RigL(), stop_updating_at=0.5)
    assert share == pytest.approx(0.5 * 0.1 + 0.5 * (0.1 + 0.005 * 0.9), rel=1e-3)


def test_exploration_that_stops_is_averaged():
    share, _ = training_share(1000, backward_sparsity=0.5, stop_exploring_at=0.25)
    assert share == pytest.approx(0.5 * 0.1 + 0.5 * (0.25 * 0.5 + 0.75 * 0.1))


def test_planned_sizes_are_those_of_training_at_every_step():
    model = nn.Sequential(nn.Linear(20, 50))
    options = {"ramp": Ramp(0.5, 0.2, begin=3, end=17), "stop_exploring_at": 21, "update_every": 4}
    topkast = TopKast(model, 0.9, 0.8, **nouns(include=["0.weight"], **options))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    sums = [0, 0]
    for _ in range(30):
        optimizer.zero_grad()
        weight = topkast.weights["0.weight"]
        sums = [sums[0] + int(weight.active.sum()), sums[1] + int(weight.updated.sum())]
        model(torch.randn(4, 20)).square().mean().backward()
        optimizer.step()
    chosen = Settings(0.9, 0.8, **nouns(include=["0.weight"], **options))
    sizes = SetSizes(chosen.allocation, chosen.schedule, chosen.ramp, {"0.weight": torch.Size([50, 20])})
    assert sizes.mean_densities(30, chosen.rule.needs_gradient)["0.weight"] == pytest.approx(
        (sums[0] / 30000, sums[1] / 30000)
    )
