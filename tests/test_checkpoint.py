"""Checkpoints: they resume exactly, and they are the sparse network to anybody without this package."""

import copy
import importlib.util
import os
import sys
import textwrap

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from tests import processes
from tests.helpers import (
    MIDDLE,
    Net,
    Resumable,
    SaveAfter,
    batches,
    check_sparse,
    fit,
    make_callback,
    make_net,
    make_trainer,
    parameters_of,
    plain_path,
    same,
)


def run(folder, callback, model, epochs, ckpt_path=None, others=(), **changes):
    """Fit; return everything a run consists of."""
    trainer = make_trainer(folder, callback, *others, max_epochs=epochs, **changes)
    fit(trainer, model, ckpt_path=ckpt_path)
    return {
        "parameters": parameters_of(model),
        "sets and latent values": callback.topkast.state_dict(),
        "θ": {name: weight.theta() for name, weight in callback.topkast.weights.items()},
        "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()),
        "steps": (trainer.global_step, callback.topkast.step_count),
    }


def check_resumes_exactly(folder, callback_options, model_of, **changes):
    """Four epochs equal two, a checkpoint, and two more with new objects, bit for bit."""
    whole = run(folder, make_callback(**callback_options), model_of(), 4, **changes)
    save = SaveAfter(folder / "half.ckpt", epoch=1)
    run(folder, make_callback(**callback_options), model_of(), 4, others=[save], **changes)
    torch.manual_seed(99)  # a resumed run inherits no generator
    callback = make_callback(**callback_options)
    resumed = run(folder, callback, model_of(seed=7), 4, ckpt_path=folder / "half.ckpt", **changes)
    for part, value in whole.items():
        assert same(value, resumed[part]), part
    check_sparse(callback.topkast)
    return whole


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("update_every", [1, 3, 5])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_resumed_run_equals_the_whole_run_bit_for_bit(tmp_path, optimizer, update_every, accumulate):
    """Four batches an epoch: 3 and 5 put the checkpoint in the middle of a refresh interval."""
    whole = check_resumes_exactly(
        tmp_path,
        {"update_every": update_every, "strength": 1e-2},
        lambda seed=0: make_net(seed=seed, optimizer=optimizer, lr=0.05),
        accumulate_grad_batches=accumulate,
    )
    assert whole["steps"] == ((16, 16) if accumulate == 1 else (8, 8))


@pytest.mark.parametrize(
    "options",
    [
        {"exploration": "random", "seed": 3},
        {"stop_exploring_at": 0.25},
        {"stop_exploring_at": 0.75},
        {"stop_exploring_at": 8},
        {"penalty": "l1", "strength": 1e-2},
        {"penalty": "norm", "strength": 1e-2},
        {"shrinkage": 1e-2},
        {"reset_optimizer_state": False},
        {"distribution": "erk", "keep_first_dense": False, "keep_last_dense": False},
        {"delay": 2},
        {"storage": "packed"},
        {"storage": "packed", "delay": 1, "update_every": 5},
        {"storage": "packed", "stop_exploring_at": 0.25, "shrinkage": 1e-2},
        {"storage": "packed", "exploration": "random", "distribution": "erk", "keep_last_dense": False},
        {"storage": "compact"},
    ],
    ids=str,
)
def test_every_setting_resumes_bit_for_bit(tmp_path, options):
    check_resumes_exactly(tmp_path, options, lambda seed=0: make_net(seed=seed, optimizer="adamw", lr=0.02))


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("options", [{"strength": 1e-2}, {"shrinkage": 1e-2}], ids=str)
def test_run_with_a_scheduler_resumes_bit_for_bit(tmp_path, options):
    def model(seed=0):
        torch.manual_seed(seed)
        return Scheduled()

    check_resumes_exactly(tmp_path, options, model)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_packed_run_resumes_bit_for_bit(tmp_path, optimizer, accumulate):
    check_resumes_exactly(
        tmp_path,
        {"update_every": 3, "strength": 1e-2, "storage": "packed"},
        lambda seed=0: make_net(seed=seed, optimizer=optimizer, lr=0.05),
        accumulate_grad_batches=accumulate,
    )


@pytest.mark.parametrize(("saved", "resumed"), [("masked", "packed"), ("packed", "compact"), ("compact", "masked")])
def test_run_resumes_in_another_execution(tmp_path, saved, resumed):
    options = {"update_every": 3, "strength": 1e-2}
    whole = run(tmp_path, make_callback(**options), make_net(optimizer="adamw", lr=0.02), 4)
    save = SaveAfter(tmp_path / "half.ckpt", epoch=1)
    run(tmp_path, make_callback(storage=saved, **options), make_net(optimizer="adamw", lr=0.02), 4, others=[save])
    callback = make_callback(storage=resumed, **options)
    other = run(tmp_path, callback, make_net(seed=7, optimizer="adamw", lr=0.02), 4, ckpt_path=tmp_path / "half.ckpt")
    for part in ("parameters", "θ"):
        for name, value in whole[part].items():
            torch.testing.assert_close(other[part][name], value, rtol=1e-4, atol=1e-6)
    assert torch.equal(
        callback.topkast.weights[MIDDLE].tiers, whole["sets and latent values"]["weights"][MIDDLE]["tiers"]
    )


def test_bfloat16_run_resumes_bit_for_bit(tmp_path):
    class Half(Net):
        def loss(self, batch):
            return nn.functional.mse_loss(self(batch[0]), batch[1].to(torch.bfloat16))

    def model(seed=0):
        torch.manual_seed(seed)
        return Half(optimizer="adamw", lr=0.05)

    check_resumes_exactly(tmp_path, {}, model, precision="bf16-true")


@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_run_resumes_bit_for_bit_from_the_middle_of_an_epoch(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    results = []
    for path, others in ((None, [Save()]), (tmp_path / "middle.ckpt", [])):
        callback, model = make_callback(update_every=4, strength=1e-2), make_net(optimizer="adamw", lr=0.05)
        trainer = make_trainer(tmp_path, callback, *others, max_epochs=3)
        fit(trainer, model, Resumable(batches()), ckpt_path=path)
        results.append((parameters_of(model), callback.topkast.state_dict(), trainer.optimizers[0].state_dict()))
        assert callback.topkast.step_count == 12
    assert same(*results)


def test_several_optimizers_resume_bit_for_bit(tmp_path):
    from tests.test_lightning import Gan

    results = []
    for path, others in ((None, [SaveAfter(tmp_path / "half.ckpt", 1)]), (tmp_path / "half.ckpt", [])):
        torch.manual_seed(0)
        model, callback = Gan(), make_callback(update_every=3, strength=1e-2)
        fit(make_trainer(tmp_path, callback, *others, max_epochs=4), model, ckpt_path=path)
        assert callback.topkast.state_dict()["steps"] == [16, 8]
        results.append((parameters_of(model), callback.topkast.state_dict()))
    assert same(*results)


def test_saving_changes_nothing(tmp_path):
    class SaveAlways(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "now.ckpt")

    results = []
    for others in ([], [SaveAlways()]):
        results.append(run(tmp_path, make_callback(), make_net(optimizer="adamw", lr=0.05), 2, others=others))
    assert same(*results)


def test_dense_checkpoint_can_be_made_sparse(tmp_path):
    """Resuming a run that had no Top-KAST: the weights are selected where training goes on."""
    dense = make_net()
    fit(make_trainer(tmp_path, SaveAfter(tmp_path / "dense.ckpt", 0), max_epochs=1), dense)
    callback, model = make_callback(), make_net(seed=5)
    fit(make_trainer(tmp_path, callback, max_epochs=3), model, ckpt_path=tmp_path / "dense.ckpt")
    assert callback.topkast.step_count == 8
    check_sparse(callback.topkast)


class Explores(Callback):
    """Notes after each step whether B is larger than A."""

    def __init__(self, callback) -> None:
        self.callback, self.seen = callback, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(self.callback.topkast.weights[MIDDLE].is_exploring)


def test_fraction_of_a_run_is_of_what_remains_after_a_dense_checkpoint(tmp_path, storage):
    fit(make_trainer(tmp_path, SaveAfter(tmp_path / "dense.ckpt", 0), max_epochs=1), make_net())
    callback = make_callback(stop_exploring_at=0.5)
    explores = Explores(callback)
    fit(make_trainer(tmp_path, callback, explores, max_epochs=3), make_net(), ckpt_path=tmp_path / "dense.ckpt")
    assert explores.seen == [True] * 3 + [False] * 5


def test_fraction_of_a_run_is_of_the_whole_after_a_sparse_checkpoint(tmp_path, storage):
    first = make_callback(stop_exploring_at=0.5)
    fit(make_trainer(tmp_path, first, SaveAfter(tmp_path / "sparse.ckpt", 0), max_epochs=3), make_net())
    callback = make_callback(stop_exploring_at=0.5)
    explores = Explores(callback)
    fit(make_trainer(tmp_path, callback, explores, max_epochs=3), make_net(), ckpt_path=tmp_path / "sparse.ckpt")
    assert explores.seen == [True] + [False] * 7


# --- without this package -----------------------------------------------------------------------------------------

PLAIN = """
import torch
from lightning.pytorch import LightningModule
from torch import nn


class Plain(LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)
"""

READ = """
import sys
sys.modules["lightning_topkast"] = None  # any import of it fails
try:
    import tvshim
except ImportError:
    pass
import torch
from plain import Plain

model = Plain.load_from_checkpoint("model.ckpt", weights_only=True)
try:
    import lightning_topkast
except ImportError:
    print("blocked")
torch.save({name: parameter.detach() for name, parameter in model.named_parameters()}, "read.pt")
"""


def python(folder, source: str, *paths) -> str:
    """Run `source` in a new process in `folder`; return what it printed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, *plain_path()])),
        "OMP_NUM_THREADS": "1",
    }
    done = processes.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(source)],
        cwd=folder, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_checkpoint_is_the_sparse_network_without_this_package(tmp_path):
    (tmp_path / "plain.py").write_text(PLAIN)
    spec = importlib.util.spec_from_file_location("plain", tmp_path / "plain.py")
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)

    callback, model = make_callback(), plain.Plain(width=12)
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "model.ckpt")

    assert "blocked" in python(tmp_path, READ, tmp_path)
    read = torch.load(tmp_path / "read.pt", weights_only=True)
    assert same(read, parameters_of(model))
    assert int(torch.count_nonzero(read["layers.1.weight"])) == 36


def test_checkpoint_holds_tensors_and_primitives_only(tmp_path):
    callback = make_callback()
    trainer = fit(make_trainer(tmp_path, callback), make_net(optimizer="adamw"))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    state = saved["callbacks"][callback.state_key]
    assert same(state, callback.topkast.state_dict())
    weight = callback.topkast.weights[MIDDLE]
    assert torch.equal(state["weights"][MIDDLE]["latent"] + saved["state_dict"][MIDDLE], weight.theta())
    assert saved["state_dict"].keys() == make_net().state_dict().keys()


RESUME = """
try:
    import tvshim
except ImportError:
    pass
import sys, torch
from pathlib import Path
from tests.helpers import fit, make_callback, make_net, make_trainer, parameters_of

callback, model = make_callback(update_every=3, strength=1e-2), make_net(seed=5, optimizer="adamw", lr=0.05)
folder = Path.cwd()
fit(make_trainer(folder, callback, max_epochs=4), model, ckpt_path=folder / "half.ckpt")
torch.save((parameters_of(model), callback.topkast.state_dict()), "resumed.pt")
"""


@pytest.mark.slow
def test_run_resumes_bit_for_bit_in_a_new_process(tmp_path):
    def parts():
        return make_callback(update_every=3, strength=1e-2), make_net(optimizer="adamw", lr=0.05)

    callback, model = parts()
    fit(make_trainer(tmp_path, callback, SaveAfter(tmp_path / "half.ckpt", 1), max_epochs=4), model)
    python(tmp_path, RESUME)
    assert same(
        torch.load(tmp_path / "resumed.pt", weights_only=True), (parameters_of(model), callback.topkast.state_dict())
    )
