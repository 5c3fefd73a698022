"""What our planner counts for a ResNet-50 is what RigL's authors published, and ERK is their formula."""

import runpy
from math import prod
from pathlib import Path

import pytest
import torch

from lightning_topkast.app.models import resnet
from lightning_topkast.method.density import erdos_renyi_kernel

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def published(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return runpy.run_path(str(BENCHMARKS / "published_flops.py"))


@pytest.mark.slow
def test_inference_flops_are_within_a_hundredth_of_the_published_ones(published):
    for (distribution, sparsity), expected in published["PUBLISHED"].items():
        totals = published["as_rigl"](distribution, sparsity)
        assert totals["forward_flops_ratio"] == pytest.approx(expected, abs=0.01), (distribution, sparsity)
    assert totals["dense_forward_flops"] == pytest.approx(published["DENSE_FLOPS"], rel=0.01)


def rigl_densities(shapes, density):
    """ERK as RigL's code finds it: while one exceeds 1, those with the largest factor become dense, and again."""
    factors = {name: sum(shape) / prod(shape) for name, shape in shapes.items()}
    dense = set()
    while True:
        left = [name for name in shapes if name not in dense]
        wanted = sum(density * prod(shapes[n]) for n in left) - sum((1 - density) * prod(shapes[n]) for n in dense)
        scale = wanted / sum(factors[n] * prod(shapes[n]) for n in left)
        largest = max(factors[n] for n in left)
        if scale * largest <= 1:
            return {n: 1.0 if n in dense else scale * factors[n] for n in shapes}
        dense |= {n for n in left if factors[n] == largest}


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.05])
def test_erk_densities_are_those_of_rigl_layer_by_layer(density):
    with torch.device("meta"):
        net = resnet(50, (3, 224, 224), 1000)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters() if p.dim() > 1}
    assert len(shapes) == 54
    expected = rigl_densities(shapes, density)
    assert erdos_renyi_kernel(shapes, density) == pytest.approx(expected)
    assert density == 0.05 or 1.0 in expected.values(), "dense layers are what the two could find differently"
