"""Run by test_resume.py in a process of its own, which forks ranks: `python resumes.py FOLDER`.

Every way to train is run whole, resumed in the middle of an epoch, and that run's checkpoint of an epoch's end again.
"""

import itertools
import logging
import os
import signal
import socket
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback
from reliability.whole import whole

from lightning_topkast import AtomicCheckpointIO, StepBoundaryCheckpoint
from tests.helpers import Resumable, batches, make_callback, make_net, make_trainer, parameters_of

WAYS = [
    (storage, ranks, accumulate)
    for ranks in (2, 1)  # ranks are forked: before autograd has run in this process
    for storage, accumulate in itertools.product(("masked", "packed"), (1, 2))
]


class Shares(Resumable):
    """A rank's share of each batch."""

    def __iter__(self):
        share = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4) if dist.is_initialized() else slice(None)
        return ((x[share], y[share]) for x, y in super().__iter__())


class Saves(Callback):
    """Saves in the middle of the second epoch and at its end, and what each rank holds after training."""

    def __init__(self, folder: Path, callback) -> None:
        self.folder, self.callback = folder, callback

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 7 and not trainer.fit_loop.epoch_loop._should_accumulate():
            trainer.save_checkpoint(self.folder / "middle.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_step == 10:
            trainer.save_checkpoint(self.folder / "end.ckpt")

    def on_train_end(self, trainer, pl_module):
        weights = self.callback.topkast.weights
        state = {
            "steps": trainer.global_step,
            "parameters": parameters_of(pl_module),
            "θ": {name: whole(weight.theta()) for name, weight in weights.items()},
            "sets": whole(self.callback.topkast.state_dict(gathered=False)),
            "optimizer": trainer.optimizers[0].state_dict(),
        }
        torch.save(state, self.folder / f"trained-{trainer.global_rank}.pt")


def train(
    folder: Path,
    storage: str,
    ranks: int,
    accumulate: int,
    ckpt_path: Path | None = None,
    others=(),
    seed=0,
    **options,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    callback = make_callback(update_every=4, strength=1e-2, keep_last_dense=False, storage=storage)
    model = make_net(seed=seed, optimizer="adamw", lr=0.02)
    changes = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False} if ranks == 2 else {}
    trainer = make_trainer(
        folder, callback, Saves(folder, callback), *others, max_epochs=3, accumulate_grad_batches=accumulate,
        plugins=[AtomicCheckpointIO()], **(changes | options),
    )  # fmt: skip
    trainer.fit(model, Shares(batches(5 * accumulate)), Shares(batches(2, seed=2)), ckpt_path=ckpt_path)


class Signals(Callback):
    """Rank 1 alone gets SLURM's signal, in the middle of a backward pass."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 6 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def requeued_rank(rank: int, folder: Path, port: int, seed: int, *others) -> None:
    """One process of a job of SLURM's: it is signalled, or finds by itself what the signalled one has left."""
    quiet()
    own = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "NNODES": 1, "NODEID": 0, "PROCID": rank, "LOCALID": rank}
    os.environ |= {f"SLURM_{name}": str(value) for name, value in own.items()}
    os.environ |= {"SLURM_JOB_ID": "4217", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "PATH": f"{folder.parent}{os.pathsep}{os.environ['PATH']}"}
    saving = StepBoundaryCheckpoint(folder / "checkpoints", "last", enable_version_counter=False)
    train(folder, "masked", 2, 1, others=[saving, *others], seed=seed, strategy="ddp", enable_checkpointing=True)


def requeue(folder: Path) -> None:
    folder.mkdir()
    command = folder / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/calls"\n')
    command.chmod(0o755)
    for name, seed, others in (("signalled", 0, [Signals()]), ("requeued", 7, [])):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.start_processes(requeued_rank, (folder / "run", port, seed, *others), nprocs=2, start_method="fork")
        for rank in (0, 1):
            (folder / "run" / f"trained-{rank}.pt").rename(folder / f"{name}-{rank}.pt")


def quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def main(folder: Path) -> None:
    quiet()
    requeue(folder / "requeue")
    for way in WAYS:
        own = folder / "-".join(map(str, way))
        train(own / "whole", *way)
        train(own / "from the middle", *way, own / "whole" / "middle.ckpt", seed=7)
        train(own / "from its end", *way, own / "from the middle" / "end.ckpt", seed=8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
