"""A packed Linear's whole step with Adam in bfloat16 as Python launches it: eager, compiled, or as a CUDA graph."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpu_timing import PAIRS, aim, filled, pair_name
from gpu_training import Training, Ways, launched, ways
from tables import Row
from torch import Tensor, nn

AIMS = {(0.9, 0.8): 2.5, (0.95, 0.9): 4, (0.98, 0.95): 6}  # times dense, each in the fastest of the ways
AIM_WIDTH, AIM_ROWS = 4096, 8192


@dataclass(frozen=True)
class Size:
    """What is timed, and how often."""

    width: int
    rows: int
    blocks: tuple[int, ...]
    pairs: tuple[tuple[float, float], ...]
    rounds: int


SIZES = {
    "full": Size(4096, 8192, (128, 64), PAIRS[1:], 25),
    "quick": Size(1024, 1024, (64,), PAIRS[1:], 5),
    "rehearsal": Size(128, 48, (16,), PAIRS[1:2], 2),
}


def measure(size: Size, device: torch.device) -> Iterator[Row]:
    """One row for each block and pair of sparsities."""
    x = torch.randn(size.rows, size.width, device=device, dtype=torch.bfloat16, requires_grad=True)
    dense = ways(Training(linear(size.width, device), x))
    for block in size.blocks:
        for pair in size.pairs:
            row: Row = {"width": size.width, "rows": size.rows, "block": block, "sparsity": pair_name(pair)}
            yield filled(row, figures(size, x, dense, pair, block), device)


def linear(width: int, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(width, width, device=device, dtype=torch.bfloat16)


def figures(size: Size, x: Tensor, dense: Ways, pair: tuple[float, float], block: int) -> Iterator[Row]:
    sparse = ways(Training(linear(size.width, x.device), x, pair, block))
    yield launched(dense, sparse, x.device, size.rounds)


def aims(rows: list[Row]) -> list[Row]:
    """Each aim with the better of the blocks."""
    rows = [row for row in rows if (row["width"], row["rows"]) == (AIM_WIDTH, AIM_ROWS)]
    return [
        aim(
            f"{pair_name(pair)}: a Linear's step with Adam from Python, width {AIM_WIDTH}, ≥ {speed} × dense",
            max((row["from Python"] for row in rows if row["sparsity"] == pair_name(pair) and "from Python" in row),
                default=None),
            speed,
            at_least=True,
        )
        for pair, speed in AIMS.items()
    ]  # fmt: skip
