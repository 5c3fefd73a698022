"""What cannot be read for a moment is not damaged, and not missing: nothing is begun anew or overwritten for it."""

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_topkast.app.commands.compare import main as compare
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run.resume import newest_checkpoint
from lightning_topkast.app.run_folder.checkpoint import _File
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.sweep.collect import collect
from tests.app.test_auto_resume import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

SHORT = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "test=false", "logger=none")


@pytest.fixture
def stale(monkeypatch):
    """Let a network file system lose a file: it is there, and every read of it fails."""

    def lose(path: Path) -> None:
        fails = OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        watched, opened = _File._watched, os.open

        @contextmanager
        def read(file):
            with watched(file):
                if str(file.name) == str(path):
                    raise fails
                yield

        def open_file(name, *args, **options):
            if str(name) == str(path):
                raise fails
            return opened(name, *args, **options)

        monkeypatch.setattr(_File, "_watched", read)
        monkeypatch.setattr(os, "open", open_file)

    return lose


def test_run_whose_newest_checkpoint_cannot_be_read_stops_in_one_line(cli, tmp_path, stale):
    folder = (f"hydra.run.dir={tmp_path}/run", "ckpt_path=auto")
    assert cli(*SHORT, *folder, "trainer.max_epochs=1")[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    stale(last)
    code, _, err = cli(*SHORT, *folder, "trainer.max_epochs=2")
    assert code == 2
    assert f"{last} cannot be read (Stale file handle)" in err.strip().splitlines()[-1]
    assert "ckpt_path=FILE" in err
    assert last.read_bytes() == before


def test_older_checkpoint_is_not_taken_for_one_that_cannot_be_read(tmp_path, stale):
    write_checkpoint(tmp_path / "checkpoints" / "best.ckpt", step=10)
    write_checkpoint(tmp_path / "checkpoints" / "last.ckpt", step=20)
    stale(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(AppError, match=r"last\.ckpt cannot be read"):
        newest_checkpoint(RunFolder(tmp_path))


@pytest.mark.parametrize("closed", ["checkpoints", "checkpoints/last.ckpt"])
def test_forbidden_checkpoint_is_not_missing(tmp_path, closed, request):
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        parent.chmod(0o755)
    write_checkpoint(tmp_path / "checkpoints" / "last.ckpt", step=20)
    (tmp_path / closed).chmod(0)
    request.getfixturevalue("as_nobody")
    try:
        with pytest.raises(AppError, match=rf"{closed} cannot be read \(Permission denied\)"):
            newest_checkpoint(RunFolder(tmp_path))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        (tmp_path / closed).chmod(0o755)


def test_run_with_damaged_checkpoints_only_stops_and_keeps_them(cli, tmp_path):
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"half a check")
    code, _, err = cli(*SHORT, f"hydra.run.dir={tmp_path}/run", "ckpt_path=auto", "trainer.max_epochs=1")
    assert code == 2
    line = err.strip().splitlines()[-1]
    assert "there are 1 checkpoints of" in line
    assert "ckpt_path=FILE" in line
    assert last.read_bytes() == b"half a check"


def test_sharded_checkpoint_of_a_writer_that_was_killed_is_no_reason_to_stop(tmp_path):
    (tmp_path / "checkpoints" / "last.ckpt").mkdir(parents=True)
    (tmp_path / "checkpoints" / "last.ckpt" / "__0_0.distcp").touch()
    assert newest_checkpoint(RunFolder(tmp_path)) is None


def test_completed_run_of_a_sweep_is_not_repeated_while_its_result_cannot_be_read(
    command_line, tmp_path, stale, monkeypatch
):
    started = []
    monkeypatch.setattr("lightning_topkast.app.sweep.launch.Launcher.launch", lambda self, runs: started.append(runs))
    topkast_compare = command_line("topkast-compare", compare)
    assert topkast_compare(tmp_path / "sweep", "data=digits", "seed=0")[0] == 2  # nothing was trained
    ((run,),) = started
    result = tmp_path / "sweep" / run.name / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({"status": "finished"}))
    stale(result)
    code, _, err = topkast_compare(tmp_path / "sweep", "data=digits", "seed=0")
    assert (code, len(started)) == (2, 1)
    assert err.strip() == f"topkast-compare: {result}: Stale file handle"


def test_table_is_not_written_without_a_run_that_cannot_be_read(tmp_path, stale):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "result.json").write_text("{}")
    stale(tmp_path / "one" / "result.json")
    with pytest.raises(OSError, match="Stale"):
        collect(tmp_path)
