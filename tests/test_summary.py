"""The table of all weights at the start of a run."""

import pytest
import torch
from torch import nn

from lightning_topkast import Packed, Targets, TopKast


class Deep(nn.Module):
    """Blocks with long names, as those of language models."""

    def __init__(self, blocks=12):
        super().__init__()
        self.language_model = nn.ModuleList(
            nn.ModuleDict(
                {"self_attention_in": nn.Linear(16, 48), "feed_forward_up": nn.Linear(16, 64), "norm": nn.LayerNorm(16)}
            )
            for _ in range(blocks)
        )


@pytest.mark.parametrize("width", [80, 120, 400])
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_table_fits_the_terminal_and_tells_the_weights_apart(width, storage):
    topkast = TopKast(Deep(), 0.9, 0.8, storage=storage)
    lines = topkast.summary().table(width).splitlines()
    assert max(map(len, lines)) <= width
    names = [line.split()[0] for line in lines if "×" in line and "dense" not in line]
    assert len(set(names)) == len(names) == len(topkast.weights)
    if width == 400:
        assert names == list(topkast.weights)


def test_names_that_would_look_alike_are_told_apart():
    names = [f"a_module_with_a_long_name_{middle}_and_a_tail_of_its_own" for middle in ("one", "two", "six", "ten")]
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in names})
    topkast = TopKast(model, 0.9, 0.8, targets=Targets(keep_first_dense=False))
    lines = topkast.summary().table(80).splitlines()
    assert len({line[:16] for line in lines if "16×16" in line and "dense" not in line}) == len(topkast.weights)


def test_dense_parameters_with_one_reason_are_one_line():
    lines = TopKast(Deep(), 0.9, 0.8).summary().table(100).splitlines()
    assert sum("dense: bias" in line for line in lines) == sum("dense: norm" in line for line in lines) == 1
    (biases,) = (line for line in lines if "dense: bias" in line)
    assert biases.split() == ["24", "parameters", "1,344", "dense:", "bias"]
    assert any(line.startswith("language_model.0.self_") and "dense: first candidate" in line for line in lines)


def test_storage_is_a_column_only_where_weights_differ_in_it():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    text = TopKast(model, 0.9, 0.8, storage="compact").summary().table()
    assert "2 sparse, compact" in text
    assert text.count("compact") == 1


def test_the_summary_says_why_each_weight_is_stored_as_it_is():
    model = nn.Sequential(nn.Linear(16, 512), nn.Linear(512, 512), nn.ConvTranspose2d(8, 8, 3), nn.Linear(512, 16))
    model[1].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    storage = Packed(kernels="torch", products="auto")
    targets = Targets(include_types=["Linear", "ConvTranspose2d"], keep_first_dense=False, keep_last_dense=False)
    with pytest.warns(UserWarning, match="masked"):
        topkast = TopKast(model, 0.9, 0.8, targets=targets, storage=storage)
    assert topkast.summary().notes[1:4] == (
        "compact, 2 of 4: fewer than 65,536 entries",
        "compact, 1 of 4: its layer has no product with packed values",
        "masked, 1 of 4: it has hooks, which expect a dense gradient",
    )
    ends = Targets(keep_first_dense=False, keep_last_dense=False)
    one = TopKast(nn.Linear(512, 512), 0.9, 0.8, targets=ends, storage=storage)
    assert "packed, 1 of 1: packed products should take 0.67 times as long as dense ones" in one.summary().notes
