"""`train(cfg)` trains for real: accuracy, checkpoints, curves, resuming, and what it prints."""

import csv
import json
import os

import pytest
import torch
from lightning import LightningModule

from lightning_topkast.app.data import Digits
from lightning_topkast.app.models import MLP
from lightning_topkast.app.run.build import build_callbacks, build_model
from lightning_topkast.app.run.loggers import logged_in, wandb_logger
from lightning_topkast.app.run.progress import SparsityProgressBar
from lightning_topkast.app.run.summary import count_weights
from lightning_topkast.app.run.task import ClassificationTask
from lightning_topkast.app.run.train import train
from tests.app.own_module import OwnModule

SHORT = ["trainer.max_epochs=2", "trainer.limit_train_batches=4", "callbacks.progress=null", "logger=none"]


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_default_run_reaches_96_percent_with_nine_tenths_of_the_weights_zero(composed, tmp_path, capsys):
    score = train(composed("logger=csv"))
    printed = capsys.readouterr().out
    accuracy = float(printed.rsplit("test/acc ", 1)[1].split()[0])
    assert accuracy >= 0.96
    assert score >= 0.96
    assert "net.hidden2.weight │ 256×256 │  65,536 │    6,554 │  90.00 %" in printed
    assert f"Run folder:  {tmp_path}/run\n" in printed
    assert f"Checkpoint:  {tmp_path}/run/checkpoints/best.ckpt\n" in printed
    assert "sparsity=0.900" in printed

    curve = [row["topkast/mask_change"] for row in rows(tmp_path / "run" / "csv" / "metrics.csv")]
    assert sum(value not in ("", None) for value in curve) >= 10, "a curve needs points"


def test_checkpoint_loads_without_pickled_objects_and_is_sparse(composed, tmp_path):
    train(composed(*SHORT))
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    weight = state["net.hidden2.weight"]
    assert weight.count_nonzero() <= round(0.1 * weight.numel())


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
# the two runs keep their checkpoints by different names, so one's callback is none of the other's
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_run_resumed_at_an_epochs_end_equals_the_uninterrupted_one(composed, tmp_path):
    whole = ["trainer.max_epochs=3", "trainer.limit_train_batches=7", "callbacks.progress=null", "logger=none"]
    checkpoints = tmp_path / "run" / "checkpoints"
    train(composed(*whole, "+callbacks.last_checkpoint.save_top_k=-1", "callbacks.last_checkpoint.filename='{epoch}'"))
    expected = torch.load(checkpoints / "epoch=2.ckpt", weights_only=True)["state_dict"]
    resume = [f"ckpt_path='{checkpoints}/epoch=0.ckpt'", f"callbacks.last_checkpoint.dirpath={tmp_path}/resumed"]
    train(composed(*whole, *resume, f"callbacks.checkpoint.dirpath={tmp_path}/resumed"))
    resumed = torch.load(tmp_path / "resumed" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(expected[name], resumed[name]) for name in expected if name.startswith("net."))


def test_dense_and_sparse_runs_see_the_same_batches(composed):
    orders = []
    for sparsity in ("dense", "topkast"):
        config = composed(*SHORT, f"sparsity={sparsity}")
        data = Digits(batch_size=config.data.batch_size, seed=config.data.seed)
        data.setup()
        orders.append(list(data.train_dataloader().sampler))
    assert orders[0] == orders[1]


def test_train_returns_the_best_value_of_the_monitored_metric(composed, tmp_path):
    best = train(composed(*SHORT, "recipe.monitor=val/loss", "recipe.mode=min"))
    other = ("callbacks=none", "recipe.monitor=val/loss", f"paths.output_dir={tmp_path}/other")
    last = train(composed(*other, *(o for o in SHORT if "progress" not in o)))
    assert 0 < best <= last


@pytest.mark.filterwarnings("ignore:.ModelCheckpoint.* could not find the monitored key")
def test_run_that_ends_before_its_first_validation_is_validated_and_tested(composed, tmp_path):
    score = train(composed("trainer.max_steps=3", "logger=none"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["monitor"]["value"] == pytest.approx(score)
    assert result["metrics"]["test/acc"] > 0.0


def test_lightning_module_is_used_as_it_is(composed):
    config = composed(*SHORT, "model=custom", "model._target_=tests.app.own_module.OwnModule",
                      "recipe.monitor=own/loss", "recipe.mode=min", "recipe.keep_first_dense=false")  # fmt: skip
    assert isinstance(build_model(config), OwnModule)
    assert train(config) > 0


def test_any_network_of_a_library_becomes_a_task(composed):
    config = composed("model=custom", "model._target_=torchvision.models.squeezenet1_1", "+model.num_classes=10")
    task = build_model(config)
    assert isinstance(task, ClassificationTask)
    assert isinstance(task, LightningModule)
    assert type(task.net).__name__ == "SqueezeNet"


def test_failed_run_closes_its_wandb_run(composed, monkeypatch):
    import wandb

    def fail(self, batch, batch_idx):
        assert wandb.run is not None
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(ClassificationTask, "training_step", fail)
    with pytest.raises(ZeroDivisionError):
        train(composed("logger=wandb", "callbacks.progress=null"))
    assert wandb.run is None


def test_offline_wandb_run_is_named_for_sync_and_sets_no_variable(composed, tmp_path, capsys):
    before = dict(os.environ)
    train(composed(*SHORT[:-1], "logger=wandb"))
    folder = capsys.readouterr().out.split("wandb sync ", 1)[1].split("\n")[0]
    assert folder.startswith(f"{tmp_path}/run/wandb/offline-run-")
    assert os.path.isdir(folder)
    assert {name for name in os.environ if name.startswith("WANDB_MODE")} <= set(before)


def test_wandb_is_offline_only_if_the_user_is_logged_out(tmp_path, monkeypatch):
    def mode(**options):
        return wandb_logger(str(tmp_path), **options)._wandb_init.get("mode")

    assert not logged_in()
    assert mode() == "offline"
    assert mode(mode="online") == "online"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    netrc.chmod(0o600)
    with monkeypatch.context() as m:
        m.setenv("NETRC", str(netrc))
        assert mode() is None
    with monkeypatch.context() as m:
        m.setenv("WANDB_API_KEY", "0" * 40)
        assert mode() is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() is None, "WANDB_MODE is W&B's own business"


def test_progress_bar_shows_the_realised_sparsity():
    class Trainer:
        callback_metrics = {"topkast/forward_sparsity": torch.tensor(0.9)}
        progress_bar_metrics = {}
        loggers = []

    assert SparsityProgressBar().get_metrics(Trainer(), None)["sparsity"] == "0.900"


def test_without_a_logger_the_learning_rate_monitor_is_left_out(composed):
    names = [type(c).__name__ for c in build_callbacks(composed(), has_loggers=False)]
    assert names == ["TopKastCallback", "StepBoundaryCheckpoint", "StepBoundaryCheckpoint", "SparsityProgressBar"]


def test_report_counts_zeros_in_the_weights_themselves():
    net = MLP([4], 2, hidden=[3])
    with torch.no_grad():
        net.hidden1.weight.zero_()
        net.hidden1.weight[0, 0] = 1.0
    counts = {count.name: count for count in count_weights(net)}
    assert counts["hidden1.weight"].nonzero == 1
    assert counts["hidden1.weight"].entries == 12
