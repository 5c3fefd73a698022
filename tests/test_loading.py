"""Files of strangers are read as data, and in no more memory than they take on the disk."""

import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from lightning_topkast import AtomicCheckpointIO, TopKastError
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run_folder.checkpoint import open_checkpoint
from lightning_topkast.loading import check_distributed, load
from lightning_topkast.training.sharded_checkpoint import consolidate
from tests import processes
from tests.helpers import make_net, same

# torch, where a checkpoint of shards is written by a single process
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

GIB = 1 << 30


class Touch:
    """Unpickled with its code run, it leaves a folder behind."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write(path, **more):
    """A checkpoint of Lightning, with more in it."""
    state = make_net().state_dict()
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": state, "global_step": 1, **more}, path)
    return path


@pytest.mark.parametrize("sizes", [(60 * GIB,), (3, 20 * GIB), (7, 5, GIB)])
@pytest.mark.parametrize("where", ["state_dict", "optimizer_states"])
def test_tensors_that_repeat_a_stored_value_to_fill_the_memory_are_refused(tmp_path, sizes, where):
    bomb = torch.zeros(1, dtype=torch.uint8).expand(sizes)
    path = write(tmp_path / "a.ckpt", **{where: {"w": bomb} if where == "state_dict" else [{"state": {0: bomb}}]})
    assert path.stat().st_size < 1 << 20
    with pytest.raises(AppError, match="made to fill the memory") as error:
        open_checkpoint(str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(TopKastError, match="made to fill the memory"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_many_small_repeated_tensors_are_summed(tmp_path):
    path = write(tmp_path / "a.ckpt", more=[torch.zeros(1).expand(1 << 20, 1 + i) for i in range(20)])
    with pytest.raises(AppError, match="made to fill the memory"):
        open_checkpoint(str(path))


def test_buffers_that_are_views_and_tied_weights_are_read(tmp_path):
    weight = torch.randn(50, 40)
    content = {"mask": torch.ones(1).expand(64, 64), "a": weight, "tied": weight, "part": weight[::2, 1:].T}
    torch.save(content, tmp_path / "a.pt")
    read = load(tmp_path / "a.pt")
    assert all(torch.equal(read[name], content[name]) for name in content)


def test_parts_that_are_compressed_are_refused_before_they_are_unpacked(tmp_path):
    write(tmp_path / "a.ckpt", more=torch.zeros(1 << 20))
    with zipfile.ZipFile(tmp_path / "a.ckpt") as whole:
        parts = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    with zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in parts.items():
            packed.writestr(name, content)
    with pytest.raises(TopKastError, match="its parts take"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "b.ckpt")


def test_containers_that_hold_each_other_many_times_are_walked_once(tmp_path):
    nested = [torch.zeros(2)]
    for _ in range(40):
        nested = [nested, nested]
    torch.save(nested, tmp_path / "a.pt")
    load(tmp_path / "a.pt")


def test_lightnings_checkpoints_are_data_unless_the_user_says_otherwise(tmp_path):
    path = write(tmp_path / "a.ckpt", hyper_parameters=Touch(tmp_path / "executed"))
    for weights_only in (None, True):
        with pytest.raises(pickle.UnpicklingError):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def shards(tmp_path):
    """A distributed checkpoint of a model and its optimizer, as Lightning writes them."""
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    content = {"state_dict": net.state_dict(), "optimizer_0": optimizer.state_dict()}
    save(content, checkpoint_id=tmp_path / "shards", no_dist=True)
    torch.save({"global_step": 3, "state_dict": {}, "callbacks": {}}, tmp_path / "shards" / "meta.pt")
    return tmp_path / "shards"


def edit_index(folder, change):
    index = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(index) or index))


def test_distributed_checkpoint_is_accepted_and_made_one_file(tmp_path, shards):
    check_distributed(shards)
    assert open_checkpoint(str(shards)) is None
    consolidate(shards, tmp_path / "whole.ckpt")
    assert load(tmp_path / "whole.ckpt")["optimizer_states"][0]["param_groups"][0]["lr"] == 0.1


IN_LITTLE_MEMORY = """
import resource, sys, torch
from lightning_topkast.training.sharded_checkpoint import consolidate

consolidate(sys.argv[1], sys.argv[2])  # once, so that all is imported
held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + 100 * 2**20,) * 2)
consolidate(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_distributed_checkpoint_is_made_one_file_in_little_memory(tmp_path):
    """Of 320 MiB, in tensors of 40, which malloc gives back to the system, memory holds less than 100 at a time."""
    weights = {f"{n}.weight": torch.full((2048, 5120), float(n)) for n in range(8)}
    save({"state_dict": weights, "optimizer_0": {"step": 3}}, checkpoint_id=tmp_path / "shards", no_dist=True)
    torch.save({"global_step": 3, "callbacks": {}}, tmp_path / "shards" / "meta.pt")
    processes.run([sys.executable, "-c", IN_LITTLE_MEMORY, tmp_path / "shards", tmp_path / "whole.ckpt"], check=True)
    whole = load(tmp_path / "whole.ckpt")
    assert whole["optimizer_states"] == [{"step": 3}]
    assert all(same(whole["state_dict"][name], weight) for name, weight in weights.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "whole.ckpt"]


@pytest.mark.parametrize("error", [OSError(28, "no space left"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_making_one_file_leaves_the_old_one_whole_if_it_is_interrupted(tmp_path, shards, monkeypatch, error):
    whole = tmp_path / "whole.ckpt"
    consolidate(shards, whole)
    before, written = whole.read_bytes(), []

    def half(content, path, save=torch.save):
        save(content, path)
        written.append(path)
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: len(data) // 2])
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(error)):
        consolidate(shards, whole)
    assert len(written) == 1
    assert whole.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "whole.ckpt"]


def with_code_in_the_index(folder, path):
    edit_index(folder, lambda index: {"state_dict_metadata": {}, "more": Touch(path)})


def with_code_in_an_entry(folder, path):
    evil = folder / "evil.distcp"
    torch.save(Touch(path), evil)

    def change(index):
        place = next(place for place in index.storage_data if place.fqn.endswith("lr"))
        stored = index.storage_data[place]
        stored.relative_path, stored.offset, stored.length = evil.name, 0, evil.stat().st_size

    edit_index(folder, change)


def with_code_for_a_tensor(folder, path):
    with_code_in_an_entry(folder, path)

    def change(index):
        name, stored = next((p.fqn, s) for p, s in index.storage_data.items() if s.relative_path == "evil.distcp")
        weight = next(place.fqn for place in index.storage_data if place.fqn.startswith("state_dict."))
        del index.state_dict_metadata[name]
        index.state_dict_metadata[weight] = BytesStorageMetadata()
        index.storage_data = {MetadataIndex(weight): stored}

    edit_index(folder, change)


def with_code_outside(folder, path):
    with_code_in_an_entry(folder, path)
    (folder / "evil.distcp").rename(folder.parent / "evil.distcp")

    def change(index):
        for stored in index.storage_data.values():
            if stored.relative_path == "evil.distcp":
                stored.relative_path = "../evil.distcp"

    edit_index(folder, change)


def with_huge_tensors(folder, path):
    def change(index):
        entry = next(e for e in index.state_dict_metadata.values() if hasattr(e, "size"))
        entry.size = torch.Size([1 << 40])

    edit_index(folder, change)


def with_a_pipe_that_nobody_writes_to(folder, path):
    shard = next(folder.glob("*.distcp"))
    shard.unlink()
    os.mkfifo(shard)


def with_what_is_unpacked_before_it_is_read(folder, path):
    """What lies in the file may be harmless, and what torch makes of it by zstd not."""

    def change(index):
        next(iter(index.storage_data.values())).transform_descriptors = ["stream.zstd/1"]

    edit_index(folder, change)


@pytest.mark.parametrize("spoil", [
    with_code_in_the_index, with_code_in_an_entry, with_code_for_a_tensor, with_code_outside, with_huge_tensors,
    with_what_is_unpacked_before_it_is_read, with_a_pipe_that_nobody_writes_to,
])  # fmt: skip
def test_distributed_checkpoint_that_would_run_code_or_fill_the_memory_is_refused(tmp_path, shards, spoil):
    spoil(shards, tmp_path / "executed")
    for read in (open_checkpoint, lambda folder: consolidate(folder, tmp_path / "whole.ckpt")):
        with pytest.raises(TopKastError, match="cannot be read safely") as error:
            read(str(shards))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "whole.ckpt").exists()
