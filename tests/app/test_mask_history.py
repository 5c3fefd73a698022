"""The masks over a run: what is recorded, that a resumed run records the same, and how it is read and shown."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from lightning import Callback

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.report.network import network
from lightning_topkast.app.report.run_page import WeightRow, write_run_report
from lightning_topkast.app.run.mask_recorder import MaskRecorder
from lightning_topkast.app.run_folder import mask_history
from lightning_topkast.app.run_folder.mask_history import FILE, MaskHistory, read_mask_history
from lightning_topkast.telemetry.pictures import block_shares
from tests.helpers import SaveAfter, fit, make_callback, make_net, make_trainer


@pytest.fixture
def without_figures(monkeypatch):
    """What matplotlib draws takes most of a report's time."""
    monkeypatch.setitem(sys.modules, "lightning_topkast.app.report.drawing", None)


class ByHand(Callback):
    """Keeps the tiers after each step."""

    def __init__(self, callback):
        self.callback, self.tiers = callback, {}

    def on_train_start(self, trainer, pl_module):
        self.keep(trainer)

    def on_train_batch_end(self, trainer, *args):
        self.keep(trainer)

    def keep(self, trainer):
        weights = self.callback.topkast.weights.values()
        self.tiers[trainer.global_step] = [weight.tiers.cpu().clone() for weight in weights]


def record(folder, *more, epochs=3, callback=None, seed=0, **options):
    """Train 4 steps an epoch, with a refresh after every other one."""
    callback = callback or make_callback(update_every=2, keep_first_dense=False)
    trainer = make_trainer(folder, callback, MaskRecorder(folder), *more, max_epochs=epochs)
    fit(trainer, make_net(seed=seed, lr=0.5), **options)
    return read_mask_history(folder)


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_recorded_are_the_masks_at_every_refresh(storage, tmp_path):
    callback = make_callback(update_every=2, keep_first_dense=False, storage=storage)
    by_hand = ByHand(callback)
    history = record(tmp_path, by_hand, callback=callback)
    assert [(moment.step, moment.refresh) for moment in history.moments] == [(2 * n, n) for n in range(7)]
    weights = callback.topkast.weights
    assert [(each.name, tuple(each.shape)) for each in history.weights] == [(w.name, w.shape) for w in weights.values()]
    for number in range(len(weights)):
        expected = [block_shares(by_hand.tiers[moment.step][number], 64).numpy() for moment in history.moments]
        assert np.abs(history.shares(number) - expected).max() <= 1 / 255
        assert history.shares(number).sum() > 0
    assert not np.array_equal(history.shares(0)[0], history.shares(0)[-1])


def test_long_run_keeps_few_moments_evenly_spaced_and_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_topkast.app.run.mask_recorder.MOST_MOMENTS", 4)
    history = record(tmp_path, epochs=5)  # 10 refreshes
    assert [moment.refresh for moment in history.moments] == [0, 4, 8, 10]
    assert history.every == 4


@pytest.mark.parametrize("most", [3, 32])
def test_resumed_run_has_recorded_the_same_as_an_uninterrupted_one(most, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_topkast.app.run.mask_recorder.MOST_MOMENTS", most)
    half = tmp_path / "half.ckpt"  # after 4 steps
    expected = record(tmp_path / "run", SaveAfter(half, 0))  # which also records what the resumed run repeats
    assert record(tmp_path / "run", seed=1, ckpt_path=half) == expected
    (tmp_path / "run" / FILE).unlink()  # lost: begun anew at the checkpoint
    anew = record(tmp_path / "run", seed=1, ckpt_path=half)
    assert [moment.step for moment in anew.moments][-1] == 12
    assert min(moment.step for moment in anew.moments) >= 4


def test_another_run_in_the_folder_begins_anew(tmp_path):
    record(tmp_path, epochs=3)
    assert [moment.step for moment in record(tmp_path, epochs=1).moments] == [0, 2, 4]


def test_full_disk_ends_the_record_and_not_the_run(tmp_path, monkeypatch, capsys):
    def fail(folder, history):
        raise OSError(28, "No space left on device", str(folder / FILE))

    monkeypatch.setattr("lightning_topkast.app.run.mask_recorder.write_mask_history", fail)
    assert record(tmp_path) is None
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "masks" in line]
    assert line.startswith("the masks over the run are not recorded from step 0 on: ")
    assert "No space left" in line


def test_blocks_of_large_weights_are_shares_of_their_entries():
    tiers = torch.zeros(130, 3, dtype=torch.uint8)  # blocks of 3 × 1, the last of 1 × 1
    tiers[0], tiers[1], tiers[129, 2] = 2, 1, 2
    shares = block_shares(tiers, 64)
    assert shares.shape == (44, 3, 2)
    assert shares[0].tolist() == [[pytest.approx(1 / 3)] * 2] * 3
    assert shares[43].tolist() == [[0, 0], [0, 0], [0, 1]]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder that is copied and never changed."""
    folder = tmp_path_factory.mktemp("recorded")
    record(folder, epochs=1)
    return folder


def broken(content):
    weight, moment = content["weights"][0], content["moments"][0]
    yield "not JSON", "{"
    yield "a list", []
    yield "another version", content | {"format": 2}
    yield "rows beyond the limit", content | {"weights": [weight | {"rows": 10**9}, *content["weights"][1:]]}
    yield "no height", content | {"weights": [weight | {"height": 0}, *content["weights"][1:]]}
    yield "a size that does not fit", content | {"weights": [weight | {"rows": 1}, *content["weights"][1:]]}
    yield "too many moments", content | {"moments": [moment] * 1000}
    yield "too few masks", content | {"moments": [moment | {"masks": []}]}
    yield (
        "not base64",
        content | {"moments": [moment | {"masks": [{"top": 0.5, "blocks": "?"}] * len(moment["masks"])}]},
    )
    yield "NaN", json.dumps(content).replace('"top": ', '"top": NaN, "was": ', 1)
    yield "a refresh twice", content | {"moments": [content["moments"][0]] * 2}
    yield "steps that fall", content | {"moments": content["moments"][::-1]}
    yield "too large", " " * (1 << 24)
    yield "deep", "[" * 100_000


KINDS = [
    "not JSON", "a list", "another version", "rows beyond the limit", "no height", "a size that does not fit",
    "too many moments", "too few masks", "not base64", "NaN", "a refresh twice", "steps that fall", "too large", "deep",
]  # fmt: skip


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_record_is_one_note_and_the_rest_is_shown(kind, recorded, tmp_path):
    content = dict(broken(json.loads((recorded / FILE).read_text())))
    assert list(content) == KINDS
    text = content[kind] if isinstance(content[kind], str) else json.dumps(content[kind])
    (tmp_path / FILE).write_text(text)
    with pytest.raises(AppError, match=FILE) as error:
        read_mask_history(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    page = write_run_report(tmp_path).read_text()
    assert "Masks over the run are missing" in page
    assert 'type="range"' not in page


def test_record_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(AppError, match="named pipe"):
        read_mask_history(tmp_path)


def test_damaged_record_does_not_end_a_resumed_run(recorded, tmp_path):
    half = tmp_path / "half.ckpt"
    record(tmp_path, SaveAfter(half, 0))
    (tmp_path / FILE).write_text("{")
    assert record(tmp_path, ckpt_path=half).moments[-1].step == 12


def test_largest_record_is_within_what_is_read(tmp_path):
    blocks = mask_history.as_bytes(np.random.default_rng(0).random((64, 64, 2)).astype(np.float32) / 2)
    weight = {"shape": [1 << 30] * 16, "height": 1 << 40, "width": 1 << 40, "rows": 64, "columns": 64}
    history = MaskHistory(
        weights=[{"name": f"{number}" + "n" * 900, **weight} for number in range(6)],
        every=1,
        moments=[mask_history.Moment(step=n, refresh=n, masks=[blocks] * 6) for n in range(32)],
    )
    mask_history.write_mask_history(tmp_path, history)
    assert read_mask_history(tmp_path) == history


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_figures")
def test_slider_steps_through_the_recorded_moments(recorded, tmp_path):
    page = write_run_report(shutil.copytree(recorded, tmp_path / "run")).read_text()
    (moments,) = re.findall(r'data-moments="([^"]*)"', page)
    assert moments.split("|") == ["step 0, refresh 0", "step 2, refresh 1", "step 4, refresh 2"]
    (slider,) = re.findall(r"<input [^>]*>", page)
    assert 'type="range" min="0" max="2" value="2"' in slider
    assert slider.endswith(" hidden>")  # until the script runs
    assert page.count('class="reel"') == len(read_mask_history(recorded).weights)
    assert "--moments: 3; --moment: 2" in page


@pytest.mark.usefixtures("without_figures")
def test_masks_that_never_change_have_no_slider(tmp_path):
    static = make_callback(update_every=2, rule="static", forward_sparsity=0.8, backward_sparsity=0.8)
    record(tmp_path, callback=static, epochs=1)
    page = write_run_report(tmp_path).read_text()
    assert "<script" not in page
    assert 'type="range"' not in page


def test_columns_of_the_network_are_as_wide_and_full_as_their_weights():
    rows = [
        WeightRow("net.first.weight", "10×10", 100, 100, reason="first candidate"),
        WeightRow("net.middle.weight", "20×20", 400, 40, active=40, updated=80),
        WeightRow("net.last.weight", "10×10", 100, 1, active=1, updated=100),
    ]
    drawn = network(rows)
    first, middle, last = drawn.columns
    assert [column.name for column in drawn.columns] == ["first", "middle", "last"]
    assert [column.width for column in drawn.columns] == [10, 20, 10]
    heights = dict(drawn.marks)
    assert list(heights) == ["100 %", "10 %", "1 %"]
    assert (first.active, middle.active, last.active) == (100, heights["10 %"], heights["1 %"]) == (100, 60, 20)
    assert last.updated == 100
    assert middle.active < middle.updated < 100
    assert (first.is_dense, middle.is_dense) == (True, False)
    assert first.about == "net.first.weight, 10×10: dense: first candidate"
    assert middle.about == "net.middle.weight, 20×20: forward density 10.00 %, backward 20.00 %"


def test_dense_network_is_not_drawn():
    assert network([WeightRow("w", "2×2", 4, 4)]) is None
    assert network([]) is None
