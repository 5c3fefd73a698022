"""A transformer of a billion parameters in training, dense, packed by blocks and 2:4: tokens a second, and memory.

And one for which dense training with Adam has no room on the device: packed, and by FSDP2 with weights, gradients and
Adam's state in host memory. Weights are float32 and computed with in bfloat16, steps are those of a loop that waits for
nothing, and a variant's memory is free before the next one begins.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from giant import DENSE_BYTES, TOKENS, Transformer, build, held
from gpu_block import Block
from gpu_semi import check_semi, make_semi
from gpu_timing import Clock, aim, filled, pair_name
from tables import Row
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.optim import Adam

from lightning_topkast import TopKast
from lightning_topkast.distributed import to_local

Pair = tuple[float, float]
Built = tuple[Transformer, TopKast | None]

PAIRS: tuple[Pair, ...] = ((0.9, 0.8), (0.95, 0.9))
AIMS = {PAIRS[0]: 2, PAIRS[1]: 3}  # times dense, in tokens a second
AIM_WIDTH = 4096


@dataclass(frozen=True)
class Size:
    """What is trained, and how often.

    Args:
        width: a multiple of 128, which is a head's.
        batch: sequences a step.
        time: tokens of each.
        sides: of packed blocks.
        steps: of a loop that is timed, and `loops` of these.
        parameters: of all the transformer's blocks together, about; where dense does not fit, its memory decides.
        room: bytes of the device that may be used where dense does not fit, so that the host has room for the rest.
    """

    width: int
    batch: int
    time: int
    sides: tuple[int, ...]
    steps: int
    loops: int
    parameters: float
    room: float = 0.0


SIZES = {
    "full": Size(4096, 8, 1024, (128, 64), 5, 3, parameters=1e9),
    "quick": Size(1024, 4, 256, (64,), 3, 2, parameters=5e7),
    "rehearsal": Size(128, 2, 16, (16,), 2, 1, parameters=4e5),
}
OFFLOAD_SIZES = {
    "full": Size(4096, 8, 1024, (128,), 2, 2, parameters=0, room=24e9),  # of a card that many have
    "quick": Size(1024, 4, 256, (64,), 2, 1, parameters=0, room=3e9),
    "rehearsal": Size(128, 2, 16, (16,), 1, 1, parameters=0, room=5e6),
}


def block_parameters(width: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Block(width, width // 128).parameters())


def depth_of(width: int, parameters: float) -> int:
    """How many blocks have about so many parameters."""
    return max(1, round(parameters / block_parameters(width)))


def depth_beyond(width: int, memory: float) -> int:
    """The fewest blocks whose weights, gradients and Adam's state, dense in float32, are more than this memory."""
    return int(memory // (DENSE_BYTES * block_parameters(width))) + 1


# --- tokens a second ----------------------------------------------------------------------------------------------


def measure(size: Size, device: torch.device) -> Iterator[Row]:
    """One row for each variant of a depth that every one of them has room for."""
    depth = depth_of(size.width, size.parameters)
    variants: dict[str, Callable[[], Built]] = {"dense": lambda: (dense(size, depth, device), None)}
    for side in size.sides:
        for pair in PAIRS:
            variants[f"{packed_name(pair)}, blocks of {side}"] = partial(packed, size, depth, pair, side, device)
    variants["2:4 by torch"] = lambda: (semi(size, depth, device), None)
    yield from compare(variants, size, depth, device, ("eager", "compiled"))


def measure_offload(size: Size, device: torch.device) -> Iterator[Row]:
    """One row for each variant of a depth that dense has no room for; all eager."""
    room = size.room
    if device.type == "cuda":
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        room = min(room, torch.cuda.get_device_properties(device).total_memory, host / 2)
    depth = depth_beyond(size.width, room)
    variants: dict[str, Callable[[], Built]] = {
        "FSDP2 with CPU offload": lambda: (offload(size, depth, device), None),
        "dense": lambda: (dense(size, depth, device), None),
    }
    for pair in PAIRS:
        variants[packed_name(pair)] = partial(packed, size, depth, pair, size.sides[0], device)
    with limited(room, device):
        for row in compare(variants, size, depth, device, ("eager",)):
            yield row | {"room GB": room / 1e9}


def compare(
    variants: dict[str, Callable[[], Built]], size: Size, depth: int, device: torch.device, ways: tuple[str, ...]
) -> Iterator[Row]:
    """A row for each variant, with its tokens a second over those of the first one."""
    first: Row | None = None
    for name, make in variants.items():
        row: Row = {"variant": name, "width": size.width, "blocks": depth, "tokens a step": size.batch * size.time}
        filled(row, train(make, size, device, ways), device)
        torch.compiler.reset()  # the next variant needs other graphs
        if dist.is_initialized():
            dist.destroy_process_group()
        first = first or row
        if "tokens/s" in first and "tokens/s" in row:
            row[f"× {first['variant']}"] = row["tokens/s"] / first["tokens/s"]
        yield row


def train(make: Callable[[], Built], size: Size, device: torch.device, ways: tuple[str, ...]) -> Iterator[Row]:
    """What a variant's row holds."""
    clock = Clock(device)
    counters.clear()
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    model, topkast = make()
    sparse = {} if topkast is None else topkast.weights
    entries = sum(parameter.numel() for parameter in model.parameters())
    entries += sum(weight.size - weight.parameter.numel() for weight in sparse.values())
    yield {"B parameters": entries / 1e9}
    optimizer = Adam(model.parameters(), lr=1e-4, fused=True)
    if topkast is not None:
        topkast.attach(optimizer)
    tokens = torch.randint(TOKENS, (size.batch, size.time + 1), device=device)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    def loop() -> None:
        for _ in range(size.steps):
            step()

    fastest = float("inf")
    for way in ways:
        if way == "compiled":
            for block in model.blocks:  # all by the same graph
                block.compile(fullgraph=True, dynamic=False)
        warm_up: list[float] = []
        yield {f"{way} warm-up s": clock.wall(lambda into=warm_up: into.extend(float(step()) for _ in range(3))) / 1e3}  # type: ignore[misc]
        if way == ways[0]:
            yield {"first loss": warm_up[0]}
        ms = median(clock.wall(loop) / size.steps for _ in range(size.loops))
        fastest = min(fastest, ms)
        yield {f"{way} ms": ms, "tokens/s": 1e3 * tokens[:, 1:].numel() / fastest, "last loss": float(step())}
        if way == ways[0]:
            yield {"held GB": sum(to_local(each).nbytes for each in held(model, optimizer)) / 1e9}
        if device.type == "cuda":
            yield {"peak GB": (torch.cuda.max_memory_allocated() - before) / 1e9}
    if "compiled" in ways:
        yield {"graphs": counters["stats"]["unique_graphs"]}


# --- variants -----------------------------------------------------------------------------------------------------


def packed_name(pair: Pair) -> str:
    return f"packed {pair_name(pair)}"


def dense(size: Size, depth: int, device: torch.device) -> Transformer:
    with device:
        return Transformer(size.width, depth, size.width // 128, size.time)


def packed(size: Size, depth: int, pair: Pair, side: int, device: torch.device) -> Built:
    return build(depth, size.width, size.time, pair, side, device)


def semi(size: Size, depth: int, device: torch.device) -> Transformer:
    check_semi(device)
    model = dense(size, depth, device)
    make_semi(model.blocks)
    return model


def offload(size: Size, depth: int, device: torch.device) -> Transformer:
    """Dense, its weights brought to the device block by block; Adam takes its steps on the host."""
    model = dense(size, depth, torch.device("cpu"))
    backend = "nccl" if device.type == "cuda" else "gloo"  # of the host's tensors nothing is sent
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (1,))
    types = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (*model.blocks, model):
        fully_shard(
            module, mesh=mesh, mp_policy=types, offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda")
        )
    return model


@contextmanager
def limited(room: float, device: torch.device) -> Iterator[None]:
    """Let this process use so many bytes of the device."""
    if device.type != "cuda":
        yield
        return
    try:
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(device).total_memory)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def aims(rows: list[Row]) -> list[Row]:
    """Each aim with the better of the blocks."""
    found: list[Row] = []
    for pair, speed in AIMS.items():
        ratios = [
            row["× dense"]
            for row in rows
            if row["width"] == AIM_WIDTH and row["variant"].startswith(packed_name(pair)) and "× dense" in row
        ]
        text = f"{pair_name(pair)}: tokens a second of a transformer, width {AIM_WIDTH}, ≥ {speed} × dense"
        found.append(aim(text, max(ratios, default=None), speed, at_least=True))
    return found
