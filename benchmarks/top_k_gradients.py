"""What sending only the largest gradients costs in accuracy, and what it saves in bytes: FashionMNIST over processes.

    OMP_NUM_THREADS=1 python benchmarks/top_k_gradients.py [--ranks 2] [--seeds 0 1 2] [--epochs 5] [--json FILE]

An MLP of 300 and 100 hidden units, whose first layer is sparse too, in DDP over gloo; all runs see the same batches.
Bytes are those that a rank sends in a step: 2 (w-1)/w of what is all-reduced over w ranks, and w-1 times what it gives
to a gather. "dense" sends the whole gradients of masked weights. PowerSGD compresses these gradients to a low rank.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tables import Row, table
from time_to_accuracy import accuracy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_topkast import L2, Targets, TopKAllReduce, TopKast, TopKGradients, sparse_all_reduce
from lightning_topkast.app.data import FashionMNIST
from lightning_topkast.method.selection import nested_top_k
from lightning_topkast.training.top_k_all_reduce import gaussian_threshold

Registered = Callable[[DistributedDataParallel, TopKast], None]


class Counted(TopKAllReduce):
    """Notes how many of the k values that fit into a message are chosen."""

    def _choose(self, values: Tensor, count: int) -> Tensor:
        chosen = super()._choose(values, count)
        chosen_of_k.append(chosen.numel() / count)
        return chosen


chosen_of_k: list[float] = []


def largest(density: float, **options: Any) -> Registered:
    def register(ddp: DistributedDataParallel, topkast: TopKast) -> None:
        ddp.register_comm_hook(None, Counted(topkast, gradients=TopKGradients(density, **options)).hook)

    return register


def low_rank(rank: int) -> Registered:
    def register(ddp: DistributedDataParallel, topkast: TopKast) -> None:
        ddp.register_comm_hook(PowerSGDState(None, rank, start_powerSGD_iter=2), powerSGD_hook)

    return register


METHODS: dict[str, Registered] = {
    "dense": lambda ddp, topkast: None,
    "sparse": lambda ddp, topkast: ddp.register_comm_hook(None, sparse_all_reduce(topkast)),
    "largest 10 %": largest(0.1),
    "largest 10 %, no feedback": largest(0.1, feedback=False),
    "largest 2 %": largest(0.02),
    "largest 2 %, no feedback": largest(0.02, feedback=False),
    "largest 1 %": largest(0.01),
    "Gaussian threshold, 10 %": largest(0.1, threshold="gaussian"),
    "Gaussian threshold, 1 %": largest(0.01, threshold="gaussian"),
    "PowerSGD, rank 1": low_rank(1),
    "PowerSGD, rank 7": low_rank(7),
}


class Sent(TorchDispatchMode):
    """Counts the bytes that a rank sends."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            ranks = dist.get_world_size()
            given = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
            if str(func) == "c10d.allreduce_.default":
                self.bytes += 2 * given[0].nbytes * (ranks - 1) / ranks
            elif str(func) == "c10d.allgather_.default":
                self.bytes += min(each.nbytes for each in given) * (ranks - 1)
            else:
                raise NotImplementedError(str(func))
        return func(*args, **(kwargs or {}))


def train(method: str, density: tuple[float, float], data: FashionMNIST, epochs: int, seed: int) -> Row:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    topkast = TopKast(
        model, 1 - density[0], 1 - density[1], targets=Targets(keep_first_dense=False), penalty=L2(shrinkage=1e-3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    topkast.attach(optimizer)
    ddp = DistributedDataParallel(model)
    METHODS[method](ddp, topkast)
    chosen_of_k.clear()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sent, seconds, steps = Sent(), [], 0
    for epoch in range(epochs):
        data.seed = 1000 * seed + epoch
        for x, y in data.train_dataloader():
            own = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
            optimizer.zero_grad()
            start = time.perf_counter()
            loss = F.cross_entropy(ddp(x[own]), y[own])
            if steps == 5:  # DDP has settled its buckets, and PowerSGD compresses
                with sent:
                    loss.backward()
            else:
                loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            steps += 1
    return {
        "method": method, "seed": seed, "accuracy": 100 * accuracy(model, list(data.test_dataloader())),
        "kB sent": sent.bytes / 1e3, "ms a step": 1e3 * median(seconds),
        "chosen of k": mean(chosen_of_k) if chosen_of_k else None,
    }  # fmt: skip


def work(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=arguments.ranks)
    data = FashionMNIST(arguments.folder, batch_size=128, val_size=1 / 12)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    runs = [
        train(method, tuple(arguments.densities), data, arguments.epochs, seed)
        for seed in arguments.seeds
        for method in arguments.methods
    ]
    if rank == 0:
        Path(folder, "runs.json").write_text(json.dumps(runs))
    dist.barrier()
    os._exit(0)  # PowerSGD over gloo may abort a process that takes its group down


def thresholds(size: int) -> list[Row]:
    """How many of the values asked for exceed a Gaussian threshold, and its time relative to the exact choice."""
    torch.manual_seed(0)
    normal, rows = torch.randn(size), []
    samples = {
        "normal": normal,
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample((size,)),
        "Student's t, 3 degrees": torch.distributions.StudentT(3.0).sample((size,)),
        "half zeros": normal * (torch.rand(size) < 0.5),
    }
    for name, values in samples.items():
        for density in (0.1, 0.01):
            count, times = round(density * size), []
            for _ in range(5):
                start = time.perf_counter()
                nested_top_k(values.abs(), (count,))
                middle = time.perf_counter()
                found = int(torch.count_nonzero(values.abs() > gaussian_threshold(values, density)))
                times.append((time.perf_counter() - middle) / (middle - start))
            rows.append({"values": name, "density": density, "found / asked": found / count, "time": median(times)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--densities", type=float, nargs=2, default=[0.1, 0.2], help="forward and backward")
    parser.add_argument("--epochs", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", help="of the data, if it is not where the Debian package or torchvision put it")
    parser.add_argument("--json", type=Path, help="also write all runs to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (arguments, folder), nprocs=arguments.ranks, start_method="spawn")
        runs = json.loads(Path(folder, "runs.json").read_text())
    rows: list[Row] = []
    for method in arguments.methods:
        own = [run for run in runs if run["method"] == method]
        accuracies = [run["accuracy"] for run in own]
        rows.append(
            {
                "method": method,
                "accuracy": f"{mean(accuracies):.2f}",
                "of each seed": ", ".join(f"{each:.2f}" for each in accuracies),
                "kB sent a step": own[0]["kB sent"],
                "ms a step": median(run["ms a step"] for run in own),
                "chosen of k": own[0]["chosen of k"],
            }
        )
    forward, backward = (round(100 * (1 - density)) for density in arguments.densities)
    table(f"{forward}/{backward}, {arguments.ranks} ranks, {arguments.epochs} epochs", rows)
    torch.set_num_threads(1)
    table("A Gaussian threshold: values found, and time relative to the exact choice", thresholds(1 << 22))
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
