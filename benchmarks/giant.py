"""A transformer far larger than dense training has room for takes steps with Adam, on one device or on several.

    python benchmarks/giant.py [--blocks 26] [--width 8192] [--pair 0.98 0.95] [--steps 10] [--json FILE]
    torchrun --nproc-per-node N benchmarks/giant.py ...

Weights are float32 and computed with in bfloat16; all of θ lies in host memory, and the device holds the updated set's
blocks, their gradients and Adam's state. Of several ranks each has its share of both, by FSDP2, and trains on tokens of
its own. Dense training with Adam holds 16 bytes a parameter (weight, gradient and two moments in float32), which with
nothing else in it bounds what the devices' memory is enough for. Every step sees the same random tokens, so that a
falling loss shows that it learns. The network is built on the meta device, so that of several ranks each draws its own
rows of θ, and none has a dense weight.
"""

import argparse
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from gpu_block import Block
from gpu_timing import device_name
from tables import Row, table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim import Adam

from lightning_topkast import Packed, Targets, TopKast
from lightning_topkast.distributed import to_local
from lightning_topkast.method import structure

TOKENS = 256
DENSE_BYTES = 16  # a parameter's


class Transformer(nn.Module):
    """A causal language model over bytes."""

    def __init__(self, width: int, blocks: int, heads: int, time: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(TOKENS, width), nn.Embedding(time, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.output(self.norm(x))
        return output


def build(
    blocks: int,
    width: int,
    time: int,
    pair: tuple[float, float],
    side: int,
    device: torch.device,
    mesh: DeviceMesh | None = None,
) -> tuple[Transformer, TopKast]:
    """Pack a transformer on the meta device, which draws it, and shard it over the mesh, if there is one.

    Args:
        blocks: of the transformer.
        side: of the sets' blocks.
    """
    with torch.device("meta"):
        model = Transformer(width, blocks, width // 128, time)
    topkast = TopKast(
        model,
        *pair,
        targets=Targets(include=["blocks.*"], keep_first_dense=False, keep_last_dense=False),
        update_every=10**6,
        penalty=None,
        structure=structure.Block(side, side),
        storage=Packed(unsupported="error"),
    )
    for module in (*model.blocks, model):
        module.to(device)
        if mesh is not None:
            fully_shard(module, mesh=mesh)
    return model, topkast


def held(model: nn.Module, optimizer: Adam) -> Iterator[Tensor]:
    """This rank's weights, gradients and optimizer state."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


class Watch:
    """Seconds of what is done, printed as it goes by one rank."""

    def __init__(self, device: torch.device, prints: bool) -> None:
        self.on_gpu = device.type == "cuda"
        self.prints = prints
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        start = perf_counter()
        done = work()
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds[name] = perf_counter() - start
        if self.prints:
            print(f"{name}: {self.seconds[name]:.1f} s", flush=True)
        return done


def run(arguments: argparse.Namespace, device: torch.device, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Build, train, refresh, and train on."""
    rank, world = (0, 1) if mesh is None else (mesh.get_rank(), mesh.size())
    torch.manual_seed(0)
    watch = Watch(device, prints=rank == 0)
    sizes = (arguments.blocks, arguments.width, arguments.time, tuple(arguments.pair), arguments.side)
    model, topkast = watch("drawing, packing and sharding", lambda: build(*sizes, device, mesh))
    optimizer = Adam(model.parameters(), lr=arguments.lr, fused=True)
    topkast.attach(optimizer)
    weights = topkast.weights.values()
    dense = sum(parameter.numel() for parameter in model.parameters()) - sum(w.parameter.numel() for w in weights)
    parameters = dense + sum(weight.size for weight in weights)
    torch.manual_seed(rank)
    tokens = torch.randint(TOKENS, (arguments.batch, arguments.time + 1), device=device)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    losses: list[float] = []
    watch("first step, with tuning", lambda: losses.append(step()))
    times: list[float] = []

    def steps(count: int) -> None:
        for _ in range(count):
            start = perf_counter()
            losses.append(step())
            times.append(perf_counter() - start)

    steps(arguments.steps)
    watch("a refresh of all weights", topkast.refresh)
    promoted = sum(weight.promoted for weight in weights)
    steps(arguments.steps)
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 0
    row: Row = {
        "rank": rank,
        "B parameters": parameters / 1e9,
        "sparsity": "{:.0%} / {:.0%}".format(*arguments.pair),
        "block": arguments.side,
        "tokens a step": world * tokens[:, 1:].numel(),
        "θ at home GB": sum(w.sharding.local_shape.numel() * w.parameter.element_size() for w in weights) / 1e9,
        "weights, gradients, Adam GB": sum(to_local(each).nbytes for each in held(model, optimizer)) / 1e9,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "dense Adam GB": DENSE_BYTES * parameters / 1e9 / world,
        "dense Adam's limit, B parameters": world * memory / DENSE_BYTES / 1e9 if on_gpu else None,
        "host peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "ms a step": sorted(times)[len(times) // 2] * 1e3,
        "s a refresh": watch.seconds["a refresh of all weights"],
        "promoted": promoted,
        "first loss": losses[0],
        "last loss": losses[-1],
    }
    rows = [row] * world
    if mesh is not None:
        dist.all_gather_object(rows, row)
    return {"rows": rows, "seconds": watch.seconds, "losses": losses, "step seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=26, help="of the transformer (default: %(default)s)")
    parser.add_argument("--width", type=int, default=8192, help="a multiple of 128 (default: %(default)s)")
    parser.add_argument("--side", type=int, default=128, help="of the sets' blocks (default: %(default)s)")
    parser.add_argument("--pair", type=float, nargs=2, default=(0.98, 0.95), help="forward and backward sparsity")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step (default: %(default)s)")
    parser.add_argument("--time", type=int, default=2048, help="tokens of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="before and after a refresh (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = None
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    found = run(arguments, device, mesh)
    if mesh is None or mesh.get_rank() == 0:
        table(f"Training on {device_name(device) if device.type == 'cuda' else 'CPU'}", found["rows"])
        print("loss: " + " ".join(f"{loss:.3f}" for loss in found["losses"]))
        if arguments.json:
            arguments.json.write_text(json.dumps(found | {"device": device_name(device)}, indent=1) + "\n")
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
