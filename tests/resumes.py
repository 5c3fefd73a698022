"""Run by test_resume.py in a process of its own, which forks ranks: `python resumes.py FOLDER`.

Every way to train is run whole, resumed in the middle of an epoch, and that run's checkpoint of an epoch's end again.
"""

import itertools
import logging
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback

from lightning_topkast import AtomicCheckpointIO
from tests.helpers import Resumable, batches, make_callback, make_net, make_trainer, parameters_of

WAYS = [
    (execution, ranks, accumulate)
    for ranks in (2, 1)  # ranks are forked: before autograd has run in this process
    for execution, accumulate in itertools.product(("masked", "packed"), (1, 2))
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
            "θ": {name: weight.theta() for name, weight in weights.items()},
            "sets": self.callback.topkast.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
        }
        torch.save(state, self.folder / f"trained-{trainer.global_rank}.pt")


def train(folder: Path, execution: str, ranks: int, accumulate: int, ckpt_path: Path | None = None) -> None:
    folder.mkdir(parents=True)
    callback = make_callback(update_every=4, penalty_strength=1e-2, keep_last_dense=False, execution=execution)
    model = make_net(seed=0 if ckpt_path is None else 7, optimizer="adamw", lr=0.02)
    changes = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False} if ranks == 2 else {}
    trainer = make_trainer(
        folder, callback, Saves(folder, callback), max_epochs=3, accumulate_grad_batches=accumulate,
        plugins=[AtomicCheckpointIO()], **changes,
    )  # fmt: skip
    trainer.fit(model, Shares(batches(5 * accumulate)), Shares(batches(2, seed=2)), ckpt_path=ckpt_path)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for way in WAYS:
        own = folder / "-".join(map(str, way))
        train(own / "whole", *way)
        train(own / "from the middle", *way, own / "whole" / "middle.ckpt")
        train(own / "from its end", *way, own / "from the middle" / "end.ckpt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
