"""Run by test_ranks.py in a process of its own, which forks two or three ranks: `python ranks.py FOLDER RANKS`.

Forking needs a process in which autograd has not run yet, and one import of torch serves all ranks.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from reliability.whole import whole
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lightning_topkast import MaskChange, Ramp, ReservoirActivation, Sparsity, TopKastError
from lightning_topkast.baselines import RigL
from lightning_topkast.distributed import check_ranks_agree
from tests import reductions
from tests.helpers import MIDDLE, Batches, batches, make_callback, make_net, make_trainer, parameters_of

# looks at the whole gradient every third step, of which the ranks send the active entries only in between
RIGL = {"rule": RigL(0.5), "backward_sparsity": 0.75, "stop_updating_at": 100, "strength": None}
VARYING = {"ramp": Ramp(0.25, 0.0, begin=0, end=4), "powerpropagation": 2.0}


class Shares(Batches):
    """Every rank sees its own share of each batch: halves, or thirds of unequal size."""

    def __iter__(self):
        rank, world = dist.get_rank(), dist.get_world_size()
        return iter([tuple(tensor.tensor_split(world)[rank] for tensor in batch) for batch in list.__iter__(self)])


class Hooked(DDPStrategy):
    """DDP with a communication hook, which Lightning itself registers on GPUs only."""

    def __init__(self, hook) -> None:
        super().__init__(start_method="fork")
        self.hook = hook

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(None, self.hook)


class Note(Callback):
    """Writes down what this rank holds after training."""

    def __init__(self, folder: Path, callback) -> None:
        self.folder, self.callback = folder, callback

    def on_train_end(self, trainer, pl_module):
        state = (
            whole(self.callback.topkast.state_dict(gathered=False)),
            parameters_of(pl_module),
            self.callback.topkast.refresh_count,
        )
        torch.save((*state, _sizes), self.folder / f"trained-{trainer.global_rank}.pt")


class Drift(Callback):
    """Changes a parameter on one rank only."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 0:
            with torch.no_grad():
                pl_module.layers[2].weight.mul_(torch.rand(16, 16, generator=torch.Generator().manual_seed(1)))


class CountHooks(Callback):
    """Notes how many hooks DDP has, whenever training starts; the list is DDP's own, which has no public one."""

    def __init__(self) -> None:
        self.hooks = []

    def on_train_start(self, trainer, pl_module):
        self.hooks.append([hook.__name__ for hook, _ in trainer.strategy.model._comm_hooks])


class Unalike(Callback):
    """Lets the ranks begin from different weights, of which DDP takes rank 0's."""

    def setup(self, trainer, pl_module, stage):
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.add_(trainer.global_rank)


def train(
    folder: Path, world: int, *others, accumulate: int = 1, first: tuple = (), strategy_of=None, **changes
) -> None:
    folder.mkdir(exist_ok=True)
    callback = make_callback(**({"keep_last_dense": False, "strength": 1e-2} | changes))
    callbacks = [*first, callback, Note(folder, callback), *(other() for other in others)]
    model = make_net(optimizer="adamw", lr=0.02)
    strategy = "ddp_fork" if strategy_of is None else strategy_of(callback)
    trainer = make_trainer(
        folder, *callbacks, strategy=strategy, devices=world, use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(model, Shares(batches()), Shares(batches(2, seed=2)))


_sizes: list[int] = []  # of every rank, which is forked and has its own


def noting(state, bucket):
    _sizes.append(bucket.buffer().numel())
    return allreduce_hook(state, bucket)


def refusal(*arguments, **changes) -> str:
    """What stops this training; the launcher wraps what a rank raised."""
    try:
        train(*arguments, **changes)
    except Exception as error:
        return str(error)
    return "nothing"


def ranks(rank: int, folder: Path, world: int) -> None:
    """What the ranks find out without a Trainer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(reductions.reduced(world), folder / f"reduced-{rank}.pt")
    found = {}
    generator = torch.Generator().manual_seed(0)
    same = torch.randint(3, (5, 7), dtype=torch.uint8, generator=generator)
    check_ranks_agree(["same", "also"], [same, same.T])
    found["agreeing"] = "passed"

    swapped = same.clone().view(-1)
    if rank:
        first, second = (swapped == 2).nonzero()[0], (swapped == 0).nonzero()[0]
        swapped[first], swapped[second] = 0, 2
    try:
        check_ranks_agree(["same", "swapped"], [same, swapped.view(5, 7)])
    except TopKastError as error:
        found["differing"] = str(error)

    mask = torch.rand(10, generator=generator) < 0.5
    other = torch.rand(10, generator=generator) < 0.5
    # shares of unequal size: a mean of means would be wrong
    mine = slice(3 * rank, 3 * rank + 3 if rank < world - 1 else 10)
    for metric, arguments in (
        (Sparsity(), (mask,)),
        (MaskChange(), (mask, other)),
        (ReservoirActivation(), (mask, other)),
    ):
        metric.update(*(argument[mine] for argument in arguments))
        found[type(metric).__name__] = metric.compute().item()
        alone = type(metric)(sync_on_compute=False)
        alone.update(*arguments)
        found[f"{type(metric).__name__} of everything"] = alone.compute().item()
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


def hooks_of_two_fits(folder: Path) -> list[list[str]]:
    """The hooks of one process in DDP, which launches no others, that fits twice."""
    count, callback, model = CountHooks(), make_callback(all_reduce="sparse"), make_net()
    for _ in range(2):
        make_trainer(folder, callback, count, strategy=DDPStrategy()).fit(model, batches())
    return count.hooks


def main(folder: Path, world: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mp.start_processes(ranks, (folder, world), nprocs=world, start_method="fork")
    train(folder / "masked", world)
    train(folder / "packed", world, storage="packed")
    train(folder / "accumulated", world, accumulate=2, update_every=2, exploration="random")
    train(folder / "sparse", world, all_reduce="sparse")
    if world == 3:
        return
    train(folder / "unalike", world, first=(Unalike(),), storage="packed")
    train(folder / "compact", world, accumulate=2, update_every=2, storage="compact")
    train(folder / "rigl", world, all_reduce="sparse", **RIGL)
    train(folder / "varying", world, all_reduce="sparse", **VARYING)
    train(folder / "composed", world, strategy_of=lambda callback: Hooked(callback.all_reduce_hook(noting)))
    refusals = {
        "drifted": refusal(folder / "drifted", world, Drift, update_every=4),
        "hooked": refusal(
            folder / "hooked", world, all_reduce="sparse_bf16", strategy_of=lambda _: Hooked(allreduce_hook)
        ),
        "differing": refusal(
            folder / "differing",
            world,
            include=[MIDDLE],
            all_reduce="sparse",
            first=(make_callback(include=["layers.0.weight"]),),
        ),
    }
    (folder / "refusals.json").write_text(json.dumps(refusals))
    (folder / "hooks.json").write_text(json.dumps(hooks_of_two_fits(folder / "twice")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
