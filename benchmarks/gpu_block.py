"""A transformer block in bfloat16, dense beside packed by blocks: forward pass, backward pass and Adam's step."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpu_timing import PAIRS, Clock, aim, filled, medians, pair_name, peak_memory
from gpu_training import Training, Ways, launched, ways
from tables import Row
from torch import Tensor, nn
from torch.nn import functional as F

SPEEDS = {(0.9, 0.8): 2, (0.95, 0.9): 3, (0.98, 0.95): 4}  # times dense, each in the fastest of the ways
# Weights, gradients and Adam's state, as a share of the dense ones: what packed mode is to hold on CPU.
BYTES = {(0.9, 0.8): 0.45, (0.95, 0.9): 0.25, (0.98, 0.95): 0.13}
AIM_WIDTH = 4096


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


SIZES = {  # pairs with aims come first
    "full": Size(4096, 32, 4, 2048, 128, PAIRS[1:] + PAIRS[:1], 9),
    "quick": Size(1024, 8, 2, 512, 64, PAIRS[1:2], 3),
    "rehearsal": Size(64, 4, 2, 16, 8, PAIRS[1:3], 2),
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


def make(size: Size, x: Tensor, pair: tuple[float, float] | None = None) -> Training:
    torch.manual_seed(0)
    with torch.device(x.device):
        model = Block(size.width, size.heads).to(torch.bfloat16)
    return Training(model, x, pair, size.block)


def held(size: Size, x: Tensor, pair: tuple[float, float] | None = None) -> tuple[Training, Row]:
    """A training after two steps, and the MB that it holds between them."""
    on_gpu = x.device.type == "cuda"
    gc.collect()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    training = make(size, x, pair)
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
    make(Size(256, 4, 1, 16, 16, (), 0), torch.randn(1, 16, 256, device=device, dtype=x.dtype)).step()
    dense, dense_row = held(size, x)
    dense_row |= {"peak MB": peak_memory(dense.step, device)}
    dense_ways = ways(dense)
    for pair in size.pairs:
        row: Row = {"width": size.width, "block": size.block, "sparsity": pair_name(pair)}
        yield filled(row, figures(size, x, pair, dense, dense_row, dense_ways), device)


def figures(
    size: Size, x: Tensor, pair: tuple[float, float], dense: Training, dense_row: Row, dense_ways: Ways
) -> Iterator[Row]:
    """What a pair's row holds."""
    sparse, sparse_row = held(size, x, pair)
    sparse_row |= {"peak MB": peak_memory(sparse.step, x.device)}
    found = medians({"dense": dense.step, "sparse": sparse.step}, x.device, size.rounds)
    yield {"dense ms": found["dense"], "sparse ms": found["sparse"], "speed": found["dense"] / found["sparse"]}
    assert sparse.topkast is not None
    for key in ("peak MB", "held MB", "counted MB"):
        yield {f"dense {key}": dense_row[key], f"sparse {key}": sparse_row[key]}
    yield {
        "index MB": sum(weight.layout.nbytes for weight in sparse.topkast.weights.values()) / 1e6,  # type: ignore[attr-defined]
        "bytes": sparse_row["counted MB"] / dense_row["counted MB"],
    }
    if x.is_cuda:
        yield {"held": sparse_row["held MB"] / dense_row["held MB"]}
    yield launched(dense_ways, ways(sparse), x.device, size.rounds)
    yield {"refresh ms": Clock(x.device).wall(sparse.topkast.refresh)}


def aims(rows: list[Row]) -> list[Row]:
    """The speed from Python, and the bytes that packed mode is to hold."""
    by_pair = {row["sparsity"]: row for row in rows if row["width"] == AIM_WIDTH}
    found = [
        aim(f"{pair_name(pair)}: a block's step with Adam from Python, width {AIM_WIDTH}, ≥ {speed} × dense",
            by_pair.get(pair_name(pair), {}).get("from Python"), speed, at_least=True)
        for pair, speed in SPEEDS.items()
    ]  # fmt: skip
    found += [
        aim(f"{pair_name(pair)}: a block's weights, gradients and Adam's state on the device ≤ {limit} × dense",
            by_pair.get(pair_name(pair), {}).get("held"), limit)
        for pair, limit in BYTES.items()
    ]  # fmt: skip
    return found
