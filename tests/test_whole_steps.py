"""`StepBoundaryCheckpoint`: whatever it saves, a run goes on from it as if it had never stopped."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint

from lightning_topkast import StepBoundaryCheckpoint, TopKastError
from tests.helpers import Resumable, batches, make_callback, make_net, make_trainer, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def run(folder, ckpt_path=None, monitor=None, every_n_train_steps=None, **changes):
    """Train, keeping every checkpoint; return the end, and the checkpoints by their step."""
    checkpoint = StepBoundaryCheckpoint(
        folder, "{step}", monitor=monitor, save_top_k=-1, every_n_train_steps=every_n_train_steps,
        enable_version_counter=False,
    )  # fmt: skip
    callback, model = make_callback(update_every=2, strength=1e-2), make_net(optimizer="adamw", lr=0.02)
    trainer = make_trainer(folder, callback, checkpoint, **({"enable_checkpointing": True} | changes))
    trainer.fit(model, Resumable(batches(7)), batches(2, seed=2), ckpt_path=ckpt_path)
    end = model.state_dict(), callback.topkast.state_dict(), trainer.optimizers[0].state_dict()
    saved = {torch.load(path, weights_only=True)["global_step"]: path for path in folder.glob("*.ckpt")}
    return end, saved, trainer


@pytest.mark.parametrize("monitor", [None, "val_loss"])
def test_validation_in_the_middle_of_a_step_saves_at_its_end(tmp_path, monitor):
    changes = {"val_check_interval": 3, "accumulate_grad_batches": 2, "monitor": monitor}
    whole, saved, _ = run(tmp_path / "whole", **changes)
    assert len(saved) >= 2
    for path in saved.values():
        resumed, _, _ = run(tmp_path / "resumed", ckpt_path=path, **changes)
        assert same(whole, resumed), path


def test_run_that_max_steps_cut_short_goes_on_in_the_middle_of_its_epoch(tmp_path):
    whole, _, _ = run(tmp_path / "whole")
    _, saved, _ = run(tmp_path / "cut", max_steps=10)
    resumed, _, trainer = run(tmp_path / "resumed", ckpt_path=saved[10])
    assert trainer.global_step == 14
    assert same(whole, resumed)


def test_two_that_differ_in_their_files_only_keep_a_state_each(tmp_path):
    first, second = (StepBoundaryCheckpoint(tmp_path, name) for name in ("first", "second"))
    run_trainer = make_trainer(tmp_path, first, second, enable_checkpointing=True, max_epochs=1)
    run_trainer.fit(make_net(), batches(2), batches(2, seed=2))
    states = torch.load(tmp_path / "first.ckpt", weights_only=True)["callbacks"]
    assert {first.state_key, second.state_key} <= set(states)


@pytest.fixture
def ctrl_c():
    """Ctrl-C as a foreground process has it: a shell's background job ignores it, and so does Lightning's once hit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class CtrlC(Callback):
    """Presses it in the optimizer's step or in a batch of the validation, and notes how far the run went on."""

    def __init__(self, times: int = 1, validation: bool = False) -> None:
        self.times, self.validation = times, validation
        self.seen: list[str] = []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.press(trainer, self.validation))

    def press(self, trainer, other: bool) -> None:
        if trainer.global_step == 3 and not other:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
            self.seen.append("pressed")

    def on_train_batch_end(self, *_):
        self.seen.append("step")

    def on_validation_batch_end(self, trainer, *_):
        self.seen.append("validated")
        if trainer.global_step == 7 and self.validation:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_run_that_ctrl_c_ended_goes_on_bit_for_bit(tmp_path, accumulate):
    def train(folder, *callbacks, ckpt_path=None):
        callback, model = make_callback(update_every=2, strength=1e-2), make_net(optimizer="adamw", lr=0.02)
        last = StepBoundaryCheckpoint(folder, "last", enable_version_counter=False, save_on_interrupt=True)
        trainer = make_trainer(
            folder, callback, *callbacks, last, enable_checkpointing=True, accumulate_grad_batches=accumulate,
        )  # fmt: skip
        trainer.fit(model, Resumable(batches(7 * accumulate)), batches(2, seed=2), ckpt_path=ckpt_path)
        return model.state_dict(), callback.topkast.state_dict(), trainer.optimizers[0].state_dict()

    with pytest.raises(SystemExit):
        train(tmp_path / "run", CtrlC())
    saved = tmp_path / "run" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 4
    assert same(train(tmp_path / "whole"), train(tmp_path / "run", ckpt_path=saved))


def test_interrupt_is_saved_by_no_checkpoint_that_follows_a_metric(tmp_path):
    with pytest.raises(TopKastError, match="without monitor"):
        StepBoundaryCheckpoint(tmp_path, monitor="val_loss", save_on_interrupt=True)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("pressed", "seen"),
    [
        (CtrlC(), 3 * ["step"] + ["pressed", "step"]),
        (CtrlC(times=2), 3 * ["step"]),
        (CtrlC(validation=True), 7 * ["step"] + ["validated"]),
    ],
)
def test_ctrl_c_waits_for_the_end_of_the_step(tmp_path, pressed, seen):
    # StepBoundaryCheckpoint comes last: callbacks that make checkpoints do
    trainer = make_trainer(tmp_path, pressed, StepBoundaryCheckpoint(tmp_path), enable_checkpointing=True)
    with pytest.raises(SystemExit):
        trainer.fit(make_net(), batches(7), batches(2, seed=2))
    assert pressed.seen == seen


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_is_given_back_after_the_run(tmp_path):
    during = []

    class Look(Callback):
        def on_train_batch_end(self, *_):
            during.append(signal.getsignal(signal.SIGINT))

    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise ValueError("no")

    class Later(Checkpoint):
        """Comes after ours and before Lightning's own teardown, which may restore the handler too."""

        def on_train_end(self, *_):
            ended.append(signal.getsignal(signal.SIGINT))

        on_exception = on_train_end

    ended = []
    for other in (Look(), Fails()):
        trainer = make_trainer(
            tmp_path, other, StepBoundaryCheckpoint(tmp_path), Later(), enable_checkpointing=True, max_epochs=1
        )
        try:
            trainer.fit(make_net(), batches(2), batches(2, seed=2))
        except ValueError:
            assert isinstance(other, Fails)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.default_int_handler not in during
    assert ended == 2 * [signal.default_int_handler]
