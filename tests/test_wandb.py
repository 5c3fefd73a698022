"""What an offline Weights & Biases run holds, read back from its files."""

import json

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from lightning_topkast import TopKast
from lightning_topkast.telemetry.media import Lines, Media, Picture, _Columns, pictured, split_histogram
from lightning_topkast.telemetry.pictures import SET_COLOURS, heatmap, histogram_picture, mask_picture, on_white
from lightning_topkast.telemetry.wandb import WandbMedia
from tests.helpers import MIDDLE, Net, fit, make_callback, make_net, make_trainer
from tests.test_telemetry import STRENGTH, ByHand
from tests.wandb_files import history, records_of

wandb = pytest.importorskip("wandb")


class Logging(Net):
    """Logs metrics of its own."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """One offline run of twelve steps: its records, its folder, its callback and the values counted by hand."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        for name in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder))
        # mode, not offline=True, which sets WANDB_MODE: that is read once in a process, and stays set
        callback = make_callback(strength=STRENGTH)
        by_hand = ByHand(callback)
        logger = WandbLogger(mode="offline", save_dir=folder, project="test", log_model=True)
        try:
            trainer = make_trainer(folder, callback, by_hand, logger=logger, max_epochs=3, enable_checkpointing=True)
            fit(trainer, make_net(optimizer="adamw", lr=0.05))
        finally:
            wandb.finish()
    (run,) = (folder / "wandb").glob("offline-run-*")
    return run, callback, by_hand


@pytest.fixture(scope="module")
def records(offline_run):
    return records_of(offline_run[0])


def test_run_holds_the_values_counted_by_hand(offline_run, records):
    rows = [row for row in history(records) if "topkast/penalty" in row]
    logged = {int(row["trainer/global_step"]): row for row in rows}
    for step, expected in enumerate(offline_run[2].rows):
        assert {key: logged[step][key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_settings_are_in_the_runs_configuration(records):
    updates = [record["config"]["update"] for record in records if record["type"] == "config"]
    ((settings,),) = (update["topkast"] for update in updates if "topkast" in update)
    assert settings["forward_sparsity"] == 0.75
    assert settings["schedule"]["update_every"] == 3
    assert settings["rule"] == {"name": "Magnitude", "exploration": "magnitude"}


def test_rows_of_ones_own_are_kept_beside_those_of_the_callback(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")

    class Own(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.logger.experiment.log({"own": trainer.global_step}, step=trainer.global_step)

    callbacks = [make_callback(update_every=10), Own()]
    logger = WandbLogger(mode="offline", save_dir=tmp_path, project="test")
    try:
        fit(make_trainer(tmp_path, *callbacks, logger=logger, max_epochs=10, log_every_n_steps=5), Logging())
    finally:
        wandb.finish()
    rows = history(records_of(next((tmp_path / "wandb").glob("offline-run-*"))))
    assert sum("own" in row for row in rows) >= 38
    steps = [int(row["trainer/global_step"]) for row in rows if "topkast/penalty" in row]
    assert steps == [0, *range(4, 40, 5), 40], "each at its own step"


def test_without_curves_of_single_weights_only_those_of_all_are_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    callback = make_callback(weight_curves=False)
    logger = WandbLogger(mode="offline", save_dir=tmp_path, project="test")
    try:
        trainer = fit(make_trainer(tmp_path, callback, logger=logger, max_steps=6), make_net())
    finally:
        wandb.finish()
    rows = history(records_of(next((tmp_path / "wandb").glob("offline-run-*"))))
    keys = {key for row in rows for key in row if key.startswith("topkast/")}
    assert {key.split("/")[1] for key in keys if MIDDLE in key} == {"masks", "thresholds"}
    assert "topkast/mask_change" in keys
    assert f"topkast/mask_change/{MIDDLE}" in trainer.callback_metrics, "which other callbacks may monitor"


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


def test_picture_of_a_mask_is_that_of_its_sets(offline_run, records):
    shown = [row for row in history(records) if f"topkast/masks/{MIDDLE}.path" in row]
    assert len(shown) == 4  # as often as the histograms
    with Image.open(offline_run[0] / "files" / shown[-1][f"topkast/masks/{MIDDLE}.path"]) as image:
        pixels = np.asarray(image.convert("RGB"))
    tiers = offline_run[1].topkast.weights[MIDDLE].tiers.numpy()
    cell = pixels.shape[0] // tiers.shape[0]
    colours = np.asarray(on_white(Image.fromarray(SET_COLOURS[tiers])))
    assert np.array_equal(pixels[cell // 2 :: cell, cell // 2 :: cell], colours)
    assert any(f"topkast/thresholds/{MIDDLE}.path" in row for row in history(records))


def test_mask_change_of_least_and_most_changed_weights_is_one_chart(offline_run, records):
    (row,) = (row for row in history(records) if "topkast/mask_change_of_weights_table.path" in row)
    table = json.loads((offline_run[0] / "files" / row["topkast/mask_change_of_weights_table.path"]).read_text())
    lines: dict[str, list[float]] = {}
    for step, name, value in table["data"]:
        lines.setdefault(name, []).append(value)
        assert 0 <= step <= 12
    refreshed = offline_run[2].rows[2::3]
    for name, values in lines.items():
        assert values[1:] == pytest.approx(
            [values_by_hand[f"topkast/{name}"] for values_by_hand in refreshed], rel=1e-5
        )


def test_checkpoint_is_handed_over_with_its_densities(offline_run, records):
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    (artifact,) = (artifact for artifact in artifacts if artifact["name"].startswith("sparse-model-"))
    assert artifact["type"] == "model"
    (file,) = artifact["manifest"]["contents"]
    checkpoint = torch.load(file["local_path"], weights_only=True)
    metadata = json.loads(artifact["metadata"])
    assert metadata["densities"] == {MIDDLE: {"forward": 0.25, "backward": 0.5}}
    alpha = checkpoint["state_dict"][MIDDLE]
    assert int(alpha.count_nonzero()) == 0.25 * alpha.numel()
    assert metadata["topkast/forward_sparsity"] == 0.75


def shown(folder, name, value):
    """The folder of an offline run to which one thing was logged."""
    try:
        WandbMedia(WandbLogger(mode="offline", save_dir=folder, project="test")).show({name: value}, 1)
    finally:
        wandb.finish()
    (run,) = (folder / "wandb").glob("offline-run-*/files/media")
    return run


def test_name_too_long_for_a_file_is_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    name = f"topkast/masks/{'ü' * 400}.weight"
    (file,) = shown(tmp_path, name, Picture(Image.new("RGB", (2, 2)), "")).rglob("*.png")
    assert file.name.startswith("ü" * 80 + "-")


def test_lines_longer_than_a_table_of_wandb_are_all_there(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    steps = list(range(5000))
    lines = Lines(steps, {name: [float(step) for step in steps] for name in ("least", "mean", "most")})
    (file,) = shown(tmp_path, "topkast/lines", lines).rglob("*.json")
    rows = json.loads(file.read_text())["data"]
    for name in lines.values:
        drawn = [value for _, line, value in rows if line == name]
        assert drawn == steps[::5]


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


@pytest.mark.parametrize("spoilt", [slice(None), 0], ids=["all", "a row"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_weight_that_has_diverged_is_shown_as_far_as_it_is_finite(spoilt, value):
    engine = TopKast(make_net(), 0.75, 0.5)
    with torch.no_grad():
        engine.weights[MIDDLE].parameter[spoilt] = value
    found = split_histogram(engine.weights[MIDDLE])
    assert all(np.isfinite(edges).all() for _, edges in found.values())
    Media().at_end([engine])


def test_heatmap_has_a_row_a_weight_and_a_column_a_refresh():
    small = heatmap([{"a": 0.0, "b": 1.0}])
    wide = heatmap([{"a": 0.0, "b": 1.0}] * 20)
    tall = heatmap([{f"weight {index}": 0.5 for index in range(10)}])
    assert wide.width > small.width
    assert tall.height - small.height == 8 * 14


def test_heatmap_of_a_long_run_stays_small():
    assert heatmap([{"a": float(torch.rand(()))} for _ in range(3000)]).width < 1200


def test_columns_of_a_long_run_are_means_over_all_of_it():
    columns = _Columns()
    for refresh in range(10_001):
        columns.add({"a": float(refresh), "b": 1.0})
    drawn = columns.all()
    assert 1000 <= len(drawn) <= 2001
    values = [column["a"] for column in drawn]
    assert values[:3] == [3.5, 11.5, 19.5]  # eight refreshes each
    assert values[-1] == 10_000
    assert np.diff(values[:-1]).tolist() == [8.0] * (len(values) - 2)
    assert {column["b"] for column in drawn} == {1.0}


def test_heatmap_of_masks_that_never_change_can_be_drawn():
    heatmap([{"a": 0.0}] * 3)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 3, 5), (4, 3, 5, 2), (4, 3, 2, 5, 2), (1, 1)])
def test_picture_of_a_mask_shows_every_entry_of_any_shape(shape):
    tiers = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    pixels = np.asarray(mask_picture(tiers)).reshape(-1, 4)
    for tier, colour in enumerate(SET_COLOURS):
        # lines around kernels hide a part of a cell, never a whole one
        assert (pixels == colour).all(axis=1).any() == (tiers == tier).any()


def test_picture_of_a_large_mask_stays_small():
    picture = mask_picture(np.full((1300, 5000), 2, dtype=np.uint8))
    assert max(picture.size) <= 512
    assert picture.getcolors() == [(picture.width * picture.height, tuple(SET_COLOURS[2]))]


def test_block_of_a_large_mask_is_the_stronger_the_more_of_it_is_updated():
    tiers = np.zeros((600, 40), dtype=np.uint8)
    tiers[:300, 0] = 2
    tiers[300:450:2, 0] = 1
    pixels = np.asarray(mask_picture(tiers, 256)).astype(int)
    assert pixels.shape == (200 * 1, 40, 4)
    assert (pixels[:100, 0] == SET_COLOURS[2]).all()
    grey, orange = SET_COLOURS[:2].astype(float)
    mixed = {tuple(((n * orange + (3 - n) * grey) / 3).round().astype(int).tolist()) for n in (1, 2)}
    assert set(map(tuple, pixels[100:150, 0].tolist())) == mixed  # one or two of three entries
    assert (pixels[150:, 0] == SET_COLOURS[0]).all()


def test_histogram_picture_has_a_line_at_each_threshold():
    groups = {"active": (np.array([0, 4]), np.array([0, 1, 2])), "reservoir": (np.array([9, 0]), np.array([0, 1, 2]))}
    with_lines, without = (histogram_picture(groups, lines) for lines in ({"active": 1.0}, {}))
    columns = []
    for image in (with_lines, without):
        red = (np.asarray(image) == [200, 0, 0]).all(axis=2)
        columns.append(np.flatnonzero(red[60:180].any(axis=0)))
    assert columns[0].tolist() == [8 + 220]
    assert columns[1].tolist() == []


def test_pictured_are_the_first_convolution_and_attention_else_the_first_weight():
    class Weight:
        def __init__(self, name, *shape):
            self.name, self.shape = name, shape

    convolutions = [Weight("conv1.weight", 4, 3, 3, 3), Weight("conv2.weight", 4, 4, 3, 3), Weight("head.weight", 2, 4)]
    attention = [
        Weight(f"blocks.{block}.attention.{part}.weight", 4, 4) for block in range(3) for part in ("qkv", "out")
    ]
    assert pictured(convolutions) == {"conv1.weight"}
    assert pictured(attention) == {weight.name for weight in attention[:4]}
    assert pictured(convolutions[2:]) == {"head.weight"}
