"""What bounds for the number of entries in a row cost and earn: choosing, accuracy, and products of packed layers.

    OMP_NUM_THREADS=1 python benchmarks/fan_in.py [--only choosing accuracy products] [--quick] [--seeds 0 1 2] [...]

Accuracy is that of an MLP 300-100 on FashionMNIST by the recipe of docs/results.md (6 epochs, SGD with momentum and a
cosine, sets chosen every 50 steps), after the last step, on the test images. The layers whose products are timed hold
rows of very different size, as trained ones do: the standard deviation of a row is log-normal. Variants live in one
process and take turns; times are CPU seconds of its one thread, ratios medians over the turns.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, median, stdev
from time import process_time
from typing import Any

import torch
from tables import Row, table
from time_to_accuracy import accuracy as share_right
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from lightning_topkast import Packed, Schedule, Targets, TopKast, Unstructured, keep_freed_memory
from lightning_topkast.app.data import FashionMNIST
from lightning_topkast.app.models import MLP
from lightning_topkast.distributed import Sharding

BOUNDS = {
    "free": None,
    "at most 2": (0, 2),
    "at least 0.25": (0.25, 1e9),
    "0.25 to 2": (0.25, 2),
    "constant": (1, 1),
}
PAIRS = ((0.95, 0.9), (0.98, 0.95))


def skewed(side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(side, side, generator=generator) * torch.randn(side, 1, generator=generator).exp()


def in_turn(actions: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """CPU seconds of every action in every turn, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name, act in actions.items():
            start = process_time()
            act()
            if turn:
                seconds[name].append(process_time() - start)
    return seconds


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    return median(one / two for one, two in zip(own, other, strict=True))


def choosing(side: int, turns: int) -> None:
    scores = skewed(side).abs_()
    rows: list[Row] = []
    for forward, backward in ((0.9, 0.8), *PAIRS):
        counts = round((1 - backward) * scores.numel()), round((1 - forward) * scores.numel())
        select = {name: Unstructured(fan_in).selection(Sharding("w", scores)) for name, fan_in in BOUNDS.items()}
        actions = {name: partial(choose, scores, counts) for name, choose in select.items()}
        seconds = in_turn(actions, turns)
        for name, own in seconds.items():
            row: Row = {"sparsity": f"{forward:.0%}/{backward:.0%}", "bounds": name, "ms": 1e3 * median(own)}
            rows.append(row | {"to free": ratio(own, seconds["free"])})
    table(f"Choosing the sets of {side} × {side} entries", rows)


def train(
    data: FashionMNIST, seed: int, epochs: int, sparsities: tuple[float, float] | None, **settings: Any
) -> tuple[float, nn.Module, TopKast | None]:
    """Train, dense if there are no sparsities; return the test accuracy, the network and the engine."""
    torch.manual_seed(seed)
    model, topkast = MLP((1, 28, 28), 10, [300, 100]), None
    if sparsities is not None:
        targets = Targets(keep_first_dense=False)
        topkast = TopKast(model, *sparsities, targets=targets, schedule=Schedule(50), **settings)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    data.seed = seed
    batches = data.train_dataloader()
    steps = epochs * len(batches)
    if topkast is not None:
        topkast.attach(optimizer, total_steps=steps)

    def factor(step: int) -> float:
        warm = 0.05 * steps
        return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

    scheduler = LambdaLR(optimizer, factor)
    for epoch in range(epochs):
        data.seed = 1000 * seed + epoch
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    return share_right(model, list(data.test_dataloader())), model, topkast


def empty_rows(topkast: TopKast | None) -> int:
    """Return how many rows of the first weight have no active entry."""
    assert topkast is not None
    first = next(iter(topkast.weights.values()))
    return int((~first.active.any(1)).sum())


def accuracy(seeds: Sequence[int], epochs: int, folder: str | None) -> None:
    data = FashionMNIST(folder, batch_size=128, val_size=1 / 12)
    data.prepare_data()
    data.setup()
    rows: list[Row] = []
    for name, fan_in in BOUNDS.items():
        found = [train(data, seed, epochs, (0.98, 0.95), structure=Unstructured(fan_in)) for seed in seeds]
        percent = [100 * right for right, *_ in found]
        deviation = f" ± {stdev(percent):.2f}" if len(percent) > 1 else ""
        empty = ", ".join(str(empty_rows(topkast)) for *_, topkast in found)
        rows.append({"bounds": name, "test accuracy": f"{mean(percent):.2f}{deviation}", "empty rows of 300": empty})
    table(f"FashionMNIST, MLP 300-100 at 98/95, {epochs} epochs, seeds {', '.join(map(str, seeds))}", rows)


def products(side: int, turns: int, batch: int) -> None:
    x, upstream = torch.randn(batch, side), torch.randn(batch, side)
    rows: list[Row] = []
    for forward, backward in PAIRS:
        layers: dict[str, nn.Module] = {}
        numbers = {}
        for name, fan_in in BOUNDS.items():
            model = nn.Sequential(nn.Linear(side, side, bias=False))
            with torch.no_grad():
                model[0].weight.copy_(skewed(side) / side**0.5)
            topkast = TopKast(
                model, forward, backward, targets=Targets(keep_first_dense=False, keep_last_dense=False),
                structure=Unstructured(fan_in), storage=Packed(unsupported="error"),
            )  # fmt: skip
            layers[name], numbers[name] = model, topkast.weights["0.weight"].active.sum(1)
        layers["free, again"], numbers["free, again"] = layers["free"], numbers["free"]

        def both(model: nn.Module) -> None:
            model.zero_grad()
            own = x.detach().requires_grad_()
            model(own).backward(upstream)

        one_way = in_turn({name: partial(model, x) for name, model in layers.items()}, turns)
        both_ways = in_turn({name: partial(both, model) for name, model in layers.items()}, turns)
        for name, number in numbers.items():
            own, every = one_way[name], both_ways[name]
            row: Row = {
                "sparsity": f"{forward:.0%}/{backward:.0%}",
                "bounds": name,
                "empty rows": int((number == 0).sum()),
            }
            row |= {"largest row": int(number.max()), "forward, ms": 1e3 * median(own)}
            row |= {"to free": ratio(own, one_way["free"]), "with backward, ms": 1e3 * median(every)}
            rows.append(row | {"with backward, to free": ratio(every, both_ways["free"])})
    table(f"Packed linear layer {side} × {side}, batch {batch}", rows)


def main() -> None:
    parts = ("choosing", "accuracy", "products")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts, nargs="+", default=parts, help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--epochs", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small layers and few turns, to see that it runs")
    parser.add_argument("--folder", help="of the data, if it is not where the Debian package or torchvision put it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    side, turns = (256, 2) if arguments.quick else (4096, 15)
    if "choosing" in arguments.only:
        choosing(side, turns)
    keep_freed_memory()
    if "accuracy" in arguments.only:
        accuracy(arguments.seeds, arguments.epochs, arguments.folder)
    if "products" in arguments.only:
        products(side, turns, 128)


if __name__ == "__main__":
    main()
