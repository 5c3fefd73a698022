"""Which weights are sparse, and why the others are not."""

import warnings

import pytest
import torch
from torch import nn

from lightning_topkast import TopKast, TopKastError
from lightning_topkast.method.targets import Targets, find_targets


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.scale = nn.Parameter(torch.ones(8, 8))
        self.head = nn.Linear(8, 10)


def reasons(model, **options):
    return {target.name: target.reason for target in find_targets(model, Targets(**options))}


def sparse(model, **options):
    return [name for name, reason in reasons(model, **options).items() if not reason]


def test_by_default_weights_of_known_layers_are_sparse_but_the_first_and_last():
    assert reasons(Net()) == {
        "embed.weight": "embedding",
        "conv.weight": "first candidate",
        "conv.bias": "bias",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "attention.in_proj_weight": "",
        "attention.in_proj_bias": "bias",
        "attention.out_proj.weight": "",
        "attention.out_proj.bias": "bias",
        "mlp.0.weight": "",
        "mlp.0.bias": "bias",
        "mlp.2.weight": "",
        "mlp.2.bias": "bias",
        "scale": "Net is not sparsified by default",
        "head.weight": "last candidate",
        "head.bias": "bias",
    }


def test_first_and_last_can_be_sparse():
    names = sparse(Net(), keep_first_dense=False, keep_last_dense=False)
    assert names[0] == "conv.weight"
    assert names[-1] == "head.weight"


def test_include_names_all_that_is_sparse():
    assert sparse(Net(), include=["mlp.*"]) == ["mlp.0.weight", "mlp.2.weight"]


def test_a_wildcard_never_reaches_biases_norms_and_embeddings_but_a_full_name_does():
    everything = {"keep_first_dense": False, "keep_last_dense": False}
    names = sparse(Net(), include=["*"], **everything)
    assert not {"embed.weight", "norm.weight", "head.bias"} & set(names)
    assert "scale" in names
    assert sparse(Net(), include=["embed.weight", "head.bias"]) == ["embed.weight", "head.bias"]


def test_a_full_name_overrides_first_and_last():
    assert sparse(Net(), include=["head.weight", "conv.weight"]) == ["conv.weight", "head.weight"]


def test_exclude_takes_out_and_does_not_make_the_next_weight_first():
    # a parameter of the model's own module comes before those of its layers
    assert sparse(Net(), include=["mlp.*", "scale"], keep_first_dense=False) == [
        "scale",
        "mlp.0.weight",
        "mlp.2.weight",
    ]
    assert sparse(Net(), exclude=["conv.*", "attention.*"]) == ["mlp.0.weight", "mlp.2.weight"]


@pytest.mark.parametrize("name", ["Linear", "torch.nn.Linear", "torch.nn.modules.linear.Linear"])
def test_types_are_named_bare_or_dotted(name):
    names = sparse(Net(), include_types=[name])
    # out_proj is a NonDynamicallyQuantizableLinear, a subclass
    assert names == ["mlp.0.weight", "mlp.2.weight"] or names == [
        "attention.out_proj.weight",
        "mlp.0.weight",
        "mlp.2.weight",
    ]
    assert not [n for n in sparse(Net(), exclude_types=[name]) if n.startswith("mlp")]


def test_third_party_modules_are_included_by_type():
    class Projection(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))
            self.bias = nn.Parameter(torch.zeros(4))

    model = nn.Sequential(Projection(), Projection(), Projection())
    assert sparse(model, include_types=["Projection"]) == ["1.weight"]


def test_a_tied_weight_counts_once_under_its_first_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[1].weight
    assert sparse(model) == ["1.weight"]


def test_a_weight_tied_to_an_embedding_stays_dense():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[3].weight = model[2].weight
    assert reasons(model)["2.weight"] == "embedding"


def test_frozen_parameters_stay_dense():
    model = Net()
    model.mlp.requires_grad_(False)
    assert reasons(model)["mlp.0.weight"] == "frozen"


def test_names_are_those_of_the_plain_model_after_compilation():
    model = nn.Sequential(nn.Linear(8, 8), torch.compile(nn.Linear(8, 8), backend="eager"), nn.Linear(8, 8))
    assert sparse(model) == ["1.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["mpl.*"]}, r"include: 'mpl\.\*' matches no parameter .*mlp"),
        ({"exclude": ["haed.weight"]}, r"exclude: 'haed.weight' .*head\.weight"),
        ({"include_types": ["linear"]}, r"include_types: 'linear' matches no module type .*Linear"),
        ({"exclude_types": ["Conv2d"]}, r"exclude_types: 'Conv2d' .*Conv1d"),
    ],
)
def test_what_matches_nothing_is_refused_with_names_near_it(options, message):
    with pytest.raises(TopKastError, match=message):
        find_targets(Net(), Targets(**options))


def test_a_model_with_nothing_to_sparsify_is_refused_with_the_reasons():
    with pytest.raises(TopKastError, match=r"0\.weight \(first candidate\).*keep_first_dense=False"):
        find_targets(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), Targets())


def test_a_lazy_module_is_refused_until_it_has_a_shape():
    with pytest.raises(TopKastError, match="has no shape yet"):
        find_targets(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), Targets())


def test_the_summary_counts_every_parameter():
    summary = TopKast(Net(), 0.9, 0.8).summary()
    rows = {row.name: row for row in summary.rows}
    assert (rows["mlp.0.weight"].active, rows["mlp.0.weight"].updated) == (13, 26)
    assert rows["head.weight"].active == rows["head.weight"].size == 80
    assert rows["head.weight"].reason == "last candidate"
    assert "dense: last candidate" in str(summary)
    zeros = sum(row.size - row.active for row in summary.rows)
    assert summary.model_density == pytest.approx(1 - zeros / sum(p.numel() for p in Net().parameters()))


# --- the first and the last layer of a language model -------------------------------------------------------------


class Language(nn.Module):
    """An embedding, two blocks and a head, which may be tied to it."""

    def __init__(self, tied: bool, outputs: int = 20, embedding: type = nn.Embedding) -> None:
        super().__init__()
        self.embed = embedding(20, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, outputs, bias=False)
        if tied:
            self.head.weight = self.embed.weight


BLOCKS = ["blocks.0.weight", "blocks.1.weight"]


@pytest.mark.parametrize("embedding", [nn.Embedding, nn.EmbeddingBag])
def test_the_ends_of_a_language_model_are_its_embeddings(embedding):
    tied = Language(tied=True, embedding=embedding)
    assert sparse(tied) == BLOCKS
    assert reasons(tied)["embed.weight"] == "embedding"
    untied = Language(tied=False, embedding=embedding)
    assert sparse(untied) == BLOCKS
    assert reasons(untied)["head.weight"] == "last candidate"
    assert sparse(untied, keep_last_dense=False) == [*BLOCKS, "head.weight"]


def test_a_model_with_another_head_keeps_its_first_candidate_dense():
    classifier = Language(tied=False, outputs=3)
    assert reasons(classifier)["blocks.0.weight"] == "first candidate"
    assert reasons(classifier)["head.weight"] == "last candidate"


def test_a_model_that_does_not_begin_with_an_embedding_keeps_its_ends_dense():
    """The embedding of a decoder or of a class is a side input here, even if its size is that of the head."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20))
    assert sparse(model) == ["2.weight"]
    tied = nn.Sequential(nn.Linear(5, 8), nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20), nn.Linear(8, 4))
    tied[3].weight = tied[1].weight
    assert sparse(tied) == ["2.weight"]


def test_a_vector_before_the_embedding_does_not_hide_it():
    model = Language(tied=True)
    model.register_parameter("temperature", nn.Parameter(torch.ones(1)))
    assert sparse(model) == BLOCKS


def test_the_last_candidate_of_a_language_model_must_be_its_head():
    """A convolution with as many outputs as there are tokens is none."""
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(8, 20, 1))
    assert reasons(model)["1.weight"] == "first candidate"


SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LANGUAGE_MODELS = {
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "LlamaForCausalLM": ("LlamaConfig", SIZES | {"intermediate_size": 24, "num_key_value_heads": 1}),
    "BertForMaskedLM": ("BertConfig", SIZES | {"intermediate_size": 24}),
}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_blocks_of_language_models_of_transformers_are_sparse(kind, tied):
    """Of BERT's head, its transform is sparse too if the output embedding is tied."""
    transformers = pytest.importorskip("transformers")
    config, sizes = LANGUAGE_MODELS[kind]
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes, tie_word_embeddings=tied))
    by_name = reasons(model, include_types=["Conv1D", "Linear"] if kind.startswith("GPT2") else ["Linear"])
    head = next(name for name, _ in model.named_modules() if name in ("lm_head", "cls.predictions.decoder"))
    assert by_name.get(f"{head}.weight", "embedding") == ("embedding" if tied else "last candidate")
    others = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != head
    }
    assert {name for name, reason in by_name.items() if not reason} == others
    assert "first candidate" not in by_name.values()


# --- parametrizations ---------------------------------------------------------------------------------------------


def normed(new: bool) -> nn.Module:
    if new:
        return nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch prefers its parametrization by now
        return nn.utils.weight_norm(nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("new", "length", "direction"),
    [
        (False, "1.weight_g", "1.weight_v"),
        (True, "1.parametrizations.weight.original0", "1.parametrizations.weight.original1"),
    ],
    ids=["old", "new"],
)
def test_weight_norm_stays_dense_whatever_pattern_matches_it(new, length, direction):
    model = nn.Sequential(nn.Linear(8, 8), normed(new), nn.Linear(8, 8), nn.Linear(8, 8))
    for options in ({}, {"include": ["*"]}, {"include_types": ["Linear", "ParametrizationList"][: 1 + new]}):
        by_name = reasons(model, **options)
        assert (by_name[length], by_name[direction]) == ("weight norm", "weight norm")
        assert by_name["2.weight"] == ""
    for name in (length, direction):
        with pytest.raises(TopKastError, match=f"include: '{name}' belongs to a weight norm.*remove it first"):
            find_targets(model, Targets(include=[name]))


def test_an_orthogonal_matrix_has_no_zeros_where_its_parameter_has_some():
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 8))
    name = "1.parametrizations.weight.original"
    assert reasons(model, include=["*"], keep_first_dense=False)[name] == "orthogonal parametrization"
    assert sparse(model, include=[name]) == [name]  # a full name is explicit, and its values stay valid


def test_a_spectral_norm_keeps_zeros_and_trains():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8)
    )
    name = "1.parametrizations.weight.original"
    topkast = TopKast(model, 0.9, 0.8, update_every=2, include=[name, "2.weight"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(9, 8)).square().mean().backward()
        optimizer.step()
    assert torch.isfinite(model[1].weight).all()
    assert int((model[1].weight != 0).sum()) == topkast.weights[name].active_count


# --- how much is sparse -------------------------------------------------------------------------------------------


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(20, 20))


def test_a_model_that_stays_mostly_dense_unasked_is_warned_of():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Unknown(), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="sparse weights hold only") as caught:
        TopKast(model, 0.9, 0.8)
    (warning,) = caught
    message = str(warning.message)
    assert "sparse weights hold only 13.8% of the model's weights" in message
    assert "largest dense ones are '2.matrix' (400 entries: Unknown is not sparsified by default). " in message
    assert "include=[...]" in message
    assert warning.filename == __file__


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: nn.Sequential(nn.Embedding(500, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 500)), {}),
        (lambda: nn.Sequential(nn.Linear(500, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 90)), {}),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Unknown(), nn.Linear(8, 8)), {"include": ["1.*"]}),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(60, 60), nn.Linear(8, 8)),
            {"exclude": ["2.weight"], "targets": None},
        ),
    ],
    ids=["embeddings", "first and last", "named", "excluded"],
)
def test_what_is_dense_on_purpose_is_not_warned_of(build, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopKast(build(), 0.9, 0.8, **options)


def test_the_summary_says_how_much_of_the_model_is_sparse():
    summary = TopKast(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), 0.9, 0.8).summary()
    assert summary.sparse_share == pytest.approx(64 / 216)
    assert "sparse weights hold 29.6% of the model's parameters" in str(summary)


def test_name_with_brackets_matches_itself():
    class Bracketed(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("blocks[0]", "blocks[1]", "head[*]"):
                self.add_module(name, nn.Linear(4, 4))

    def of(**choice):
        return {target.name: target.reason for target in find_targets(Bracketed(), Targets(**choice))}

    assert of(include=["blocks[0].weight"])["blocks[0].weight"] == ""
    kept = {"keep_first_dense": False, "keep_last_dense": False}
    assert of(exclude=["blocks[0].weight"], **kept)["blocks[0].weight"] == "excluded"
    assert of(exclude=["blocks[0].weight"], **kept)["blocks[1].weight"] == ""
    topkast = TopKast(
        Bracketed(),
        0.5,
        0.5,
        overrides={"blocks[1].weight": {"forward_sparsity": 0.75, "backward_sparsity": 0.75}},
        targets=Targets(**kept),
    )
    assert int(topkast.weights["blocks[1].weight"].active_entries) == 4
