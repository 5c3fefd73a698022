"""torch.compile of packed models: one graph, and none again over refreshes, since places and values are its inputs."""

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


def train(make, structure, kernels, compiles: bool) -> list[float]:
    torch.manual_seed(0)
    model, targets, loss_of = make()
    storage = Packed(kernels=kernels, unsupported="error")
    schedule = Schedule(update_every=2)
    topkast = TopKast(model, 0.75, 0.5, targets=targets, schedule=schedule, structure=structure, storage=storage)
    assert {weight.storage for weight in topkast.weights.values()} == {"packed"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    forward = torch.compile(model, backend="aot_eager") if compiles else model
    losses = []
    for _ in range(2 * REFRESHES + 1):
        optimizer.zero_grad()
        loss = loss_of(forward)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert topkast.refresh_count == REFRESHES
    return losses


@pytest.mark.parametrize(("structure", "kernels"), SETS)
@pytest.mark.parametrize("make", [mlp, block, gpt2, llama])
def test_a_packed_model_is_one_graph_over_refreshes(make, structure, kernels):
    torch.compiler.reset()
    counters.clear()
    losses = train(make, structure, kernels, compiles=True)
    assert not counters["graph_break"]
    assert (counters["frames"]["total"], counters["stats"]["unique_graphs"]) == (1, 1)
    assert losses == pytest.approx(train(make, structure, kernels, compiles=False), rel=1e-4)
