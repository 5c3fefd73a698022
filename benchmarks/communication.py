"""What DDP and FSDP2 send of sparse weights, and how long a step takes over a link of limited bandwidth.

    OMP_NUM_THREADS=1 python benchmarks/communication.py [--quick] [--json FILE]

Two processes train one MLP with gloo, each in a network namespace of its own, joined by a virtual Ethernet pair whose
rate `tc` limits: Linux, root and iproute2 are needed. Bytes are those that the interface's counter saw leave rank 0, in
the step with the fewest: TCP sends some twice when a rank is late.
The payload is what a ring sends of the tensors that collectives are called with: gloo's reduce-scatter sends twice that
(of two ranks), since it is an all-reduce inside. So for FSDP2 the payload is what is checked, and for DDP the cable.
The variants live in one process and take their steps in turn, on the same batches; seconds are wall time, speeds
medians over rounds of (dense / variant) within a round. "dense" is masked Top-KAST under plain DDP, "fsdp2" the same
with every layer in `fully_shard`, which gathers its values for the forward and for the backward pass.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from tables import Row, table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_topkast import Block, TopKAllReduce, TopKast, TopKGradients
from lightning_topkast.training.all_reduce import INNER_HOOKS, sparse_all_reduce

DENSITIES = (0.5, 0.2, 0.1, 0.05)  # backward; forward is half of it
LINKS = {"unlimited": None, "1 Gbit/s": "1gbit", "100 Mbit/s": "100mbit"}
VARIANTS = ("dense", "sparse", "sparse_bf16", "largest", "packed", "fsdp2", "fsdp2_packed", "fsdp2_blocks")
OTHER_SETS = ("largest", "fsdp2_blocks")  # than dense
LARGEST = 0.1  # share of B's values that "largest" sends
INTERFACE = "topkast"
SIDE = 16  # of the blocks
# what a ring of two sends of the whole tensor
RING = {
    "c10d.allreduce_.default": 1.0,
    "c10d.broadcast_.default": 1.0,  # DDP's, of a few numbers when it settles its buckets
    "c10d._allgather_base_.default": 0.5,
    "c10d.allgather_.default": 1.0,  # of two tensors, one of which is the rank's own: the largest given is one of them
    "c10d._reduce_scatter_base_.default": 0.5,
    "c10d.barrier.default": 0.0,
}
REFRESH_EVERY = 4
ROUNDS = {"unlimited": 13, "1 Gbit/s": 13, "100 Mbit/s": 7}
LIMIT_S = 900  # for all densities on one link


# --- one of the two processes -------------------------------------------------------------------------------------


class Variant:
    """A model in DDP or FSDP2, whose steps are timed and whose bytes are counted."""

    def __init__(self, name: str, density: float, width: int) -> None:
        torch.manual_seed(0)
        sizes = [64, width, width, width, 10]
        layers = [layer for ends in pairwise(sizes) for layer in (nn.Linear(*ends), nn.ReLU())]
        self.model: nn.Module = nn.Sequential(*layers[:-1])
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.is_sharded, is_packed = name.startswith("fsdp2"), name.endswith(("packed", "blocks"))
        if self.is_sharded and not is_packed:
            self.shard()
        self.topkast = TopKast(
            self.model,
            1 - density / 2,
            1 - density,
            update_every=REFRESH_EVERY,
            structure=Block(SIDE, SIDE) if name == "fsdp2_blocks" else "unstructured",
            storage="packed" if is_packed else "masked",
        )
        if self.is_sharded and is_packed:
            self.shard()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.topkast.attach(self.optimizer)
        self.parallel = self.model if self.is_sharded else DistributedDataParallel(self.model)
        if name in INNER_HOOKS:
            self.parallel.register_comm_hook(None, sparse_all_reduce(self.topkast, hook=INNER_HOOKS[name]))
        if name == "largest":
            hook = TopKAllReduce(self.topkast, gradients=TopKGradients(LARGEST)).hook
            self.parallel.register_comm_hook(None, hook)
        weights = self.topkast.weights.values()
        values = self.parameters - sum(weight.size - int(weight.updated_entries) for weight in weights)
        sent = self.parameters if name in ("dense", "fsdp2") else values
        # DDP: an all-reduce of the gradients; FSDP2: two all-gathers of the values and a reduce-scatter
        self.expected = sent * (2 if name == "sparse_bf16" else 4) * (3 / 2 if self.is_sharded else 1)
        if name == "largest":  # values, places, and whether each weight was used, to the other rank; dense gradients
            counts = [round(LARGEST * int(weight.updated_entries)) for weight in weights]
            dense = self.parameters - sum(weight.size for weight in weights)
            self.expected = 8 * sum(counts) + 4 * (len(counts) + dense)

    def shard(self) -> None:
        """Shard the values of every layer by FSDP2."""
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in self.model.children():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[float, int]:
        """Train one step; return its seconds and the bytes sent."""
        x, y = batch
        dist.barrier()
        sent, start = sent_bytes(), perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.parallel(x), y).backward()
        self.optimizer.step()
        seconds = perf_counter() - start
        dist.barrier()  # the other rank has all of it: until then a part may wait in the cable's queue, uncounted
        return seconds, sent_bytes() - sent

    def values(self) -> dict[str, Tensor]:
        values = self.model.state_dict() | {name: weight.theta() for name, weight in self.topkast.weights.items()}
        return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in values.items()}


class Payload(TorchDispatchMode):
    """Counts what a ring of two sends of the collectives within it."""

    bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            whole = max(each.nbytes for each in tree_leaves(args) if isinstance(each, Tensor))
            self.bytes += RING[str(func)] * whole
        return func(*args, **(kwargs or {}))


def sent_bytes() -> int:
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def measure(density: float, width: int, rounds: int) -> Iterator[Row]:
    """Steps of all variants in turn."""
    variants = {name: Variant(name, density, width) for name in VARIANTS}
    generator = torch.Generator().manual_seed(dist.get_rank())
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    sent: dict[str, list[int]] = {name: [] for name in VARIANTS}
    payloads = {name: Payload() for name in VARIANTS}
    for turn in range(rounds + 2):  # in the first DDP settles its buckets
        batch = torch.randn(32, 64, generator=generator), torch.randint(10, (32,), generator=generator)
        for name, variant in variants.items():
            with payloads[name] if turn == 1 else nullcontext():
                taken, count = variant.step(batch)
            refreshes = (turn + 1) % REFRESH_EVERY == 0
            if turn >= 2:
                sent[name].append(count)
                if not refreshes:
                    seconds[name].append(taken)
    dense = variants["dense"].values()
    for name, variant in variants.items():
        scale = max(float(value.abs().max()) for value in dense.values())
        # of θ and everything dense, relative to the largest value
        difference = max(float((value - dense[key]).abs().max()) for key, value in variant.values().items()) / scale
        ratio = min(sent[name]) / min(sent["dense"])
        payload = payloads[name].bytes / payloads["dense"].bytes
        expected = variant.expected / variants["dense"].expected
        yield {
            "backward density": density,
            "variant": name,
            "step ms": 1e3 * median(seconds[name]),
            "times dense": median(a / b for a, b in zip(seconds["dense"], seconds[name], strict=True)),
            "MB sent": min(sent[name]) / 1e6,
            "bytes / dense": ratio,
            "payload / dense": payload,
            "expected": expected,
            "off by %": 100 * ((payload if variant.is_sharded else ratio) / expected - 1),
            "weights differ by": None if name in OTHER_SETS else f"{difference:.0e}",
        }


def work(rank: int, address: str, width: int, rounds: int, densities: list[float], results: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # nothing here writes into a layer's outputs
    dist.init_process_group("gloo", init_method=f"tcp://{address}:29500", rank=rank, world_size=2)
    rows = [row for density in densities for row in measure(density, width, rounds)]
    if rank == 0:
        results.write_text(json.dumps(rows))
    dist.destroy_process_group()


# --- the two namespaces -------------------------------------------------------------------------------------------


def obstacle() -> str | None:
    """Why namespaces can't be made here."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces takes root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 not found"
    tried = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    return tried.stderr.strip() or None


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)


@contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable, at 10.77.0.1 and 10.77.0.2; gone afterwards."""
    names = (f"topkast-{os.getpid()}-0", f"topkast-{os.getpid()}-1")
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        peer = ("peer", "name", INTERFACE, "netns", names[1])
        run("ip", "-n", names[0], "link", "add", INTERFACE, "type", "veth", *peer)
        for rank, name in enumerate(names):
            run("ip", "-n", name, "address", "add", f"10.77.0.{rank + 1}/30", "dev", INTERFACE)
            run("ip", "-n", name, "link", "set", INTERFACE, "mtu", "9000", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=60, stderr=subprocess.DEVNULL)


def limit(name: str, rate: str) -> None:
    """What leaves the namespace does so at this rate, in packets as they would be on a wire, all headers counted."""
    run("ip", "-n", name, "link", "set", INTERFACE, "gso_max_segs", "1")
    bucket = ("rate", rate, "burst", "128kb", "limit", "16mb")
    run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *bucket)


def train_in(names: tuple[str, str], arguments: list[str], results: Path) -> list[Row]:
    """Both processes, each in its namespace; they end in time or are killed."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, name in enumerate(names):
            own = ["--rank", str(rank), "--results", str(results), *arguments]
            command = ["ip", "netns", "exec", name, sys.executable, __file__, *own]
            processes.append(subprocess.Popen(command, env=environment))
        deadline = perf_counter() + LIMIT_S
        for process in processes:
            if process.wait(timeout=max(1.0, deadline - perf_counter())):
                raise SystemExit("a rank failed, see above")
    except subprocess.TimeoutExpired:
        raise SystemExit(f"the ranks took longer than {LIMIT_S} s and were stopped") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return json.loads(results.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small network and few steps, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help="steps that are measured of each variant, otherwise by the link")
    arguments = parser.parse_args()
    width, rounds, densities = (256, 5, [0.2]) if arguments.quick else (1024, arguments.rounds, list(DENSITIES))
    if arguments.rank is not None:
        work(arguments.rank, "10.77.0.1", width, rounds, densities, arguments.results)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the namespaces go
    reason = obstacle()
    if reason:
        raise SystemExit(f"communication.py joins two processes by a cable of its own: {reason}")

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for link, rate in LINKS.items():
            if arguments.quick and link != "100 Mbit/s":
                continue
            with namespaces() as names:
                for name in names if rate else ():
                    limit(name, rate)
                own = ["--rounds", str(rounds or ROUNDS[link]), *(["--quick"] if arguments.quick else [])]
                measured = train_in(names, own, Path(folder) / "rows.json")
            table(f"{link}: a step of two ranks", measured)
            rows += [{"link": link} | row for row in measured]
    worst = max(abs(row["off by %"]) for row in rows)
    print(f"Bytes sent, for FSDP2 the payload, are off what the values take by {worst:.2f} % at most (aim: 1 %).")
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
