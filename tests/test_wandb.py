"""What an offline Weights & Biases run holds, read back from its files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from lightning_topkast import TopKast
from lightning_topkast.wandb_media import heatmap, split_histogram
from tests.helpers import MIDDLE, fit, make_callback, make_net, make_trainer
from tests.test_telemetry import STRENGTH, ByHand

wandb = pytest.importorskip("wandb")


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """One offline run of twelve steps: its records, its folder, its callback and the values counted by hand."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        for name in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder))
        # mode, not offline=True, which sets WANDB_MODE: that is read once in a process, and stays set
        callback = make_callback(penalty_strength=STRENGTH)
        by_hand = ByHand(callback)
        logger = WandbLogger(mode="offline", save_dir=folder, project="test")
        try:
            trainer = make_trainer(folder, callback, by_hand, logger=logger, max_epochs=3)
            fit(trainer, make_net(optimizer="adamw", lr=0.05))
        finally:
            wandb.finish()
    (run,) = (folder / "wandb").glob("offline-run-*")
    return run, callback, by_hand


@pytest.fixture(scope="module")
def records(offline_run):
    """Every record of the run's own log file, by wandb's reader."""
    command = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [command, "leet", "inspect", "--json", offline_run[0]], capture_output=True, text=True, timeout=60
    )
    if done.returncode and "No such command" in done.stderr:
        pytest.skip("this wandb cannot read its own runs")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records) -> list[dict]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_run_holds_the_values_counted_by_hand(offline_run, records):
    rows = [row for row in history(records) if "topkast/penalty" in row]
    logged = {int(row["trainer/global_step"]): row for row in rows}
    for step, expected in enumerate(offline_run[2].rows):
        assert {key: logged[step][key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_values_are_drawn_over_the_optimizer_step(records):
    found = [record["metric"] for record in records if record["type"] == "metric"]
    metrics = {metric.get("name") or metric["glob_name"]: metric for metric in found}
    assert metrics["topkast/*"]["step_metric"] == "trainer/global_step"
    for name in ("forward_sparsity", "backward_sparsity", "model_sparsity", "mask_change", "reservoir_activated"):
        assert metrics[f"topkast/{name}"]["summary"]["last"]


def test_histograms_of_magnitude_meet_at_the_thresholds(offline_run, records):
    groups = {
        group: [
            {part: row[f"{key}.{part}"] for part in ("bins", "values")}
            for row in history(records)
            if f"{(key := f'topkast/magnitude/{MIDDLE}/{group}')}.bins" in row
        ]
        for group in ("active", "exploring", "reservoir")
    }
    # the sets were noted five times, at the start and at four refreshes; drawn the 1st, 2nd and 4th time and at the end
    assert {len(found) for found in groups.values()} == {4}
    assert [sum(found[-1]["values"]) for found in groups.values()] == [64, 64, 128]
    edges = np.array(groups["active"][-1]["bins"])
    weight = offline_run[1].topkast.weights[MIDDLE]
    for members in (weight.active, weight.updated & ~weight.active):
        assert np.isclose(edges, float(weight.theta().abs()[members].min()), atol=1e-6).any()


def test_heatmap_image_and_table_of_weights_are_on_disk(offline_run, records):
    (last,) = (row for row in history(records) if "topkast/weights.path" in row)
    files = offline_run[0] / "files"
    with Image.open(files / last["topkast/mask_change_heatmap.path"]) as image:
        assert image.size == (last["topkast/mask_change_heatmap.width"], last["topkast/mask_change_heatmap.height"])
        assert len(image.convert("RGB").getcolors(100_000)) > 3
    table = json.loads((files / last["topkast/weights.path"]).read_text())
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    assert rows.keys() == dict(make_net().named_parameters()).keys()
    assert (rows[MIDDLE]["active"], rows[MIDDLE]["updated"], rows[MIDDLE]["kept dense"]) == (64, 128, "")
    assert rows["layers.0.weight"]["kept dense"] == "first candidate"
    assert rows["layers.0.bias"]["kept dense"] == "bias"


# --- pictures and histograms without a run ------------------------------------------------------------------------


def test_split_histogram_separates_the_sets_where_they_meet():
    weight = TopKast(make_net(), 0.75, 0.5).weights[MIDDLE]
    found = split_histogram(weight)
    theta = weight.theta().abs()
    threshold = float(theta[weight.active].min())
    counts, edges = found["active"]
    assert counts[edges[:-1] < threshold - 1e-7].sum() == 0
    counts, edges = found["exploring"]
    assert counts[edges[:-1] >= threshold].sum() == 0
    assert sum(counts.sum() for counts, _ in found.values()) == theta.numel()


def test_heatmap_has_a_row_a_weight_and_a_column_a_refresh():
    small = heatmap([{"a": 0.0, "b": 1.0}])
    wide = heatmap([{"a": 0.0, "b": 1.0}] * 20)
    tall = heatmap([{f"weight {index}": 0.5 for index in range(10)}])
    assert wide.width > small.width
    assert tall.height - small.height == 8 * 14


def test_heatmap_of_a_long_run_stays_small():
    assert heatmap([{"a": float(torch.rand(()))} for _ in range(3000)]).width < 1200


def test_heatmap_of_masks_that_never_change_can_be_drawn():
    heatmap([{"a": 0.0}] * 3)
