"""How densities are shared out."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_topkast import Targets, TopKast, TopKastError
from lightning_topkast.method.density import erdos_renyi_kernel, uniform

shapes_of_a_model = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=6,
)


def kept(shapes, densities):
    return sum(prod(shapes[name]) * density for name, density in densities.items())


def test_uniform_gives_every_weight_the_same_density():
    assert uniform({"a": (3, 4), "b": (500,)}, 0.1) == {"a": 0.1, "b": 0.1}


def test_erk_follows_the_sum_over_the_product_of_the_sizes():
    densities = erdos_renyi_kernel({"a": (100, 100), "b": (200, 300)}, 0.1)
    # raw factors 200/10000 and 500/60000, scaled so that 0.1 · 70,000 entries are kept
    assert densities["a"] == pytest.approx(0.2)
    assert densities["b"] == pytest.approx(500 / 60000 * 10)


def test_erk_counts_kernel_sizes():
    densities = erdos_renyi_kernel({"conv": (64, 32, 3, 3), "linear": (128, 256)}, 0.2)
    assert densities["conv"] / densities["linear"] == pytest.approx((102 / 18432) / (384 / 32768))


def test_a_weight_that_erk_would_overfill_is_dense_and_the_others_share_the_rest():
    shapes = {"tiny": (2, 2), "wide": (1000, 1000)}
    densities = erdos_renyi_kernel(shapes, 0.1)
    assert densities["tiny"] == 1.0
    assert kept(shapes, densities) == pytest.approx(0.1 * 1_000_004)


@given(shapes=shapes_of_a_model, density=st.floats(0.01, 1), more=st.floats(0, 1))
def test_erk_keeps_the_requested_total_and_grows_with_it(shapes, density, more):
    densities = erdos_renyi_kernel(shapes, density)
    assert all(0 <= value <= 1 + 1e-9 for value in densities.values())
    assert kept(shapes, densities) == pytest.approx(density * sum(map(prod, shapes.values())), rel=1e-6)
    larger = erdos_renyi_kernel(shapes, density + more * (1 - density))
    assert all(larger[name] >= densities[name] - 1e-9 for name in shapes)


def mlp():
    return nn.Sequential(nn.Linear(20, 40), nn.Linear(40, 80), nn.Linear(80, 40), nn.Linear(40, 10))


def test_sets_hold_the_rounded_share_of_each_weight():
    topkast = TopKast(mlp(), 0.9, 0.8)
    assert {n: (w.active_count, w.updated_count) for n, w in topkast.weights.items()} == {
        "1.weight": (320, 640),
        "2.weight": (320, 640),
    }


def test_one_active_entry_is_enough_and_none_is_refused():
    def small():
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    (weight,) = TopKast(small(), 0.95, 0.9).weights.values()
    assert int(weight.active.sum()) == 1
    with pytest.raises(TopKastError, match=r"weight '1.weight' has 16 entries, too few for one active entry"):
        TopKast(small(), 0.97, 0.9)


def test_an_override_applies_to_what_it_matches_and_erk_shares_the_rest():
    topkast = TopKast(
        mlp(),
        0.9,
        0.8,
        targets=Targets(keep_first_dense=False),
        distribution="erk",
        overrides={"2.*": {"forward_sparsity": 0.5}},
    )
    weights = topkast.weights
    assert (weights["2.weight"].active_count, weights["2.weight"].updated_count) == (1600, 1600)
    assert weights["0.weight"].active_count + weights["1.weight"].active_count == pytest.approx(400, abs=1)
    assert weights["0.weight"].forward_density > weights["1.weight"].forward_density


def test_a_later_override_wins():
    overrides = {"*": {"forward_sparsity": 0.5, "backward_sparsity": 0.5}, "1.*": {"forward_sparsity": 0.75}}
    topkast = TopKast(mlp(), 0.9, 0.8, overrides=overrides)
    assert topkast.weights["1.weight"].forward_density == 0.25
    assert topkast.weights["2.weight"].forward_density == 0.5


def test_an_override_that_matches_nothing_is_refused():
    with pytest.raises(TopKastError, match=r"'encoder\.\*' matches no sparse weight"):
        TopKast(mlp(), 0.9, 0.8, overrides={"encoder.*": {"forward_sparsity": 0.5}})


@pytest.mark.parametrize("values", [{}, {"density": 0.5}, {"forward_sparsity": 0.5, "backward_sparsity": 0.6}])
def test_an_override_that_makes_no_sense_is_refused(values):
    with pytest.raises(TopKastError, match="overrides"):
        TopKast(mlp(), 0.9, 0.8, overrides={"1.*": values})
