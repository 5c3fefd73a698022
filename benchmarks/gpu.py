"""Top-KAST on a GPU: are the block-sparse products right, and how fast are they, blocks, masked steps and 2:4 weights?

    python benchmarks/gpu.py [--parts PART ...] [--quick] [--json FILE]

First the checks of the tests: on the GPU, or without one in Triton's interpreter, and then nothing is timed. Then, by
parts, each beside its dense counterpart in turn:

    layer    a linear layer, its products and whole steps; beside them the products of torch's BSR and of stanford-stk
    block    a transformer block's step with Adam, packed by blocks, and the bytes that it holds
    masked   a ResNet-50's step in masked mode
    refresh  choosing the sets of large weights in masked mode
    semi     products of 2:4 weights by sparse tensor cores

Times are medians between events on the device, all work launched before it begins, so that they hold no launching;
"eager" ones hold it. "of limit" is the speed over that which the arithmetic allows: 1/D forward, 1/(D+M) for the
values' gradient, 3/(2D + (D+M)) for a step.
"""

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import gpu_block
import gpu_layer
import gpu_masked
import gpu_semi
import torch
from gpu_timing import device_name
from tables import Row, table

ROOT = Path(__file__).parents[1]
QUICK_CHECKS = ("the_sets_may_be_empty_or_everything", "autocast_computes_in_its_type")


@dataclass(frozen=True)
class Part:
    """Something that can be timed by itself."""

    title: str
    sizes: dict[str, Any]
    measure: Callable[[Any, torch.device], Iterator[Row]]
    aims: Callable[[list[Row]], list[Row]] = lambda rows: []


PARTS = {
    "layer": Part("A linear layer in bfloat16", gpu_layer.SIZES, gpu_layer.measure, gpu_layer.aims),
    "block": Part("A transformer block in bfloat16, with Adam", gpu_block.SIZES, gpu_block.measure, gpu_block.aims),
    "masked": Part(
        "A masked step, SGD with momentum", gpu_masked.STEP_SIZES, gpu_masked.measure_steps, gpu_masked.step_aims
    ),
    "refresh": Part(
        "A masked refresh, with Adam's state to reset",
        gpu_masked.REFRESH_SIZES,
        gpu_masked.measure_refreshes,
        gpu_masked.refresh_aims,
    ),
    "semi": Part("2:4 weights in bfloat16, the forward pass", gpu_semi.SIZES, gpu_semi.measure),
}


def run_checks(device: str, quick: bool) -> list[Row]:
    """The checks of tests/blocks.py in a process of their own; one row a check."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, ROOT / "tests" / "blocks.py", str(torch.seed() % 2**31), "--device", device]
    command += ["--only", *QUICK_CHECKS] if quick else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        sys.exit(f"the checks could not run: {done.stderr}")
    failures: dict[str, str] = json.loads(done.stdout)
    for text in filter(None, failures.values()):
        print(text, file=sys.stderr)
    return [
        {"check": name.replace("_", " "), "result": "failed" if text else "passed"} for name, text in failures.items()
    ]


def run_part(name: str, scale: str, device: torch.device) -> dict[str, Any]:
    """Time a part and print it; one that fails gives the rows it had made until then."""
    part, start = PARTS[name], perf_counter()
    rows: list[Row] = []
    failed = None
    try:
        for row in part.measure(part.sizes[scale], device):
            rows.append(row)
    except Exception:  # the other parts are still worth their time
        failed = traceback.format_exc()
        print(f"part {name} failed:\n{failed}", file=sys.stderr)
    seconds = perf_counter() - start
    title = f"{part.title}, on {device_name(device)}"
    if name == "layer":  # a step has columns of its own
        for kind, wanted in (("products", False), ("steps", True)):
            table(f"{title}: {kind}", [row for row in rows if (row["part"] == "step") == wanted])
    elif rows:
        table(title, rows)
    print(f"{name}: {seconds:.0f} s\n", flush=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"rows": rows, "aims": part.aims(rows), "failed": failed, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--quick", action="store_true", help="two checks and small sizes: shows that it runs, no more")
    parser.add_argument("--rehearse", action="store_true", help="time tiny sizes by torch's operators on CPU instead")
    parser.add_argument("--no-checks", action="store_true", help="time only")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu and not arguments.rehearse else "cpu")
    has_triton = importlib.util.find_spec("triton") is not None
    timed = has_gpu or arguments.rehearse
    if not timed:
        if has_triton:
            print("There is no GPU: the checks run in Triton's interpreter, and nothing is timed.\n")
        else:
            print("There is no GPU, and triton is not installed: nothing is checked or timed.")
    elif has_gpu and not has_triton:
        sys.exit("triton is not installed, which a CUDA build of torch brings along: pip install triton")
    checks: list[Row] = []
    if has_triton and not arguments.rehearse and not arguments.no_checks:
        checks = run_checks(device.type, arguments.quick)
        table("Checks", checks)
    figures: dict[str, Any] = {"device": device_name(device) if timed else None, "checks": checks, "parts": {}}
    scale = "rehearsal" if arguments.rehearse else "quick" if arguments.quick else "full"
    for name in arguments.parts if timed else []:
        figures["parts"][name] = run_part(name, scale, device)
        if arguments.json:  # what was measured outlives a crash
            write(figures, arguments.json)
    aims = [row for part in figures["parts"].values() for row in part["aims"]]
    if aims:
        table("Aims", aims)
    if arguments.json:
        write(figures, arguments.json)
    failed = [name for name, part in figures["parts"].items() if part["failed"]]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    if any(row["result"] == "failed" for row in checks):
        sys.exit("some checks failed")


def write(figures: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
