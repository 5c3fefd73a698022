"""The 2:4 weights that `structure="2:4"` trains, multiplied by the GPU's sparse tensor cores through torch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpu_timing import Clock, in_a_line, medians
from tables import Row
from torch import nn
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from lightning_topkast import Targets, TopKast

BACKENDS = {"cuSPARSELt": SparseSemiStructuredTensorCUSPARSELT, "CUTLASS": SparseSemiStructuredTensorCUTLASS}


@dataclass(frozen=True)
class Size:
    """What is timed, and how often."""

    width: int
    rows: int
    rounds: int


SIZES = {"full": Size(8192, 8192, 15), "quick": Size(1024, 1024, 3), "rehearsal": Size(128, 64, 2)}


@torch.no_grad()
def measure(size: Size, device: torch.device) -> Iterator[Row]:
    """The forward pass by either of the libraries that torch can use, and by `to_sparse_semi_structured`'s choice."""
    model = nn.Linear(size.width, size.width, bias=False, device=device, dtype=torch.bfloat16)
    TopKast(model, 0.5, 0.4, targets=Targets(keep_first_dense=False, keep_last_dense=False), structure="2:4")
    alpha = model.weight.detach()
    groups = alpha.view(-1, 4).count_nonzero(dim=1)
    assert int(groups.max()) <= 2, "a group of four has more than two entries"
    x = torch.randn(size.rows, size.width, device=device, dtype=torch.bfloat16)
    exact = x.float() @ alpha.float().t()
    dense = F.linear(x, alpha)
    clock = Clock(device)
    for name in ("torch's choice", *BACKENDS):
        compress = torch.sparse.to_sparse_semi_structured if name not in BACKENDS else BACKENDS[name].from_dense
        row: Row = {"width": size.width, "rows": size.rows, "library": name}
        try:
            compressed = compress(alpha)
            output = F.linear(x, compressed)
            row["error"] = ((output.float() - exact).norm() / exact.norm()).item()
            row["dense error"] = ((dense.float() - exact).norm() / exact.norm()).item()
            assert row["error"] < 0.02, f"relative error {row['error']:.3f}"
            calls = {"dense": lambda: F.linear(x, alpha), "2:4": lambda at=compressed: F.linear(x, at)}  # type: ignore[misc]
            found = medians(calls, device, size.rounds)
            row |= {"dense ms": found["dense"], "2:4 ms": found["2:4"], "speed": found["dense"] / found["2:4"]}
            row["compressing ms"] = min(clock.wall(lambda make=compress: make(alpha)) for _ in range(3))  # type: ignore[misc]
        except Exception as error:  # each library has its own limits
            row["failed"] = in_a_line(error)
        yield row
