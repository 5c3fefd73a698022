"""A user's LightningModule in the application: it brings its own optimizer, and the application does not pretend."""

import sys

import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run.train import train

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

OWN = (
    "model=custom", "model._target_=tests.app.own_module.OwnModule", "recipe.monitor=own/loss", "recipe.mode=min",
    "recipe.keep_first_dense=false", "logger=none", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1",
    "test=false", "callbacks.progress=null",
)  # fmt: skip


@pytest.mark.parametrize("how", ["auto", "file", "resume"])
def test_run_of_ones_own_module_resumes(cli, tmp_path, how):
    folder = f"hydra.run.dir={tmp_path}/run"
    assert cli(*OWN, folder, "trainer.max_epochs=1")[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    how_to = {"auto": [*OWN, folder, "ckpt_path=auto"], "file": [*OWN, folder, f"ckpt_path={last}"]}
    code, _, err = cli(*how_to.get(how, ["--resume", tmp_path / "run", "--trust"]), "trainer.max_epochs=2")
    assert code == 0, err
    assert torch.load(last, weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    "override", ["optimizer.lr=0.1", "optimizer=sgd", "scheduler=none", "task.label_smoothing=0.1"]
)
def test_override_without_effect_is_refused_in_one_line(cli, override):
    code, _, err = cli(*OWN, override, "trainer.max_epochs=1")
    assert code == 2
    assert f"topkast-train: {override} has no effect: OwnModule is a LightningModule" in err.strip().splitlines()[-1]


def test_files_of_a_run_hold_no_variable_that_the_module_was_given(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2-of-the-module")
    own = [text for text in OWN if text != "logger=none"]
    secret = "${oc.env:A_SECRET}"
    given = [f"+model.token={secret}", f"+model.nested={{a: '{secret}'}}", "+model.width=16"]
    code, out, err = cli(*own, "logger=csv", *given, f"hydra.run.dir={tmp_path}/run", "trainer.max_epochs=1")
    assert code == 0, err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if b"hunter2" in path.read_bytes()]
    assert "the module has hunter2-of-the-module" in out  # which its own code needs
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert saved == {"token": secret, "nested": {"a": secret}, "width": 16}
    code, _, err = cli(*own, f"+optimizer.key={secret}")
    assert "has no effect" in err
    assert "hunter2" not in err


def test_settings_without_effect_are_not_logged(composed, monkeypatch):
    logged = []
    monkeypatch.setattr("lightning_topkast.app.run.train.log_config", lambda loggers, config: logged.append(config))
    train(composed(*OWN, "trainer.max_epochs=1"))
    assert "model" in logged[0]
    assert not logged[0].keys() & {"optimizer", "scheduler", "task"}


def test_small_dense_in_an_application_of_ones_own_refuses_the_wide_network(composed):
    callback = instantiate(composed("sparsity=small_dense").sparsity, _convert_="all")
    trainer = Trainer(callbacks=[callback], max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(AppError, match="narrows no network by itself"):
        trainer.fit(BoringModel())


@pytest.mark.parametrize("sweep", [False, True])
def test_run_that_diverged_says_so_and_fails_but_lets_a_sweep_go_on(cli, tmp_path, sweep):
    many = ["-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep"] if sweep else []
    code, _, err = cli(
        *many, "sparsity=dense", "optimizer=sgd", "optimizer.lr=1e30", "scheduler=none", "logger=none",
        "trainer.limit_train_batches=4", "trainer.max_epochs=1", "callbacks.progress=null",
    )  # fmt: skip
    assert code == (0 if sweep else 2), err
    said = [line for line in err.splitlines() if "the run diverged" in line]
    assert len(said) == (2 if sweep else 1)


DATA = """
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Data(LightningDataModule):
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.set = TensorDataset(torch.randn(size, 1, 8, 8), torch.randint(2, (size,)))

    def train_dataloader(self):
        return DataLoader(self.set, 8)

    val_dataloader = test_dataloader = train_dataloader
"""


NET = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 2))
"""


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A module `some_data` in the present folder, and an option of the group `data` in `conf`."""
    (tmp_path / "some_data.py").write_text(DATA)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("_target_: some_data.Data\nsize: 24\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "some_data", raising=False)
    return tmp_path


@pytest.mark.parametrize("custom", [True, False])
def test_data_of_ones_own_is_trained_on(cli, own_data, monkeypatch, custom):
    monkeypatch.syspath_prepend(own_data)
    how = ["data=custom", "data._target_=some_data.Data"] if custom else ["data=mine", "--config-dir", "conf"]
    code, _, err = cli(*OWN, *how, "trainer.max_epochs=1", "trainer.log_every_n_steps=1", "hydra.run.dir=run")
    assert code == 0, err
    assert (own_data / "run" / "result.json").exists()


def test_module_in_the_present_folder_that_python_does_not_find_is_named_with_the_way_out(cli, own_data):
    code, _, err = cli(*OWN, "data=custom", "data._target_=some_data.Data")
    assert code == 2
    assert "begin the command with PYTHONPATH=. so that Python finds 'some_data'" in err.strip().splitlines()[-1]


def test_network_for_data_of_unknown_classes_is_told_to_name_them(cli, own_data, monkeypatch):
    monkeypatch.syspath_prepend(own_data)
    code, _, err = cli("model=custom", "model._target_=torch.nn.Flatten", "data=custom", "data._target_=some_data.Data")
    assert code == 2
    assert "set task.num_classes=10" in err.strip().splitlines()[-1]


@pytest.mark.parametrize("model", ["model=custom", "model=mlp"])
def test_network_trains_on_data_of_ones_own_that_says_nothing_of_its_sizes(cli, own_data, monkeypatch, model):
    monkeypatch.syspath_prepend(own_data)
    (own_data / "some_net.py").write_text(NET)
    own = (
        ("model._target_=some_net.Net",)
        if model == "model=custom"
        else ("model.num_classes=2", "model.input_shape=[1,8,8]")
    )
    more = ("trainer.max_epochs=1", "trainer.log_every_n_steps=1", "hydra.run.dir=run", "logger=none")
    data = ("data=custom", "data._target_=some_data.Data", "task.num_classes=2")
    code, _, err = cli(model, *own, *data, *more)
    assert code == 0, err


def test_run_whose_best_checkpoint_is_not_finite_has_diverged_and_is_recorded(cli, tmp_path):
    """Its accuracy is that of a guess, which is finite, so that a checkpoint of NaN is the best."""
    fast = (
        "optimizer=sgd",
        "optimizer.lr=1e30",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=4",
        "logger=none",
    )
    code, _, err = cli(*fast, f"hydra.run.dir={tmp_path}/run", "report=false")
    assert code == 2
    assert "the run diverged" in err.splitlines()[-1]
    assert "were to be loaded" not in err
    assert '"status": "diverged"' in (tmp_path / "run" / "result.json").read_text()
