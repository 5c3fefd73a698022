"""`WholeStepCheckpoint`: whatever it saves, a run goes on from it as if it had never stopped."""

import pytest
import torch

from lightning_topkast import WholeStepCheckpoint
from tests.helpers import Resumable, batches, make_callback, make_net, make_trainer, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def run(folder, ckpt_path=None, monitor=None, every_n_train_steps=None, **changes):
    """Train, keeping every checkpoint; return the end, and the checkpoints by their step."""
    checkpoint = WholeStepCheckpoint(
        folder, "{step}", monitor=monitor, save_top_k=-1, every_n_train_steps=every_n_train_steps,
        enable_version_counter=False,
    )  # fmt: skip
    callback, model = make_callback(update_every=2, penalty_strength=1e-2), make_net(optimizer="adamw", lr=0.02)
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
    first, second = (WholeStepCheckpoint(tmp_path, name) for name in ("first", "second"))
    run_trainer = make_trainer(tmp_path, first, second, enable_checkpointing=True, max_epochs=1)
    run_trainer.fit(make_net(), batches(2), batches(2, seed=2))
    states = torch.load(tmp_path / "first.ckpt", weights_only=True)["callbacks"]
    assert {first.state_key, second.state_key} <= set(states)
