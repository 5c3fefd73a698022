"""How long training takes to a fixed accuracy on FashionMNIST: dense, masked and packed.

    OMP_NUM_THREADS=1 python benchmarks/time_to_accuracy.py [--network cnn] [--accuracy 0.88] [--width 2048] [...]

An MLP of two wide hidden layers whose first layer is sparse too, or five convolutions with batch norm whose first is
dense; the last layer is dense, and Adam has a constant learning rate. The validation accuracy is taken every 50 steps,
outside the clock, which counts the CPU seconds of the one thread in training steps with their refreshes. All runs see
the same batches. The process keeps freed memory, as topkast-train does on CPU.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from time import process_time

import torch
from tables import Row, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from lightning_topkast import L2, Targets, TopKast, keep_freed_memory
from lightning_topkast.app.data import FashionMNIST

METHODS = {
    "dense": None,
    "masked, 90/80": (0.9, 0.8, "masked"),
    "packed, 90/80": (0.9, 0.8, "packed"),
    "packed, 95/90": (0.95, 0.9, "packed"),
    "packed, 98/95": (0.98, 0.95, "packed"),
}
EVERY = 50
WIDTHS = {"mlp": 2048, "cnn": 128}


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def cnn(width: int) -> nn.Module:
    """3×3 convolutions on maps of 28 × 28, then 14 × 14 and 7 × 7."""
    channels, strides = (1, width // 2, width, width, width, width), (1, 2, 1, 2, 1)
    layers: list[nn.Module] = []
    for before, after, stride in zip(channels, channels[1:], strides, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stubs


NETWORKS = {"mlp": mlp, "cnn": cnn}


def train(network: str, method: str, data: FashionMNIST, width: int, goal: float, most_epochs: int, seed: int) -> Row:
    """Train until the validation accuracy reaches the goal; seconds, steps and the accuracy reached."""
    torch.manual_seed(seed)
    model = NETWORKS[network](width)
    topkast = None
    if METHODS[method] is not None:
        forward, backward, storage = METHODS[method]  # type: ignore[misc]
        topkast = TopKast(
            model,
            forward,
            backward,
            targets=Targets(keep_first_dense=network == "cnn"),
            penalty=L2(shrinkage=1e-3),
            storage=storage,
        )
    optimizer = Adam(model.parameters(), lr=1e-3, fused=True)
    if topkast is not None:
        topkast.attach(optimizer)
    validation = list(data.val_dataloader())
    seconds, steps, reached = 0.0, 0, 0.0
    for epoch in range(most_epochs):
        data.seed = 1000 * seed + epoch
        batches = iter(data.train_dataloader())
        while chunk := list(islice(batches, EVERY)):
            start = process_time()
            for x, y in chunk:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            seconds += process_time() - start
            steps += len(chunk)
            reached = accuracy(model.eval(), validation)
            model.train()
            if reached >= goal:
                return {"method": method, "seed": seed, "seconds": seconds, "steps": steps, "accuracy": reached}
    return {"method": method, "seed": seed, "seconds": None, "steps": steps, "accuracy": reached}


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Share of the examples that are classified correctly."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accuracy", type=float, default=0.88, help="on the validation images (default: %(default)s)")
    parser.add_argument("--network", choices=NETWORKS, default="mlp", help="(default: %(default)s)")
    parser.add_argument("--width", type=int, help=f"of the hidden layers, or channels (default: {WIDTHS})")
    parser.add_argument("--epochs", type=int, default=8, help="at most (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", help="of the data, if it is not where the Debian package or torchvision put it")
    parser.add_argument("--json", type=Path, help="also write all runs to this file")
    arguments = parser.parse_args()
    width = arguments.width or WIDTHS[arguments.network]
    torch.set_num_threads(1)
    keep_freed_memory()
    data = FashionMNIST(arguments.folder, batch_size=128, val_size=1 / 12)
    data.prepare_data()
    data.setup("fit")
    runs = [
        train(arguments.network, method, data, width, arguments.accuracy, arguments.epochs, seed)
        for seed in arguments.seeds
        for method in METHODS
    ]
    rows: list[Row] = []
    for method in METHODS:
        own = [run for run in runs if run["method"] == method]
        row: Row = {"method": method, "reached": f"{sum(run['seconds'] is not None for run in own)} of {len(own)}"}
        done = [run for run in own if run["seconds"] is not None]
        if done:
            row["seconds"] = sum(run["seconds"] for run in done) / len(done)
            row["steps"] = sum(run["steps"] for run in done) / len(done)
            row["ms a step"] = row["seconds"] / row["steps"] * 1e3
        rows.append(row)
    table(f"FashionMNIST, {arguments.network}, width {width}, to {arguments.accuracy:.0%}", rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
