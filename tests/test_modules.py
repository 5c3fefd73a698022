"""Every kind of layer trains sparse."""

import pytest
import torch
from torch import Tensor, nn

from lightning_topkast import Targets, TopKast
from tests.helpers import check_sparse, nouns, parameters_of, thetas

STEPS, EVERY = 13, 4  # three refreshes, the last of them followed by one more step


class Recurrent(nn.Module):
    """Runs a recurrent layer and keeps its output sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Unrolled(nn.Module):
    """Runs a recurrent cell over a sequence."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Attention(nn.Module):
    """Attends over one sequence, or from it to narrower keys and values."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        key = x[..., : self.sizes.get("kdim", 8)]
        value = x[..., : self.sizes.get("vdim", 8)]
        return self.attention(x, key, value, need_weights=False)[0]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x[:, :4], x[:, 4:])


# model, shape of its input, names of its sparse weights when neither end is kept dense
CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), (6, 8), {"0.weight", "2.weight"}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9), {"weight"}),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 6, 6), {"weight"}),
    "conv2d grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6), {"weight"}),
    "conv2d channels_last": (
        lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        (2, 4, 6, 6),
        {"weight"},
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), (1, 2, 5, 5, 5), {"weight"}),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), {"weight"}),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 4, 4), {"weight"}),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 4, 3), (1, 2, 3, 3, 3), {"weight"}),
    "bilinear": (TwoInputs, (6, 8), {"bilinear.weight"}),
    "attention": (Attention, (2, 5, 8), {"attention.in_proj_weight", "attention.out_proj.weight"}),
    "attention with kdim and vdim": (
        lambda: Attention(kdim=6, vdim=4),
        (2, 5, 8),
        {f"attention.{part}_proj_weight" for part in "qkv"} | {"attention.out_proj.weight"},
    ),
    "lstm": (
        lambda: Recurrent(nn.LSTM(8, 6, batch_first=True)),
        (2, 4, 8),
        {"layer.weight_ih_l0", "layer.weight_hh_l0"},
    ),
    "lstm with proj_size": (
        lambda: Recurrent(nn.LSTM(8, 6, proj_size=4, num_layers=2, batch_first=True)),
        (2, 4, 8),
        {f"layer.weight_{part}_l{layer}" for part in ("ih", "hh", "hr") for layer in (0, 1)},
    ),
    "gru bidirectional": (
        lambda: Recurrent(nn.GRU(8, 6, bidirectional=True, batch_first=True)),
        (2, 4, 8),
        {f"layer.weight_{part}_l0{way}" for part in ("ih", "hh") for way in ("", "_reverse")},
    ),
    "rnn": (lambda: Recurrent(nn.RNN(8, 6, batch_first=True)), (2, 4, 8), {"layer.weight_ih_l0", "layer.weight_hh_l0"}),
    "lstm cell": (lambda: Unrolled(nn.LSTMCell(8, 6)), (2, 4, 8), {"cell.weight_ih", "cell.weight_hh"}),
    "gru cell": (lambda: Unrolled(nn.GRUCell(8, 6)), (2, 4, 8), {"cell.weight_ih", "cell.weight_hh"}),
    "rnn cell": (lambda: Unrolled(nn.RNNCell(8, 6)), (2, 4, 8), {"cell.weight_ih", "cell.weight_hh"}),
}  # fmt: skip


def train(topkast: TopKast, optimizer: torch.optim.Optimizer, loss_of, steps: int = STEPS) -> list[float]:
    """Train and check at every step what must hold; return the losses."""
    losses = []
    for _ in range(steps):
        before, reservoir = thetas(topkast), {name: ~w.updated for name, w in topkast.weights.items()}
        exploring = {name: w.updated & ~w.active for name, w in topkast.weights.items()}
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        check_sparse(topkast)
        for name, theta in thetas(topkast).items():
            kept, explored = reservoir[name], exploring[name]
            assert kept.any(), f"{name}: no reservoir to check"
            assert explored.any(), f"{name}: nothing explores"
            assert torch.equal(theta[kept], before[name][kept]), f"{name}: θ on C moved"
            assert not torch.equal(theta[explored], before[name][explored]), f"{name}: exploring entries did not learn"
    assert topkast.refresh_count == steps // EVERY
    assert torch.isfinite(torch.tensor(losses)).all()
    assert losses[-1] < losses[0]
    return losses


def make_topkast(model: nn.Module, optimizer: torch.optim.Optimizer, **changes) -> TopKast:
    arguments = {"update_every": EVERY, "strength": 0.0, "keep_first_dense": False, "keep_last_dense": False}
    start = parameters_of(model)
    topkast = TopKast(model, 0.75, 0.5, **nouns(**(arguments | changes))).attach(optimizer)
    for name, theta in thetas(topkast).items():
        assert torch.equal(theta, start[name]), f"{name}: the first selection lost stored values"
    return topkast


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("case", CASES)
def test_layer_trains_sparse(case, optimizer):
    build, shape, expected = CASES[case]
    torch.manual_seed(0)
    model = build()
    x = torch.randn(shape)
    goal = torch.randn(model(x).shape)
    steps = {
        "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    }[optimizer](model.parameters())
    topkast = make_topkast(model, steps)
    assert topkast.weights.keys() == expected
    train(topkast, steps, lambda: nn.functional.mse_loss(model(x), goal))


def test_channels_last_weight_keeps_its_memory_format():
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make_topkast(model, optimizer)
    model(torch.randn(2, 4, 6, 6)).square().mean().backward()
    optimizer.step()
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()


def test_channels_last_and_contiguous_weights_train_alike():
    """The sets and latent values follow the entries, not their places in memory."""
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Conv2d(4, 6, 3).double().to(memory_format=memory_format)
        x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        topkast = make_topkast(model, optimizer)
        train(topkast, optimizer, lambda model=model, x=x: (model(x) - 1).square().mean())
        results.append((topkast.weights["weight"].tiers.contiguous(), topkast.weights["weight"].theta().contiguous()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


class TiedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def test_tied_linear_weight_is_one_sparse_weight():
    torch.manual_seed(0)
    model = TiedLinear()
    x, goal = torch.randn(6, 8), torch.randn(6, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    topkast = make_topkast(model, optimizer)
    assert list(topkast.weights) == ["up.weight"]
    assert [row.name for row in topkast.summary().rows if not row.reason] == ["up.weight"]
    assert sum(row.size for row in topkast.summary().rows) == 64 + 8 + 8
    train(topkast, optimizer, lambda: nn.functional.mse_loss(model(x), goal))
    assert model.down.weight is model.up.weight


class TinyLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def test_weight_tied_to_an_embedding_stays_dense():
    model = TinyLanguageModel()
    topkast = TopKast(model, 0.75, 0.5, targets=Targets(keep_first_dense=False, keep_last_dense=False))
    assert list(topkast.weights) == ["hidden.weight"]
    reasons = {row.name: row.reason for row in topkast.summary().rows}
    assert reasons["embedding.weight"] == "embedding"
    assert (model.head.weight != 0).all()


def test_weight_tied_to_an_embedding_is_sparse_when_named_in_full():
    torch.manual_seed(0)
    model = TinyLanguageModel()
    tokens, goal = torch.arange(12), torch.arange(12).flip(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    topkast = make_topkast(model, optimizer, include=["embedding.weight"])
    assert list(topkast.weights) == ["embedding.weight"]
    train(topkast, optimizer, lambda: nn.functional.cross_entropy(model(tokens), goal))
    assert model.head.weight is model.embedding.weight


def test_a_module_called_twice_is_one_sparse_weight():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x, goal = torch.randn(6, 8), torch.randn(6, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    topkast = make_topkast(model, optimizer)
    assert list(topkast.weights) == ["0.weight"]
    train(topkast, optimizer, lambda: nn.functional.mse_loss(model(x), goal))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


CONV1D = {
    f"transformer.h.{layer}.{part}.weight"
    for layer in (0, 1)
    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}


@pytest.mark.parametrize(
    "chosen",
    [
        {"include_types": ["Conv1D"]},
        {"include_types": ["transformers.pytorch_utils.Conv1D"]},
        {"include": ["transformer.h.*.c_*.weight"]},
    ],
    ids=["bare type", "dotted type", "pattern"],
)
def test_gpt2_trains_with_its_conv1d_sparse(chosen):
    model = gpt2()
    tokens = torch.randint(32, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    topkast = make_topkast(model, optimizer, **chosen)
    assert topkast.weights.keys() == CONV1D
    train(topkast, optimizer, lambda: model(input_ids=tokens, labels=tokens).loss)


def test_gpt2_conv1d_is_not_sparsified_unasked():
    """Its head is tied to the embedding, so nothing is left: the error says what to name."""
    with pytest.raises(ValueError, match=r"Conv1D is not sparsified by default.*include"):
        TopKast(gpt2(), 0.75, 0.5)


def test_llama_trains_sparse_but_its_embedding_and_ends():
    model = llama()
    tokens = torch.randint(32, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    topkast = make_topkast(model, optimizer, keep_first_dense=True, keep_last_dense=True)
    reasons = {row.name: row.reason for row in topkast.summary().rows}
    assert reasons["model.embed_tokens.weight"] == "embedding"
    assert reasons["lm_head.weight"] == "last candidate"
    assert all(reason == "norm" for name, reason in reasons.items() if "norm" in name)
    assert len(topkast.weights) == 2 * 7  # the embedding is the first layer
    train(topkast, optimizer, lambda: model(input_ids=tokens, labels=tokens).loss)


def test_gradients_masked_for_a_skipped_step_are_masked_again_at_the_next():
    """`mask_gradients` was called, the step was not taken: the next one has new gradients."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    topkast = make_topkast(model, optimizer, update_every=100)
    model(torch.randn(4, 8)).square().mean().backward()
    topkast.mask_gradients()  # and no step, as when a scaler skips it

    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    reservoir = ~topkast.weights["weight"].updated
    assert (optimizer.state[model.weight]["momentum_buffer"][reservoir] == 0).all()
