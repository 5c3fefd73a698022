"""Whole training steps of dense, masked and packed networks, and what they hold in memory.

    OMP_NUM_THREADS=1 python benchmarks/packed.py [--quick] [--only SECTION ...] [--keep-memory] [--json FILE] [...]

The variants of a case live in one process and take their steps in turn, on the same batch. Times are CPU seconds of
this process's one thread; speeds are medians over rounds of (dense / variant) within a round. The arithmetic limit of
a packed step is 3 / (2D + (D+M)) times dense: two products with A, one on B.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from tables import Row, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer
from workloads import ResNet18, ResNet50

from lightning_topkast import Block, Packed, Schedule, Targets, TopKast, keep_freed_memory
from lightning_topkast.app.models import TransformerLM, WideResNet
from lightning_topkast.layers import packed_weights

PAIRS = ((0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95), (0.99, 0.98))
EQUAL_PAIRS = ((0.9, 0.9), (0.95, 0.95), (0.98, 0.98))
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=1e-3, momentum=0.9),
    "Adam": lambda p: Adam(p, lr=1e-4),
    "Adam, fused": lambda p: Adam(p, lr=1e-4, fused=True),
    "AdamW, fused": lambda p: AdamW(p, lr=1e-4, fused=True),
}
VARIANTS = {
    "masked": {"storage": "masked"},
    "packed, torch": {"storage": Packed(kernels="torch")},
    "packed, compiled": {"storage": Packed(kernels="compiled")},
}
IN_BLOCKS: dict[str, dict[str, Any]] = {
    f"packed, blocks of {side}": {"storage": Packed(kernels="torch"), "structure": Block(side, side)}
    for side in (16, 32, 64)
}


@dataclass
class Case:
    """A network with a batch, trained in several ways."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    optimizer: str
    pair: tuple[float, float]
    rounds: int
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    keep_ends_dense: bool = False
    channels_last: bool = False


class Training:
    """One variant of a case in training."""

    def __init__(self, case: Case, variant: str) -> None:
        torch.manual_seed(0)
        self.case, self.topkast = case, None
        self.model = case.build()
        if variant in PEERS:
            PEERS[variant](self.model, case.pair[0], case.keep_ends_dense)
        self.channels_last = case.channels_last and variant != "dense, channels first"
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if variant not in ("dense", "dense, channels first", *PEERS):
            ends = case.keep_ends_dense
            options: dict[str, Any] = (VARIANTS | IN_BLOCKS).get(variant) or {"storage": variant}
            targets = Targets(keep_first_dense=ends, keep_last_dense=ends)
            self.topkast = TopKast(self.model, *case.pair, targets=targets, **options)
        self.optimizer = OPTIMIZERS[case.optimizer](self.model.parameters())
        if self.topkast is not None:
            self.topkast.attach(self.optimizer)

    def step(self, batch: tuple[Tensor, Tensor]) -> float:
        """Train one step; return its seconds."""
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        inputs = batch[0].contiguous(memory_format=order)
        start = process_time()
        self.optimizer.zero_grad()
        output = self.model(inputs)
        if batch[1].is_floating_point():
            loss = F.mse_loss(output, batch[1])
        else:
            loss = F.cross_entropy(output.flatten(0, -2), batch[1].flatten())
        loss.backward()
        self.optimizer.step()
        return process_time() - start

    def memory(self) -> Row:
        """Bytes after a step: what the device must hold, the indices apart, and what lies on the host."""
        parameters = list(self.model.parameters())
        tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        tensors += [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        packed = packed_weights(self.model).values()
        # a compact layer's dense α lives while autograd needs it, which is from the forward to the backward pass
        dense_alpha = sum(w.size * w.parameter.element_size() for w in packed if w.storage == "compact")
        host = sum(value.nbytes for w in packed for value in vars(w).values() if isinstance(value, Tensor))
        host -= sum(w.parameter.nbytes for w in packed)
        return {
            "bytes": sum(t.nbytes for t in tensors) + dense_alpha,
            "index bytes": sum(w.layout.nbytes for w in packed),
            "host bytes": host,
        }


def use_sparselab(model: nn.Module, sparsity: float, keep_ends_dense: bool) -> None:
    """Replace linear layers by sparselab's."""
    from sparselab.nn import SparseLinear

    for parent, name, layer in layers_of(model, nn.Linear, keep_ends_dense):
        setattr(parent, name, SparseLinear(layer.in_features, layer.out_features, sparsity=sparsity))


def use_sparseprop(model: nn.Module, sparsity: float, keep_ends_dense: bool) -> None:
    """Replace linear layers and convolutions by sparseprop's."""
    from sparseprop.modules import SparseConv2d, SparseLinear

    for parent, name, layer in layers_of(model, (nn.Linear, nn.Conv2d), keep_ends_dense):
        with torch.no_grad():
            layer.weight.mul_(torch.rand_like(layer.weight) >= sparsity)
        kind = SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d
        setattr(parent, name, kind.from_dense(layer))


def layers_of(model: nn.Module, kinds: Any, keep_ends_dense: bool) -> list[tuple[nn.Module, str, Any]]:
    """Parents, names and layers of these kinds, without the first and last layer of all if these are kept dense."""
    named = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    layers: list[tuple[nn.Module, str, Any]] = []
    for path in named[1:-1] if keep_ends_dense else named:
        if isinstance(layer := model.get_submodule(path), kinds):
            parent, _, name = path.rpartition(".")
            layers.append((model.get_submodule(parent), name, layer))
    return layers


PEERS: dict[str, Callable[[nn.Module, float, bool], None]] = {
    "sparselab": use_sparselab,
    "sparseprop": use_sparseprop,
}


def compare(case: Case) -> list[Row]:
    """Let every variant take its steps in turn; one row a variant."""
    trainings: dict[str, Training] = {}
    rows: list[Row] = []
    for name in ("dense", *case.variants):
        try:
            trainings[name] = Training(case, name)
            for _ in range(3):
                trainings[name].step(case.batch())
        except Exception as error:  # a peer or a missing compiler may fail in any way, and the table says how
            trainings.pop(name, None)
            rows.append({"variant": name, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:80]})
    times: dict[str, list[float]] = {name: [] for name in trainings}
    names = list(trainings)
    for turn in range(case.rounds):
        batch = case.batch()
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(trainings[name].step(batch))
    dense_bytes = trainings["dense"].memory()["bytes"]
    forward, backward = (1 - sparsity for sparsity in case.pair)
    limit = 3 / (2 * forward + backward)
    head = {"network": case.name, "optimizer": case.optimizer, "sparsity": f"{case.pair[0]:.0%} / {case.pair[1]:.0%}"}
    for name, training in trainings.items():
        speed = median(plain / mine for plain, mine in zip(times["dense"], times[name], strict=True))
        memory = training.memory()
        row: Row = {"variant": name, "ms": median(times[name]) * 1e3, "speed": speed}
        row["of limit"] = speed / limit if name != "dense" else None
        row["bytes"] = memory["bytes"] / dense_bytes
        row["+ indices"] = (memory["bytes"] + memory["index bytes"]) / dense_bytes
        row["host MB"] = memory["host bytes"] / 1e6
        if training.topkast is not None:
            start = process_time()
            training.topkast.refresh()
            row["refresh ms"] = (process_time() - start) * 1e3
        rows.append(row)
    del trainings
    gc.collect()
    return [head | row for row in rows]


def mlp(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cases(quick: bool, only: list[str]) -> Iterator[Case]:
    """Everything that is timed, by section."""
    if "MLP" in only:
        for width in (64,) if quick else (1024, 2048, 4096):
            for size in (8,) if quick else (128, 256):
                for optimizer in ("SGD", "Adam", *(("Adam, fused",) if (width, size) == (2048, 128) else ())):
                    for pair in PAIRS[1:3] if quick else PAIRS:
                        yield Case(
                            f"MLP 4 × {width}, batch {size}",
                            lambda width=width: mlp(width),  # type: ignore[misc]
                            lambda width=width, size=size: (torch.randn(size, width), torch.randn(size, width)),  # type: ignore[misc]
                            optimizer,
                            pair,
                            rounds=3 if quick else {1024: 15, 2048: 9, 4096: 3}[width],
                        )
    if "blocks" in only:
        for width in (512,) if quick else (1024, 2048, 4096):
            for pair in PAIRS[1:3] if quick else PAIRS:
                yield Case(
                    f"MLP 4 × {width}, batch 128",
                    lambda width=width: mlp(width),  # type: ignore[misc]
                    lambda width=width: (torch.randn(128, width), torch.randn(128, width)),  # type: ignore[misc]
                    "Adam",
                    pair,
                    3 if quick else {1024: 15, 2048: 9, 4096: 3}[width],
                    ["packed, compiled", *IN_BLOCKS],
                )
    if "transformer" in only:
        width, time, size = (32, 8, 2) if quick else (1024, 128, 4)
        for optimizer in ("SGD", "Adam"):
            for pair in PAIRS[1:3] if quick else PAIRS:
                yield Case(
                    f"transformer block, width {width}, {size} × {time}",
                    lambda: nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True),
                    lambda: (torch.randn(size, time, width), torch.randn(size, time, width)),
                    optimizer,
                    pair,
                    rounds=3 if quick else 7,
                )
    if "compact" in only:
        channels, width, time, depth = (8, 32, 16, 2) if quick else (64, 384, 128, 6)
        networks: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
            "ResNet-18, batch 32": (
                lambda: ResNet18(channels),
                lambda: (torch.randn(32, 3, 32, 32), torch.randint(10, (32,))),
            ),
            "transformer, 8 × 128": (
                lambda: TransformerLM(256, time, width=width, depth=depth, heads=4),
                lambda: (torch.randint(256, (8, time)), torch.randint(256, (8, time))),
            ),
        }
        for name, (build, batch) in networks.items():
            for optimizer in ("AdamW, fused", "Adam"):
                yield Case(name, build, batch, optimizer, (0.9, 0.8), 3 if quick else 7, ["masked", "compact"], True)
    if "convolutions" in only:
        yield from convolutions(quick)
    if "peers" in only:
        width, size = (64, 8) if quick else (2048, 128)
        channels, side = (16, 8) if quick else (64, 32)
        for pair in EQUAL_PAIRS:
            yield Case(
                f"ResNet-18 ({side}×{side}), batch 32",
                lambda: ResNet18(channels),
                lambda: (torch.randn(32, 3, side, side), torch.randint(10, (32,))),
                "SGD",
                pair,
                3,
                ["packed", "sparseprop"],
                keep_ends_dense=True,
            )
            yield Case(
                f"MLP 4 × {width}, batch {size}",
                lambda: mlp(width),
                lambda: (torch.randn(size, width), torch.randn(size, width)),
                "Adam",
                pair,
                3 if quick else 9,
                ["packed, torch", "packed, compiled", *PEERS],
            )


def convolutions(quick: bool) -> Iterator[Case]:
    """Networks of convolutions, beside the dense network in its fastest memory format."""
    channels, side, large = (8, 8, 32) if quick else (64, 32, 224)
    networks: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = [
        *(
            (f"ResNet-18 ({side}×{side}), batch {size}", lambda: ResNet18(channels), (size, 3, side, side), 9)
            for size in ((8,) if quick else (32, 128))
        ),
        (
            f"ResNet-50 ({large}×{large}), batch 16",
            lambda: ResNet50(channels, blocks=(1, 1, 1, 1) if quick else (3, 4, 6, 3)),
            (16, 3, large, large),
            5,
        ),
        (
            f"WideResNet-22-2 ({side}×{side}), batch 128",
            lambda: WideResNet((3, side, side), 10, 10 if quick else 22),
            (8 if quick else 128, 3, side, side),
            9,
        ),
    ]
    for name, build, shape, rounds in networks:
        for pair in PAIRS[1:3] if quick else PAIRS:
            yield Case(
                name,
                build,
                lambda shape=shape: (torch.randn(shape), torch.randint(10, shape[:1])),  # type: ignore[misc]
                "SGD",
                pair,
                3 if quick else rounds,
                ["dense, channels first", "packed"],
                keep_ends_dense=True,
                channels_last=True,
            )


def refreshes(quick: bool) -> list[Row]:
    """The steps at which a refresh is chosen and takes effect, waited for or in the background; wall time."""
    width, interval, latest = (64, 5, 2) if quick else (2048, 20, 10)
    rows: list[Row] = []
    for delay in (0, latest):
        torch.manual_seed(0)
        model = mlp(width)
        topkast = TopKast(
            model,
            0.9,
            0.8,
            targets=Targets(keep_first_dense=False, keep_last_dense=False),
            schedule=Schedule(interval, delay),
            storage="packed",
        )
        optimizer = OPTIMIZERS["Adam"](model.parameters())
        topkast.attach(optimizer)
        times: dict[int, list[float]] = {}
        for step in range(1, 1 + interval * (3 if quick else 9)):
            x = torch.randn(128, width)
            start = perf_counter()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            times.setdefault(step % interval, []).append((perf_counter() - start) * 1e3)
        special = {0: "step that chooses, ms", delay: "step that applies, ms"}
        plain = [ms for at, several in times.items() if at not in special for ms in several]
        row: Row = {"delay": delay, "median step, ms": median(plain)}
        row |= {name: median(times[at][1:]) for at, name in special.items()}
        row["an interval, ms"] = sum(median(several[1:]) for several in times.values())
        rows.append(row)
    return rows


def peak(quick: bool, pair: int, variant: str) -> float:
    """Peak resident memory in MB (Linux) of a process that takes four steps and a refresh."""
    width = 64 if quick else 2048
    batch = torch.randn(128, width), torch.randn(128, width)
    training = Training(Case("", lambda: mlp(width), lambda: batch, "Adam", PAIRS[pair], 0), variant)
    for _ in range(3):
        training.step(batch)
    if training.topkast is not None:
        training.topkast.refresh()
    training.step(batch)
    # not getrusage: that peak is inherited from the parent process
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024


def peaks(quick: bool) -> list[Row]:
    """Peak memory of processes that each train one variant of the MLP of width 2048, host memory included."""
    rows: list[Row] = []
    for index, pair in enumerate(PAIRS):
        row: Row = {"sparsity": f"{pair[0]:.0%} / {pair[1]:.0%}"}
        for variant in ("dense", *VARIANTS):
            command = [sys.executable, __file__, "--peak-of", str(index), variant, *(["--quick"] if quick else [])]
            done = subprocess.run(command, capture_output=True, text=True)
            row[f"{variant}, MB"] = float(done.stdout) if done.returncode == 0 else None
        rows.append(row)
    return rows


def aims(rows: list[Row]) -> list[Row]:
    """Each aim with what was measured."""
    found: list[Row] = []

    def add(aim: str, measured: float, limit: float, at_least: bool = True) -> None:
        met = measured >= limit if at_least else measured <= limit
        found.append({"aim": aim, "measured": measured, "met": "met" if met else "not met"})

    by_key = {(r["network"], r["optimizer"], r["sparsity"], r["variant"]): r for r in rows if "failed" not in r}
    wanted = {
        "90% / 80%": (1.2, 3, 0.45),
        "95% / 90%": (2.3, 6, 0.25),
        "98% / 95%": (5, 12, 0.13),
        "99% / 98%": (9, 20, 0.06),
    }
    for sparsity, (torch_speed, compiled_speed, share) in wanted.items():
        for variant, speed in (("packed, torch", torch_speed), ("packed, compiled", compiled_speed)):
            row = by_key.get(("MLP 4 × 2048, batch 128", "Adam", sparsity, variant))
            if row is not None:
                add(f"{variant}, {sparsity}: speed ≥ {speed}", row["speed"], speed)
                add(f"{variant}, {sparsity}: bytes ≤ {share}", row["bytes"], share, at_least=False)
    row = by_key.get(("MLP 4 × 4096, batch 128", "Adam", "95% / 90%", "packed, compiled"))
    if row is not None:
        add("width 4096, 95% / 90%, compiled: speed ≥ 4", row["speed"], 4)
    for (network, optimizer, sparsity, variant), row in by_key.items():
        if variant == "compact":
            add(f"{network}, {optimizer}: compact no slower than dense", row["speed"], 1)
            add(f"{network}, {optimizer}: bytes ≤ 0.5", row["bytes"], 0.5, at_least=False)
        peer = by_key.get((network, optimizer, sparsity, "sparselab"))
        if peer is not None and variant == "packed, compiled":
            add(f"{sparsity}: ≥ 2.5 × as fast as sparselab", peer["ms"] / row["ms"], 2.5)
    return found


def plot(rows: list[Row], path: Path) -> None:
    """Speed against sparsity, a line an operator, beside the arithmetic limit."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    names = [f"{f:.0%} / {b:.0%}" for f, b in PAIRS]
    for axis, optimizer in zip(axes, ("SGD", "Adam"), strict=True):
        for variant, marker in (("packed, compiled", "o"), ("packed, torch", "s"), ("masked", "^")):
            for width, style in ((1024, ":"), (2048, "-"), (4096, "--")):
                points = [
                    (r["sparsity"], r["speed"])
                    for r in rows
                    if (r["network"], r["optimizer"], r["variant"])
                    == (f"MLP 4 × {width}, batch 128", optimizer, variant)
                    and r["sparsity"] in names
                ]
                if points:
                    colour = {"packed, compiled": "#0072B2", "packed, torch": "#D55E00", "masked": "#777777"}[variant]
                    label = f"{variant}, width {width}"
                    axis.plot(*zip(*points, strict=True), style, marker=marker, color=colour, label=label, ms=4)
        limits = [3 / (2 * (1 - f) + 1 - b) for f, b in PAIRS]
        axis.plot(names, limits, color="black", lw=0.8, label="arithmetic limit of the products")
        axis.axhline(1, color="black", lw=0.5)
        axis.set(title=optimizer, yscale="log", xlabel="forward / backward sparsity")
        axis.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        axis.tick_params("x", labelsize=8)
    axes[0].set_ylabel("times as fast as dense, whole step")
    axes[1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    sections = ["MLP", "blocks", "transformer", "compact", "convolutions", "peers", "refresh", "peak"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks and few steps: shows that it runs, no more")
    parser.add_argument("--only", nargs="+", choices=sections, default=sections, help="sections")
    parser.add_argument("--keep-memory", action="store_true", help="call keep_freed_memory(), as topkast-train does")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw the MLP's speeds into this file")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.keep_memory:
        keep_freed_memory()
    if arguments.peak_of:
        print(peak(arguments.quick, int(arguments.peak_of[0]), arguments.peak_of[1]))
        return
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread\n")
    rows: list[Row] = []
    for case in cases(arguments.quick, arguments.only):
        compared = compare(case)
        rows += compared
        table(f"{case.name}, {case.optimizer}, {case.pair[0]:.0%} / {case.pair[1]:.0%}", [
            {key: value for key, value in row.items() if key not in ("network", "optimizer", "sparsity")}
            for row in compared
        ])  # fmt: skip
    delays = refreshes(arguments.quick) if "refresh" in arguments.only else []
    if delays:
        table("Refreshes, chosen at once and in the background", delays)
    peak_rows = peaks(arguments.quick) if "peak" in arguments.only else []
    if peak_rows:
        table("Peak memory of a process, MLP 4 × 2048, batch 128, Adam", peak_rows)
    reached = aims(rows)
    if reached:
        table("Aims", reached)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {"rows": rows, "refreshes": delays, "peaks": peak_rows, "aims": reached}, indent=1, ensure_ascii=False
            )
            + "\n"
        )
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
