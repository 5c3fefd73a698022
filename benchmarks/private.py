"""Private choices of units and of single entries: how much of the exact choice is left.

    OMP_NUM_THREADS=1 python benchmarks/private.py [--folder DATA]

Each image of FashionMNIST is one person, and the network is an MLP 300-100 at random, which tells nothing of them.
Units are scored by the number of people for whom they are active; entries of the first weight by the sum over people of
the gradient's size, clipped: |gradient of the unit| / clip, at most 1, times the pixel in [0, 1]. So one person changes
any score by at most 1. The overlap is that with the exact top-k, over 20 draws; by chance it is k / n.
"""

import argparse
import math

import torch
from tables import Row, table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_topkast import private_top_k
from lightning_topkast.app.data import FashionMNIST
from lightning_topkast.top_k.private import noise_scale

DELTA = 1e-6
SPREAD = {"gumbel": math.pi / math.sqrt(6), "laplace": math.sqrt(2)}  # standard deviation of scale 1


def scores_of(x: Tensor, y: Tensor, clip: float = 1e-3) -> dict[str, Tensor]:
    """Scores of the 300 hidden units and of their 235,200 weights, of sensitivity 1."""
    torch.manual_seed(0)
    first, rest = nn.Linear(784, 300), nn.Sequential(nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    pixels = x.flatten(1)
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    hidden = first(x.flatten(1)).detach().requires_grad_()
    F.cross_entropy(rest(hidden), y, reduction="sum").backward()
    gradient = (hidden.grad.abs() / clip).clamp_max(1)  # type: ignore[union-attr]
    return {"units": (hidden > 0).double().sum(0), "entries": (gradient.T.double() @ pixels.double())}


def row(what: str, scores: Tensor, k: int, epsilon: float, noise: str, people: int) -> Row:
    exact = torch.zeros(scores.numel(), dtype=torch.bool)
    exact[scores.flatten().topk(k).indices] = True
    draws = [private_top_k(scores, k, epsilon, DELTA, 1.0, noise).mask.flatten() for _ in range(20)]  # type: ignore[arg-type]
    scale = noise_scale(scores.numel(), k, epsilon, DELTA, 1.0, noise)[0]  # type: ignore[arg-type]
    return {
        "people": people, "scores": what, "k of n": f"{k:,} of {scores.numel():,}", "ε": epsilon, "noise": noise,
        "its deviation": scale * SPREAD[noise], "that of the scores": float(scores.std()),
        "overlap": sum(int((draw & exact).sum()) for draw in draws) / (20 * k), "by chance": k / scores.numel(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="of the data, if it is not where the Debian package or torchvision put it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = FashionMNIST(arguments.folder, batch_size=5000, val_size=1 / 12)
    data.prepare_data()
    data.setup("fit")
    x, y = (torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True))
    rows = []
    for people in (len(x), len(x) // 10):
        scores = scores_of(x[:people], y[:people])
        for k in (30, 150):
            for epsilon, noise in ((1.0, "gumbel"), (0.2, "gumbel"), (0.2, "laplace")):
                rows.append(row("units", scores["units"], k, epsilon, noise, people))
        for k in (scores["entries"].numel() // 20, scores["entries"].numel() // 2):
            for epsilon, noise in ((1.0, "gumbel"), (0.2, "gumbel"), (0.2, "laplace")):
                rows.append(row("entries", scores["entries"], k, epsilon, noise, people))
    table(f"Private choices, δ = {DELTA}", rows)


if __name__ == "__main__":
    main()
