"""What the soak draws: models, settings, optimizers, and what happens to a run on its way."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
KINDS = {"loop": 0.6, "trainer": 0.2, "killed": 0.1, "sharded": 0.1}
EVENTS = ("save", "deepcopy", "pickle", "detach", "refresh", "load on A", "load dense")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], width: int, hidden: int, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(width, hidden, batch_first=True, **options)
        self.out = nn.Linear(hidden * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, **options)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, width)
        self.two.weight = self.one.weight
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(torch.tanh(self.one(torch.tanh(self.first(x))))))


class Pairs(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.pairs, self.out = nn.Bilinear(width, width, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pairs(x, x.flip(0)))


def _mlp(rng: Random) -> dict[str, Any]:
    return {"widths": [rng.choice([1, 2, 3, 5, 8, 13, 17, 24]) for _ in range(rng.randint(3, 5))]}


def _make_mlp(widths: list[int]) -> nn.Module:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def _make_conv2d(width: int, kernel: int, groups: int, last: bool) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, width * groups, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width * groups, 2 * groups, 1),
        nn.ReLU(),
        nn.Conv2d(2 * groups, 2 * groups, kernel, groups=groups, padding=kernel // 2),
        nn.ReLU(),
        nn.Conv2d(2 * groups, 3, 1),
    )
    return net.to(memory_format=torch.channels_last) if last else net


@dataclass(frozen=True)
class Family:
    """Models of a kind: how their sizes are drawn, how one is made, and the shape of a batch for it."""

    draw: Callable[[Random], dict[str, Any]]
    make: Callable[..., nn.Module]
    batch: Callable[[dict[str, Any]], tuple[int, ...]]


FAMILIES = {
    "mlp": Family(_mlp, _make_mlp, lambda sizes: (6, sizes["widths"][0])),
    "conv1d": Family(
        lambda rng: {"width": rng.randint(1, 6), "kernel": rng.choice([1, 3])},
        lambda width, kernel: nn.Sequential(
            nn.Conv1d(3, width, 3), nn.Tanh(), nn.Conv1d(width, 4, kernel), nn.Tanh(), nn.Conv1d(4, 2, 1)
        ),
        lambda sizes: (3, 3, 9),
    ),
    "conv2d": Family(
        lambda rng: {
            "width": rng.randint(1, 4), "kernel": rng.choice([1, 3]), "groups": rng.choice([1, 2]),
            "last": rng.random() < 0.4,
        },
        _make_conv2d,
        lambda sizes: (3, 2, 5, 5),
    ),
    "conv transpose": Family(
        lambda rng: {"width": rng.randint(2, 5)},
        lambda width: nn.Sequential(
            nn.ConvTranspose1d(2, width, 3), nn.Tanh(), nn.ConvTranspose1d(width, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 1)
        ),
        lambda sizes: (3, 2, 6),
    ),
    "conv3d": Family(
        lambda rng: {"width": rng.randint(2, 4)},
        lambda width: nn.Sequential(nn.Conv3d(1, width, 2), nn.Tanh(), nn.Conv3d(width, 3, 2), nn.Conv3d(3, 1, 1)),
        lambda sizes: (2, 1, 4, 4, 4),
    ),
    "rnn": Family(
        lambda rng: {
            "kind": rng.choice(["LSTM", "GRU", "RNN"]), "width": rng.randint(2, 5), "hidden": rng.randint(2, 6),
            "bidirectional": rng.random() < 0.3, "num_layers": rng.choice([1, 2]),
        },
        lambda kind, **sizes: Recurrent(getattr(nn, kind), **sizes),
        lambda sizes: (3, 4, sizes["width"]),
    ),
    "attention": Family(
        lambda rng: {"width": 2 * rng.randint(2, 6), "heads": rng.choice([1, 2])},
        Attention,
        lambda sizes: (2, 5, sizes["width"]),
    ),
    "tied": Family(lambda rng: {"width": rng.randint(3, 12)}, Tied, lambda sizes: (5, 4)),
    "bilinear": Family(lambda rng: {"width": rng.randint(2, 5)}, Pairs, lambda sizes: (4, sizes["width"])),
}  # fmt: skip


@dataclass
class Case:
    """One drawn run; `settings` are the library's, `optimizer` is a class and its arguments."""

    kind: str
    family: str
    sizes: dict[str, Any]
    seed: int
    dtype: str
    values: str  # how θ begins: "any", "ties" or "zeros"
    settings: dict[str, Any]
    optimizer: tuple[str, dict[str, Any]]
    lr: float
    steps: int
    accumulate: int = 1
    clip: float | None = None
    scaled: bool = False
    wandering_lr: bool = False
    events: dict[int, list[tuple[str, str]]] = field(default_factory=dict)  # step → what happens before it
    skips: dict[int, str] = field(default_factory=dict)  # step → "no gradient", "some without", "overflow"
    cut: str = ""  # how weights are sharded; of packed ones under "DDP" θ, the sets and the scores

    def describe(self) -> str:
        return "\n".join(f"    {key}: {value}" for key, value in asdict(self).items())

    def build(self, other: int = 0) -> nn.Module:
        """The model; with `other` the same with other values."""
        torch.manual_seed(self.seed + other)
        model = FAMILIES[self.family].make(**self.sizes).to(DTYPES[self.dtype])
        with torch.no_grad():
            for parameter in model.parameters():
                if self.values == "ties":
                    parameter.mul_(4).round_().div_(4)
                elif self.values == "zeros" and parameter.dim() > 1:
                    parameter.zero_()
        return model

    def batch(self, step: int, part: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10007 + step * 31 + part)
        shape = FAMILIES[self.family].batch(self.sizes)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[self.dtype])

    def make_optimizer(self, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        """Two groups: every third parameter learns at half the rate."""
        listed = [parameters[name] for name in sorted(parameters)]
        slow, fast = listed[2::3], [p for i, p in enumerate(listed) if i % 3 != 2]
        groups = [{"params": fast, "lr": self.lr, "initial_lr": self.lr}]
        if slow:
            groups.append({"params": slow, "lr": self.lr / 2, "initial_lr": self.lr / 2})
        name, arguments = self.optimizer
        return getattr(torch.optim, name)(groups, **arguments)


def _optimizer(rng: Random) -> tuple[str, dict[str, Any]]:
    decay = rng.choice([0.0, 0.01, 0.2])
    name = rng.choice(["SGD", "SGD", "Adam", "AdamW", "RMSprop"])
    arguments: dict[str, Any] = {"weight_decay": decay}
    if name == "SGD" and rng.random() < 0.7:
        arguments |= {"momentum": 0.9, "nesterov": rng.random() < 0.5}
    if name == "RMSprop":
        arguments |= {"momentum": rng.choice([0.0, 0.9]), "centered": rng.random() < 0.5}
    if name in ("Adam", "AdamW"):
        arguments |= {"amsgrad": rng.random() < 0.3}
    how = rng.choice(["", "", "foreach", "fused"] if name != "RMSprop" else ["", "foreach"])
    return name, arguments | ({how: True} if how else {})


def _settings(rng: Random, kind: str) -> dict[str, Any]:
    forward = rng.choice([0.0, 0.3, 0.5, 0.8, 0.9, rng.random()])
    every = rng.choice([1, 2, 3, 5, 7])
    settings: dict[str, Any] = {
        "forward_sparsity": forward,
        "backward_sparsity": rng.choice([0.0, forward, forward * rng.random()]),
        "update_every": every,
        "delay": rng.randrange(every) if rng.random() < 0.4 else 0,
        "distribution": rng.choice(["uniform", "erk"]),
        "exploration": rng.choice(["magnitude", "magnitude", "random"]),
        "stop_exploring_at": rng.choice([None, None, rng.randint(0, 15), rng.random()]),
        "penalty": rng.choice(["l2", "l2", "l1", "norm"]),
        "keep_first_dense": rng.random() < 0.5,
        "keep_last_dense": rng.random() < 0.5,
        "storage": rng.choice(["masked", "masked", "packed", "compact", "auto"]),
        "kernels": rng.choice(["torch", "torch", "auto"]),
        "seed": rng.randint(0, 9),
    }
    if settings["penalty"] == "l2" and rng.random() < 0.3:
        settings["shrinkage"] = rng.choice([0.0, 1e-3, 0.3])
    else:
        settings["strength"] = rng.choice([0.0, 1e-4, 1e-2])
    if rng.random() < 0.2:
        settings["overrides"] = {"*": {"forward_sparsity": rng.choice([0.0, 0.4]), "backward_sparsity": 0.0}}
    if settings["storage"] == "masked" and rng.random() < 0.25:
        settings["reset_optimizer_state"] = False
    # by what was drawn so far, so that cases of earlier seeds stay what they were
    settings |= _structure(Random(str(settings)), settings["backward_sparsity"])
    if ":" in settings.get("structure", ""):
        settings.pop("overrides", None)
    if kind == "sharded" and settings["storage"] == "masked":
        settings |= {"delay": 0, "reset_optimizer_state": True}
    return settings


def _structure(rng: Random, backward: float) -> dict[str, Any]:
    kind = rng.choice(["entry", "entry", "block", "n:m"])
    if kind == "block":
        return {"structure": kind, "block": [rng.randint(1, 4), rng.randint(1, 4)]}
    if kind == "entry":
        return {}
    n, m = rng.choice([(2, 4), (1, 2), (1, 3), (3, 8)])
    return {
        "structure": f"{n}:{m}", "forward_sparsity": 1 - n / m, "backward_sparsity": min(backward, 1 - n / m),
        "distribution": "uniform", "exploration": "magnitude",
    }  # fmt: skip


def draw(kind: str | None, rng: Random) -> Case:
    """One case; of a random kind if None."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    family = rng.choice(list(FAMILIES))
    settings = _settings(rng, kind)
    steps = rng.randint(6, 24)
    case = Case(
        kind=kind,
        family=family,
        sizes=FAMILIES[family].draw(rng),
        seed=rng.randrange(10**6),
        dtype=rng.choice(["float32", "float32", "float64", "bfloat16"]),
        values=rng.choice(["any", "any", "any", "ties", "zeros"]),
        settings=settings,
        optimizer=_optimizer(rng),
        lr=rng.choice([0.003, 0.02, 0.1]),
        steps=steps,
        accumulate=rng.choice([1, 1, 3]),
        clip=rng.choice([None, None, 0.05, 1.0]),
        wandering_lr=rng.random() < 0.3,
    )
    if case.dtype == "bfloat16":
        case.optimizer[1].pop("centered", None)  # the difference of two averages is nothing but rounding
    if case.dtype == "bfloat16" and case.optimizer[0] == "SGD":
        case.optimizer[1].pop("fused", None)  # on CPU torch 2.13's computes something else, from 16 entries on
    if kind == "sharded":
        packed = settings["storage"] != "masked"
        case.cut = rng.choice(["DDP", "FSDP2"] if packed else ["Shard(0)", "Shard(1)", "Replicate", "FSDP2"])
        if case.cut != "DDP":
            case.optimizer[1].pop("fused", None)  # which torch has not for all DTensors
        if case.cut == "Shard(1)" and ":" in settings.get("structure", ""):
            settings["structure"] = "unstructured"  # needs whole rows
    if kind in ("loop", "killed"):
        case.scaled = case.dtype != "bfloat16" and rng.random() < 0.3
        hows = ["no gradient", "some without"] + ["overflow"] * case.scaled
        # not at first, where torch's fused SGD leaves a momentum without values if it skips
        first = 4 if "fused" in case.optimizer[1] else 0
        case.skips = {step: rng.choice(hows) for step in range(first, steps) if rng.random() < 0.08}
    if kind == "loop":
        for step in range(1, steps):
            while rng.random() < 0.2:
                to = rng.choice(["masked", "packed", "compact", settings["storage"]])
                to = to if settings.get("reset_optimizer_state", True) else "masked"
                event, before = rng.choice(EVENTS), case.events.setdefault(step, [])
                # Of two loads without a step in between the second goes by what was there before the first, which the
                # oracle does not remember; tests/test_foreign_code.py has it.
                loaded = any(each.startswith("load") for each, _ in before)
                before.append(("detach" if loaded and event.startswith("load") else event, to))
    return case
