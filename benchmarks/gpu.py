"""The block-sparse linear layer on a GPU: is it right, and how fast is it beside the dense layer?

    python benchmarks/gpu.py [--quick] [--json FILE]

First the checks of the tests: on the GPU, or without one in Triton's interpreter, and then nothing is timed. Then
forward pass, both gradients and whole steps of a layer in bfloat16, dense and block-sparse in turn on the same inputs;
beside them the BSR products that torch brings along. Times are medians between device events with the work queued
ahead, so that they hold no launching; "eager ms" is a whole step with it. "of limit" is the speed over that which the
arithmetic allows: 1/D forward, 1/(D+M) for the values' gradient, 3/(2D + (D+M)) for a step.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from tables import Row, table
from torch import Tensor
from torch.nn import functional as F

from lightning_topkast.ops import BlockPattern, block_sparse_linear, choose_block_operators
from lightning_topkast.ops.blocks import library

ROOT = Path(__file__).parents[1]
PAIRS = ((0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95))
AIMS = {(0.9, 0.8): 4, (0.95, 0.9): 7, (0.98, 0.95): 12}  # times dense, a step at width 8192 and block 64 or 128
AIM_WIDTH, AIM_BLOCKS = 8192, (64, 128)
QUEUED_AHEAD = 2_000_000  # cycles that the device sleeps while work is queued, some 1 ms


@dataclass(frozen=True)
class Size:
    """What is timed, and how often."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    rows: int
    rounds: int


FULL = Size((4096, 8192), (32, 64, 128), 8192, 15)
QUICK = Size((1024,), (64,), 1024, 3)
QUICK_CHECKS = ("the_sets_may_be_empty_or_everything", "autocast_computes_in_its_type")
REHEARSAL = Size((128,), (16, 32), 48, 2)


def run_checks(device: str, quick: bool) -> list[Row]:
    """The checks of tests/blocks.py in a process of their own; one row a check."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, ROOT / "tests" / "blocks.py", str(torch.seed() % 2**31), "--device", device]
    command += ["--only", *QUICK_CHECKS] if quick else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        sys.exit(f"the checks could not run: {done.stderr}")
    failures: dict[str, str] = json.loads(done.stdout)
    for text in filter(None, failures.values()):
        print(text, file=sys.stderr)
    return [
        {"check": name.replace("_", " "), "result": "failed" if text else "passed"} for name, text in failures.items()
    ]


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

    def parts(self) -> dict[str, Callable[[], object]]:
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

    def __init__(self, dense: Dense, tiers: Tensor, block: int, operators: str) -> None:
        self.dense, self.operators = dense, operators
        self.pattern = BlockPattern.from_tiers(tiers.to(dense.input.device), (block, block))
        values = dense.weight.detach().view(-1)[self.pattern.flat_indices()]
        self.values = values.view(-1, block, block).requires_grad_()

    def parts(self) -> dict[str, Callable[[], object]]:
        """What is timed."""
        dense, pattern, operators = self.dense, self.pattern, self.operators
        input, values, bias = dense.input.detach(), self.values.detach(), dense.bias.detach()
        return {
            "forward": lambda: block_sparse_linear(input, values, bias, pattern, operators),
            "dx": lambda: library.block_product(dense.grad, values, None, *pattern.active_by_column, True, operators),
            "dW": lambda: library.block_sampled(dense.grad, input, *pattern.updated_by_row, values.shape, operators),
            "step": self.step,
        }

    def step(self) -> tuple[Tensor, ...]:
        """The forward pass and all gradients."""
        leaves = (self.dense.input, self.values, self.dense.bias)
        output = block_sparse_linear(*leaves, self.pattern, self.operators)
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

    def parts(self) -> dict[str, Callable[[], object]]:
        """What is timed; the bias is left out."""
        input, grad = self.dense.input.detach(), self.dense.grad
        return {
            "forward": lambda: self.ops.bsr_dense_mm(self.weight, input.t()),
            "dx": lambda: self.ops.bsr_dense_mm(self.transposed, grad.t()),
            "dW": lambda: self.ops.sampled_addmm(self.updated, grad.t(), input, beta=0.0),
        }


class Clock:
    """Milliseconds of a call: on a GPU between events on the device, else by the wall."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Callable[[], object], queued: bool = True) -> float:
        """`queued`: the device is kept busy until all is launched."""
        if self.device.type != "cuda":
            start = perf_counter()
            call()
            return (perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if queued:
            torch.cuda._sleep(QUEUED_AHEAD)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))


def medians(calls: dict[str, Callable[[], object]], clock: Clock, rounds: int, queued: bool = True) -> dict[str, float]:
    """Each call in turn; a call that fails is left out."""
    usable: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        try:
            for _ in range(2):  # the first one compiles and tunes
                call()
            usable[name] = call
        except Exception as error:  # a rival may fail in any way
            print(f"{name} failed: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in usable}
    for _ in range(rounds):
        for name, call in usable.items():
            times[name].append(clock(call, queued))
    return {name: median(several) for name, several in times.items()}


def peak_memory(step: Callable[[], object], device: torch.device) -> float | None:
    """MB that a step needs on the device beyond what lay there before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(size: Size, device: torch.device, operators: str) -> Iterator[Row]:
    """One row for each width, block, pair of sparsities and part of a step."""
    clock = Clock(device)
    for width in size.widths:
        dense = Dense(width, size.rows, device)
        dense_peak = peak_memory(dense.step, device)
        for block in size.blocks:
            for pair in PAIRS:
                sparse = Sparse(dense, sets(width, block, pair), block, operators)
                error = sparse.error()
                assert error < 0.02, f"width {width}, block {block}, {pair}: relative error {error:.3f}"
                variants = {"dense": dense.parts(), "sparse": sparse.parts()}
                if device.type == "cuda":
                    variants["BSR"] = TorchBSR(sparse).parts()
                forward, backward = (1 - sparsity for sparsity in pair)
                limits = {"forward": 1 / forward, "dx": 1 / forward, "dW": 1 / backward}
                limits["step"] = 3 / (2 * forward + backward)
                eager = medians({"dense": dense.step, "sparse": sparse.step}, clock, size.rounds, queued=False)
                for part, limit in limits.items():
                    calls = {name: parts[part] for name, parts in variants.items() if part in parts}
                    found = medians(calls, clock, size.rounds)
                    products = 3 if part == "step" else 1
                    speed = found["dense"] / found["sparse"]
                    yield {
                        "width": width,
                        "block": block,
                        "sparsity": f"{pair[0]:.0%} / {pair[1]:.0%}",
                        "part": part,
                        "dense ms": found["dense"],
                        "sparse ms": found["sparse"],
                        "BSR ms": found.get("BSR"),
                        "speed": speed,
                        "of limit": speed / limit,
                        "dense TFLOP/s": 2e-9 * products * size.rows * width**2 / found["dense"],
                        "sparse TFLOP/s": 2e-9 * products * size.rows * width**2 / limit / found["sparse"],
                        "eager ms": eager["sparse"] if part == "step" else None,
                        "eager speed": eager["dense"] / eager["sparse"] if part == "step" else None,
                        "error": error if part == "step" else None,
                        "peak MB": peak_memory(sparse.step, device) if part == "step" else None,
                        "dense peak MB": dense_peak if part == "step" else None,
                    }


def aims(rows: list[Row]) -> list[Row]:
    """Each aim with the better of its blocks."""
    found: list[Row] = []
    for pair, aim in AIMS.items():
        name = f"{pair[0]:.0%} / {pair[1]:.0%}"
        speeds = [
            row["speed"]
            for row in rows
            if (row["width"], row["sparsity"], row["part"]) == (AIM_WIDTH, name, "step") and row["block"] in AIM_BLOCKS
        ]
        if speeds:
            met = "met" if max(speeds) >= aim else "not met"
            found.append({"aim": f"{name}: a step ≥ {aim} × dense", "measured": max(speeds), "met": met})
    return found


def name_of(device: torch.device) -> str:
    """What was timed, for a table's title."""
    if device.type != "cuda":
        return "a rehearsal on CPU, whose times mean nothing"
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two checks and one small layer: shows that it runs, no more"
    )
    parser.add_argument("--rehearse", action="store_true", help="time tiny layers by torch's operators on CPU instead")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu and not arguments.rehearse else "cpu")
    checks: list[Row] = []
    has_triton = importlib.util.find_spec("triton") is not None
    if not has_gpu and not arguments.rehearse:
        if has_triton:
            print("There is no GPU: the checks run in Triton's interpreter, and nothing is timed.\n")
        else:
            print("There is no GPU, and triton is not installed: nothing is checked or timed.")
    elif has_gpu and not has_triton:
        sys.exit("triton is not installed, which a CUDA build of torch brings along: pip install triton")
    if has_triton and not arguments.rehearse:
        checks = run_checks(device.type, arguments.quick)
        table("Checks", checks)
    rows: list[Row] = []
    reached: list[Row] = []
    if has_gpu or arguments.rehearse:
        size = REHEARSAL if arguments.rehearse else QUICK if arguments.quick else FULL
        name = "torch" if arguments.rehearse else "triton"
        operators = choose_block_operators(name, device, (size.blocks[0],) * 2, torch.bfloat16)  # type: ignore[arg-type]
        start = perf_counter()
        rows = list(measure(size, device, operators))
        table(f"A linear layer in bfloat16, {size.rows} rows, on {name_of(device)}", rows)
        reached = aims(rows)
        if reached:
            table("Aims", reached)
        print(f"timed in {perf_counter() - start:.0f} s")
    if arguments.json:
        figures = {"device": name_of(device) if rows else None, "checks": checks, "rows": rows, "aims": reached}
        arguments.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    if any(row["result"] == "failed" for row in checks):
        sys.exit("some checks failed")


if __name__ == "__main__":
    main()
