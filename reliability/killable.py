"""A small training that says where it stands, goes on from its checkpoint, and can be told to wait to be killed."""

import io
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from loader import Resumable
from nouns import nouns
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from whole import whole

from lightning_topkast import AtomicCheckpointIO, StepBoundaryCheckpoint, TopKastCallback
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.engine.refresh import Refresher
from lightning_topkast.weights import MaskedWeight, PackedWeight

BATCHES, EPOCHS, SAVE_EVERY = 13, 5, 3
STUCK = timedelta(seconds=60)  # how long a rank waits for another


class Moment(IntEnum):
    """What a process is doing."""

    STARTING, TRAINING, CHOOSING, REFRESHING, WRITING, ENDED = range(6)


@dataclass(frozen=True)
class Kind:
    """One way to train."""

    storage: str
    ranks: int
    accumulate: int = 1
    delay: int = 0
    strategy: str = "ddp"
    plugin: str = "ours"

    def __str__(self) -> str:
        strategy = f", {self.strategy}" if self.ranks > 1 else ""
        delay = f", delay {self.delay}" if self.delay else ""
        ranks = f"{self.ranks} rank{'s'[: self.ranks - 1]}"
        return f"{self.storage}, {ranks}{strategy}, accumulate {self.accumulate}{delay}"


@dataclass(frozen=True)
class Target:
    """Where a process shall wait to be killed: the `nth` time that `rank` gets there."""

    rank: int
    moment: Moment
    nth: int
    part: int = 0  # of writing: in the middle, before it is on the disk, before it is in place, after that


class Place:
    """Where every rank stands, in memory that parent and children share."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 64)

    def clear(self) -> None:
        self._shared[:] = bytes(64)

    def moment(self, rank: int) -> Moment:
        return Moment(self._shared[2 * rank])

    def set_moment(self, rank: int, moment: Moment) -> None:
        self._shared[2 * rank] = moment

    def waits(self, rank: int) -> bool:
        return bool(self._shared[2 * rank + 1])

    def wait(self, rank: int) -> None:
        """Wait to be killed; if another rank is, go on after a while."""
        self._shared[2 * rank + 1] = 1
        time.sleep(0.3)


class Batches(Resumable):
    """A rank's share of fixed batches, which go on in the middle of an epoch."""

    def __init__(self, rank: int, ranks: int) -> None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(BATCHES, 8, 12, generator=generator)
        y = torch.stack([x[..., 0] * x[..., 1], x[..., 2].sin()], dim=-1)
        own = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        super().__init__(zip(x[:, own], y[:, own], strict=True))


class Net(LightningModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Linear(12, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 48), nn.Tanh(), nn.Linear(48, 2)
        )

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.layers, FSDPModule):
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BATCHES * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Reports(Callback):
    def __init__(self, place: Place) -> None:
        self.place = place

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.place.set_moment(trainer.global_rank, Moment.TRAINING)


def train(kind: Kind, folder: Path, rank: int, port: int, place: Place, target: Target | None) -> None:
    """Train, from the checkpoint if there is one, and leave everything the run consists of in `folder`."""
    torch.set_num_threads(1)
    report(place, rank, target)
    changes: dict[str, Any] = {}
    if kind.ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        if kind.strategy == "ddp":
            changes["strategy"] = DDPStrategy(process_group_backend="gloo", timeout=STUCK)
        else:
            changes["strategy"] = ModelParallelStrategy(kind.ranks, 1, True, "gloo", STUCK)
    callback = TopKastCallback(
        0.8, 0.6, **nouns(update_every=4, delay=kind.delay, shrinkage=1e-3, storage=kind.storage, kernels="torch")
    )
    # a folder of shards would be half old and half new if it were written over
    name = "{step}" if kind.strategy == "fsdp2" else "last"
    saving = StepBoundaryCheckpoint(
        folder / "checkpoints", name, every_n_train_steps=SAVE_EVERY, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator="cpu", devices=kind.ranks, max_epochs=EPOCHS, accumulate_grad_batches=kind.accumulate,
        callbacks=[Reports(place), callback, saving], use_distributed_sampler=False, default_root_dir=folder,
        plugins=[AtomicCheckpointIO() if kind.plugin == "ours" else TorchCheckpointIO()],
        logger=False, enable_progress_bar=False, enable_model_summary=False, **changes,
    )  # fmt: skip
    path, _ = newest_checkpoint(folder)
    model = Net(seed=7 if path else 0)
    trainer.fit(model, Batches(rank, kind.ranks), ckpt_path=path, weights_only=True)
    place.set_moment(rank, Moment.ENDED)
    assert callback.topkast is not None
    result = {
        "model": whole(model.state_dict()),
        "θ": {name: whole(weight.theta()) for name, weight in callback.topkast.weights.items()},
        "sets": whole(callback.topkast.state_dict(gathered=False)),
        "optimizer": whole(trainer.optimizers[0].state_dict()),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "steps": trainer.global_step,
    }
    with (folder / f"ended-{rank}.pt").open("wb") as file:
        torch.save(result, file)


def newest_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The newest complete checkpoint, if there is one, and its step."""
    return RunFolder(folder).newest_checkpoint(lambda _: None) or (None, 0)


def report(place: Place, rank: int, target: Target | None) -> None:
    """Have this process say where it stands, and wait at its target."""
    visits = 0

    def reached(moment: Moment, part: int = 0) -> None:
        nonlocal visits
        if target is not None and (rank, moment, part) == (target.rank, target.moment, target.part):
            visits += 1
            if visits == target.nth:
                place.wait(rank)

    @contextmanager
    def during(moment: Moment) -> Iterator[None]:
        before = place.moment(rank)
        place.set_moment(rank, moment if before != Moment.STARTING else before)  # the first selection is no refresh
        try:
            yield
        finally:
            place.set_moment(rank, before)

    def refreshing(method: Callable[..., None]) -> Callable[..., None]:
        @wraps(method)
        def wrapped(*arguments: Any) -> None:
            with during(Moment.REFRESHING):
                method(*arguments)

        return wrapped

    def applying(method: Callable[..., None]) -> Callable[..., None]:
        @wraps(method)
        def wrapped(*arguments: Any) -> None:
            method(*arguments)
            if place.moment(rank) == Moment.REFRESHING:
                reached(Moment.REFRESHING)  # one weight has its new sets, others do not

        return wrapped

    Refresher.refresh = refreshing(Refresher.refresh)  # type: ignore[method-assign]
    Refresher._apply = refreshing(Refresher._apply)  # type: ignore[method-assign]
    MaskedWeight.apply = applying(MaskedWeight.apply)  # type: ignore[method-assign]
    PackedWeight.apply = applying(PackedWeight.apply)  # type: ignore[method-assign]

    def choosing(method: Callable[..., None]) -> Callable[..., None]:
        @wraps(method)
        def wrapped(*arguments: Any) -> None:
            reached(Moment.CHOOSING)  # in the background: other ranks wait for the places of this one's sets
            method(*arguments)

        return wrapped

    PackedWeight.prepare = choosing(PackedWeight.prepare)  # type: ignore[method-assign]

    def writing(method: Callable[..., None]) -> Callable[..., None]:
        @wraps(method)
        def wrapped(*arguments: Any, **others: Any) -> None:
            with during(Moment.WRITING):
                method(*arguments, **others)

        return wrapped

    save, fsync, replace = torch.save, os.fsync, os.replace

    def write_in_halves(data: bytes, goal: Any, part: int) -> None:
        goal.write(data[: len(data) // 2])
        goal.flush()
        if place.moment(rank) == Moment.WRITING:
            reached(Moment.WRITING, part)
        goal.write(data[len(data) // 2 :])

    def save_in_halves(content: Any, goal: Any) -> None:
        if isinstance(goal, Path):  # of a folder of shards, the last file
            reached(Moment.WRITING)
            return save(content, goal)
        buffer = io.BytesIO()
        save(content, buffer)
        write_in_halves(buffer.getvalue(), goal, part=0)

    def sync(descriptor: int) -> None:
        reached(Moment.WRITING, 1)
        fsync(descriptor)

    def put_in_place(source: Any, goal: Any) -> None:
        reached(Moment.WRITING, 2)
        replace(source, goal)
        reached(Moment.WRITING, 3)

    for writer in (AtomicCheckpointIO, TorchCheckpointIO, ModelParallelStrategy):
        writer.save_checkpoint = writing(writer.save_checkpoint)  # type: ignore[method-assign]
    torch.save, os.fsync, os.replace = save_in_halves, sync, put_in_place  # type: ignore[assignment]
    # how Lightning's own plugin puts a file in place from another file system
    shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
    shutil.copyfileobj = lambda source, goal, *_: write_in_halves(source.read(), goal, part=2)
