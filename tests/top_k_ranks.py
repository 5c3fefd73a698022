"""Run by test_top_k_all_reduce.py in a process of its own, which forks the ranks: `python top_k_ranks.py FOLDER RANKS`.

The ranks train in DDP with the hook; rank 0 also trains on all shares alone, with top-k and feedback written once more,
in dense tensors. Then Trainers of as many ranks train, stop and resume.
"""

import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_topkast import TopKast, TopKGradients
from lightning_topkast.training.all_reduce import Hook
from lightning_topkast.training.top_k_all_reduce import TopKAllReduce
from tests.helpers import SaveAfter, batches, make_callback, make_net, make_trainer, nouns, parameters_of
from tests.ranks import Shares
from tests.reductions import FIRST, SECOND, STEPS, Mixed, shares

DENSITY = 0.2
SELDOM = "seldom.weight"


class Run(NamedTuple):
    """What training in DDP and training alone have in common."""

    storage: str = "masked"
    accumulate: int = 1
    channels_last: bool = False
    seldom: bool = False
    targets: Any = (None,)
    stop_exploring_at: int | None = None


# each with options of DDP
VARIANTS: dict[str, tuple[Run, dict[str, Any]]] = {
    "masked": (Run(), {}),
    "packed": (Run("packed"), {}),
    "accumulated": (Run(accumulate=2), {}),
    "channels-last": (Run(channels_last=True), {}),
    "unused parameters": (Run(seldom=True), {}),
    "unused packed parameters": (Run("packed", seldom=True), {}),
    "tiny buckets": (Run(), {"bucket_cap_mb": 1e-4}),
    "static graph": (Run(), {"static_graph": True}),
    "views of buckets": (Run("packed"), {"gradient_as_bucket_view": True}),
    "two engines": (Run(targets=([FIRST], [SECOND])), {}),
    "stopped": (Run(stop_exploring_at=4), {}),
    "stopped and packed": (Run("packed", stop_exploring_at=4), {}),
}


def begin(run: Run):
    torch.manual_seed(0)
    model = Mixed().to(memory_format=torch.channels_last if run.channels_last else torch.preserve_format)
    of_storage = {"storage": "packed", "kernels": "torch"} if run.storage == "packed" else {}
    options = {"update_every": 3, "strength": 1e-2, "stop_exploring_at": run.stop_exploring_at} | of_storage
    engines = [TopKast(model, 0.75, 0.5, **nouns(include=include, **options)) for include in run.targets]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    for engine in engines:
        engine.attach(optimizer)
    return model, engines, optimizer


def found_in(model: nn.Module, engines: list[TopKast]) -> dict[str, Tensor]:
    weights = {name: weight for engine in engines for name, weight in engine.weights.items()}
    return dict(model.state_dict()) | {f"θ of {name}": weight.theta() for name, weight in weights.items()}


def loss_of(model: nn.Module, share: tuple[Tensor, Tensor], seldom: bool, step: int, turn: int) -> Tensor:
    x, y = share
    return nn.functional.mse_loss(model(x * (turn + 1), not seldom or step % 2 == 1), y)


def train(world: int, run: Run, inner: Hook = allreduce_hook, state: Any = None, **of_ddp: Any) -> dict[str, Tensor]:
    """Train in DDP with the hook."""
    model, engines, optimizer = begin(run)
    ddp = DistributedDataParallel(model, find_unused_parameters=run.seldom, **of_ddp)
    compressed = TopKAllReduce(*engines, gradients=TopKGradients(DENSITY), hook=inner)
    ddp.register_comm_hook(state, compressed.hook)
    for step in range(STEPS):
        for turn in range(run.accumulate):
            ddp.require_backward_grad_sync = turn == run.accumulate - 1
            loss_of(ddp, shares(step, world)[dist.get_rank()], run.seldom, step, turn).backward()
        optimizer.step()
        optimizer.zero_grad()
    residuals = {f"residual of {name}": saved["values"] for name, saved in compressed.state_dict().items()}
    return found_in(model, engines) | residuals


def train_alone(world: int, run: Run) -> dict[str, Tensor]:
    """Train on the shares of all ranks, one after the other, each with a dense residual of its own."""
    model, engines, optimizer = begin(run)
    weights = {name: weight for engine in engines for name, weight in engine.weights.items()}
    left = {name: [torch.zeros(weight.shape) for _ in range(world)] for name, weight in weights.items()}
    parameters = dict(model.named_parameters())
    by_parameter = {weight.parameter: weight for weight in weights.values()}
    for step in range(STEPS):
        gradients = []
        for rank in range(world):
            for turn in range(run.accumulate):
                loss_of(model, shares(step, world)[rank], run.seldom, step, turn).backward()
            gradients.append({name: p.grad for name, p in parameters.items()})
            optimizer.zero_grad()
        for name, parameter in parameters.items():
            given = [each[name] for each in gradients]
            if given[0] is None:  # of a layer that no rank has used
                continue
            if (weight := by_parameter.get(parameter)) is None:
                parameter.grad = sum(each / world for each in given)
                continue
            b = weight.updated
            order = weight.sets.indices().long() if weight.is_packed else None
            mean = torch.zeros(weight.shape)
            for rank, gradient in enumerate(given):
                if order is not None:
                    gradient = torch.zeros(weight.size).index_copy_(0, order, gradient[: len(order)]).view(weight.shape)
                total = (left[weight.name][rank] + gradient) * b
                largest = total.view(-1).abs().topk(max(1, round(DENSITY * int(b.sum())))).indices
                sent = torch.zeros(weight.size).index_copy_(0, largest, total.view(-1)[largest]).view(weight.shape)
                left[weight.name][rank] = total - sent
                mean += sent / world
            if order is None:
                parameter.grad = torch.empty_like(parameter).copy_(mean)
            else:
                parameter.grad = torch.zeros_like(parameter)
                parameter.grad[: len(order)] = mean.view(-1)[order]
        optimizer.step()
        optimizer.zero_grad()
    assert STEPS % 3 == 1, "a step after the last refresh, with which the residuals have followed"
    residuals = {
        f"residual of {name}": torch.stack([each.view(-1)[weight.updated.reshape(-1)] for each in left[name]])
        for name, weight in weights.items()
    }
    return found_in(model, engines) | residuals


def train_with_two_losses(world: int, **of_ddp: Any) -> list[Tensor]:
    """What a layer has, and has left to send, after a loss that uses it, and after another that does not."""
    model, engines, _ = begin(Run(targets=([SELDOM],)))
    ddp = DistributedDataParallel(model, find_unused_parameters=True, **of_ddp)
    compressed = TopKAllReduce(*engines, gradients=TopKGradients(DENSITY))
    ddp.register_comm_hook(None, compressed.hook)
    seen = []
    for seldom in (True, False):
        x, y = shares(0, world)[dist.get_rank()]
        nn.functional.mse_loss(ddp(x, seldom), y).backward()
        left = [residual.values.clone() for residual in compressed._residuals.values()]
        seen += [model.seldom.weight.grad.clone(), *left]
    return seen


def ranks(rank: int, folder: Path, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    found: dict[str, Any] = {}
    for name, (run, of_ddp) in VARIANTS.items():
        # all of them alone, since refreshes compare the sets of all ranks
        found[name] = {"hook": train(world, run, **of_ddp), "alone": train_alone(world, run)}
    found["two losses"] = [train_with_two_losses(world, gradient_as_bucket_view=view) for view in (False, True)]
    low_rank = powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2, min_compression_rate=1)
    inside = {"PowerSGD": (powerSGD_hook.powerSGD_hook, low_rank), "16 bits": (fp16_compress_hook, None)}
    for name, (hook, state) in inside.items():
        found[name] = train(world, Run(), hook, state)
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


# --- Trainers -----------------------------------------------------------------------------------------------------


class Keep(Callback):
    """Writes down what this rank holds after training, and what it has left to send."""

    def __init__(self, path: Path, callback: Any) -> None:
        self.path, self.callback = path, callback

    def on_train_end(self, trainer, pl_module):
        left = {weight.name: each.values for weight, each in self.callback._compressed._residuals.items()}
        thetas = {name: weight.theta() for name, weight in self.callback.topkast.weights.items()}
        torch.save((parameters_of(pl_module), thetas, left), f"{self.path}-{trainer.global_rank}.pt")


def fit(path: Path, world: int, storage: str, epochs: int, *others, ckpt_path: Path | None = None) -> None:
    callback = make_callback(storage=storage, all_reduce=TopKGradients(0.3), keep_last_dense=False, strength=1e-2)
    callbacks = [callback, Keep(path, callback), *others]
    trainer = make_trainer(
        path.parent, *callbacks, strategy="ddp_fork", devices=world, use_distributed_sampler=False, max_epochs=epochs
    )
    model = make_net(optimizer="adamw", lr=0.02)
    trainer.fit(model, Shares(batches(5)), Shares(batches(2, seed=2)), ckpt_path=ckpt_path)


def fit_twice(path: Path) -> None:
    """One process in DDP, which launches no others: what is left to send after a fit, and at the start of the next."""
    callback, model, left = make_callback(all_reduce=TopKGradients(0.3)), make_net(), []

    class Look(Callback):
        def look(self, trainer, pl_module):
            left.append([each.values.clone() for each in callback._compressed._residuals.values()])

        on_train_start = on_train_end = look

    for _ in range(2):
        make_trainer(path.parent, callback, Look(), strategy=DDPStrategy()).fit(model, batches())
    torch.save(left, path)


def main(folder: Path, world: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mp.start_processes(ranks, (folder, world), nprocs=world, start_method="fork")
    for storage in ("masked", "packed"):
        saved = folder / f"{storage}.ckpt"
        fit(folder / f"{storage}-whole", world, storage, 4, SaveAfter(saved, 1))
        fit(folder / f"{storage}-resumed", world, storage, 4, ckpt_path=saved)
    if world == 2:
        fit_twice(folder / "twice.pt")
    if world == 3:  # a checkpoint of three ranks goes on with two
        fit(folder / "fewer", 2, "masked", 4, ckpt_path=folder / "masked.ckpt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
