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
        self.embed = nn.Embedding(10, 8)
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


def test_the_two_parameters_of_weight_norm_stay_dense():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch prefers its parametrization by now
        normed = nn.utils.weight_norm(nn.Linear(8, 8))
    targets = find_targets(
        nn.Sequential(nn.Linear(8, 8), normed), Targets(keep_first_dense=False, keep_last_dense=False)
    )
    reasons = {target.name: target.reason for target in targets}
    assert (reasons["1.weight_g"], reasons["1.weight_v"]) == ("weight norm", "weight norm")
    assert reasons["0.weight"] == ""
