"""torch.compile of sparse models: one graph, and none again over refreshes, since places and values are its inputs."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lightning_topkast import Block, Packed, Schedule, Targets, TopKast
from tests.helpers import needs_compiler

pytestmark = [
    pytest.mark.slow,
    # of torch.compile, about itself
    pytest.mark.filterwarnings("ignore:.*TorchDynamo|.*torch._dynamo|.*Dynamo"),
]
SETS = [
    pytest.param("unstructured", "torch", id="entries, torch"),
    pytest.param("unstructured", "compiled", id="entries, compiled", marks=needs_compiler),
    pytest.param(Block(8, 8), "torch", id="blocks"),
]
REFRESHES = 3


def mlp():
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.ReLU())))
    return model, Targets(), lambda forward: forward(torch.randn(16, 32)).square().mean()


def block():
    model = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    return model, Targets(), lambda forward: forward(torch.randn(4, 8, 32)).square().mean()


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), Targets(include_types=["Conv1D"]), language_loss


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), Targets(), language_loss


def language_loss(forward):
    tokens = torch.randint(64, (4, 16))
    return F.cross_entropy(forward(input_ids=tokens).logits.flatten(0, 1), tokens.flatten())


def cnn():
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
        nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16 * 9, 8),
    )  # fmt: skip
    return model, Targets(), lambda forward: forward(torch.randn(16, 8, 8, 8)).square().mean()


def train(make, structure, storage, backend=None, batches=(), steps=2 * REFRESHES + 1, **schedule):
    """Train for some refreshes; `batches`: sizes of the MLP's, instead of its own."""
    torch.manual_seed(0)
    model, targets, loss_of = make()
    schedule = Schedule(update_every=2, **schedule)
    topkast = TopKast(model, 0.75, 0.5, targets=targets, schedule=schedule, structure=structure, storage=storage)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    forward = torch.compile(model, backend=backend) if backend else model
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = forward(torch.randn(batches[step], 32)).square().mean() if batches else loss_of(forward)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert topkast.refresh_count >= REFRESHES
    return losses, {weight.storage for weight in topkast.weights.values()}


def packed(kernels):
    return Packed(kernels=kernels, unsupported="error")


def compiled(*arguments, backend="aot_eager", **options):
    """Train compiled; return the number of graphs, the losses and the storages."""
    torch.compiler.reset()
    counters.clear()
    losses, storages = train(*arguments, backend=backend, **options)
    assert not counters["graph_break"]
    assert counters["frames"]["total"] == counters["stats"]["unique_graphs"]
    return counters["stats"]["unique_graphs"], losses, storages


@pytest.mark.parametrize(("structure", "kernels"), SETS)
@pytest.mark.parametrize("make", [mlp, block, gpt2, llama])
def test_a_packed_model_is_one_graph_over_refreshes(make, structure, kernels):
    graphs, losses, storages = compiled(make, structure, packed(kernels))
    assert (graphs, storages) == (1, {"packed"})
    assert losses == pytest.approx(train(make, structure, packed(kernels))[0], rel=1e-4)


@pytest.mark.parametrize(("structure", "kernels"), SETS)
def test_inductor_makes_code_of_that_graph(structure, kernels):
    graphs, losses, _ = compiled(gpt2, structure, packed(kernels), backend="inductor")
    assert graphs == 1
    assert losses == pytest.approx(train(gpt2, structure, packed(kernels))[0], rel=1e-4)


@pytest.mark.parametrize("storage", [pytest.param(Packed(), marks=needs_compiler), "compact", "masked"])
def test_convolutions_are_one_graph(storage):
    graphs, losses, storages = compiled(cnn, "unstructured", storage)
    assert (graphs, storages) == (1, {storage if isinstance(storage, str) else "packed"})
    assert losses == pytest.approx(train(cnn, "unstructured", storage)[0], rel=1e-4)


@pytest.mark.parametrize(("structure", "kernels"), SETS)
def test_batches_of_many_sizes_take_two_graphs_as_of_a_dense_model(structure, kernels):
    """The first is made for one size, the second for all others."""
    sizes = [16, 12, 20, 24, 8, 30, 16]
    graphs, losses, _ = compiled(mlp, structure, packed(kernels), batches=sizes)
    assert graphs == 2
    assert losses == pytest.approx(train(mlp, structure, packed(kernels), batches=sizes)[0], rel=1e-4)


@pytest.mark.parametrize(("structure", "kernels"), SETS)
def test_the_end_of_exploration_takes_another_graph(structure, kernels):
    options = {"steps": 12, "stop_exploring_at": 5}
    graphs, losses, _ = compiled(mlp, structure, packed(kernels), **options)
    assert graphs == 2
    assert losses == pytest.approx(train(mlp, structure, packed(kernels), **options)[0], rel=1e-4)
