"""Checkpoint files survive whatever happens while one is written."""

import os
import resource
import shutil
import signal
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_topkast import AtomicCheckpointIO, files
from lightning_topkast.files import atomic_file
from tests.helpers import make_trainer, same
from tests.processes import forked

OLD, NEW = {"weight": torch.zeros(100_000)}, {"weight": torch.ones(100_000)}


def load(path):
    return torch.load(path, weights_only=True)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_saving(path, plugin, patches) -> None:
    """Save in a forked process in which what `patches` replaces, (module, name, stand-in), kills it."""
    child = os.fork()
    if child == 0:
        try:
            for module, name, stand_in in patches:
                setattr(module, name, stand_in)
            plugin.save_checkpoint(NEW, path)
        finally:
            os._exit(0)
    with forked() as children:
        children.append(child)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        children.clear()


def half_then_die(source, target, *_):
    data = source.read()
    target.write(data[: len(data) // 2])
    target.flush()
    die()


def save_half_then_die(checkpoint, file):
    file.write(bytes(200_000))
    file.flush()
    die()


MOMENTS = {
    "writing": [(torch, "save", save_half_then_die)],
    "written": [(os, "fsync", die)],
    "on the disk": [(os, "replace", die)],
}


@pytest.fixture
def path(tmp_path):
    """A file with an older checkpoint in it."""
    AtomicCheckpointIO().save_checkpoint(OLD, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("moment", MOMENTS)
def test_writer_killed_before_the_end_leaves_the_old_checkpoint(path, moment):
    killed_while_saving(path, AtomicCheckpointIO(), MOMENTS[moment])
    assert same(load(path), OLD)
    assert len(os.listdir(path.parent)) == 2
    assert [file.name for file in path.parent.glob("*.ckpt")] == ["last.ckpt"]

    AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert same(load(path), NEW)
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_writer_killed_after_the_end_leaves_the_new_checkpoint(path, monkeypatch):
    replace = os.replace
    killed_while_saving(path, AtomicCheckpointIO(), [(os, "replace", lambda *names: (replace(*names), die()))])
    assert same(load(path), NEW)
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize(
    "plugin",
    [
        AtomicCheckpointIO(),
        # why this package has its own; when this begins to pass, it need not any more
        pytest.param(TorchCheckpointIO(), marks=pytest.mark.xfail(raises=RuntimeError, reason="copies over the old")),
    ],
    ids=["ours", "Lightning's"],
)
def test_temporary_folder_on_another_file_system_endangers_no_checkpoint(path, plugin, monkeypatch):
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == path.stat().st_dev:
        pytest.skip("needs a second file system")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        moments = [(shutil, "_USE_CP_SENDFILE", False), (shutil, "copyfileobj", half_then_die), (os, "replace", die)]
        killed_while_saving(path, plugin, moments)
    assert same(load(path), OLD)  # torch raises RuntimeError for half a file


def test_two_writers_in_a_folder_leave_each_other_alone(path):
    with atomic_file(path.with_name("other.ckpt")) as partial:
        AtomicCheckpointIO().save_checkpoint(NEW, path.with_name("best.ckpt"))
        partial.write_bytes(path.read_bytes())
    assert same(load(path.with_name("best.ckpt")), NEW)
    assert same(load(path.with_name("other.ckpt")), OLD)
    assert len(os.listdir(path.parent)) == 3


def test_two_writers_of_one_file_never_leave_it_half_written(path):
    reads, seen = 0, set()
    with forked() as children:
        for content in (OLD, NEW):
            children.append(os.fork())
            if children[-1] == 0:
                try:
                    for _ in range(30):
                        AtomicCheckpointIO().save_checkpoint(content, path)
                except BaseException:
                    os._exit(1)
                os._exit(0)
        while children:
            ended, status = os.waitpid(children[0], os.WNOHANG)
            if ended:
                assert status == 0
                children.pop(0)
            seen.add(load(path)["weight"].unique().tolist()[0])
            reads += 1
    assert seen == {0.0, 1.0}
    assert reads > 10
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_file_is_on_the_disk_before_it_is_renamed_and_its_folder_after(path, monkeypatch):
    done = []

    def noted(name, call):
        def noting(target, *arguments):
            kind = "folder" if isinstance(target, int) and stat.S_ISDIR(os.fstat(target).st_mode) else "file"
            done.append((name, kind))
            return call(target, *arguments)

        return noting

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert done == [("fsync", "file"), ("replace", "file"), ("fsync", "folder")]


def test_folder_that_cannot_be_synced_by_its_file_system_is_no_error(path, monkeypatch):
    def refuse(descriptor, fsync=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert same(load(path), NEW)


def remove_leftovers_elsewhere(folder):
    """Let another process remove them."""
    with forked() as children:
        children.append(os.fork())
        if children[0] == 0:
            try:
                files.remove_leftovers(folder)
            finally:
                os._exit(0)
        assert os.waitpid(children.pop(), 0)[1] == 0


def test_file_that_another_process_takes_for_a_leftover_before_it_is_locked_is_made_anew(path, monkeypatch):
    lock, taken = files._lock, []

    def late(file, wait):
        if wait and not taken:
            taken.append(file.name)
            remove_leftovers_elsewhere(path.parent)
            assert not os.path.exists(file.name), "the other process was to remove it"
        return lock(file, wait)

    monkeypatch.setattr(files, "_lock", late)
    AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert taken
    assert same(load(path), NEW)
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_file_that_another_process_writes_is_no_leftover(path):
    with atomic_file(path) as partial:
        shutil.copyfile(path, partial)
        remove_leftovers_elsewhere(path.parent)
        assert partial.exists()


def test_temporary_file_is_not_taken_for_a_checkpoint(tmp_path, monkeypatch):
    """After a SLURM requeue Lightning looks for the name of its own among all the folder's files."""
    trainer = make_trainer(tmp_path)
    AtomicCheckpointIO().save_checkpoint(OLD, tmp_path / "hpc_ckpt_3.ckpt")
    killed_while_saving(tmp_path / "hpc_ckpt_4.ckpt", AtomicCheckpointIO(), MOMENTS["written"])
    assert len(os.listdir(tmp_path)) == 2
    assert trainer._checkpoint_connector._hpc_resume_path == str(tmp_path / "hpc_ckpt_3.ckpt")


def test_full_disk_is_named_and_the_old_checkpoint_kept(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"not written: File too large; the .* there before is untouched") as error:
            AtomicCheckpointIO().save_checkpoint(NEW, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(path)
    assert same(load(path), OLD)
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="not written: File exists") as error:
        AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "file" / "last.ckpt")
    assert error.value.filename == str(tmp_path / "file" / "last.ckpt")


def test_checkpoint_has_the_permissions_of_any_new_file(path):
    (path.parent / "other").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((path.parent / "other").stat().st_mode)


def test_other_file_systems_are_left_to_lightning(tmp_path):
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint(NEW, "memory://somewhere/last.ckpt")
    assert same(plugin.load_checkpoint("memory://somewhere/last.ckpt"), NEW)
    plugin.remove_checkpoint("memory://somewhere/last.ckpt")
    plugin.save_checkpoint(NEW, f"file://{tmp_path}/new/last.ckpt")
    assert same(load(tmp_path / "new" / "last.ckpt"), NEW)
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint(NEW, tmp_path / "last.ckpt", storage_options={})
