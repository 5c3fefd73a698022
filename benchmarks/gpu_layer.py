"""A block-sparse linear layer in bfloat16 beside the dense one, and beside the products that torch and `stk` have."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from gpu_timing import PAIRS, Call, aim, in_a_line, medians, pair_name, peak_memory
from tables import Row
from torch import Tensor
from torch.nn import functional as F

from lightning_topkast.ops import BlockPattern, block_sparse_linear, choose_block_kernels
from lightning_topkast.ops.blocks import library

AIMS = {(0.9, 0.8): 4, (0.95, 0.9): 7, (0.98, 0.95): 12}  # times dense, a step at width 8192 and block 64 or 128
AIM_WIDTH, AIM_BLOCKS = 8192, (64, 128)


@dataclass(frozen=True)
class Size:
    """What is timed, and how often."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    rows: int
    rounds: int


SIZES = {
    "full": Size((4096, 8192), (32, 64, 128), 8192, 9),
    "quick": Size((1024,), (64,), 1024, 3),
    "rehearsal": Size((128,), (16, 32), 48, 2),
}


def sets(width: int, block: int, pair: tuple[float, float]) -> Tensor:
    """Random tiers of the grid, with exact counts."""
    side = width // block
    active, updated = (round((1 - sparsity) * side * side) for sparsity in pair)
    order = torch.randperm(side * side, generator=torch.Generator().manual_seed(width + block))
    tiers = torch.zeros(side * side, dtype=torch.uint8)
    tiers[order[:updated]] = 1
    tiers[order[:active]] = 2
    return tiers.view(side, side)


class Dense:
    """The dense layer of a width."""

    def __init__(self, width: int, rows: int, device: torch.device) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16)

        self.input, self.grad = random(rows, width).requires_grad_(), random(rows, width)
        self.weight, self.bias = random(width, width).div_(width**0.5).requires_grad_(), random(width).requires_grad_()

    def parts(self) -> dict[str, Call]:
        """What is timed."""
        input, weight, bias = self.input.detach(), self.weight.detach(), self.bias.detach()
        return {
            "forward": lambda: F.linear(input, weight, bias),
            "dx": lambda: self.grad @ weight,
            "dW": lambda: self.grad.t() @ input,
            "step": self.step,
        }

    def step(self) -> tuple[Tensor, ...]:
        """The forward pass and all gradients."""
        leaves = (self.input, self.weight, self.bias)
        output = F.linear(*leaves)
        return (output, *torch.autograd.grad(output, leaves, self.grad))


class Sparse:
    """The same layer with some of its blocks."""

    def __init__(self, dense: Dense, tiers: Tensor, block: int, kernels: str) -> None:
        self.dense, self.kernels = dense, kernels
        active, exploring = (torch.nonzero(tiers.reshape(-1) == tier).squeeze(1) for tier in (2, 1))
        self.pattern = BlockPattern.from_flat(active, exploring, tuple(tiers.shape), (block, block)).to(
            dense.input.device
        )
        values = dense.weight.detach().view(-1)[self.pattern.flat_indices()]
        self.values = values.view(-1, block, block).requires_grad_()

    def parts(self) -> dict[str, Call]:
        """What is timed."""
        dense, pattern, kernels = self.dense, self.pattern, self.kernels
        input, values, bias = dense.input.detach(), self.values.detach(), dense.bias.detach()
        return {
            "forward": lambda: block_sparse_linear(input, values, bias, pattern, kernels),
            "dx": lambda: library.block_product(dense.grad, values, None, *pattern.active_by_column, True, kernels),
            "dW": lambda: library.block_sampled(dense.grad, input, *pattern.updated_by_row, values.shape, kernels),
            "step": self.step,
        }

    def step(self) -> tuple[Tensor, ...]:
        """The forward pass and all gradients."""
        leaves = (self.dense.input, self.values, self.dense.bias)
        output = block_sparse_linear(*leaves, self.pattern, self.kernels)
        return (output, *torch.autograd.grad(output, leaves, self.dense.grad))

    def error(self) -> float:
        """The largest relative error of output and gradients, by norm, against dense float32 products.

        It also sees that a second step gives the same bits.
        """
        found, again = self.step(), self.step()
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True)), "two steps differ"
        places = self.pattern.flat_indices()
        active = self.pattern.active_count * self.values[0].numel()
        weight = torch.zeros_like(self.dense.weight, dtype=torch.float32)
        weight.view(-1)[places[:active]] = self.values.detach().view(-1)[:active].float()
        input, grad = self.dense.input.detach().float(), self.dense.grad.float()
        expected = [F.linear(input, weight, self.dense.bias.detach().float()), grad @ weight]
        expected += [(grad.t() @ input).view(-1)[places].view_as(self.values), grad.sum(0)]
        pairs = zip(found, expected, strict=True)
        return max(((mine.float() - theirs).norm() / theirs.norm()).item() for mine, theirs in pairs)


class TorchBSR:
    """The products by torch's own Triton kernels for BSR matrices."""

    def __init__(self, sparse: Sparse) -> None:
        from torch.sparse import _triton_ops

        self.ops, self.dense = _triton_ops, sparse.dense
        values, size = sparse.values.detach(), sparse.pattern.shape
        rows, columns, updated = (
            sparse.pattern.active_by_row,
            sparse.pattern.active_by_column,
            sparse.pattern.updated_by_row,
        )

        def matrix(lines: object, blocks: Tensor) -> Tensor:
            return torch.sparse_bsr_tensor(lines.starts, lines.others, blocks.contiguous(), size=size)  # type: ignore[attr-defined]

        self.weight = matrix(rows, values[rows.blocks.long()])
        self.transposed = matrix(columns, values[columns.blocks.long()].transpose(1, 2))
        self.updated = matrix(updated, values[updated.blocks.long()])

    def parts(self) -> dict[str, Call]:
        """What is timed; the bias is left out."""
        input, grad = self.dense.input.detach(), self.dense.grad
        return {
            "forward": lambda: self.ops.bsr_dense_mm(self.weight, input.t()).t(),
            "dx": lambda: self.ops.bsr_dense_mm(self.transposed, grad.t()).t(),
            "dW": lambda: self.ops.sampled_addmm(self.updated, grad.t(), input, beta=0.0),
        }


class STK:
    """The products by the package `stanford-stk`, whose kernels know blocks of 128 only."""

    def __init__(self, sparse: Sparse) -> None:
        import stk

        self.ops, self.dense = stk.ops, sparse.dense
        pattern, values = sparse.pattern, sparse.values.detach()

        def matrix(lines: object) -> object:
            blocks = lines.blocks.long()  # type: ignore[attr-defined]
            across, starts = lines.others.short(), lines.starts  # type: ignore[attr-defined]
            return stk.Matrix(pattern.shape, values[blocks], pattern.rows[blocks].short(), across, starts)

        self.weight, self.updated = matrix(pattern.active_by_row), matrix(pattern.updated_by_row)

    def parts(self) -> dict[str, Call]:
        """What is timed; the bias is left out."""
        input, grad = self.dense.input.detach(), self.dense.grad
        return {
            "forward": lambda: self.ops.dds(input, self.weight.t()),  # type: ignore[attr-defined]
            "dx": lambda: self.ops.dds(grad, self.weight),
            "dW": lambda: self.ops.sdd(grad.t(), input, self.updated),
        }


def rivals(sparse: Sparse, block: int, device: torch.device) -> dict[str, dict[str, Call]]:
    """What else computes these products on this device, and computes them right."""
    if device.type != "cuda":
        return {}
    kinds = {"BSR": TorchBSR} | ({"stk": STK} if block == 128 and find_spec("stk") is not None else {})
    found: dict[str, dict[str, Call]] = {}
    for name, kind in kinds.items():
        try:
            parts = kind(sparse).parts()
            check_rival(parts, sparse)
            found[name] = parts
        except Exception as error:  # a rival may fail in any way
            print(f"{name}, block {block}, failed: {in_a_line(error)}", file=sys.stderr)
    return found


def check_rival(parts: dict[str, Call], sparse: Sparse) -> None:
    """See that a rival's products by A, of which none adds the bias, are ours."""
    mine, bias = sparse.parts(), sparse.dense.bias.detach()
    for part in ("forward", "dx"):
        expected, found = mine[part](), parts[part]()
        difference = (found + bias if part == "forward" else found) - expected  # type: ignore[operator]
        error = (difference.float().norm() / expected.float().norm()).item()  # type: ignore[attr-defined]
        assert error < 0.02, f"{part} has a relative error of {error:.3f}"


def measure(size: Size, device: torch.device) -> Iterator[Row]:
    """One row for each width, block, pair of sparsities and part of a step."""
    name = "triton" if device.type == "cuda" else "torch"
    for width in size.widths:
        dense = Dense(width, size.rows, device)
        dense_peak = peak_memory(dense.step, device)
        for block in size.blocks:
            kernels = choose_block_kernels(name, device, (block, block), torch.bfloat16)  # type: ignore[arg-type]
            for pair in PAIRS:
                sparse = Sparse(dense, sets(width, block, pair), block, kernels)
                error = sparse.error()
                assert error < 0.02, f"width {width}, block {block}, {pair}: relative error {error:.3f}"
                variants = {"dense": dense.parts(), "sparse": sparse.parts()} | rivals(sparse, block, device)
                forward, backward = (1 - sparsity for sparsity in pair)
                limits = {"forward": 1 / forward, "dx": 1 / forward, "dW": 1 / backward}
                limits["step"] = 3 / (2 * forward + backward)
                for part, limit in limits.items():
                    calls = {name: parts[part] for name, parts in variants.items() if part in parts}
                    found = medians(calls, device, size.rounds)
                    speed = found["dense"] / found["sparse"]
                    flops = 2e-9 * (3 if part == "step" else 1) * size.rows * width**2
                    row = {"width": width, "block": block, "sparsity": pair_name(pair), "part": part}
                    row |= {"dense ms": found["dense"], "sparse ms": found["sparse"]}
                    row |= {f"{name} ms": found[name] for name in variants if name in found}
                    row |= {"speed": speed, "of limit": speed / limit}
                    row |= {
                        "dense TFLOP/s": flops / found["dense"],
                        "sparse TFLOP/s": flops / limit / found["sparse"],
                    }
                    if part == "step":
                        eager = medians(calls, device, size.rounds, queued=False)
                        row |= {"eager dense ms": eager["dense"], "eager sparse ms": eager["sparse"]}
                        row |= {"eager speed": eager["dense"] / eager["sparse"], "error": error}
                        row |= {"dense peak MB": dense_peak, "sparse peak MB": peak_memory(sparse.step, device)}
                    yield row


def aims(rows: list[Row]) -> list[Row]:
    """Each aim with the better of its blocks."""
    found: list[Row] = []
    for pair, speed in AIMS.items():
        wanted = (AIM_WIDTH, pair_name(pair), "step")
        speeds = [
            row["speed"]
            for row in rows
            if (row["width"], row["sparsity"], row["part"]) == wanted and row["block"] in AIM_BLOCKS
        ]
        text = f"{pair_name(pair)}: a step of the layer, width {AIM_WIDTH}, ≥ {speed} × dense"
        found.append(aim(text, max(speeds, default=None), speed, at_least=True))
    return found
