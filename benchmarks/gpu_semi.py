"""2:4 weights by the GPU's sparse tensor cores through torch: products by those that `structure="2:4"` trains, and
layers that torch prunes in training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_timing import Call, Clock, filled, medians
from tables import Row
from torch import Tensor, nn
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


def measure(size: Size, device: torch.device) -> Iterator[Row]:
    """The forward pass by either of the libraries that torch can use, and by `to_sparse_semi_structured`'s choice."""
    model = nn.Linear(size.width, size.width, bias=False, device=device, dtype=torch.bfloat16)
    TopKast(model, 0.5, 0.4, targets=Targets(keep_first_dense=False, keep_last_dense=False), structure="2:4")
    alpha = model.weight.detach()
    groups = alpha.view(-1, 4).count_nonzero(dim=1)
    assert int(groups.max()) <= 2, "a group of four has more than two entries"
    x = torch.randn(size.rows, size.width, device=device, dtype=torch.bfloat16)
    for name in ("torch's choice", *BACKENDS):  # each library has its own limits
        row: Row = {"width": size.width, "rows": size.rows, "library": name}
        yield filled(row, figures(name, x, alpha, size.rounds), device)


def figures(name: str, x: Tensor, alpha: Tensor, rounds: int) -> Iterator[Row]:
    """What a library's row holds."""
    compress = torch.sparse.to_sparse_semi_structured if name not in BACKENDS else BACKENDS[name].from_dense
    compressed = compress(alpha)
    exact = x.float() @ alpha.float().t()
    error = relative_error(F.linear(x, compressed), exact)
    yield {"error": error, "dense error": relative_error(F.linear(x, alpha), exact)}
    assert error < 0.02, f"relative error {error:.3f}"
    calls: dict[str, Call] = {"dense": lambda: F.linear(x, alpha), "2:4": lambda: F.linear(x, compressed)}
    found = medians(calls, x.device, rounds)
    yield {"dense ms": found["dense"], "2:4 ms": found["2:4"], "speed": found["dense"] / found["2:4"]}
    clock = Clock(x.device)
    yield {"compressing ms": min(clock.wall(lambda: compress(alpha)) for _ in range(3))}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


class SemiLinear(nn.Linear):
    """A linear layer in training whose weight is pruned to 2:4 at each forward pass, its gradient dense.

    torch prunes 4 × 4 tiles so that the transposed weight is 2:4 too, and multiplies by both; of the autograd function
    between them, which `torchao.sparsity.training` has, torch has none: here it is `_SemiProduct`.
    """

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias.to(torch.bfloat16)
        rows = input.flatten(0, -2).to(torch.bfloat16)
        output: Tensor = _SemiProduct.apply(rows, self.weight.to(torch.bfloat16), bias)
        return output.view(*input.shape[:-1], -1)


class _SemiProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.pruned = SparseSemiStructuredTensorCUSPARSELT.prune_dense_static_sort(weight.detach())
        return torch.addmm(bias, rows, ctx.pruned.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (rows,) = ctx.saved_tensors
        grad = grad.contiguous()
        return grad @ ctx.pruned, grad.t() @ rows, grad.sum(0)


def make_semi(model: nn.Module) -> None:
    """Turn a model's linear layers into 2:4 ones, which hold the same parameters."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = SemiLinear


def check_semi(device: torch.device) -> None:
    """See that the gradient of the input is by the transpose of the weight that the output is by, and that this is 2:4.

    Raises:
        AssertionError: it is not.
        Exception: of any kind, where torch, its libraries or the device cannot do it.
    """
    torch.manual_seed(0)
    layer = SemiLinear(512, 256, device=device)
    nn.init.zeros_(layer.bias)
    x = torch.eye(512, device=device, dtype=torch.bfloat16).requires_grad_()
    output = layer(x)
    alpha = output.detach().float().t()
    dense = layer.weight.detach().to(torch.bfloat16).float()
    groups = alpha.reshape(-1, 4).count_nonzero(dim=1)
    assert int(groups.max()) <= 2, "a group of four has more than two entries"
    assert groups.float().mean() > 1.6, "too many entries are left out"  # two in most groups
    assert torch.equal(alpha, dense * (alpha != 0)), "entries have changed"
    grad = torch.randn(512, 256, device=device, dtype=torch.bfloat16)
    (found,) = torch.autograd.grad(output, x, grad)
    error = relative_error(found, grad.float() @ alpha)
    assert error < 0.02, f"the gradient of the input has a relative error of {error:.3f}"
