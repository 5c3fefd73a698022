"""Our RigL beside `rigl-torch` 0.5.2 from PyPI: the same choices on the same tensors, and one task.

    pip install --no-deps rigl-torch          (and torchvision, which it imports)
    OMP_NUM_THREADS=1 python benchmarks/rigl.py

Both train the MLP 300-100 on FashionMNIST at 90 % sparsity with SGD. The package keeps the first layer dense and prunes
the last one, so ours does too. The package skips the optimizer at its updates, ours does not.
"""

import argparse
import statistics
import time

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from tables import table
from torch import nn

from lightning_topkast import Schedule, Targets, TopKast
from lightning_topkast.app.models import MLP
from lightning_topkast.app.vision import load_torchvision
from lightning_topkast.baselines import RigL
from lightning_topkast.method.selection import drop_and_grow

SPARSITY, UPDATE_EVERY, STOP = 0.9, 100, 0.75


def agreement(trials: int) -> int:
    """In how many random trials both choose the same connections, given weights, mask and dense gradient."""
    from rigl_torch.RigL import RigLScheduler

    alike = 0
    for trial in range(trials):
        torch.manual_seed(trial)
        model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 25), nn.Linear(25, 5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        theirs = RigLScheduler(
            model, optimizer, dense_allocation=0.1, T_end=1000, delta=10, alpha=0.3, ignore_linear_layers=False
        )
        theirs.step = 10 * (trial % 90)
        while theirs.check_if_backward_hook_should_accumulate_grad() is False:
            theirs.step += 1
        model(torch.randn(8, 20)).square().sum().backward()
        weight, hook = model[1].weight, theirs.backward_hook_objects[1]
        before, active, gradient = weight.detach().clone(), theirs.backward_masks[1].clone(), hook.dense_grad.clone()
        dropped = int(theirs.cosine_annealing() * int(active.sum()))
        ours = drop_and_grow(before.abs(), active, gradient.abs(), int(active.sum()) - dropped, dropped)
        theirs._rigl_step()
        alike += torch.equal(ours.bool(), theirs.backward_masks[1])
    return alike


def accuracy(which: str, seed: int, data, epochs: int) -> tuple[float, float]:
    """Test accuracy in percent, and seconds of training."""
    torch.manual_seed(seed)
    model = MLP([1, 28, 28], 10, [300, 100])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data.seed = seed
    loader = data.train_dataloader()
    total = epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    theirs = None
    if which == "rigl-torch":
        from rigl_torch.RigL import RigLScheduler

        theirs = RigLScheduler(
            model, optimizer, dense_allocation=1 - SPARSITY, T_end=int(STOP * total), delta=UPDATE_EVERY, alpha=0.3,
            ignore_linear_layers=False,
        )  # fmt: skip
    elif which == "ours":
        TopKast(
            model,
            SPARSITY,
            SPARSITY,
            targets=Targets(keep_last_dense=False),
            schedule=Schedule(update_every=UPDATE_EVERY, stop_updating_at=STOP),
            rule=RigL(0.3),
            seed=seed,
        ).attach(optimizer, total_steps=total)
    start = time.perf_counter()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if theirs is None or theirs():
                optimizer.step()
            scheduler.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = sum(int((model(x).argmax(-1) == y).sum()) for x, y in data.test_dataloader())
    return 100 * right / len(data.test_set), seconds


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_torchvision("models")
    print(f"the same connections in {agreement(arguments.trials)} of {arguments.trials} random updates\n")
    with initialize_config_module("lightning_topkast.conf", version_base="1.3"):
        data = instantiate(compose("train", overrides=["data=fashion_mnist"]).data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    figures: dict[str, list[tuple[float, float]]] = {"dense": [], "ours": [], "rigl-torch": []}
    for seed in range(arguments.seeds):
        for which in figures:  # in turn, so that a busy machine is busy for all
            figures[which].append(accuracy(which, seed, data, arguments.epochs))
    rows = []
    for which, found in figures.items():
        scores, seconds = zip(*found, strict=True)
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        rows.append({"method": which, "accuracy": f"{statistics.mean(scores):.2f} ± {spread:.2f}", "seeds": len(scores),
                     "seconds": statistics.median(seconds)})  # fmt: skip
    table(f"MLP 300-100 on FashionMNIST, {SPARSITY:.0%} of two layers, {arguments.epochs} epochs", rows)


if __name__ == "__main__":
    main()
