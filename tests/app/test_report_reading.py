"""What a report reads: curves from logs, and the sets of weights from checkpoints."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_topkast.app.report.curves import on_grid, thinned
from lightning_topkast.app.report.mask_pictures import draw_mask
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.run_folder.logs import read_curves
from lightning_topkast.app.run_folder.masks import SavedWeight, read_masks
from lightning_topkast.telemetry.pictures import SET_COLOURS


def log(folder, text):
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)


def test_resumed_part_of_a_run_replaces_what_came_after_its_checkpoint(tmp_path):
    log(tmp_path / "csv", "step,loss\n1,5\n2,4\n3,9\n4,9\n")
    log(tmp_path / "csv-2", "step,loss,acc\n3,3,\n5,2,0.5\n")
    curves = {name: (steps.tolist(), values.tolist()) for name, (steps, values) in read_curves(tmp_path).items()}
    assert curves == {"loss": ([1, 2, 3, 5], [5, 4, 3, 2]), "acc": ([5], [0.5])}


def test_copied_folder_with_other_dates_has_the_same_curves(tmp_path):
    for number in range(12):  # begun at step 20 * number, and killed 20 steps after the next one's start
        steps = range(20 * number, 20 * number + 40)
        rows = "".join(f"{step},{number}\n" for step in steps)
        log(tmp_path / ("csv" if number == 0 else f"csv-{number + 1}"), f"step,loss\n{rows}")
        os.utime(
            tmp_path / ("csv" if number == 0 else f"csv-{number + 1}") / "metrics.csv", (100 - number, 100 - number)
        )
    steps, values = read_curves(tmp_path)["loss"]
    assert steps.tolist() == list(range(260))
    assert values.tolist() == [min(step // 20, 11) for step in range(260)]


def test_copied_event_files_with_other_dates_have_the_same_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    for number, begun in enumerate((99, 1000, 1700000000)):
        with SummaryWriter(str(tmp_path / f"part{number}")) as writer:
            for step in range(10 * number, 10 * number + 20):
                writer.add_scalar("loss", number, step)
        (written,) = (tmp_path / f"part{number}").iterdir()
        (tmp_path / "tensorboard").mkdir(exist_ok=True)
        target = written.rename(tmp_path / "tensorboard" / f"events.out.tfevents.{begun}.host.7.0")
        os.utime(target, (100 - number, 100 - number))
    steps, values = read_curves(tmp_path)["loss"]
    assert steps.tolist() == list(range(40))
    assert values.tolist() == [min(step // 10, 2) for step in range(40)]


def test_cells_that_are_no_finite_numbers_are_no_points(tmp_path):
    log(tmp_path / "csv", "step,loss\n1,nan\n2,4\n3,inf\n4,\n5,x\n,3\n6")
    steps, values = read_curves(tmp_path)["loss"]
    assert (steps.tolist(), values.tolist()) == ([2], [4])


def test_curves_come_from_tensorboard_where_there_is_no_csv_log(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step in (1, 2, 3):
            writer.add_scalar("val/acc", step / 4, step)
    steps, values = read_curves(tmp_path)["val/acc"]
    assert (steps.tolist(), values.tolist()) == ([1, 2, 3], [0.25, 0.5, 0.75])


def test_curves_are_those_of_a_logger_whose_folder_is_named(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train_loss\n1,5\n")  # of a Trainer with a CSVLogger
    (curve,) = read_curves(tmp_path).values()
    assert [each.tolist() for each in curve] == [[1], [5]]
    assert RunFolder(tmp_path).is_run


def test_layers_logged_at_different_steps_keep_their_last_value_between_them():
    steps, values = on_grid(
        {"a": (np.array([0.0, 2.0]), np.array([5.0, 6.0])), "b": (np.array([1.0]), np.array([7.0]))}
    )
    assert steps.tolist() == [0, 1, 2]
    assert values.tolist() == [[5, 5, 6], [7, 7, 7]]


def test_long_curve_is_thinned_to_means():
    steps, values = thinned((np.arange(10.0), np.arange(10.0) ** 2), most=5)
    assert steps.tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert values.tolist() == [0.5, 6.5, 20.5, 42.5, 72.5]


def weight(tiers, theta):
    tiers, theta = torch.tensor(tiers, dtype=torch.uint8), torch.tensor(theta)
    return SavedWeight("w", tiers, theta * (tiers == 2), theta * (tiers != 2))


def test_thresholds_are_the_magnitudes_at_the_sizes_of_the_sets():
    explores = weight([2, 0, 1, 2, 1], [5.0, -1.0, 3.0, -4.0, -2.0])
    assert (explores.active, explores.updated, explores.thresholds()) == (2, 4, (4.0, 2.0))
    assert weight([2, 0, 0], [5.0, 1.0, 3.0]).thresholds() == (5.0, None)
    assert weight([2, 2], [5.0, 1.0]).thresholds() == (None, None)


def test_histogram_has_the_magnitudes_of_each_set():
    groups = weight([2, 0, 1, 2, 1], [5.0, -1.0, 3.0, -4.0, -2.0]).groups()
    assert {tier: group.tolist() for tier, group in groups.items()} == {0: [1], 1: [3, 2], 2: [5, 4]}


def test_masks_are_those_of_the_checkpoint_that_was_tested(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for step, name in enumerate(("best", "last")):  # the last is newer
        content = {"pytorch-lightning_version": "2.6.0", "state_dict": {}, "global_step": step}
        torch.save(content, tmp_path / "checkpoints" / f"{name}.ckpt")
    assert read_masks(RunFolder(tmp_path)).step == 0
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    assert read_masks(RunFolder(tmp_path)).step == 1


def pixels(tiers, tmp_path):
    (tmp_path / "mask.png").write_bytes(draw_mask(SavedWeight("w", torch.tensor(tiers, dtype=torch.uint8), None, None)))
    with Image.open(tmp_path / "mask.png") as image:
        return np.asarray(image.convert("RGBA")).astype(int)


def test_mask_is_drawn_in_three_colours_outputs_downwards(tmp_path):
    drawn = pixels([[2, 1, 0], [0, 0, 0]], tmp_path)
    assert drawn.shape == (170, 255, 4)  # 85 times as large
    corners = drawn[42, [42, 127, 212]]
    assert np.abs(corners[0] - SET_COLOURS[2]).max() <= 4
    assert np.abs(corners[1] - SET_COLOURS[1]).max() <= 4
    assert np.abs(corners[2] - SET_COLOURS[0]).max() <= 4
    assert drawn[127, 42].tolist() == corners[2].tolist()


def test_kernels_of_a_convolution_are_tiles(tmp_path):
    tiers = np.zeros((2, 3, 2, 2))
    tiers[1, 2, 0, 1] = 2  # second output, third input, its upper right corner
    drawn = pixels(tiers.tolist(), tmp_path)
    zoom = drawn.shape[0] // 4
    found = np.argwhere(np.abs(drawn - SET_COLOURS[2]).max(axis=-1) <= 4)
    assert found.min(axis=0).tolist() == [2 * zoom, 5 * zoom]
    assert found.max(axis=0).tolist() == [3 * zoom - 1, 6 * zoom - 2]  # beside the gap to the next kernel
