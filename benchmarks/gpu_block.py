"""A transformer block in bfloat16, dense beside packed by blocks: forward pass, backward pass and Adam's step."""

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from gpu_timing import PAIRS, Clock, aim, in_a_line, medians, pair_name, peak_memory
from tables import Row
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from lightning_topkast import Packed, Targets, TopKast
from lightning_topkast.method import structure

# Weights, gradients and Adam's state, as a share of the dense ones: what packed mode is to hold on CPU.
AIMS = {(0.9, 0.8): 0.45, (0.95, 0.9): 0.25, (0.98, 0.95): 0.13}


@dataclass(frozen=True)
class Size:
    """What is timed, and how often."""

    width: int
    heads: int
    batch: int
    time: int
    block: int
    pairs: tuple[tuple[float, float], ...]
    rounds: int


SIZES = {
    "full": Size(4096, 32, 4, 2048, 128, PAIRS, 9),
    "quick": Size(1024, 8, 2, 512, 64, PAIRS[1:2], 3),
    "rehearsal": Size(64, 4, 2, 16, 8, PAIRS, 2),
}


class Block(nn.Module):
    """Pre-norm causal attention, then a feed-forward part of four times the width, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.query_key_value(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class Training:
    """A block in training; with a pair of sparsities it is packed."""

    def __init__(self, size: Size, x: Tensor, pair: tuple[float, float] | None = None) -> None:
        torch.manual_seed(0)
        self.x, self.topkast = x, None
        with torch.device(x.device):
            self.model = Block(size.width, size.heads).to(torch.bfloat16)
        if pair is not None:
            self.topkast = TopKast(
                self.model,
                *pair,
                targets=Targets(keep_first_dense=False, keep_last_dense=False),
                update_every=10**6,
                structure=structure.Block(size.block, size.block),
                storage=Packed(kernels="auto" if x.is_cuda else "torch"),  # no rehearsal waits for a compiler
            )
        self.optimizer = Adam(self.model.parameters(), lr=1e-4, fused=True)
        if self.topkast is not None:
            self.topkast.attach(self.optimizer)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.x).backward(self.x)
        self.optimizer.step()

    def tensors(self) -> Iterable[Tensor]:
        """Weights, gradients and Adam's state."""
        for parameter in self.model.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def held(size: Size, x: Tensor, pair: tuple[float, float] | None = None) -> tuple[Training, Row]:
    """A training after two steps, and the MB that it holds between them."""
    on_gpu = x.device.type == "cuda"
    gc.collect()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    training = Training(size, x, pair)
    for _ in range(2):
        training.step()
    gc.collect()
    counted = sum(tensor.nbytes for tensor in training.tensors()) / 1e6
    row: Row = {"held MB": (torch.cuda.memory_allocated() - before) / 1e6 if on_gpu else None, "counted MB": counted}
    return training, row


def measure(size: Size, device: torch.device) -> Iterator[Row]:
    """One row for each pair of sparsities."""
    x = torch.randn(size.batch, size.time, size.width, device=device, dtype=torch.bfloat16)
    # what libraries allocate once, such as cuBLAS' workspace, is no part of a model
    Training(Size(256, 4, 1, 16, 16, (), 0), torch.randn(1, 16, 256, device=device, dtype=x.dtype)).step()
    dense, dense_bytes = held(size, x)
    dense_peak = peak_memory(dense.step, device)
    for pair in size.pairs:
        row: Row = {"width": size.width, "block": size.block, "sparsity": pair_name(pair)}
        try:
            sparse, sparse_bytes = held(size, x, pair)
            calls = {"dense": dense.step, "sparse": sparse.step}
            found, eager = (medians(calls, device, size.rounds, queued) for queued in (True, False))
            row |= {"dense ms": found["dense"], "sparse ms": found["sparse"], "speed": found["dense"] / found["sparse"]}
            row |= {"eager dense ms": eager["dense"], "eager sparse ms": eager["sparse"]}
            row["eager speed"] = eager["dense"] / eager["sparse"]
            assert sparse.topkast is not None
            row["refresh ms"] = Clock(device).wall(sparse.topkast.refresh)
            row |= {"dense peak MB": dense_peak, "sparse peak MB": peak_memory(sparse.step, device)}
            for key in ("held MB", "counted MB"):
                row |= {f"dense {key}": dense_bytes[key], f"sparse {key}": sparse_bytes[key]}
            row["index MB"] = sum(weight.layout.nbytes for weight in sparse.topkast.weights.values()) / 1e6  # type: ignore[attr-defined]
            row["bytes"] = sparse_bytes["counted MB"] / dense_bytes["counted MB"]
            if device.type == "cuda":
                row["held"] = sparse_bytes["held MB"] / dense_bytes["held MB"]
            del sparse, calls
        except Exception as error:  # the other pairs are still worth their time
            row["failed"] = in_a_line(error)
        yield row


def aims(rows: list[Row]) -> list[Row]:
    """The bytes that packed mode is to hold."""
    limits = {pair_name(pair): limit for pair, limit in AIMS.items()}
    found = [(row, limits[row["sparsity"]]) for row in rows if row["sparsity"] in limits and row.get("held")]
    return [
        aim(f"{row['sparsity']}: a block's weights, gradients and Adam's state on the device ≤ {limit} × dense",
            row["held"], limit)
        for row, limit in found
    ]  # fmt: skip
