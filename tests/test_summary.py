"""The table of all weights at the start of a run."""

import pytest
import torch
from torch import nn

from lightning_topkast import Targets, TopKast


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
