"""What masked mode costs on a GPU: a ResNet-50's step beside the dense one, and refreshes of large weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from gpu_block import Block
from gpu_timing import Clock, aim, in_a_line, medians
from tables import Row
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from lightning_topkast import Targets, TopKast
from lightning_topkast.method import structure

FORWARD, BACKWARD, EVERY = 0.9, 0.8, 100
STRUCTURES: dict[str, dict[str, Any]] = {
    "unstructured": {"forward_sparsity": FORWARD, "backward_sparsity": BACKWARD, "structure": "unstructured"},
    "block": {"forward_sparsity": FORWARD, "backward_sparsity": BACKWARD, "structure": "block"},
    "2:4": {"forward_sparsity": 0.5, "backward_sparsity": 0.4, "structure": "2:4"},
}


# --- a step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSize:
    """What is timed, and how often."""

    network: str
    batch: int
    side: int  # of the images
    every: int  # steps between refreshes
    rounds: int  # one refresh at least falls into them


STEP_SIZES = {
    "full": StepSize("ResNet-50", 256, 224, EVERY, EVERY),
    "quick": StepSize("ResNet-50", 16, 64, 10, 10),
    "rehearsal": StepSize("three convolutions", 2, 16, 5, 6),
}


def network(name: str) -> nn.Module:
    if name == "ResNet-50":
        from torchvision.models import resnet50

        return resnet50()
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1000))


class Training:
    """A network in training on images, channels last, under autocast; dense or masked."""

    def __init__(self, size: StepSize, device: torch.device, masked: bool) -> None:
        torch.manual_seed(0)
        self.device = device
        self.images = torch.randn(size.batch, 3, size.side, size.side, device=device)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (size.batch,), device=device)
        self.model = network(size.network).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.topkast = TopKast(self.model, FORWARD, BACKWARD, update_every=size.every) if masked else None
        if self.topkast is not None:
            self.topkast.attach(self.optimizer)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()


def measure_steps(size: StepSize, device: torch.device) -> Iterator[Row]:
    """Steps in turn, of a second dense network too: how far that one's ratio is from 1 is the noise of the run."""
    row: Row = {"network": size.network, "batch": size.batch, "sparsity": f"{FORWARD:.0%} / {BACKWARD:.0%}"}
    try:
        network(size.network)
    except (ImportError, RuntimeError) as error:
        yield row | {"failed": f"no torchvision that can be imported: {in_a_line(error)}"}
        return
    was_benchmarking, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    trainings = {
        "dense": Training(size, device, masked=False),
        "masked": Training(size, device, masked=True),
        "dense again": Training(size, device, masked=False),
    }
    topkast = trainings["masked"].topkast
    assert topkast is not None
    clock = Clock(device)
    for training in trainings.values():
        for _ in range(2):
            training.step()
    ratios: dict[str, list[float]] = {"masked": [], "dense again": []}
    times: dict[str, list[float]] = {name: [] for name in trainings}
    with_refresh: list[float] = []
    names = list(trainings)
    for turn in range(size.rounds):
        before = topkast.refresh_count
        first = turn % len(names)  # nobody always follows the same neighbour
        taken = {name: clock.eager(trainings[name].step) for name in names[first:] + names[:first]}
        if topkast.refresh_count > before:
            with_refresh.append(taken.pop("masked"))
        for name, ms in taken.items():
            times[name].append(ms)
        for name in ratios.keys() & taken.keys():
            ratios[name].append(taken[name] / taken["dense"])
    dense_ms = median(times["dense"])
    row |= {"dense ms": dense_ms, "masked ms": median(times["masked"]), "ratio": median(ratios["masked"])}
    row["quartiles"] = " ... ".join(f"{edge:.3f}" for edge in quantiles(ratios["masked"], n=4)[::2])
    row["dense again ratio"] = median(ratios["dense again"])
    steps = {name: trainings[name].optimizer.step for name in ("dense", "masked")}
    for kind, queued in (("optimizer", True), ("eager optimizer", False)):
        found = medians(steps, device, min(size.rounds, 15), queued)
        row |= {f"dense {kind} ms": found["dense"], f"masked {kind} ms": found["masked"]}
    row["own %"] = 100 * (row["masked optimizer ms"] - row["dense optimizer ms"]) / dense_ms
    row["step with refresh, ms"] = median(with_refresh)
    refreshes = []
    for _ in range(3):
        trainings["masked"].step()
        refreshes.append(clock.wall(topkast.refresh))
    row["refresh ms"] = median(refreshes)
    row["refresh %"] = 100 * row["refresh ms"] / size.every / dense_ms
    row["weights"] = len(topkast.weights)
    torch.backends.cudnn.benchmark = was_benchmarking
    assert topkast.is_intact, "a parameter is not zero outside its active set"
    yield row


def step_aims(rows: list[Row]) -> list[Row]:
    """The masked step; the refresh is apart."""
    found = [row["ratio"] for row in rows if row["network"] == "ResNet-50" and row["batch"] == 256 and "ratio" in row]
    return [aim("ResNet-50, batch 256: a masked step ≤ 1.02 × dense", found[0] if found else None, 1.02)]


# --- a refresh ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RefreshSize:
    """What is refreshed, and how often."""

    shape: tuple[int, int]  # of a single weight
    width: int  # of a transformer's blocks
    depth: int
    block: int
    rounds: int


REFRESH_SIZES = {
    "full": RefreshSize((8192, 12288), 2048, 20, 128, 5),  # 100.7 M entries, and 1.007 B
    "quick": RefreshSize((1024, 1024), 512, 2, 64, 3),
    "rehearsal": RefreshSize((64, 96), 32, 2, 4, 2),
}


def measure_refreshes(size: RefreshSize, device: torch.device) -> Iterator[Row]:
    """One row for each model and structure, with Adam's state to reset."""
    outputs, inputs = size.shape
    models: dict[str, Callable[[], nn.Module]] = {
        "a weight": lambda: nn.Linear(inputs, outputs, bias=False),
        "a transformer": lambda: nn.Sequential(*(Block(size.width, 1) for _ in range(size.depth))),
    }
    for name, build in models.items():
        for kind, options in STRUCTURES.items():
            with torch.device(device):
                model = build()
            if kind == "block":
                options = options | {"structure": structure.Block(size.block, size.block)}
            yield {"of": name, "structure": kind} | refresh_row(model, options, size.rounds, device)


def refresh_row(model: nn.Module, options: dict[str, Any], rounds: int, device: torch.device) -> Row:
    """Refreshes after steps on random gradients, by which a few entries change their set."""
    topkast = TopKast(model, targets=Targets(keep_first_dense=False, keep_last_dense=False), **options)
    optimizer = Adam(model.parameters(), lr=1e-3, fused=True)
    topkast.attach(optimizer)
    weights = list(topkast.weights.values())
    entries = sum(weight.size for weight in weights)
    clock = Clock(device)
    times: list[float] = []
    choosing: list[float] = []
    moved: list[float] = []
    for _ in range(rounds + 1):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        before = [weight.tiers for weight in weights]
        times.append(clock.wall(topkast.refresh))
        choosing.append(clock.wall(lambda: [choose(weight) for weight in weights]))
        changed = [int((old != weight.tiers).sum()) for old, weight in zip(before, weights, strict=True)]
        moved.append(100 * sum(changed) / entries)
        del before
    check(weights[0])
    assert topkast.is_intact, "a parameter is not zero outside its active set"
    return {
        "weights": len(weights),
        "entries": entries,
        "entries that change their set, %": median(moved[1:]),
        "refresh ms": median(times[1:]),
        "of it choosing, ms": median(choosing[1:]),
        "first refresh ms": times[0],
    }


def choose(weight: Any) -> torch.Tensor:
    """The sets that a refresh would choose now."""
    units = weight.structure
    counts = [units.units(count, weight.shape) for count in (weight.updated_count, weight.active_count)]
    chosen = units.selection(weight.sharding)(units.scores(weight.magnitudes(), weight.sharding), counts)
    return units.tiers(chosen, weight.sharding)


def check(weight: Any) -> None:
    """See that the sets are those that the CPU chooses."""
    if isinstance(weight.structure, structure.Block):
        return  # the order of a norm's sum is the device's own
    scores, counts = weight.magnitudes().cpu(), (weight.updated_count, weight.active_count)
    expected = weight.structure.selection(weight.sharding)(scores, counts)
    assert torch.equal(weight.tiers.cpu(), expected), "the CPU chooses other sets"


def refresh_aims(rows: list[Row]) -> list[Row]:
    """A single weight of 100 M entries."""
    found = {row["structure"]: row["refresh ms"] for row in rows if row["of"] == "a weight" and row["entries"] > 10**8}
    return [aim(f"refresh of 100 M entries, {kind}: ≤ 10 ms", found.get(kind), 10) for kind in STRUCTURES]
