"""Which of the layers should stay dense? DART tries k of them at a time, and sees only how well each network does.

    python examples/dense_layers.py [--rounds 30] [--steps 60]

A network with a layer for each of the eight rows of an image learns digits; three of these layers are dense, the others
98 % sparse. There is no gradient by which layers are dense, and no reward of a single layer. Where there is a gradient,
use it: it says more than a reward.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_topkast import Dart, TopKast

LAYERS, DENSE = 8, 3


class Rows(nn.Module):
    """A layer for each of the eight rows of an image, and one that joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 32) for _ in range(LAYERS))
        self.head = nn.Linear(32 * LAYERS, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = [layer(row) for layer, row in zip(self.layers, images.unbind(1), strict=True)]
        return self.head(torch.cat(rows, 1).relu())


def reward(dense: tuple[int, ...], seed: int, steps: int = 60) -> float:
    """Validation accuracy of a network with these hidden layers dense and the others sparse."""
    torch.manual_seed(seed)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, validation = order[:1400], order[1400:]
    model = Rows()
    sparse = [f"layers.{number}.weight" for number in range(LAYERS) if number not in dense]
    topkast = TopKast(model, 0.98, 0.96, include=sparse, update_every=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    topkast.attach(optimizer)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (64,))]
        loss = cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(x[validation]).argmax(1) == y[validation]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="networks to train (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each network (default: %(default)s)")
    arguments = parser.parse_args()
    dart = Dart(LAYERS, DENSE, arguments.rounds)
    for number in range(arguments.rounds):
        dart.tell(reward(dart.ask(), number, arguments.steps))
    seeds = range(1000, 1010)
    found = sum(reward(dart.best(), seed, arguments.steps) for seed in seeds) / len(seeds)
    print(f"dense layers {dart.best()} of {LAYERS}: accuracy {found:.3f}")


if __name__ == "__main__":
    main()
