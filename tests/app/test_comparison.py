"""From results to tables, pictures and W&B: all figures are made by hand here, and no run is."""

import csv
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from lightning_topkast.app.sweep.collect import collect
from lightning_topkast.app.sweep.compare import write_tables
from lightning_topkast.app.sweep.plot import pareto_front
from lightning_topkast.app.sweep.tables import to_csv, to_json, to_markdown
from tests.app.result_files import write_result
from tests.wandb_files import history, records_of


def result(method="dense", seed=0, score=0.9, forward=None, backward=None, **changes):
    """A result as a run leaves it."""
    sparsity = {} if forward is None else {"forward_sparsity": forward, "backward_sparsity": backward}
    density = 1 - (forward or 0.0)
    config = {"seed": seed, "sparsity": sparsity, "optimizer": {"lr": 0.1}, "data": {"seed": seed}}
    made = {
        "format": 1, "status": "finished", "overrides": [f"seed={seed}"], "seed": seed, "config": config,
        "choices": {"data": "digits", "model": "mlp", "sparsity": method},
        "monitor": {"name": "val/acc", "mode": "max", "value": score - 0.01}, "metrics": {"test/acc": score},
        "sparsity": {"weights": forward or 0.0, "model": forward or 0.0},
        "parameters": {"total": 1000, "nonzero": round(1000 * density)},
        "flops": {
            "forward_flops": 100 * density, "training_flops": 300 * density, "dense_forward_flops": 100,
            "dense_training_flops": 300, "forward_flops_ratio": density, "training_flops_ratio": density,
        },
        "seconds": 10.0 + seed, "examples": 50, "versions": {"torch": "2.13.0"}, "date": "2026-01-01",
    }  # fmt: skip
    return made | changes


@pytest.fixture
def write(tmp_path):
    """Write results into folders of their own, and collect them."""

    def write_all(*results):
        for index, each in enumerate(results):
            write_result(tmp_path / "runs" / f"{index:02}", each)
        return collect(tmp_path / "runs")

    return write_all


THREE = [
    *(result("topkast_90_80", seed, score, 0.9, 0.8) for seed, score in enumerate((0.8, 0.9, 0.85))),
    *(result(seed=seed, score=score) for seed, score in enumerate((0.94, 0.96))),
    result("set", 0, 0.83, 0.9, 0.9),
    result("set", 1, 0.1, 0.9, 0.9, status="diverged"),
]  # fmt: skip


def test_table_has_a_row_a_configuration_with_the_mean_and_spread_of_its_seeds(write):
    title, _, *lines = to_markdown(write(*THREE)).splitlines()[:7]
    assert title == "## digits, mlp"
    header, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header == ["method", "forward / backward", "test/acc ↑", "val/acc ↑", "sparsity", "parameters",
                      "inference FLOPs", "training FLOPs", "time", "runs"]  # fmt: skip
    assert all(set(cell) <= set(":-") for cell in rule)
    assert rows == [
        ["dense", "0 %", "0.9500 ± 0.0141", "0.9400 ± 0.0141", "0.0%", "1,000", "1.000×", "1.000×",
         "10.5 ± 0.7 s", "2"],
        ["topkast_90_80", "90 / 80 %", "0.8500 ± 0.0500", "0.8400 ± 0.0500", "90.0%", "100", "0.100×", "0.100×",
         "11.0 ± 1.0 s", "3"],
        ["set", "90 / 90 %", "0.8300", "0.8200", "90.0%", "100", "0.100×", "0.100×", "10.0 s", "1 + 1 diverged"],
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1, "aligned, to be read as it is"


def test_csv_and_json_hold_raw_numbers(write):
    collected = write(*THREE)
    rows = list(csv.DictReader(to_csv(collected).splitlines()))
    assert [row["method"] for row in rows] == ["dense", "topkast_90_80", "set"]
    assert float(rows[1]["test_mean"]) == pytest.approx(0.85)
    assert float(rows[1]["test_std"]) == pytest.approx(0.05)
    assert (rows[1]["seeds"], rows[2]["test_std"], rows[2]["diverged"]) == ("0 1 2", "", "1")
    (comparison,) = json.loads(to_json(collected))["comparisons"]
    assert comparison["rows"][1]["figures"]["test"]["values"] == [0.8, 0.9, 0.85]


def test_where_lower_is_better_the_lowest_comes_first(write):
    monitor = {"name": "val/loss", "mode": "min", "value": 1.0}
    runs = [
        result(method, score=0, forward=0.9, backward=0.9, monitor=monitor, metrics={"test/loss": loss})
        for method, loss in (("static", 2.0), ("rigl", 1.0), ("set", 3.0))
    ]
    collected = write(*runs)
    assert [row.method for row in collected.comparisons[0].rows] == ["rigl", "static", "set"]
    assert "test/loss ↓" in to_markdown(collected)
    assert [row.method for row in pareto_front(collected.comparisons[0])] == ["rigl"]


def test_each_data_set_and_model_has_a_table(write):
    other = {"data": "text", "model": "transformer", "sparsity": "dense"}
    collected = write(result(), result(choices=other))
    assert [(c.data, c.model) for c in collected.comparisons] == [("digits", "mlp"), ("text", "transformer")]


def test_rows_are_named_by_what_they_differ_in(write):
    def with_settings(lr, **sparsity):
        made = result("topkast", 0, 0.9, 0.9, 0.8, overrides=[f"optimizer.lr={lr}"])
        made["config"] = {**made["config"], "optimizer": {"lr": lr}, "derived": {"lr": 2 * lr}}
        made["config"]["sparsity"] = {**made["config"]["sparsity"], **sparsity}
        return made

    rows = write(
        with_settings(0.1, penalty="l1"), with_settings(0.1, penalty="l2"), with_settings(0.2, penalty="l2")
    ).comparisons[0].rows  # fmt: skip
    assert sorted(row.settings for row in rows) == [
        ("optimizer.lr=0.1", "sparsity.penalty=l1"),
        ("optimizer.lr=0.1", "sparsity.penalty=l2"),
        ("optimizer.lr=0.2", "sparsity.penalty=l2"),
    ]


def test_run_made_again_with_its_seed_is_no_second_sample(write):
    collected = write(result(score=0.5, date="2026-01-01"), result(score=0.9, date="2026-02-01"))
    (row,) = collected.comparisons[0].rows
    assert row.figures["test"].values == (0.9,)


def test_training_flops_are_those_of_all_examples_as_a_ratio_to_the_largest_dense_row(write):
    small = result("small_dense", score=0.8, examples=50)
    small["flops"] = {**small["flops"], "forward_flops": 20, "training_flops": 60}
    long = result("topkast", 0, 0.9, 0.9, 0.8, examples=100)
    rows = {row.method: row for row in write(result(), small, long).comparisons[0].rows}
    assert rows["small_dense"].figures["training_flops_ratio"].mean == pytest.approx(0.2)
    assert rows["topkast"].figures["training_flops_ratio"].mean == pytest.approx(0.2)
    assert rows["topkast"].figures["inference_flops_ratio"].mean == pytest.approx(0.1)


def test_tested_weights_that_are_less_sparse_than_configured_are_told(write):
    early = result("gradual_pruning", 0, 0.9, 0.9, 0.9, sparsity={"weights": 0.7, "model": 0.7})
    assert "gradual_pruning at 90 %: only 70.0% of the tested weights are zero" in to_markdown(write(early))
    assert "tested weights" not in to_markdown(write(result("gradual_pruning", 0, 0.9, 0.9, 0.9)))


def test_different_versions_in_one_table_are_told(write):
    text = to_markdown(write(result(), result(seed=1, versions={"torch": "2.12.0"})))
    assert "different versions of torch: 2.12.0, 2.13.0" in text


def test_broken_failed_and_unfinished_runs_are_told_and_the_others_collected(write, tmp_path, capsys):
    (tmp_path / "runs" / "cut").mkdir(parents=True)
    (tmp_path / "runs" / "cut" / "result.json").write_text('{"format": 1,')
    collected = write(result(), result(status="failed", error="no memory"), result(status="running"))
    write_tables(collected, tmp_path / "runs")
    out, err = capsys.readouterr()
    assert "\n dense " in out
    assert max(map(len, out.splitlines()[:-1])) <= 80  # but for the paths of the files
    assert "• not finished: 02" in out
    assert "• failed: 01: no memory" in out
    assert "skipped: " in err
    assert "cut/result.json is damaged" in err


@pytest.mark.parametrize(
    "damage",
    [
        {"seed": None}, {"metrics": None}, {"metrics": {"test/acc": "high"}}, {"monitor": {"name": "val/acc"}},
        {"monitor": {"name": "val/acc", "mode": "max", "value": []}}, {"sparsity": {}}, {"parameters": 3},
        {"flops": {"forward_flops": 3}}, {"flops": "many"}, {"seconds": {}}, {"versions": []},
        {"choices": {"model": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_result_that_was_damaged_is_passed_over_by_name_and_costs_no_other(write, damage):
    collected = write(result(), result(seed=1) | damage)
    assert [len(row.seeds) for row in collected.comparisons[0].rows] == [1]
    (said,) = collected.broken
    assert "01/result.json" in said
    assert next(iter(damage)) in said


def test_row_without_a_known_ratio_of_flops_has_none(write):
    flops = {"forward_flops": 0.0, "training_flops": 0.0}  # no product is counted in it
    (row,) = write(result("topkast", 0, 0.9, 0.9, 0.9, flops=flops)).comparisons[0].rows
    assert "inference_flops_ratio" not in row.figures


def test_pareto_front_leaves_out_what_is_worse_and_dearer(write):
    cheap, middle, dear = (result("topkast", 0, s, f, f) for f, s in ((0.95, 0.7), (0.9, 0.9), (0.8, 0.85)))
    front = pareto_front(write(result(score=0.95), cheap, middle, dear).comparisons[0])
    assert [row.forward_sparsity for row in front] == [0.95, 0.9, 0.0]


def test_picture_is_drawn_of_a_single_row(write, tmp_path):
    pytest.importorskip("matplotlib")
    write_tables(write(result("topkast", 0, 0.9, 0.9, 0.8)), tmp_path / "runs")
    assert (tmp_path / "runs" / "comparison.png").stat().st_size > 10_000


def test_picture_is_drawn_a_panel_a_table(write, tmp_path):
    pytest.importorskip("matplotlib")
    write_tables(write(*THREE), tmp_path / "runs")
    with Image.open(tmp_path / "runs" / "comparison.png") as image:
        one = image.width
        assert len(image.convert("RGB").getcolors(1_000_000)) > 20
    write_tables(write(*THREE, result(choices={"data": "b", "model": "m", "sparsity": "dense"})), tmp_path / "runs")
    with Image.open(tmp_path / "runs" / "comparison.png") as image:
        assert image.width == pytest.approx(2 * one, abs=2)


def test_without_matplotlib_the_tables_are_written_and_the_way_out_is_said(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_tables(write(*THREE), tmp_path / "runs")
    assert "lightning-topkast[sweep]" in capsys.readouterr().err
    assert sorted(file.suffix for file in (tmp_path / "runs").glob("comparison.*")) == [".csv", ".json", ".md"]


def test_wandb_run_holds_the_table_and_the_summary(write, tmp_path, capsys):
    folder = tmp_path / "runs"
    write_tables(write(*THREE), folder, project="sweeps")
    run = Path(capsys.readouterr().out.rsplit("wandb sync ", 1)[1].strip())
    records = records_of(run)
    (path,) = (item[key] for item in history(records) for key in item if key.endswith("digits-mlp.path"))
    table = json.loads((run / "files" / path).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["method"], row["test_mean"]) for row in rows] == [
        ("dense", pytest.approx(0.95)), ("topkast_90_80", pytest.approx(0.85)), ("set", pytest.approx(0.83)),
    ]  # fmt: skip
    summary = json.dumps([record for record in records if record["type"] == "summary"])
    assert "digits-mlp/topkast_90_80-90-80/test" in summary
