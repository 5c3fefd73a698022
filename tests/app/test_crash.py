"""Whatever happens while a checkpoint is written, the application has one to go on from."""

import random
import resource
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from lightning_topkast import AtomicCheckpointIO
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run_folder.checkpoint import Checkpoint
from tests.helpers import same

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

SHORT = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "test=false", "logger=none")


@pytest.fixture
def short_run(cli, tmp_path):
    """Train for so many epochs in a folder, in which the best and the last checkpoint are replaced again and again."""

    def run(epochs: int, *changes: str) -> tuple[int, str]:
        folder = f"paths.output_dir={tmp_path}/run"
        code, _, err = cli(*SHORT, folder, f"trainer.max_epochs={epochs}", *changes)
        return code, err

    return run


class Watch:
    """Looks at the checkpoints whenever this process is about to change a file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.steps, self.on = folder, set(), [], True

    def __call__(self, event: str, arguments: tuple) -> None:
        writes = event in ("os.rename", "os.remove", "os.truncate", "os.link", "os.symlink", "shutil.move") or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        if self.on and writes and str(self.folder) in str(arguments):
            self.look()

    def look(self) -> None:
        self.on = False
        try:
            self.seen |= {path.name for path in self.folder.glob("*.ckpt")}
            for name in self.seen:
                step = Checkpoint(str(self.folder / name)).step
                if name == "last.ckpt":
                    self.steps.append(step)
        finally:
            self.on = True


def test_at_every_instant_there_is_a_checkpoint_to_go_on_from(short_run, tmp_path):
    watch = Watch(tmp_path / "run" / "checkpoints")
    sys.addaudithook(watch)
    try:
        assert short_run(4, "recipe.monitor=val/loss", "recipe.mode=min")[0] == 0
        watch.look()
    finally:
        watch.on = False  # an audit hook can't be removed
    assert watch.seen == {"best.ckpt", "last.ckpt"}
    assert watch.steps == sorted(watch.steps)
    assert set(watch.steps) == {2, 4, 6, 8}
    assert len(watch.steps) > 10


def test_full_disk_is_one_line_and_leaves_the_last_checkpoint(short_run, tmp_path):
    assert short_run(1)[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        code, err = short_run(2, f"ckpt_path={last}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert f"{last.parent}/" in line
    assert "not written: File too large; the checkpoint that was there before is untouched" in line
    assert last.read_bytes() == before
    assert short_run(2, f"ckpt_path={last}")[0] == 0


@pytest.mark.slow
def test_flipped_bit_is_refused_or_harmless(short_run, tmp_path):
    assert short_run(1, "model.hidden=[8]")[0] == 0
    whole = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content, data, generator = Checkpoint(str(whole)).content, whole.read_bytes(), random.Random(0)
    refused = 0
    flips = [(generator.randrange(len(data)), generator.randrange(8)) for _ in range(300)]
    flips += [(len(data) - place, bit) for place in range(1, 99) for bit in range(8)]  # where the directory ends
    for place, bit in flips:
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        path = tmp_path / "damaged.ckpt"
        path.write_bytes(damaged)
        try:
            found = Checkpoint(str(path)).content
        except AppError:
            refused += 1
        else:
            assert same(found, content)  # in the padding between tensors
    assert refused > 100


def test_flipped_bit_within_a_weight_is_answered_in_one_line(short_run, tmp_path):
    assert short_run(1)[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    data = bytearray(last.read_bytes())
    first = Checkpoint(str(last)).content["state_dict"]["net.hidden1.weight"].numpy().tobytes()
    data[data.index(first) + len(first) // 2] ^= 1
    last.write_bytes(data)
    assert not torch.equal(
        torch.load(last, weights_only=True)["state_dict"]["net.hidden1.weight"].view(torch.uint8).flatten(),
        torch.frombuffer(bytearray(first), dtype=torch.uint8),
    ), "torch looks at no checksums"
    code, err = short_run(2, f"ckpt_path={last}")
    assert code == 2
    assert f"the checkpoint {last} is damaged (its part archive/data/" in err.strip().splitlines()[-1]


def test_checkpoint_without_checksums_is_accepted(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        content = {"pytorch-lightning_version": "2.6.6", "state_dict": {}, "global_step": 3}
        torch.save(content, tmp_path / "last.ckpt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert Checkpoint(str(tmp_path / "last.ckpt")).step == 3


@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu"])
def test_application_writes_checkpoints_atomically(composed, trainer):
    config = composed(f"trainer={trainer}", "logger=none")
    built = instantiate(config.trainer, logger=False, _convert_="all")
    assert isinstance(built.strategy.checkpoint_io, AtomicCheckpointIO)
