"""Small models, data and checks shared by the tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from reliability.loader import Resumable  # noqa: F401  the tests' own, by this name
from reliability.nouns import nouns
from torch import Tensor, nn

from lightning_topkast import (
    TopKast,
    TopKastCallback,
)
from tests import processes

has_compiler = shutil.which((os.environ.get("CXX") or "c++").split()[0]) is not None
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no C++ compiler")

OPTIMIZERS = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1),
}


class Net(LightningModule):
    """Two hidden layers: the middle weight is sparse by default, the first and the last stay dense."""

    def __init__(self, optimizer: str = "sgd", lr: float = 0.1, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x).float(), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), batch_size=len(batch[0]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return OPTIMIZERS[self.hparams.optimizer](self.parameters(), self.hparams.lr)


MIDDLE = "layers.2.weight"


def make_net(seed: int = 0, **arguments) -> Net:
    """A `Net` whose weights depend on `seed` alone."""
    torch.manual_seed(seed)
    return Net(**arguments)


class Batches(list):
    """A loader that begins each epoch alike, so that runs can be compared; a plain list means several loaders."""


def batches(count: int = 4, size: int = 8, seed: int = 1) -> Batches:
    """Fixed batches of a small regression."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 6, generator=generator)
    y = torch.stack([x[..., 0] * x[..., 1], x[..., 2].sin()], dim=-1)
    return Batches(zip(x, y, strict=True))


# PyTorch's own kernels, so that no test waits for a compiler or differs without one; tests/test_ops.py has both
DEFAULTS = {
    "forward_sparsity": 0.75,
    "backward_sparsity": 0.5,
    "update_every": 3,
    "strength": 0.0,
    "kernels": "torch",
}


def make_callback(**changes) -> TopKastCallback:
    """75 % forward, 50 % backward sparsity, refreshed every third step, without penalty."""
    return TopKastCallback(**nouns(**(DEFAULTS | changes)))


def make_trainer(folder, *callbacks, **changes) -> Trainer:
    """A quiet CPU Trainer that writes under `folder` only."""
    arguments = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **(arguments | changes))


def fit(trainer: Trainer, model: LightningModule, data: Batches | None = None, ckpt_path=None) -> Trainer:
    """Fit on `data`, or four fixed batches, and validate on two others."""
    # Lightning warns of loaders without the step that would use them, and of such steps without loaders
    validation = batches(2, seed=2) if isinstance(model, Net) else None
    trainer.fit(model, data or batches(), validation, ckpt_path=ckpt_path)
    return trainer


class SaveAfter(Callback):
    """Saves a checkpoint at the end of an epoch; unlike `ModelCheckpoint` it need not be there on resuming."""

    def __init__(self, path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def zero_outside(parameter: Tensor, active: Tensor) -> bool:
    """Whether `parameter` is exactly zero outside the set `active`."""
    return bool((parameter.detach()[~active] == 0).all())


def check_sparse(topkast: TopKast) -> None:
    """The sets of every weight are exact and nested, and the model's parameter is zero outside A."""
    exploring = topkast.exploring
    for name, weight in topkast.weights.items():
        assert dict(topkast.model.named_parameters())[name] is weight.parameter
        assert int(weight.active.sum()) == weight.active_count, name
        assert int(weight.updated.sum()) == (weight.updated_count if exploring else weight.active_count), name
        assert not (weight.active & ~weight.updated).any(), name
        assert 0 < weight.active_count < weight.size
        assert zero_outside(topkast.model.state_dict()[name], weight.active), name


def thetas(topkast: TopKast) -> dict[str, Tensor]:
    """A copy of every stored θ."""
    return {name: weight.theta() for name, weight in topkast.weights.items()}


def plain_path() -> list[str]:
    """`sys.path` for another process, without the torchvision that only tests/app can import."""
    return [path for path in sys.path if Path(path).name != "vision"]


def run_ranks(script: str, folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder that forks ranks, which leave what they find in `folder`."""
    if not hasattr(os, "fork"):
        pytest.skip("ranks are forked")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name(script), folder, *arguments]
    return processes.run(command, env=environment, cwd=folder, check=check)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter; of packed ones α, dense."""
    state = module.state_dict()
    return {name: state[name].clone() for name, _ in module.named_parameters()}


def same(one, other) -> bool:
    """Whether two nested structures of tensors and primitives are equal bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
