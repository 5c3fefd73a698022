"""Top-KAST on a GPU: are the block-sparse products right, and how fast is what users do with them?

    python benchmarks/gpu.py [--minutes 9] [--parts PART ...] [--quick] [--json FILE]

First the checks of the tests: on the GPU, or without one in Triton's interpreter, and then nothing is timed. Then, by
parts, each beside its dense counterpart, those with aims first:

    linear   a packed Linear's step with Adam as Python launches it: eager, compiled, and as a CUDA graph
    block    a transformer block's step with Adam, packed by blocks, likewise, and the bytes that it holds
    stack    a transformer of a billion parameters in training: tokens a second dense, packed and 2:4, and memory
    layer    a linear layer, its products and whole steps; beside them the products of torch's BSR and of stanford-stk
    conv     a convolution by blocks, its products and whole steps, beside cuDNN's
    masked   a ResNet-50's step in masked mode
    refresh  choosing the sets of large weights in masked mode
    offload  a transformer that does not fit dense: packed, and by FSDP2 with CPU offload
    semi     products of 2:4 weights by sparse tensor cores

All of it ends within --minutes: each part has a share of what is left, and what there is no time for is listed. The
file of --json is replaced after each row, so that it holds all that is known whenever the run ends.

Times are medians between events on the device, all work launched before it begins, so that they hold no launching;
"eager" ones and "from Python" hold it. What compiles, tunes or captures is done before. "of limit" is the speed over
that which the arithmetic allows: 1/D forward, 1/(D+M) for the values' gradient, 3/(2D + (D+M)) for a step.

Without a GPU, --quick runs the checks in Triton's interpreter and all parts in tiny sizes on CPU, whose times mean
nothing; --rehearse does the latter alone, also beside a GPU.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import gpu_block
import gpu_conv
import gpu_layer
import gpu_linear
import gpu_masked
import gpu_semi
import gpu_stack
import torch
from gpu_about import about, clocks
from gpu_parts import Part, Result, run_parts
from gpu_timing import device_name
from tables import Row, table

from lightning_topkast.files import atomic_file

ROOT = Path(__file__).parents[1]
CHECKS = ("fused_steps.py", "blocks.py", "block_convs.py")  # in tests/
QUICK_CHECKS = {
    "fused_steps.py": ("kernels_are_few",),
    "blocks.py": ("the_sets_may_be_empty_or_everything", "autocast_computes_in_its_type"),
}
CHECKS_SHARE = 0.25  # of the time, at most

# In the order in which they run: what has aims, and matters most, comes first.
PARTS = {
    "linear": Part(
        "A Linear's step with Adam in bfloat16, from Python",
        gpu_linear.SIZES,
        gpu_linear.measure,
        gpu_linear.aims,
        share=3,
    ),
    "block": Part(
        "A transformer block in bfloat16, with Adam", gpu_block.SIZES, gpu_block.measure, gpu_block.aims, share=3
    ),
    "stack": Part(
        "A transformer in training, bf16 autocast, with Adam",
        gpu_stack.SIZES,
        gpu_stack.measure,
        gpu_stack.aims,
        share=4,
    ),
    "layer": Part("A linear layer in bfloat16", gpu_layer.SIZES, gpu_layer.measure, gpu_layer.aims, share=2),
    "conv": Part("A convolution in bfloat16, channels_last", gpu_conv.SIZES, gpu_conv.measure, gpu_conv.aims, share=2),
    "masked": Part(
        "A masked step, SGD with momentum", gpu_masked.STEP_SIZES, gpu_masked.measure_steps, gpu_masked.step_aims
    ),
    "refresh": Part(
        "A masked refresh, with Adam's state to reset",
        gpu_masked.REFRESH_SIZES,
        gpu_masked.measure_refreshes,
        gpu_masked.refresh_aims,
    ),
    "offload": Part(
        "A transformer that does not fit dense", gpu_stack.OFFLOAD_SIZES, gpu_stack.measure_offload, share=2
    ),
    "semi": Part("2:4 weights in bfloat16, the forward pass", gpu_semi.SIZES, gpu_semi.measure, share=0.5),
}


def run_checks(device: str, quick: bool, seconds: float) -> list[Row]:
    """The checks of each file in a process of its own; one row a check, or one that says why there are none."""
    end, rows = monotonic() + seconds, []
    for file in QUICK_CHECKS if quick else CHECKS:
        rows += run_checks_of(file, device, QUICK_CHECKS[file] if quick else (), end - monotonic())
    return rows


def run_checks_of(file: str, device: str, only: Sequence[str], seconds: float) -> list[Row]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, ROOT / "tests" / file, str(torch.seed() % 2**31), "--device", device]
    command += ["--only", *only] if only else []
    everything = f"all of {file}"
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=max(seconds, 1), check=False
        )
    except subprocess.TimeoutExpired:
        return [{"check": everything, "result": f"not done in {seconds:.0f} s"}]
    if done.returncode:
        print(f"the checks of {file} could not run: {done.stderr}", file=sys.stderr)
        return [{"check": everything, "result": "failed"}]
    failures: dict[str, str] = json.loads(done.stdout)
    for text in filter(None, failures.values()):
        print(text, file=sys.stderr)
    return [
        {"check": name.replace("_", " "), "result": "failed" if text else "passed"} for name, text in failures.items()
    ]


def show(name: str, result: Result, device: torch.device) -> None:
    """Print a part's rows, and what became of the rest."""
    title = f"{PARTS[name].title}, on {device_name(device)}"
    if name in ("layer", "conv"):  # a step has columns of its own
        for kind, wanted in (("products", False), ("steps", True)):
            table(f"{title}: {kind}", [row for row in result.rows if (row["part"] == "step") == wanted])
    elif result.rows:
        table(title, result.rows)
    if result.failed:
        print(f"part {name} failed:\n{result.failed}", file=sys.stderr)
    if result.left_out:
        print(f"{name}, left out: {result.left_out}")
    print(f"{name}: {result.seconds:.0f} s\n", flush=True)


def main() -> None:
    start = monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="within which all of it ends (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--quick", action="store_true", help="two checks and small sizes: shows that it runs, no more")
    parser.add_argument("--rehearse", action="store_true", help="time tiny sizes by torch's operators on CPU instead")
    parser.add_argument("--no-checks", action="store_true", help="time only")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that the parts' process ends too
    end = start + 60 * arguments.minutes
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu and not arguments.rehearse else "cpu")
    has_triton = importlib.util.find_spec("triton") is not None
    rehearsed = arguments.rehearse or (arguments.quick and not has_gpu)
    timed = has_gpu or rehearsed
    if not has_gpu and not arguments.rehearse:
        if has_triton:
            print("There is no GPU: the checks run in Triton's interpreter, and nothing is timed.\n")
        else:
            print("There is no GPU, and triton is not installed: nothing is checked or timed.")
    elif has_gpu and not has_triton:
        sys.exit("triton is not installed, which a CUDA build of torch brings along: pip install triton")
    scale = "rehearsal" if rehearsed else "quick" if arguments.quick else "full"
    figures: dict[str, Any] = {
        "device": device_name(device) if timed else None,
        "about": about(device),
        "scale": scale if timed else None,
        "minutes": arguments.minutes,
        "checks": [],
        "parts": {},
        "aims": [],
    }

    def save() -> None:
        if arguments.json:
            write(figures, arguments.json)

    save()
    if has_triton and not arguments.rehearse and not arguments.no_checks:
        figures["checks"] = run_checks(device.type, arguments.quick, CHECKS_SHARE * 60 * arguments.minutes)
        table("Checks", figures["checks"])
        save()
    parts = {name: part for name, part in PARTS.items() if name in arguments.parts} if timed else {}
    for name, result in run_parts(parts, scale, device, end):
        figures["parts"][name] = asdict(result) | {"aims": parts[name].aims(result.rows)}
        figures["aims"] = [row for each in figures["parts"].values() for row in each["aims"]]
        if result.seconds is not None:
            figures["parts"][name]["clocks after"] = clocks(device)
            show(name, result, device)
        save()
    if figures["aims"]:
        table("Aims", figures["aims"])
    left_out = {name: part["left_out"] for name, part in figures["parts"].items() if part["left_out"]}
    for name, text in left_out.items():
        print(f"Left out of {name}: {text}")
    print(f"{monotonic() - start:.0f} s in all")
    failed = [name for name, part in figures["parts"].items() if part["failed"]]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    if any(row["result"] == "failed" for row in figures["checks"]):
        sys.exit("some checks failed")


def write(figures: dict[str, Any], path: Path) -> None:
    """Replace the file; whoever reads it, or ends this process, finds the old one or the new one."""
    with atomic_file(path, "file of figures") as partial:
        partial.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
