"""How long a refresh of one packed weight takes where processes share θ, beside one process that has all of it.

    OMP_NUM_THREADS=1 python benchmarks/shared_refresh.py [--entries 16777216] [--ranks 2] [--rounds 5] [--block 32]

Forked CPU processes of one thread, gloo; AdamW's state is moved too. One process and several are started in turn, and
each time the median of some refreshes is taken, of several ranks that of the slowest. Bytes are those of θ, sets and
the scores in host memory.
"""

import argparse
import faulthandler
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tables import Row, table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_topkast import Block, Packed, Schedule, Targets, TopKast

_LONG = timedelta(seconds=600)


class Run:
    """A packed weight in training, whose gradients are random."""

    def __init__(self, options: argparse.Namespace, slices: bool) -> None:
        side = 1024
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(side, options.entries // side, bias=False))
        blocks: dict[str, Any] = {"structure": Block(options.block, options.block)} if options.block else {}
        self.topkast = TopKast(
            model,
            *options.pair,
            targets=Targets(keep_first_dense=False, keep_last_dense=False),
            schedule=Schedule(10**9),
            storage=Packed(kernels="torch"),
            **blocks,
        )
        if slices:
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        self.topkast.attach(self.optimizer)
        (self.weight,) = self.topkast.weights.values()
        self.step()

    def step(self) -> None:
        parameter = self.weight.parameter
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
        self.optimizer.step()

    def refresh(self) -> float:
        """Change the values as steps would, and return the seconds of a refresh."""
        for _ in range(3):
            self.step()
        start = time.perf_counter()
        self.topkast.refresh()
        return time.perf_counter() - start

    @property
    def host_bytes(self) -> int:
        kept = (getattr(self.weight, name) for name in ("_theta", "_tiers", "_never_active", "_scores"))
        return sum(each.nbytes for each in kept if each is not None)


def rank(index: int, world: int, folder: Path, options: argparse.Namespace) -> None:
    """Refresh, and let rank 0 save the seconds and bytes by kind."""
    faulthandler.dump_traceback_later(900, exit=True)
    torch.set_num_threads(1)
    if world > 1:
        rendezvous = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=rendezvous, rank=index, world_size=world, timeout=_LONG)
    found = {}
    for name, slices in {"DDP": False, "FSDP2": True}.items() if world > 1 else [("alone", False)]:
        run = Run(options, slices)
        slowest = []
        for _ in range(options.rounds):
            longest = torch.tensor(run.refresh())
            if world > 1:
                dist.all_reduce(longest, op=dist.ReduceOp.MAX)
            slowest.append(float(longest))
        found[name] = median(slowest), run.host_bytes
    if index == 0:
        torch.save(found, folder / "found.pt")
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1 << 24, help="a multiple of 1,024 (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="refreshes a turn (default: %(default)s)")
    parser.add_argument("--pair", type=float, nargs=2, default=(0.95, 0.9), help="forward and backward sparsity")
    parser.add_argument("--block", type=int, default=0, help="side of blocks; 0: single entries (default: %(default)s)")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, int]]] = {}
    for _ in range(options.turns):
        for world in (1, options.ranks):
            with tempfile.TemporaryDirectory() as folder:
                mp.start_processes(rank, (world, Path(folder), options), nprocs=world, start_method="fork")
                for name, figures in torch.load(Path(folder, "found.pt"), weights_only=True).items():
                    found.setdefault(name, []).append(figures)
    alone = [seconds for seconds, _ in found["alone"]]
    rows: list[Row] = []
    for name, figures in found.items():
        seconds = [each for each, _ in figures]
        row: Row = {"processes": "1" if name == "alone" else f"{options.ranks}, {name}", "ms": median(seconds) * 1e3}
        ratio = median(mine / whole for mine, whole in zip(seconds, alone, strict=True))
        rows.append(row | {"ratio": ratio, "host MB of each": figures[0][1] / 1e6})
    table(f"Refresh of {options.entries:,} packed entries at {options.pair[0]:.0%} / {options.pair[1]:.0%}", rows)


if __name__ == "__main__":
    main()
