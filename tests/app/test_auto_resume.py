"""`ckpt_path=auto`: the same command, started again, goes on from what its own folder holds."""

import os
import pickle

import fsspec
import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from lightning_topkast.app.errors import AppError, explain
from lightning_topkast.app.run.resume import newest_checkpoint
from lightning_topkast.app.run_folder.folder import RunFolder
from tests.app.bombs import doubled

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Using .DistributedSampler. with the dataloaders:UserWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

SHORT = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "logger=none")
ON_CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true")


@pytest.fixture
def auto(cli, tmp_path):
    """Run, or run again, in the test's folder."""
    return lambda *overrides: cli(*SHORT, f"hydra.run.dir={tmp_path}/run", "ckpt_path=auto", *overrides)


def lines(err):
    return [line.removeprefix("topkast-train: ") for line in err.splitlines() if line.startswith("topkast-train: ")]


def write_checkpoint(path, step, weights_only=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"pytorch-lightning_version": "2", "state_dict": {}, "global_step": step}
    torch.save(content | ({} if weights_only else {"optimizer_states": [], "loops": {}}), path)


def write_sharded(folder, step):
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").touch()
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
    torch.save({"global_step": step}, folder / "meta.pt")


def test_first_start_begins_anew_and_the_second_goes_on(auto, tmp_path):
    code, out, err = auto("trainer.max_epochs=1")
    assert (code, lines(err)) == (0, [])
    assert "epoch 1/1:" in out
    code, out, err = auto("trainer.max_epochs=2")
    assert code == 0
    (line,) = lines(err)
    assert line.startswith(f"resuming from {tmp_path}/run/checkpoints/")
    assert line.endswith("step 2")
    assert "epoch 2/2:" in out
    assert "epoch 1/2:" not in out


def test_run_that_was_finished_ends_well_again(auto):
    assert auto("trainer.max_epochs=1")[0] == 0
    code, out, _ = auto("trainer.max_epochs=1")
    assert code == 0
    assert "epoch" not in out.replace("max_epochs", "")
    assert "test/acc" in out


def test_truncated_newer_checkpoint_is_passed_over_in_one_line(auto, tmp_path):
    assert auto("trainer.max_epochs=1")[0] == 0
    whole = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "run" / "checkpoints" / "newer.ckpt").write_bytes(whole[: len(whole) // 2])
    code, out, err = auto("trainer.max_epochs=2")
    assert code == 0
    passed, _ = lines(err)
    assert passed.startswith("skipped: the checkpoint ")
    assert "newer.ckpt is not complete" in passed
    assert "epoch 1/2:" not in out


def test_most_steps_count_and_then_the_later_file(tmp_path):
    write_checkpoint(tmp_path / "checkpoints" / "copied.ckpt", step=10)
    write_checkpoint(tmp_path / "checkpoints" / "best.ckpt", step=20)
    write_checkpoint(tmp_path / "checkpoints" / "last.ckpt", step=20)
    os.utime(tmp_path / "checkpoints" / "copied.ckpt", (3e9, 3e9))
    os.utime(tmp_path / "checkpoints" / "best.ckpt", (2e9, 2e9))
    assert newest_checkpoint(RunFolder(tmp_path)) == str(tmp_path / "checkpoints" / "best.ckpt")


def test_checkpoint_that_lightning_writes_on_a_slurm_signal_is_seen(tmp_path):
    write_checkpoint(tmp_path / "checkpoints" / "last.ckpt", step=10)
    write_checkpoint(tmp_path / "hpc_ckpt_1.ckpt", step=15)
    assert newest_checkpoint(RunFolder(tmp_path)) == str(tmp_path / "hpc_ckpt_1.ckpt")


@pytest.mark.parametrize("missing", [".metadata", "meta.pt", "half of meta.pt", None])
def test_sharded_checkpoint_counts_if_it_is_complete(tmp_path, capsys, missing):
    write_checkpoint(tmp_path / "checkpoints" / "last.ckpt", step=10)
    folder = tmp_path / "checkpoints" / "sharded.ckpt"
    write_sharded(folder, step=20)
    if missing == "half of meta.pt":
        content = (folder / "meta.pt").read_bytes()
        (folder / "meta.pt").write_bytes(content[: len(content) // 2])
    elif missing:
        (folder / missing).unlink()
    expected = "last.ckpt" if missing else "sharded.ckpt"
    assert newest_checkpoint(RunFolder(tmp_path)) == str(tmp_path / "checkpoints" / expected)
    assert ("skipped: the checkpoint" in capsys.readouterr().err) == bool(missing)


@pytest.mark.parametrize("wrong", ["damaged", "an endless pipe", "repeats itself"])
def test_sharded_checkpoint_that_is_damaged_is_not_unfinished(tmp_path, wrong):
    folder = tmp_path / "checkpoints" / "last.ckpt"
    write_sharded(folder, step=20)
    if wrong == "damaged":
        (folder / "meta.pt").write_bytes(b"damaged" * 30)
    elif wrong == "repeats itself":
        torch.save({"global_step": 20, "callbacks": doubled()}, folder / "meta.pt")
    else:
        (folder / "meta.pt").unlink()
        os.mkfifo(folder / "meta.pt")
    with pytest.raises(AppError, match="there are 1 checkpoints of"):
        newest_checkpoint(RunFolder(tmp_path))


@pytest.mark.parametrize(
    "where", ["callbacks.last_checkpoint.dirpath={}/scratch", "callbacks.last_checkpoint.filename='last/{{epoch}}'"]
)
def test_checkpoints_are_found_wherever_the_run_writes_them(auto, tmp_path, where):
    more = ("callbacks.checkpoint=null", "test=false", where.format(tmp_path))
    assert auto("trainer.max_epochs=1", *more)[0] == 0
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    code, out, err = auto("trainer.max_epochs=2", *more)
    assert code == 0
    assert lines(err)[0].startswith("resuming from ")
    assert "epoch 1/2:" not in out


def test_checkpoints_that_lie_in_a_loggers_folder_are_found_and_those_of_another_run_are_not(tmp_path):
    write_checkpoint(tmp_path / "csv-2" / "checkpoints" / "last.ckpt", step=10)
    write_checkpoint(tmp_path / "project" / "id" / "checkpoints" / "last.ckpt", step=20)
    write_checkpoint(tmp_path / "day" / "time" / "checkpoints" / "last.ckpt", step=30)
    (tmp_path / "day" / "time" / ".hydra").mkdir()
    found = tmp_path / "project" / "id" / "checkpoints" / "last.ckpt"
    assert newest_checkpoint(RunFolder(tmp_path)) == str(found)


def test_checkpoints_on_another_machine_are_not_begun_over(tmp_path):
    place = f"memory://{tmp_path.name}"
    assert newest_checkpoint(RunFolder(tmp_path), [place]) is None
    with fsspec.open(f"{place}/last.ckpt", "wb") as file:
        file.write(b"x")
    with pytest.raises(AppError, match=r"there is memory://.*last\.ckpt: name the one to resume from"):
        newest_checkpoint(RunFolder(tmp_path), [place])


@pytest.mark.parametrize("name", ["best/epoch=1.ckpt", "deep/best.ckpt"])
def test_best_checkpoint_in_a_subfolder_is_the_best(tmp_path, name):
    write_checkpoint(tmp_path / "checkpoints" / name, step=10)
    write_checkpoint(tmp_path / "checkpoints" / "last.ckpt", step=20)
    assert RunFolder(tmp_path).best_checkpoint() == tmp_path / "checkpoints" / name


def test_checkpoint_of_weights_only_is_passed_over(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoints" / "last.ckpt", step=4)
    write_checkpoint(tmp_path / "checkpoints" / "weights.ckpt", step=8, weights_only=True)
    torch.save({"pytorch-lightning_version": "2", "state_dict": {}}, tmp_path / "checkpoints" / "other.ckpt")
    assert newest_checkpoint(RunFolder(tmp_path)) == str(tmp_path / "checkpoints" / "last.ckpt")
    said = capsys.readouterr().err
    assert "holds weights only" in said
    assert "other.ckpt is not a checkpoint" in said


def test_torchrun_without_a_name_for_the_run_is_refused(cli):
    code, _, err = cli("trainer=multinode", *SHORT, *ON_CPU)
    assert code == 2
    assert "--rdzv-id=NAME" in lines(err)[-1]


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistNetworkError("connect() timed out"),
        RuntimeError("[a/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800ms for recv operation"),
        RuntimeError("Application timeout caused pair closure"),
    ],
)
def test_lost_connection_is_told_from_a_mistake(error, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    line = explain(error)
    assert line.startswith("rank 3: the connection to another process is lost (")
    assert "gloo/transport" not in line
    assert explain(RuntimeError("a bug")) is None
