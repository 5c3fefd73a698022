"""Two runs in one folder: the second is refused, or has files of its own."""

import errno
import os
import signal

import pytest
from filelock import FileLock

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run.loggers import csv_logger
from lightning_topkast.app.run_folder.folder import only_run_in
from tests.processes import end, forked

SHORT = (
    "trainer.limit_train_batches=1",
    "trainer.limit_val_batches=1",
    "test=false",
    "logger=csv",
    "trainer.max_epochs=1",
)


def test_second_run_in_a_folder_is_refused_in_one_line_while_the_first_trains(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_topkast.app.run.train._PATIENCE", 0.1)
    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(folder / ".topkast-train.lock"):
        code, _, err = cli(*SHORT, f"hydra.run.dir={folder}")
    assert code == 2
    assert f"another topkast-train is running in {folder}" in err.strip().splitlines()[-1]
    assert not (folder / "checkpoints").exists()
    assert not (folder / "csv").exists()
    assert cli(*SHORT, f"hydra.run.dir={folder}")[0] == 0, "the lock ends with the process that holds it"


def test_lock_of_a_killed_process_is_free_at_once(tmp_path):
    reads, writes = os.pipe()
    with forked() as children:
        children.append(os.fork())
        if children[0] == 0:
            with only_run_in(tmp_path / "run", "topkast-train"):
                os.write(writes, b"locked")
                signal.pause()
        assert os.read(reads, 6) == b"locked"
        for _ in range(2):
            with (
                pytest.raises(AppError, match=r"another topkast-train is running in .*run: wait for it"),
                only_run_in(tmp_path / "run", "topkast-train"),
            ):
                pass
        with only_run_in(tmp_path / "run", "topkast-compare"), only_run_in(tmp_path, "topkast-train"):
            pass  # another program, another folder
        end([children.pop()])
        with only_run_in(tmp_path / "run", "topkast-train"):
            pass


def test_two_loggers_of_one_folder_share_no_file_even_before_the_first_has_written(tmp_path):
    loggers = [csv_logger(str(tmp_path)) for _ in range(3)]
    for value, logger in enumerate(loggers):
        logger.log_metrics({"loss": float(value)}, step=1)
    for logger in loggers:
        logger.save()
    texts = [(tmp_path / name / "metrics.csv").read_text().split() for name in ("csv", "csv-2", "csv-3")]
    assert texts == [["loss,step", f"{value}.0,1"] for value in range(3)]


@pytest.mark.parametrize(
    "error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")], ids=repr
)
def test_run_on_a_file_system_without_locks_trains(cli, tmp_path, monkeypatch, error):
    def refuse(self, *args, **options):
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert cli(*SHORT, f"hydra.run.dir={tmp_path}/run")[0] == 0


@pytest.mark.skipif(os.name != "posix", reason="links, pipes, permissions")
@pytest.mark.parametrize("kind", ["a link", "a pipe", "of another user"])
def test_lock_that_cannot_be_taken_is_no_reason_to_go_on_without(tmp_path, kind, request):
    lock = tmp_path / ".topkast-train.lock"
    if kind == "a link":
        lock.symlink_to(tmp_path / "elsewhere")
    elif kind == "a pipe":
        os.mkfifo(lock)
    else:
        lock.touch(0o600)
        for folder in list(tmp_path.parents)[:3]:
            folder.chmod(0o755)
        tmp_path.chmod(0o777)
        request.getfixturevalue("as_nobody")
        if os.geteuid() == lock.stat().st_uid:
            pytest.skip("no other user")
    with pytest.raises(AppError, match="choose another folder"), only_run_in(tmp_path, "topkast-train"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_who_may_write_to_a_folder_may_lock_it(tmp_path):
    for mode in (0o755, 0o775, 0o777):
        folder = tmp_path / oct(mode)
        folder.mkdir()
        folder.chmod(mode)
        with only_run_in(folder, "topkast-train"):
            assert (folder / ".topkast-train.lock").stat().st_mode & 0o777 == mode & 0o666


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("left", ["result.json", "csv/metrics.csv", "checkpoints/last.ckpt", None])
def test_run_that_begins_anew_takes_no_folder_of_another(cli, tmp_path, left):
    """Also where only a part of the other one is left; `left` is that part, None all of it."""
    folder = tmp_path / "run"
    run = (*SHORT, f"hydra.run.dir={folder}")
    if left is None:
        assert cli(*run)[0] == 0
    else:
        (folder / left).parent.mkdir(parents=True)
        (folder / left).write_text("another's")
    before = files_in(folder)
    code, _, err = cli(*run, "seed=1")
    assert code == 2
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"topkast-train: {folder} holds the files of another run: go on with it by ckpt_path=auto")
    assert files_in(folder).items() >= before.items()
    assert files_in(folder).keys() - before.keys() <= {folder / ".topkast-train.lock"}


def test_folder_in_which_a_run_was_refused_is_free(cli, tmp_path):
    run = (*SHORT, f"hydra.run.dir={tmp_path}/run")
    assert cli(*run, "sparsity.forward_sparsity=2")[0] == 2
    assert cli(*run)[0] == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_job_that_a_cluster_starts_again_goes_on_in_its_folder(cli, tmp_path, monkeypatch):
    run = (*SHORT, f"hydra.run.dir={tmp_path}/run")
    assert cli(*run)[0] == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert cli(*run)[0] == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_sweep_that_is_started_again_is_refused_and_goes_on_by_auto(cli, tmp_path):
    sweep = ("-m", *SHORT, "report=false", f"hydra.sweep.dir={tmp_path}/sweep")
    assert cli(*sweep, "seed=0")[0] == 0
    before = files_in(tmp_path / "sweep" / "0")
    code, _, err = cli(*sweep, "seed=0,1")
    assert code == 2
    assert "hydra.sweep.dir=..." in err.strip().splitlines()[-1]
    assert files_in(tmp_path / "sweep" / "0") == before
    code, out, err = cli(*sweep, "seed=0,1", "ckpt_path=auto")
    assert code == 0, err
    assert out.count("epoch 1/1:") == 1, "the finished one is not trained again"
    assert [(tmp_path / "sweep" / name / "result.json").is_file() for name in "01"] == [True, True]
