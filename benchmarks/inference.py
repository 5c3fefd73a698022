"""Inference on a CPU: a dense layer, the same one compressed, and files of both.

    OMP_NUM_THREADS=1 python benchmarks/inference.py [--width WIDTH] [--batches B B ...] [--quick] [--json FILE]

One linear layer with a bias, of which the largest entries are left. The ways of computing it take turns, so that what
else the machine does meets them all; a ratio is the median of those within a turn, dense time to the way's own.

- csr: `to_csr`, with the compiled operators where there is a compiler, and with torch's own
- torch's csr: `torch.sparse.mm` of what `topkast-export --format csr` writes
- packed: the layer as it is trained under `storage="packed"`, with gradients switched off
- onnx, onnx-sparse: onnxruntime on the exported files
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tables import Row, table
from torch import Tensor, nn

from lightning_topkast import Targets, TopKast, to_csr
from lightning_topkast.export import OnnxModel, load_csr, save_csr, save_dense, save_onnx, save_sparse
from lightning_topkast.ops import MATRIX_KERNELS

SPARSITIES = (0.80, 0.90, 0.95, 0.98)
BATCHES = (1, 8, 128)

Forward = Callable[[Tensor], Tensor]


def sparse_layer(width: int, sparsity: float) -> nn.Sequential:
    """A model of one linear layer, with the largest entries of a random weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width)).eval()
    weight = model[0].weight.data
    kept = weight.abs().view(-1).topk(round((1 - sparsity) * weight.numel())).indices
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask.view(-1)[kept] = True
    weight.mul_(mask).add_(0.0)  # without -0.0
    return model


def files(model: nn.Module, width: int, folder: Path) -> dict[str, int]:
    """Write every format; return their bytes."""
    save_dense(model, folder / "dense")
    save_csr(model, folder / "csr")
    save_sparse(model, folder / "safetensors")
    save_onnx(model, torch.randn(2, width), folder / "onnx")
    save_onnx(model, torch.randn(2, width), folder / "onnx-sparse", sparse=True)
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def ways(width: int, sparsity: float, folder: Path) -> dict[str, Forward]:
    """Every way to compute the layer."""
    threads = torch.get_num_threads()
    state = load_csr(folder / "csr")
    matrix, bias = state["0.weight"], state["0.bias"].unsqueeze(1)
    packed = sparse_layer(width, sparsity)
    TopKast(
        packed, sparsity, sparsity, targets=Targets(keep_first_dense=False, keep_last_dense=False), storage="packed"
    ).attach(torch.optim.SGD(packed.parameters(), 0.1))
    found: dict[str, Forward] = {
        "dense": sparse_layer(width, sparsity),
        "dense again": sparse_layer(width, sparsity),
        "csr, torch": to_csr(sparse_layer(width, sparsity), kernels="torch"),
        "torch's csr": lambda input: torch.addmm(bias, matrix, input.t()).t(),
        "packed": packed.eval(),
        "onnx": OnnxModel(folder / "onnx", threads),
        "onnx-sparse": OnnxModel(folder / "onnx-sparse", threads),
    }
    if MATRIX_KERNELS.choose("auto", torch.device("cpu")) == "compiled":
        found["csr, compiled"] = to_csr(sparse_layer(width, sparsity), kernels="compiled")
    return found


@torch.no_grad()
def compare(found: dict[str, Forward], input: Tensor, turns: int, at_least: float) -> list[Row]:
    """Time every way in turn; each must compute what dense does."""
    expected = found["dense"](input)
    for name, forward in found.items():
        torch.testing.assert_close(forward(input), expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    calls = {name: _calls(forward, input, at_least) for name, forward in found.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(turns):
        for name, forward in found.items():
            start = perf_counter()
            for _ in range(calls[name]):
                forward(input)
            times[name].append((perf_counter() - start) / calls[name])
    return [
        {
            "way": name,
            "ms": 1e3 * median(took),
            "times dense": median(d / t for d, t in zip(times["dense"], took, strict=True)),
        }
        for name, took in times.items()
    ]


def _calls(forward: Forward, input: Tensor, at_least: float) -> int:
    """How many calls take `at_least` seconds."""
    forward(input)
    start = perf_counter()
    forward(input)
    return max(1, round(at_least / max(perf_counter() - start, 1e-7)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--quick", action="store_true", help="a few turns of a small layer: to try it out")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    width, turns, at_least = (64, 2, 0.0) if given.quick else (given.width, 15, 0.02)
    sparsities = SPARSITIES[::3] if given.quick else SPARSITIES

    figures: dict[str, list[dict[str, Any]]] = {"speeds": [], "files": []}
    for sparsity in sparsities:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            dense = 4 * (width**2 + width)
            sizes = {kind: size / dense for kind, size in files(sparse_layer(width, sparsity), width, folder).items()}
            figures["files"].append({"sparsity": f"{sparsity:.0%}", **sizes})
            found = ways(width, sparsity, folder)
            for batch in given.batches:
                for row in compare(found, torch.randn(batch, width), turns, at_least):
                    figures["speeds"].append({"sparsity": f"{sparsity:.0%}", "batch": batch, **row})
    for batch in given.batches:
        rows: dict[str, Row] = {}
        for row in figures["speeds"]:
            if row["batch"] == batch:
                rows.setdefault(row["way"], {"way": row["way"]})[row["sparsity"]] = row["times dense"]
        dense_ms = median(row["ms"] for row in figures["speeds"] if (row["way"], row["batch"]) == ("dense", batch))
        table(f"Batch {batch}: times as fast as dense, {dense_ms:.3g} ms", list(rows.values()))
    table("Bytes of a file, to those of the dense weights", figures["files"])
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
