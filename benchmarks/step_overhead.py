"""What a training step costs with Top-KAST in masked mode, beside the dense step and two rivals.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py [--quick] [--json FILE] [--only NAME]

All variants of a network live in one process and take their steps in turn, so that whatever else the machine does
falls on all of them. Times are CPU seconds of this process (its one thread: wall time on an idle machine); ratios are
medians over rounds of (variant / dense) within a round.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from tables import Row, table
from torch import Tensor, nn
from variants import BACKWARD, EVERY, FORWARD, VARIANTS, Dense, Masked
from workloads import Workload, adamw, workloads

from lightning_topkast import Targets, TopKast, storage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks and few steps: shows that it runs, no more")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--only", help="one network: " + ", ".join(w.name for w in workloads(True)))
    parser.add_argument("--peak-of", nargs=2, metavar=("NETWORK", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick = arguments.quick
    chosen = {workload.name: workload for workload in workloads(quick)}
    if arguments.peak_of:
        name, variant = arguments.peak_of
        print(peak_of(chosen[name], VARIANTS[variant]))
        return
    if arguments.only and arguments.only not in chosen:
        parser.error(f"--only={arguments.only}: the networks are {', '.join(chosen)}")

    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread"
    print(f"{machine}; forward sparsity {FORWARD}, backward sparsity {BACKWARD}, refresh every {EVERY} steps\n")
    results: dict[str, Any] = {"machine": machine, "quick": quick, "steps": [], "states": []}
    for workload in chosen.values():
        if arguments.only in (None, workload.name):
            steps, states = compare(workload, quick)
            results["steps"] += steps
            results["states"] += states
            table(f"{workload.name}: a step", steps)
            table(f"{workload.name}: refresh and memory", states)
    results["refresh"] = large_refreshes(side=256 if quick else 4096, rounds=2 if quick else 9)
    table("Refresh of large weights", results["refresh"])
    results["masks"] = mask_kinds(size=10_000 if quick else 3_200_000, rounds=3 if quick else 60)
    table("The mask's type: gradient ⊙ B in place", results["masks"])
    results["aims"] = aims(results)
    table("Aims", results["aims"])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


# --- steps ------------------------------------------------------------------------------------------------------------


def compare(workload: Workload, quick: bool) -> tuple[list[Row], list[Row]]:
    """Time every variant on one network, early and late in training; then its refresh and memory."""
    running: dict[str, Dense] = {}
    failed: dict[str, str] = {}
    warm_up = workload.batch(workload.sizes[0])
    for name, variant in VARIANTS.items():
        try:
            running[name] = variant(workload)
            for _ in range(5):
                running[name].step(warm_up)
        except Exception as error:  # a rival may fail in any way, and the table says how
            running.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    early = {size: timings(running, workload, size) for size in workload.sizes}
    steps, size = workload.ageing
    batches = [workload.batch(size) for _ in range(8)]
    for variant in running.values():
        for step in range(steps):
            variant.step(batches[step % len(batches)])
    late = {size: timings(running, workload, size) for size in workload.sizes}

    rows = []
    for size in workload.sizes:
        for name in VARIANTS:
            row: Row = {"network": workload.name, "batch": size, "variant": name}
            if name in failed:
                row["failed"] = failed[name]
            else:
                then, now = early[size][name], late[size][name]
                row |= {
                    "early ms": then["ms"],
                    "early ratio": then["ratio"],
                    "late ms": now["ms"],
                    "late ratio": now["ratio"],
                }
                row |= {"optimizer %": now["optimizer %"], "own ms": now["own ms"], "own %": now["own %"]}
            rows.append(row)
    dense_ms = late[workload.sizes[-1]]["dense"]["ms"]
    return rows, [
        state_of(workload, name, running.get(name), dense_ms, quick) for name in VARIANTS if name != "dense again"
    ]


def timings(running: dict[str, Dense], workload: Workload, size: int) -> dict[str, Row]:
    """Let the variants take one step after the other on the same batch, for some rounds, and sum each of them up."""
    totals: dict[str, list[float]] = {name: [] for name in running}
    updates: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for turn in range(workload.rounds):
        batch = workload.batch(size)
        first = turn % len(names)  # nobody always follows the same neighbour into its cache
        for name in names[first:] + names[:first]:
            total, update = running[name].step(batch)
            totals[name].append(total)
            updates[name].append(update)
    dense = median(totals["dense"])
    rows: dict[str, Row] = {}
    for name in names:
        ratio = median(mine / plain for mine, plain in zip(totals[name], totals["dense"], strict=True))
        share = median(part / whole for part, whole in zip(updates[name], totals[name], strict=True))
        rows[name] = {"ms": median(totals[name]) * 1e3, "ratio": ratio, "optimizer %": share * 100}
        rows[name] |= {"own ms": None, "own %": None}
        if isinstance(running[name], Masked):  # what its optimizer's step takes longer, since hooks would change it
            own = median(mine - plain for mine, plain in zip(updates[name], updates["dense"], strict=True))
            rows[name] |= {"own ms": own * 1e3, "own %": own / dense * 100}
    return rows


# --- refresh and memory -----------------------------------------------------------------------------------------------


def state_of(workload: Workload, name: str, variant: Dense | None, dense_ms: float, quick: bool) -> Row:
    """What a variant's refresh costs, and what it holds."""
    row: Row = {"network": workload.name, "variant": name}
    if variant is None:
        return row
    batch = workload.batch(workload.sizes[0])
    refreshes = [variant.refresh(batch) for _ in range(2 if quick else 5)]
    if None not in refreshes:
        row["refresh ms"] = median(refreshes) * 1e3
        row["% of training"] = row["refresh ms"] / EVERY / dense_ms * 100
        row["sparse entries"] = variant.sparse_entries()
        row["extra bytes/entry"] = sum(tensor.nbytes for tensor in variant.extra_tensors()) / row["sparse entries"]
    if not quick:
        row["peak MB"] = measured_peak(workload.name, name)
    return row


def measured_peak(network: str, variant: str) -> float:
    """Peak memory of a process of its own that trains this variant only, with a refresh."""
    command = [sys.executable, __file__, "--peak-of", network, variant]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_of(workload: Workload, variant: type[Dense]) -> float:
    """Train a little; return this process's peak resident memory in MB (Linux)."""
    trained = variant(workload)
    batch = workload.batch(workload.sizes[0])
    for _ in range(3):
        trained.step(batch)
    trained.refresh(batch)
    trained.step(batch)
    # not getrusage: that peak is inherited from the parent process
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024


def large_refreshes(side: int, rounds: int) -> list[Row]:
    """Refresh one weight of side², and four of a quarter of that each, with and without optimizer state to reset."""
    cases: list[tuple[Row, Callable[[], None], TopKast]] = []
    for count, width in ((1, side), (4, side // 2)):
        for reset in (False, True):
            model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
            topkast = TopKast(
                model,
                FORWARD,
                BACKWARD,
                targets=Targets(keep_first_dense=False, keep_last_dense=False),
                storage=storage.Masked(reset_optimizer_state=reset),
            )
            optimizer = adamw(model.parameters())
            topkast.attach(optimizer)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            row = {"weights": f"{count} × {width**2:,}", "optimizer state": "AdamW's reset" if reset else "left alone"}
            cases.append((row, optimizer.step, topkast))
    seconds: list[list[float]] = [[] for _ in cases]
    moved: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for (_, step, topkast), times, shares in zip(cases, seconds, moved, strict=True):
            step()  # θ moves on
            before = [weight.tiers for weight in topkast.weights.values()]
            start = process_time()
            topkast.refresh()
            times.append(process_time() - start)
            pairs = zip(before, topkast.weights.values(), strict=True)
            shares.append(sum(int((old != weight.tiers).sum()) for old, weight in pairs) / side**2)
    return [
        row | {"entries that change their set, %": median(shares) * 100, "refresh ms": median(times) * 1e3}
        for (row, *_), times, shares in zip(cases, seconds, moved, strict=True)
    ]


def mask_kinds(size: int, rounds: int) -> list[Row]:
    """What masking costs by the type of the mask, and what the type costs in memory."""
    gradient = torch.randn(size)
    bits = gradient.view(torch.int32)  # shares its memory
    updated = torch.rand(size) < 1 - BACKWARD
    all_ones = -updated.to(torch.int8)
    kinds: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "int8, all bits set (ours)": (all_ones, bits.bitwise_and_),
        "uint8": (updated.to(torch.uint8), gradient.mul_),
        "float32": (updated.float(), gradient.mul_),
        "bool": (updated, gradient.mul_),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, (mask, apply) in kinds.items():
            start = process_time()
            apply(mask)
            seconds[name].append(process_time() - start)
    return [
        {"mask": name, "entries": size, "ms": median(seconds[name]) * 1e3, "bytes/entry": mask.element_size()}
        for name, (mask, _) in kinds.items()
    ]


# --- the aims -----------------------------------------------------------------------------------------------------


def aims(results: dict[str, Any]) -> list[Row]:
    """Each aim with what was measured."""
    rows: list[Row] = []

    def add(aim: str, measured: float, limit: float, note: str = "") -> None:
        rows.append({"aim": aim, "measured": measured, "met": "met" if measured <= limit else "not met", "note": note})

    steps = {(row["network"], row["batch"], row["variant"]): row for row in results["steps"]}
    for network in ("ResNet-18", "transformer"):
        batch = max((batch for name, batch, _ in steps if name == network), default=None)
        if batch is not None:
            masked, again = steps[network, batch, "masked"], steps[network, batch, "dense again"]
            for when in ("early", "late"):
                note = f"own time {masked['own %']:.2f} % of the dense step; dense again {again[f'{when} ratio']:.3f}"
                add(f"{network}, batch {batch}, {when}: masked ≤ 1.03 × dense", masked[f"{when} ratio"], 1.03, note)
    for row in results["refresh"]:
        add(f"refresh of {row['weights']}, state {row['optimizer state']}: ≤ 60 ms", row["refresh ms"], 60)
    for row in results["states"]:
        if row["variant"] == "masked":
            add(f"{row['network']}: refresh < 1 % of training", row["% of training"], 1)
            add(f"{row['network']}: extra memory ≤ 9 bytes an entry", row["extra bytes/entry"], 9)
    return rows


if __name__ == "__main__":
    main()
