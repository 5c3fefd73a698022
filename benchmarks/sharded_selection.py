"""How long choosing A and B of one weight takes whole, and sharded over forked CPU processes of one thread.

OMP_NUM_THREADS=1 python benchmarks/sharded_selection.py [--entries 16777216] [--ranks 2] [--rounds 7]
"""

import argparse
import faulthandler
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tables import table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_topkast.distributed import Sharding, to_local
from lightning_topkast.method.selection import nested_top_k
from lightning_topkast.method.sharded_selection import nested_top_k_of_shards


def seconds(work) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rank(index: int, folder: Path, options: argparse.Namespace) -> None:
    faulthandler.dump_traceback_later(300, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=index, world_size=options.ranks,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (options.ranks,))
    whole = torch.randn(options.entries // 1024, 1024, generator=torch.Generator().manual_seed(0)).abs()
    counts = (whole.numel() // 5, whole.numel() // 10)
    rows = []
    for name, values in (("distinct", whole), ("bfloat16, with many ties", whole.bfloat16())):
        found = {}
        for dim in (0, 1):
            weight = distribute_tensor(values, mesh, [Shard(dim)])
            sharding, part = Sharding("weight", weight), to_local(weight)
            select = partial(nested_top_k_of_shards, part, counts, values.numel(), sharding.sum, sharding.flat_indices)
            found[f"Shard({dim}) ms"] = 1000 * median(seconds(select) for _ in range(options.rounds))
            alike = torch.equal(select(), sharding.to_local(nested_top_k(values, counts)))
            assert alike, "the sharded sets are not those of the whole weight"
        alone = 1000 * median(seconds(partial(nested_top_k, values, counts)) for _ in range(options.rounds))
        rows.append({"scores": name, "entries": values.numel(), "whole, each rank ms": alone} | found)
    if index == 0:
        table(f"Choosing A and B at 90/80, {options.ranks} ranks", rows)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1 << 24)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank, (Path(folder), options), nprocs=options.ranks, start_method="fork")


if __name__ == "__main__":
    main()
