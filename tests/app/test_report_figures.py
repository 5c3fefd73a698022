"""What the figures of a report show, in small logs by hand."""

import re
from pathlib import Path

import numpy as np
import pytest

from lightning_topkast.app.report.curves import over_seeds, part_and_quantity
from lightning_topkast.app.report.names import natural
from lightning_topkast.text import short, short_names

pytest.importorskip("matplotlib")

from lightning_topkast.app.report.figures import curve_figures, heatmap

DOCS = Path(__file__).parents[2] / "docs"
CHANGE = "topkast/mask_change"


def curve(steps, values):
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def rows_of(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_cells_of_the_heatmap_are_as_wide_as_the_time_between_refreshes():
    curves = {f"{CHANGE}/w": curve([0, 10, 50, 60], [0, 0.4, 0.2, 0.1]), "loss": curve([80], [1])}
    (mesh,) = heatmap(curves).figure.axes[0].collections[:1]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 10, 50, 60, 80]  # the last until the end of the run
    assert mesh.get_array().ravel().tolist() == [0, 0.4, 0.2, 0.1]


@pytest.mark.parametrize(("steps", "edges"), [([0, 50, 100], [0, 50, 100, 102]), ([7], [7, 8])])
def test_refresh_at_the_end_of_the_run_is_visible(steps, edges):
    (mesh,) = heatmap({f"{CHANGE}/w": curve(steps, steps)}).figure.axes[0].collections[:1]
    assert mesh.get_coordinates()[0, :, 0].tolist() == edges


def test_rows_of_the_heatmap_are_in_the_order_of_the_model_or_else_in_natural_order():
    names = ["net.0.weight", "net.1.weight", "net.10.weight", "net.2.weight", "net.11.weight"]
    curves = {f"{CHANGE}/{name}": curve([0, 1], [number, number]) for number, name in enumerate(names)}
    figure = heatmap(curves).figure
    assert rows_of(figure) == [f"net.{number}.weight" for number in (0, 1, 2, 10, 11)]
    assert figure.axes[0].collections[0].get_array()[:, 0].tolist() == [0, 1, 3, 2, 4]
    bottom, top = figure.axes[0].get_ylim()
    assert bottom > top  # the first row is at the top
    known = ["net.11.weight", "net.0.weight", "a dense one"]
    assert rows_of(heatmap(curves, known).figure) == [f"net.{number}.weight" for number in (11, 0, 1, 2, 10)]


def test_numbers_of_any_length_and_of_other_scripts_can_be_sorted():
    names = ["a²", "a10", "a9", "٣", "", "9" * 999, "a"]
    assert sorted(names, key=natural) == ["", "9" * 999, "a", "a9", "a10", "a²", "٣"]


def test_rows_of_a_transformer_do_not_read_alike():
    parts = ["self_attention.query_key_value", "self_attention.project", "feedforward.expand", "feedforward.project"]
    names = [f"model.transformer.encoder.layers.{block}.{part}.weight" for block in range(12) for part in parts]
    shown = short_names(names, 40)
    assert len(set(shown)) == len(names)
    assert max(map(len, shown)) <= 40
    for name, text in zip(names, shown, strict=True):
        block, part = name.split(".")[4:6]
        assert text.startswith(f"mode…{block}.{part[:12]}")
    assert short_names(["net.0.weight", "net.1.weight"], 40) == ["net.0.weight", "net.1.weight"]


def test_names_that_are_alike_where_they_are_shown_are_numbered():
    names = [f"{'a' * 50}{middle}{'z' * 50}" for middle in "bc"]
    assert short_names(names, 20) == ["1: aaaaaaa…zzzzzzzzz", "2: aaaaaaa…zzzzzzzzz"]
    assert short("x" * 3000, 34) == "x" * 17 + "…" + "x" * 16


def test_line_below_a_curve_says_what_is_good_in_the_words_of_the_page_it_names():
    names = ("forward_sparsity", "mask_change/w", "reservoir_activated", "penalty")
    curves = {f"topkast/{name}": curve([0, 1], [0.5, 0.5]) for name in names} | {"val/acc": curve([0, 1], [0, 1])}
    captions = {each.name: each.caption for each in curve_figures(curves, "val/acc")}
    assert captions.pop("metric-acc") == ""
    assert captions.keys() == {"sparsity", "mask-change", "reservoir-activated", "penalty"}
    documented = (DOCS / "curves.md").read_text(encoding="utf-8")
    for caption in captions.values():
        words, page = re.fullmatch(r"Good: (.+) \((.+)\)\.", caption).groups()
        assert page == "docs/curves.md"
        assert f"| {words} |" in documented


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("val/acc", ("val", "acc")),
        ("val_acc", ("val", "acc")),
        ("valid_acc_epoch", ("val", "acc")),
        ("train_loss_step", ("train", "loss_step")),
        ("test_f1", ("test", "f1")),
        ("validity", ("", "validity")),
        ("val", ("", "val")),
        ("value/acc", ("", "value/acc")),
        ("loss", ("", "loss")),
        ("val/\n", ("val", "\n")),
        ("", ("", "")),
    ],
)
def test_part_and_quantity_are_read_from_the_names_that_people_give(name, read):
    assert part_and_quantity(name) == read


def test_validated_metrics_come_first_however_they_are_named():
    names = ["a1", "a2", "epoch", "test_acc", "train_loss_epoch", "train_loss_step", "val_f1", "val_loss"]
    drawn = curve_figures({name: curve([0, 1], [0, 1]) for name in names}, None)
    assert [each.name for each in drawn] == ["metric-loss", "metric-f1", "metric-a1", "metric-a2", "metric-loss_step"]
    assert [line.get_label() for line in drawn[0].figure.axes[0].lines] == ["train", "val"]


def test_curves_with_two_names_for_the_same_are_both_drawn():
    drawn = curve_figures({name: curve([0, 1], [0, 1]) for name in ("val/acc", "val_acc", "val_acc_epoch")}, None)
    assert sorted(each.name for each in drawn) == ["metric-acc", "metric-val_acc", "metric-val_acc_epoch"]


def test_seeds_are_summed_up_where_they_were_logged():
    steps, least, mean, most = over_seeds([curve([0, 2, 4], [1, 3, 5]), curve([0, 2], [3, 1])], 10)
    assert steps.tolist() == [0, 2, 4]
    assert [each.tolist() for each in (least, mean, most)] == [[1, 1, 5], [2, 2, 5], [3, 3, 5]]


def test_seeds_that_were_logged_far_apart_leave_a_gap():
    steps, _, mean, _ = over_seeds([curve([0, 1], [1, 1]), curve([9998, 9999], [2, 2])], 3)
    assert steps.tolist() == [0, 9999]
    assert mean.tolist() == [1, 2]
