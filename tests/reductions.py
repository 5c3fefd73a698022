"""What ranks.py does without a Trainer: a model in DDP, trained in a plain loop, its gradients reduced in many ways."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from reliability.whole import whole
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_topkast import TopKast
from lightning_topkast.training.all_reduce import INNER_HOOKS, Hook, sparse_all_reduce
from tests.helpers import nouns

STEPS = 7
FIRST, SECOND = "convolution.weight", "middle.weight"
Made = Callable[[Sequence[TopKast]], Hook]


class Mixed(nn.Module):
    """A convolution, whose gradients are strided if it is channels-last, and a linear layer that is used seldom."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.convolution = nn.Conv2d(4, 6, 3)
        self.middle = nn.Linear(6 * 4, 20)
        self.seldom = nn.Linear(20, 20)
        self.last = nn.Linear(20, 2)

    def forward(self, x: Tensor, seldom: bool) -> Tensor:
        x = self.middle(self.convolution(self.first(x).tanh()).tanh().flatten(1)).tanh()
        return self.last(self.seldom(x).tanh() if seldom else x)


def shares(step: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """The batch of a step, cut for the ranks: into equal parts but for the last, of 5 rows."""
    generator = torch.Generator().manual_seed(step)
    rows = 6 if step < STEPS - 1 else 5
    x, y = torch.randn(rows, 3, 6, 6, generator=generator), torch.randn(rows, 2, generator=generator)
    return list(zip(x.tensor_split(world), y.tensor_split(world), strict=True))


def train(
    world: int,
    *,
    alone: bool = False,
    hook: Made | None = None,
    state: Any = None,
    accumulate: int = 1,
    channels_last: bool = False,
    seldom: bool = False,
    targets: Sequence[list[str] | None] = (None,),
    scaler: bool = False,
    refresh_at: int = -1,
    options: dict[str, Any] | None = None,
    **of_ddp: Any,
) -> dict[str, Any]:
    """Train as one of `world` ranks, or on all their shares `alone`; return what the model holds then.

    Args:
        hook: makes the communication hook, of the engines.
        accumulate: backward passes a step, all but the last without synchronisation.
        seldom: use one layer at odd steps only.
        targets: weights of each engine; None is all.
        scaler: scale the loss, and let step 2's overflow.
        refresh_at: choose the sets once more before this step.
    """
    torch.manual_seed(0)
    model = Mixed().to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
    engines = [
        TopKast(model, 0.75, 0.5, **nouns(update_every=3, strength=1e-2, include=include, **(options or {})))
        for include in targets
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    for engine in engines:
        engine.attach(optimizer)
    grad_scaler = torch.amp.GradScaler("cpu", enabled=scaler, init_scale=8.0)
    ddp = model if alone else DistributedDataParallel(model, find_unused_parameters=seldom, **of_ddp)
    if hook is not None:
        ddp.register_comm_hook(state, hook(engines))
    masked = [w for engine in engines for w in engine.weights.values() if w.storage == "masked"]
    norms, outside = [], []
    for step in range(STEPS):
        if step == refresh_at:
            engines[0].refresh()
        batches = shares(step, world) if alone else [shares(step, world)[dist.get_rank()]]
        for turn in range(accumulate):
            if not alone:
                ddp.require_backward_grad_sync = turn == accumulate - 1  # what `no_sync` sets
            # the mean of the ranks' means, which is not the batch's where the shares differ in size
            losses = [
                nn.functional.mse_loss(ddp(x * (turn + 1), not seldom or step % 2 == 1), y) / len(batches)
                for x, y in batches
            ]
            grad_scaler.scale(sum(losses) * (torch.inf if scaler and step == 2 else 1)).backward()
        outside += [int(w.parameter.grad[~w.updated].count_nonzero()) for w in masked if w.parameter.grad is not None]
        for engine in engines:
            engine.mask_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norms.append(norm.nan_to_num())  # after an overflow it is NaN, which equals nothing
        grad_scaler.step(optimizer)
        grad_scaler.update()
        optimizer.zero_grad()
    weights = {name: weight for engine in engines for name, weight in engine.weights.items()}
    return {
        "parameters": {name: value.clone() for name, value in model.state_dict().items()},
        "thetas": {name: whole(weight.theta()) for name, weight in weights.items()},
        "tiers": {name: whole(weight.tiers) for name, weight in weights.items()},
        "norms": norms,
        "nonzero outside B": sum(outside),
        "steps": engines[0].step_count,
    }


def sparsely(hook: Hook = default_hooks.allreduce_hook) -> Made:
    return lambda engines: sparse_all_reduce(*engines, hook=hook)


PACKED = {"storage": "packed", "kernels": "torch"}

# What a sparse run and the dense one that it must equal have in common.
ALIKE: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "channels-last": {"channels_last": True},
    "unused parameters": {"seldom": True},
    "tiny buckets": {"bucket_cap_mb": 1e-4},
    "static graph": {"static_graph": True},
    "views of buckets": {"gradient_as_bucket_view": True},
    "overflow": {"scaler": True},
    "refreshed between": {"refresh_at": 4},
    "stopped": {"options": {"stop_exploring_at": 4}},
    "two engines": {"targets": ([FIRST], [SECOND])},
    "packed": {"options": PACKED},
    "compact": {"options": {"storage": "compact"}, "seldom": True},
}
ALIKE_OF_3 = ("plain", "accumulated", "unused parameters", "two engines", "packed", "compact")
OF_DDP = {"bucket_cap_mb", "static_graph", "gradient_as_bucket_view"}

# Hooks that change the numbers, each with the state that it wants.
LOSSY: dict[str, tuple[Made, Callable[[], Any]]] = {
    "sparse_bf16": (sparsely(INNER_HOOKS["sparse_bf16"]), lambda: None),
    "sparse_bf16, packed": (sparsely(INNER_HOOKS["sparse_bf16"]), lambda: None),
    "sparse_fp16": (sparsely(INNER_HOOKS["sparse_fp16"]), lambda: None),
    "wrapper inside": (sparsely(default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)), lambda: None),
    "wrapper outside": (lambda engines: default_hooks.fp16_compress_wrapper(sparsely()(engines)), lambda: None),
    "PowerSGD": (
        sparsely(powerSGD_hook.powerSGD_hook),
        lambda: powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2, min_compression_rate=1),
    ),
}


def reduced(world: int) -> dict[str, dict[str, Any]]:
    """Every way to reduce, beside plain DDP and one process on all shares; fewer of them by three ranks."""
    found: dict[str, dict[str, Any]] = {}
    for name in ALIKE if world == 2 else ALIKE_OF_3:
        changes = ALIKE[name]
        found[name] = {
            "alone": train(world, alone=True, **{key: changes[key] for key in changes.keys() - OF_DDP}),
            "dense": train(world, **changes),
            "sparse": train(world, hook=sparsely(), **changes),
        }
    if world == 3:
        return found
    for name, (hook, state) in LOSSY.items():
        options = PACKED if name.endswith("packed") else None
        found[name] = {"sparse": train(world, hook=hook, state=state(), options=options)}
    found["nested"] = {
        "sparse": train(
            world,
            targets=([FIRST], [SECOND]),
            hook=lambda engines: sparse_all_reduce(engines[0], hook=sparse_all_reduce(engines[1])),
        )
    }

    sizes: list[int] = []
    shapes: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()

    def noting(state, bucket):
        sizes.append(bucket.buffer().numel())
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        shapes.update((tuple(parameter.shape), tuple(gradient.shape)) for parameter, gradient in pairs)
        return default_hooks.allreduce_hook(state, bucket)

    train(world, hook=sparsely(noting))
    found["sent"] = {"sizes": sizes, "shapes": sorted(shapes)}
    return found
