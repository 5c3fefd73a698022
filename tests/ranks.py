"""Run by test_ranks.py in a process of its own, which forks two ranks: `python ranks.py FOLDER`.

Forking needs a process in which autograd has not run yet, and one import of torch serves both ranks.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback

from lightning_topkast import MaskChange, ReservoirActivation, Sparsity, TopKastError
from lightning_topkast.distributed import check_ranks_agree
from tests.helpers import Batches, batches, make_callback, make_net, make_trainer, parameters_of


class Shares(Batches):
    """Every rank sees its own half of each batch."""

    def __iter__(self):
        half = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
        return iter([(x[half], y[half]) for x, y in list.__iter__(self)])


class Note(Callback):
    """Writes down what this rank holds after training."""

    def __init__(self, folder: Path, callback) -> None:
        self.folder, self.callback = folder, callback

    def on_train_end(self, trainer, pl_module):
        state = self.callback.topkast.state_dict(), parameters_of(pl_module), self.callback.topkast.refresh_count
        torch.save(state, self.folder / f"trained-{trainer.global_rank}.pt")


class Drift(Callback):
    """Changes a parameter on one rank only."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 0:
            with torch.no_grad():
                pl_module.layers[2].weight.mul_(torch.rand(16, 16, generator=torch.Generator().manual_seed(1)))


class Unalike(Callback):
    """Lets the ranks begin from different weights, of which DDP takes rank 0's."""

    def setup(self, trainer, pl_module, stage):
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.add_(trainer.global_rank)


def train(folder: Path, *others, accumulate: int = 1, first: tuple = (), **changes) -> None:
    folder.mkdir(exist_ok=True)
    callback = make_callback(keep_last_dense=False, penalty_strength=1e-2, **changes)
    callbacks = [*first, callback, Note(folder, callback), *(other() for other in others)]
    model = make_net(optimizer="adamw", lr=0.02)
    trainer = make_trainer(
        folder, *callbacks, strategy="ddp_fork", devices=2, use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(model, Shares(batches()), Shares(batches(2, seed=2)))


def ranks(rank: int, folder: Path) -> None:
    """What the two ranks find out without a Trainer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
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
    mine = slice(0, 3) if rank == 0 else slice(3, 10)  # shares of unequal size: a mean of means would be wrong
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


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mp.start_processes(ranks, (folder,), nprocs=2, start_method="fork")
    train(folder)
    train(folder / "accumulated", accumulate=2, update_every=2, exploration="random")
    train(folder / "packed", execution="packed")
    train(folder / "unalike", first=(Unalike(),), execution="packed")
    train(folder / "compact", accumulate=2, update_every=2, execution="compact")
    try:
        train(folder / "drifted", Drift, update_every=4)
    except Exception as error:  # the launcher wraps what a rank raised
        (folder / "drift.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
