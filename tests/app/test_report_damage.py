"""A report of a run whose files are damaged, or of another form than runs write: what is left is shown."""

import json
import math
import sys

import pytest
import torch
from PIL import Image

from lightning_topkast.app.commands import report as command
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.report.contents import read_contents
from lightning_topkast.app.report.key_figures import key_figures
from lightning_topkast.app.report.mask_pictures import draw_mask
from lightning_topkast.app.report.page import write_page
from lightning_topkast.app.report.run_page import write_run_report
from lightning_topkast.app.report.write import write_reports
from lightning_topkast.app.run_folder.folder import runs_in
from lightning_topkast.app.run_folder.logs import read_curves
from lightning_topkast.app.run_folder.masks import SavedWeight, _saved_weight
from lightning_topkast.app.run_folder.result import read_result
from lightning_topkast.app.sweep.collect import collect
from lightning_topkast.app.sweep.compare import write_tables
from lightning_topkast.app.sweep.tables import to_json

RESULT = {
    "format": 1, "status": "finished", "choices": {"data": "digits", "sparsity": "topkast"}, "overrides": [],
    "config": {"seed": 0}, "seed": 0, "seconds": 1.5, "steps": 10, "examples": 640,
    "monitor": {"name": "val/acc", "mode": "max", "value": 0.75}, "metrics": {"test/acc": 0.5},
    "sparsity": {"weights": 0.9, "model": 0.8}, "parameters": {"total": 100, "nonzero": 20},
    "weights": [{"name": "net.weight", "shape": [4, 25], "entries": 100, "nonzero": 20}],
    "flops": {"forward_flops": 2.0, "training_flops": 6.0, "dense_training_flops": 30.0}, "versions": {},
}  # fmt: skip


@pytest.fixture
def without_figures(monkeypatch):
    """matplotlib takes most of a report's time."""
    monkeypatch.setitem(sys.modules, "lightning_topkast.app.report.drawing", None)


def leave(folder, result=None, log=None):
    folder.mkdir(parents=True, exist_ok=True)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if log is not None:
        (folder / "csv").mkdir()
        (folder / "csv" / "metrics.csv").write_text(log)
    return folder


def test_a_result_as_runs_write_it_is_taken(tmp_path):
    leave(tmp_path, RESULT)
    assert read_result(tmp_path).model_dump(exclude_unset=True) == RESULT


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", "none"),
        ("weights", [{"name": "net.weight"}]),
        ("weights", [{"name": "net.weight", "shape": None, "entries": 1, "nonzero": 1}]),
        ("parameters", {"nonzero": 20}),
        ("parameters", {"nonzero": 20, "total": "many"}),
        ("steps", "many"),
        ("hardware", ["a CPU"]),
        ("versions", {"torch": [2]}),
    ],
)
def test_part_of_another_form_is_named_and_the_rest_of_the_folder_shown(key, value, tmp_path):
    page = write_run_report(leave(tmp_path, RESULT | {key: value}, "step,val/acc\n1,0.5\n")).read_text()
    assert ("is not a valid result" in page) == (key != "versions")  # these are shown as they are
    assert "</html>" in page


def nested(levels):
    return {"a": nested(levels - 1)} if levels else 1


BEYOND = {
    "NaN": ("seconds", math.nan),
    "infinite": ("metrics", {"test/acc": math.inf}),
    "large": ("flops", {"forward_flops": 1e308, "training_flops": 1.0}),
    "400 digits": ("parameters", {"total": 10**400, "nonzero": 1}),
    "negative count": ("examples", -1),
    "sparsity is text": ("config", {"sparsity": "none"}),
    "sparsity is a list": ("config", {"sparsity": [1]}),
    "deep": ("config", nested(900)),
    "number in the configuration": ("config", {"sparsity": {"forward_sparsity": 10**400}}),
    "keys that are long in all": ("config", {"a" * 200_000: {str(number): 1 for number in range(100)}}),
    "no name": ("monitor", {"name": "", "mode": "max", "value": 0.5}),
    "no text": ("choices", {"sparsity": "\ud800"}),
    "long": ("choices", {"sparsity": "W" * 5_000_000}),
    "deep version": ("versions", {"torch": nested(400)}),
}


@pytest.mark.parametrize(("key", "value"), BEYOND.values(), ids=BEYOND)
def test_result_beyond_the_limits_is_damaged_and_hides_no_other_run(key, value, tmp_path):
    leave(tmp_path / "bad", RESULT | {key: value})
    for seed in range(2):
        leave(tmp_path / f"good{seed}", RESULT | {"seed": seed, "config": {"seed": seed}})
    collected = collect(tmp_path)
    (broken,) = collected.broken
    assert f"result.json is not a valid result: {key}" in broken
    assert len(broken) < 1000
    assert [row.seeds for row in collected.comparisons[0].rows] == [(0, 1)]


def test_ratio_of_numbers_within_the_limits_that_is_beyond_them_is_unknown(tmp_path):
    flops = {"forward_flops": 5e-324, "training_flops": 5e-324}
    leave(tmp_path / "dense", RESULT | {"choices": {"data": "digits", "sparsity": "dense"}, "flops": flops})
    leave(tmp_path / "sparse", RESULT | {"flops": {"forward_flops": 1e100, "training_flops": 1e100}})
    collected = collect(tmp_path)
    assert "training_flops_ratio" not in collected.comparisons[0].rows[1].figures
    json.loads(to_json(collected), parse_constant=pytest.fail)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("key", ["metrics", "monitor", "parameters", "flops", "weights"])
def test_run_that_failed_may_have_anything_in_its_result(key, tmp_path):
    leave(tmp_path, RESULT | {"status": "failed", key: [1]})
    assert f"is not a valid result: {key}" in write_run_report(tmp_path).read_text()


def test_run_that_diverged_saves_nothing_of_no_parameters(tmp_path):
    leave(tmp_path, RESULT | {"status": "diverged", "parameters": {"total": 0, "nonzero": 0}, "weights": []})
    names = {figure.name for figure in key_figures(read_result(tmp_path), None)}
    assert "test/acc" in names
    assert not names & {"parameters in use", "bytes saved"}


def test_endless_nesting_is_a_damaged_result(tmp_path):
    (tmp_path / "result.json").write_text("[" * 100_000)
    with pytest.raises(AppError, match="is damaged"):
        read_result(tmp_path)


@pytest.mark.usefixtures("without_figures")
def test_sweep_names_the_run_whose_result_has_another_form_and_lists_all(tmp_path):
    leave(tmp_path / "good", RESULT)
    leave(tmp_path / "bad", RESULT | {"status": "failed", "monitor": [1]})
    page = write_reports(tmp_path)[0].read_text()
    assert "2 runs" in page
    assert "monitor: input should be a valid dictionary or instance of Monitor, got [1]" in page


def test_log_with_a_field_without_an_end_keeps_what_came_before(tmp_path):
    leave(tmp_path, log='step,loss\n1,5\n2,4\n3,"' + "9,9\n" * 50_000)
    steps, values = read_curves(tmp_path)["loss"]
    assert (steps.tolist(), values.tolist()) == ([1, 2], [5, 4])


def test_what_is_no_log_of_a_run_is_left_out_with_a_note(tmp_path):
    name = "W" * 100_000
    leave(tmp_path, log=f"step,loss,{name}\n0,-1.7e308,1\n1,5,1\n1.7e308,5,\n2,nan,\n3,1e400,\n4,4,1\n")
    notes = []
    curves = read_curves(tmp_path, notes.append)
    assert {name: values.tolist() for name, (_, values) in curves.items()} == {"loss": [5, 4]}
    assert [note.partition("metrics.csv: ")[2] for note in notes] == [
        "1 point with a value beyond ±1e+100 left out.",
        "3 points with a name of more than 1,000 characters left out.",
        "1 point with a step beyond ±9,007,199,254,740,992 left out.",
    ]


def test_damaged_event_is_noted_and_what_came_before_is_kept(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        writer.add_scalar("loss", 5, 1)
    (events,) = (tmp_path / "tensorboard").iterdir()
    with open(events, "ab") as file:
        RecordWriter(file).write(b"\xff\xff\xff")
    notes = []
    assert read_curves(tmp_path, notes.append)["loss"][1].tolist() == [5]
    assert "the rest is left out, since it is damaged: DecodeError" in notes[0]


def test_curves_at_the_limits_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["val/loss", "topkast/mask_change/a", "topkast/forward_sparsity", "lr-" + "M" * 900, "val/" + "W" * 990]
    rows = [[step, *[value] * len(names)] for step, value in ((-(2**53), -1e100), (0, 5e-324), (2**53, 1e100))]
    leave(tmp_path / "run", RESULT, "\n".join(",".join(map(str, row)) for row in (["step", *names], *rows)))
    for folder, pictures in ((tmp_path / "run", 6), (tmp_path, 2)):
        page = write_reports(folder)[0].read_text()
        assert "left out" not in page
        assert "picture is missing" not in page
        assert len(list((folder / "report").iterdir())) == pictures


def test_picture_that_cannot_be_drawn_is_a_note(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from lightning_topkast.app.report import figures

    def fail(*arguments, **options):
        raise UnboundLocalError("no ticks")

    leave(tmp_path / "run", RESULT | {"flops": RESULT["flops"] | {"training_flops_ratio": 0.2}}, "step,loss\n1,5\n")
    monkeypatch.setattr("lightning_topkast.app.sweep.plot._panel", fail)
    monkeypatch.setattr(figures.Axes, "plot", fail)
    for folder, pictures in ((tmp_path / "run", 1), (tmp_path, 1)):
        page = write_reports(folder)[0].read_text()
        assert page.count("A picture is missing") == pictures
        assert "cannot be drawn: UnboundLocalError: no ticks" in page
    write_tables(collect(tmp_path), tmp_path)
    assert "the plot is missing, since it cannot be drawn" in capsys.readouterr().err
    assert (tmp_path / "comparison.md").exists()


def test_windows_of_a_log_that_was_cut_off_in_a_line_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from lightning_topkast.app.report.figures import curve_figures

    header = "step,masks/change_max,masks/change_mean,masks/change_min"
    leave(tmp_path, log=f"{header}\n10,0.5,0.4,0.3\n20,0.4,0.3,0.2\n30,0.3,0.2")
    (drawn,) = curve_figures(read_curves(tmp_path), None)
    assert drawn.name == "window-change"


def test_curves_are_of_the_run_and_not_of_a_logger(tmp_path):
    pytest.importorskip("matplotlib")
    from lightning_topkast.app.report.figures import curve_figures

    leave(tmp_path, log="step,hp_metric,val/acc\n0,-1,\n1,,0.5\n")  # Lightning's TensorBoardLogger leaves this one
    assert [each.name for each in curve_figures(read_curves(tmp_path), None)] == ["metric-acc"]


def test_shares_that_stay_at_zero_have_no_axis_below_it(tmp_path):
    pytest.importorskip("matplotlib")
    from lightning_topkast.app.report.figures import curve_figures, heatmap

    leave(tmp_path, log="step,topkast/reservoir_activated,topkast/mask_change/net.weight\n0,0,0\n10,0,0\n")
    curves = read_curves(tmp_path)
    assert all(each.figure.axes[0].get_ylim()[0] == 0 for each in curve_figures(curves, None))
    assert heatmap(curves).figure.axes[0].collections[0].get_clim() == (0, 1)


def test_histogram_of_a_diverged_weight_has_its_finite_entries(tmp_path):
    pytest.importorskip("matplotlib")
    from lightning_topkast.app.report.drawing import to_png
    from lightning_topkast.app.report.figures import histograms

    def drawn(*theta):
        tiers = torch.tensor([2, 2, 1, 0], dtype=torch.uint8)
        return histograms([SavedWeight("w", tiers, torch.tensor(theta) * (tiers == 2), torch.tensor(theta))])

    whole, broken = drawn(4.0, 3.0, 2.0, 1.0), drawn(torch.nan, torch.inf, 2.0, 1.0)
    assert [each[0].figure.axes[0].get_ylabel() for each in (whole, broken)] == ["entries", "finite entries"]
    assert to_png(broken[0].figure)
    assert drawn(torch.nan, torch.nan, torch.inf, torch.inf) == []


def test_pictures_of_others_in_a_folder_of_that_name_stay(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "thesis.png").write_bytes(b"mine")
    write_page(tmp_path, '<figure id="mask-1"></figure>', {"mask-1": b"ours"})
    write_page(tmp_path, "", {})
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["thesis.png"]


def test_page_that_cannot_be_written_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_page(tmp_path, "", {})
    assert not list(tmp_path.glob(".report*"))


def test_links_in_a_folder_lead_no_report_to_other_files(tmp_path):
    own = tmp_path / "home"
    own.mkdir()
    for name in ("old.png", "new.png", "page.html"):
        (own / name).write_text('<figure id="old">')
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    linked, run = tmp_path / "linked", tmp_path / "run"
    (run / "report").mkdir(parents=True)
    linked.mkdir()
    (linked / "report").symlink_to(own)
    for folder in (run, linked):
        (folder / "report.html").symlink_to(own / "page.html")
    with pytest.raises(AppError, match=r"report is a link.*remove the link"):
        write_page(linked, "page", {"new": b"picture"})
    for name in ("old", "new"):
        (run / "report" / f"{name}.png").symlink_to(own / f"{name}.png")
    write_page(run, "page", {"new": b"picture"})
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    assert (run / "report" / "new.png").read_bytes() == b"picture"
    assert not (run / "report" / "old.png").is_symlink()


def test_text_that_utf8_cannot_hold_does_not_stop_the_page(tmp_path):
    assert write_page(tmp_path, "a \ud800 name", {}).read_text(encoding="utf-8") == "a ? name"


@pytest.mark.usefixtures("without_figures")
def test_run_that_is_named_by_a_dot_has_a_title(tmp_path, monkeypatch):
    monkeypatch.chdir(leave(tmp_path / "my run", log="step,loss\n1,5\n"))
    assert read_contents(type(tmp_path)(".")).title == "my run"
    assert write_reports(type(tmp_path)("."))[0] == type(tmp_path)("report.html")


@pytest.mark.parametrize("left", ["csv/metrics.csv", "tensorboard/events.out.tfevents.1", "checkpoints/last.ckpt"])
def test_run_that_has_left_only_this_is_found_in_a_folder_of_runs(left, tmp_path):
    path = tmp_path / "day" / "run" / left
    path.parent.mkdir(parents=True)
    path.touch()
    assert runs_in(tmp_path) == [tmp_path / "day" / "run"]
    assert runs_in(path.parent) == []


@pytest.mark.usefixtures("without_figures")
def test_run_without_a_result_shows_the_sparsities_of_its_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    tiers = torch.tensor([[2, 1, 0, 0]], dtype=torch.uint8)
    state = {"weights": {"w": {"tiers": tiers, "latent": torch.zeros(1, 4)}}}
    content = {"pytorch-lightning_version": "2.6.0", "state_dict": {"w": torch.zeros(1, 4)}, "global_step": 1}
    torch.save(content | {"callbacks": {"TopKastCallback{}": state}}, tmp_path / "checkpoints" / "last.ckpt")
    page = write_run_report(tmp_path).read_text()
    assert 'data-name="forward sparsity">75.00 %' in page
    assert 'data-name="backward sparsity">50.00 %' in page


def test_ctrl_c_ends_without_a_traceback(tmp_path, monkeypatch):
    def interrupt(folder, each):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_topkast.app.report.write.write_reports", interrupt)
    monkeypatch.setattr(sys, "argv", ["topkast-report", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 130


@pytest.mark.usefixtures("without_figures")
def test_mask_pictures_keep_their_place_in_the_page_by_name(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    tiers = torch.tensor([[2, 1, 0, 0]], dtype=torch.uint8)
    content = {"pytorch-lightning_version": "2.6.0", "state_dict": {}, "global_step": 1}
    content["callbacks"] = {"TopKastCallback{}": {"weights": {"w": {"tiers": tiers}}}}
    torch.save(content, tmp_path / "checkpoints" / "last.ckpt")
    assert '<figure id="mask-1">' in write_run_report(tmp_path).read_text()
    with Image.open(tmp_path / "report" / "mask-1.png") as image:
        image.verify()


def hostile(part):
    """What a checkpoint may hold in the place of an ordinary tensor, by the part it stands for."""
    tiers, alpha = torch.tensor([[2, 0]], dtype=torch.uint8), torch.tensor([[1.0, 0.0]])
    latent = torch.tensor([[0.0, 3.0]])
    yield tiers, alpha, latent
    if part == "tiers":
        yield torch.empty((0, 5), dtype=torch.uint8), torch.empty((0, 5)), torch.empty((0, 5))
        yield tiers.to_sparse(), alpha, latent
        yield tiers.to("meta"), alpha, latent
    if part == "values":
        yield tiers, alpha.to_sparse(), latent
        yield tiers, alpha, latent.to_sparse_csr()
        yield tiers, alpha.to(torch.complex64), latent
        yield tiers, alpha.to("meta"), latent


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("part", ["tiers", "values"])
def test_tensors_that_cannot_be_drawn_are_told_from_those_that_can(part):
    (tiers, alpha, latent), *others = hostile(part)
    weight = _saved_weight("w", {"tiers": tiers, "latent": latent}, alpha)
    assert weight.thresholds() == (3.0, None)
    for tiers, alpha, latent in others:
        if part == "tiers":
            with pytest.raises(AppError, match="no valid tiers for 'w'"):
                _saved_weight("w", {"tiers": tiers, "latent": latent}, alpha)
        else:
            weight = _saved_weight("w", {"tiers": tiers, "latent": latent}, alpha)
            assert (weight.thresholds(), weight.groups()) == ((None, None), {})
            assert draw_mask(weight)
