"""SLURM announces a job's end by a signal: the state is saved, the job requeued, and training goes on exactly."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback

from lightning_topkast import AtomicCheckpointIO, StepBoundaryCheckpoint
from lightning_topkast.weights import MaskedWeight, PackedWeight
from tests.helpers import Resumable, batches, make_callback, make_net, make_trainer, parameters_of, same

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals"),
    pytest.mark.filterwarnings("ignore:.*weights_only"),
]


@pytest.fixture
def requeued(tmp_path, monkeypatch):
    """The file that holds what a stand-in for SLURM's `scontrol` was called with."""
    for name in ("NTASKS", "NNODES", "NTASKS_PER_NODE"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "4217")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    return calls


class Signals(Callback):
    """Sends SLURM's signal to this process once, at a certain moment of step 6 (of 5 an epoch), and ends the job."""

    def __init__(self, moment: str) -> None:
        self.moment, self.sent = moment, False

    def send(self, trainer, moment: str, step: int = 6) -> None:
        if moment == self.moment and trainer.global_step == step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        # before ours, which closes the weights
        optimizer.register_step_post_hook(lambda *_: self.send(trainer, "in the optimizer's step"))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.send(trainer, "before a batch")

    def on_after_backward(self, trainer, pl_module):
        self.send(trainer, "in a backward pass")

    def on_validation_batch_start(self, trainer, *_):
        self.send(trainer, "in a validation", step=5)

    def on_train_batch_end(self, trainer, *_):
        self.send(trainer, "after an epoch's last batch", step=10)
        if self.sent and trainer.global_step == 13:
            raise KeyboardInterrupt  # the job's time is over


def train(folder, storage: str, accumulate: int, *others, seed: int = 0):
    callback = make_callback(
        update_every=3, strength=1e-2, exploration="random", keep_last_dense=False, storage=storage
    )
    model = make_net(seed=seed, optimizer="adamw", lr=0.05)
    trainer = make_trainer(
        folder, callback, *others, max_epochs=3, accumulate_grad_batches=accumulate, plugins=[AtomicCheckpointIO()],
        enable_checkpointing=bool(others),
    )  # fmt: skip
    trainer.fit(model, Resumable(batches(5 * accumulate)), batches(2, seed=2))
    return parameters_of(model), callback.topkast.state_dict(), trainer.optimizers[0].state_dict(), trainer.global_step


def whole_steps(folder):
    return StepBoundaryCheckpoint(folder / "checkpoints", "last", enable_version_counter=False)


MOMENTS = [
    "before a batch", "in a backward pass", "in the optimizer's step", "in a refresh", "in a validation",
    "after an epoch's last batch",
]  # fmt: skip


@pytest.mark.parametrize(("storage", "accumulate"), [("masked", 1), ("packed", 2)])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_requeued_job_goes_on_bit_for_bit(tmp_path, requeued, monkeypatch, moment, storage, accumulate):
    folder = tmp_path / "run"
    signals = Signals(moment)
    with monkeypatch.context() as patched:
        kind = MaskedWeight if storage == "masked" else PackedWeight
        apply, applied = kind.apply, []

        def apply_and_send(*arguments):
            apply(*arguments)
            applied.append(arguments)
            # two at the start; then one of two has its new sets at the second refresh, in step 6
            if moment == "in a refresh" and len(applied) == 5:
                signals.sent = True
                os.kill(os.getpid(), signal.SIGUSR1)

        patched.setattr(kind, "apply", apply_and_send)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(folder, storage, accumulate, signals, whole_steps(folder))
    assert signals.sent
    assert requeued.read_text() == "requeue 4217\n"
    assert [path.name for path in folder.glob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    saved = torch.load(folder / "hpc_ckpt_1.ckpt", weights_only=True)
    assert 5 <= saved["global_step"] <= 10

    resumed = train(folder, storage, accumulate, whole_steps(folder), seed=7)
    monkeypatch.delenv("SLURM_NTASKS")  # no job of SLURM any more, which would find the file
    assert same(train(tmp_path / "whole", storage, accumulate), resumed)
    assert resumed[-1] == 15


def test_handler_of_the_user_is_left_alone(tmp_path, requeued):
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(signals.trainer_step()))

    class AtOnce(Signals):
        def on_after_backward(self, trainer, pl_module):
            self.trainer_step = lambda: trainer.global_step
            super().on_after_backward(trainer, pl_module)

        def on_train_batch_end(self, trainer, *_):
            assert not self.sent or seen == [6]

    signals = AtOnce("in a backward pass")
    try:
        train(tmp_path / "run", "masked", 1, signals, whole_steps(tmp_path / "run"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [6]
    assert not requeued.exists()
