"""No logger's failure ends a training or loses its result."""

import errno
import json
import os
import signal
import time

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger

from lightning_topkast import TopKastCallback
from lightning_topkast.app.report.contents import read_contents
from lightning_topkast.app.run import guarded
from lightning_topkast.app.run.loggers import wandb_logger
from lightning_topkast.app.run.task import ClassificationTask
from lightning_topkast.app.run.train import train
from lightning_topkast.telemetry.guard import guard_of
from tests.helpers import fit, make_callback, make_net, make_trainer

SHORT = (
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=4",
    "callbacks.progress=null",
    "trainer.log_every_n_steps=1",
)
WARNS = pytest.mark.filterwarnings("ignore:\\w+ failed .* are logged to it, and all else goes on:UserWarning")


def at_step(monkeypatch, step, act):
    """Do something once in the middle of training."""
    before = ClassificationTask.training_step
    done = []

    def training_step(self, batch, batch_idx):
        if self.global_step == step and not done:
            done.append(step)
            act()
        return before(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", training_step)


def result_of(tmp_path):
    return json.loads((tmp_path / "run" / "result.json").read_text())


def signal_service(number):
    os.kill(guarded._service()[1].pid, number)
    if number == signal.SIGKILL:
        guarded._service()[1].wait()


@WARNS
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_run_goes_on_without_wandb(composed, tmp_path, monkeypatch, capsys, how):
    monkeypatch.setattr(guarded, "PATIENCE", 1.0)
    number = signal.SIGKILL if how == "killed" else signal.SIGSTOP
    at_step(monkeypatch, 5, lambda: signal_service(number))
    train(composed(*SHORT, "logger=default"))
    result = result_of(tmp_path)
    assert result["status"] == "finished"
    assert result["steps"] == 12
    (lacking,) = result["incomplete_logs"]
    assert lacking.startswith("WandbLogger lacks metrics")
    assert f"Log:         incomplete, {lacking}" in capsys.readouterr().out
    assert f"A log is incomplete: {lacking}." in read_contents(tmp_path / "run").notes
    assert "11" in (tmp_path / "run" / "csv" / "metrics.csv").read_text()
    assert wandb.run is None
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as another:
        another.log({"next job": 1})


@WARNS
def test_folder_of_pictures_that_is_tidied_away_costs_pictures_only(composed, tmp_path, monkeypatch):
    from wandb.sdk.data_types._private import MEDIA_TMP

    def gone(*args, **options):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), MEDIA_TMP.name)

    at_step(monkeypatch, 5, lambda: monkeypatch.setattr("PIL.Image.Image.save", gone))
    train(composed(*SHORT, "logger=wandb", "recipe.update_every=2"))
    result = result_of(tmp_path)
    assert result["status"] == "finished"
    (lacking,) = result["incomplete_logs"]
    assert lacking.startswith("WandbLogger lacks pictures (")


@WARNS
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread ends
@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_log_on_a_full_disk_is_said_once_and_at_the_end(composed, tmp_path, monkeypatch, logger):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill():
        if logger == "csv":
            monkeypatch.setattr("lightning.fabric.loggers.csv_logs._ExperimentWriter.save", full)
        else:
            monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)

    at_step(monkeypatch, 5, fill)
    train(composed(*SHORT, f"logger={logger}"))
    result = result_of(tmp_path)
    assert result["status"] == "finished"
    (lacking,) = result["incomplete_logs"]
    assert "No space left on device" in lacking


def test_callback_goes_on_without_a_logger_of_ones_own_trainer_and_warns_once(tmp_path):
    class Failing(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(name.startswith("topkast/") for name in metrics):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    callback: TopKastCallback = make_callback()
    trainer = make_trainer(tmp_path, callback, logger=Failing(tmp_path), max_epochs=2)
    with pytest.warns(UserWarning, match="Failing failed .*No space left on device.*: no further metrics") as caught:
        fit(trainer, make_net())
    assert len([each for each in caught if "Failing failed" in str(each.message)]) == 1
    assert callback.topkast.refresh_count > 1


def test_slow_call_is_waited_for_as_long_as_wandb_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(guarded, "PATIENCE", 0.2)
    logger = wandb_logger(str(tmp_path), mode="offline", project="test")
    assert logger.experiment
    guarded.guard_loggers([logger])
    try:
        assert guard_of(logger).call("metrics", lambda: time.sleep(1) or "done") == "done"
    finally:
        guarded.close_wandb(failed=False)
    assert wandb.run is None
    assert not guard_of(logger).failures
