"""The report of a run and of a sweep: what it says, that it is one safe file, and that no training fails for it."""

import csv
import json
import re
import shutil
import sys
from base64 import b64encode
from hashlib import sha256
from html import escape
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import open_dict
from PIL import Image

from lightning_topkast.app.commands import report as command
from lightning_topkast.app.commands import train_job
from lightning_topkast.app.report import run_page
from lightning_topkast.app.report.leave import leave_report
from lightning_topkast.app.report.run_page import write_run_report
from lightning_topkast.app.report.write import write_reports
from lightning_topkast.app.run.settings import settings_of, without_places
from lightning_topkast.app.run.train import train
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.run_folder.logs import read_curves
from lightning_topkast.app.run_folder.masks import read_masks
from lightning_topkast.app.run_folder.result import read_result as read_model
from lightning_topkast.telemetry.pictures import SET_COLOURS, SET_NAMES
from tests.app.result_files import read_result, write_result

VOID = {"meta", "wbr", "br", "img", "link", "hr", "input"}
SHORT = ["trainer.max_epochs=1", "trainer.limit_train_batches=3", "callbacks.progress=null", "logger=csv"]
TEMPLATES = files("lightning_topkast.app.report").joinpath("templates")
SORT, SLIDE = (TEMPLATES.joinpath(f"{name}.js").read_text(encoding="utf-8").strip() for name in ("sort", "slide"))
HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """A parsed page: every element's attributes, the text of all, and whether its tags are balanced."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.open, self.text, self.rows = [], [], [], []
        self.feed(self.source)
        self.close()
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def figures(self):
        return {attributes["data-name"]: float(attributes["value"]) for attributes in self.all("data")}

    @property
    def said(self):
        return " ".join(" ".join(self.text).split())


def check_safe_and_whole(page, script=""):
    """One file, which loads nothing and runs nothing but this script."""
    names = [name for name, _ in page.elements]
    assert not {"iframe", "object", "link", "base"} & set(names)
    assert re.findall("<script>(.*?)</script>", page.source, flags=re.DOTALL) == ([script] if script else [])
    assert names.count("script") == bool(script)
    (policy,) = (attributes["content"] for attributes in page.all("meta") if "http-equiv" in attributes)
    allowed = f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}" if script else "none"
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src '{allowed}'; base-uri 'none'; "
        "form-action 'none'"
    )
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "xlink:href", "action", "data", "poster"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert "@import" not in page.source
    assert all(part.startswith("#") for part in page.source.split("url(")[1:])
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = [attributes["xlink:href"][1:] for _, attributes in page.elements if "xlink:href" in attributes]
    referred += [part[1 : part.index(")")] for part in page.source.split("url(")[1:]]
    assert {name for name in referred if not name.startswith("ata:")} <= set(ids)
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert all(attributes["aria-label"] for attributes in page.all("svg"))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in page.source
    assert names.count("h1") == 1
    assert len(page.source) < 3_000_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a real run, which is copied and never changed."""
    folder = tmp_path_factory.mktemp("report") / "run"
    own = [
        "logger=csv",
        "callbacks.progress=null",
        "trainer.max_epochs=4",
        "sparsity.schedule.update_every=10",
        "seed=5",
    ]
    with initialize_config_module("lightning_topkast.conf", version_base="1.3"):
        config = compose("train", overrides=[f"paths.output_dir={folder}", *own], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    train(config)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a real run's folder."""
    return shutil.copytree(trained, tmp_path / "one run")


@pytest.fixture
def without_figures(monkeypatch):
    """What matplotlib draws takes most of a report's time, and is left out where it is not there."""
    monkeypatch.setitem(sys.modules, "lightning_topkast.app.report.drawing", None)


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    """The page of the real run, which lies in a copy of its folder."""
    pytest.importorskip("matplotlib")
    path = write_run_report(shutil.copytree(trained, tmp_path_factory.mktemp("page") / "run"))
    read = Page(path)
    read.folder = path.parent
    return read


def test_figures_are_those_of_the_result(page):
    result, shown = read_result(page.folder), page.figures
    assert {name: shown[name] for name in result["metrics"]} == result["metrics"]
    assert shown["val/acc"] == result["monitor"]["value"]
    assert shown["forward sparsity"] == result["sparsity"]["weights"]
    assert shown["model sparsity"] == result["sparsity"]["model"]
    assert shown["parameters in use"] == result["parameters"]["nonzero"] == 11274
    assert shown["inference FLOPs"] == result["flops"]["forward_flops_ratio"]
    assert shown["training FLOPs"] == result["flops"]["training_flops_ratio"]
    assert shown["training time"] == result["seconds"]
    assert f"{result['steps']:,} steps, {result['examples']:,} examples" in page.said


def test_savings_follow_from_the_counts(page):
    flops = read_result(page.folder)["flops"]
    assert page.figures["backward sparsity"] == pytest.approx(0.8, abs=1e-4)
    # a value of 4 bytes for each non-zero entry, and a bit for each of all
    assert page.figures["bytes saved"] == 4 * 85002 - (4 * 11274 + 10626)
    an_example = flops["dense_training_flops"] - flops["training_flops"]
    assert page.figures["FLOPs saved"] == an_example * read_result(page.folder)["examples"]


def test_page_is_one_safe_file_that_needs_no_network(page):
    check_safe_and_whole(page, SLIDE)


def test_page_has_configuration_command_versions_and_hardware(page):
    result = read_result(page.folder)
    assert "topkast-train" in page.said
    assert "sparsity.schedule.update_every=10" in page.said
    assert "update_every: 10" in page.said
    assert page.all("details")
    for value in (*result["versions"].values(), *result["hardware"].values()):
        assert value in page.said


def test_every_picture_is_in_the_page_and_a_file_beside_it(page):
    files = {path.stem for path in (page.folder / "report").iterdir()}
    assert files == {
        "metric-loss", "metric-acc", "sparsity", "mask-change", "reservoir-activated", "penalty", "learning-rate",
        "mask-change-heatmap", "mask-1", "mask-2", "masks-over-run-1", "masks-over-run-2", "magnitudes-1",
        "magnitudes-2",
    }  # fmt: skip
    assert len(page.all("figure")) == len(files)
    for path in (page.folder / "report").iterdir():
        with Image.open(path) as image:
            image.verify()


def test_table_of_weights_has_the_sets_and_where_they_are_cut(page):
    rows = {row[0]: row for row in page.rows}
    weight = {weight.name: weight for weight in read_masks(RunFolder(page.folder)).weights}["net.hidden2.weight"]
    forward, backward = weight.thresholds()
    assert rows["net.hidden2.weight"][1:] == [
        "256×256", "65,536", "6,554", "6,554", "13,107", "10.00 %", "20.00 %", f"{forward:.3g}", f"{backward:.3g}",
    ]  # fmt: skip
    assert rows["net.output.weight"][1:] == ["10×256", "2,560", "2,560", "dense: last candidate"]
    assert rows["3 biases, norms and similar"][1:] == ["", "522", "522", "dense"]


def test_what_scrolls_has_a_shadow_at_its_edge_and_keeps_names_in_sight(page):
    style = page.source.partition("</style>")[0]
    (scrolls,) = re.findall(r"\n\.scroll \{([^}]*)\}", style)
    assert "overflow-x: auto" in scrolls
    assert scrolls.count("no-repeat local") == scrolls.count("no-repeat scroll") == 2  # covers, shadows
    (name,) = re.findall(r"\nth:first-child \{([^}]*)\}", style)
    assert "position: sticky; left: 0" in name
    assert "background: var(--card)" in name
    scrolling = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert len(scrolling) == 3  # network, heatmap and table
    assert all(each["tabindex"] == "0" and each["role"] == "region" and each["aria-label"] for each in scrolling)
    assert "Scroll sideways" in page.said


def test_text_in_pages_has_one_small_size(page):
    style = page.source.partition("</style>")[0]
    sizes = set(re.findall(r"font-size: ([^;]+);", style))
    assert {size for size in sizes if size.startswith(("0", "."))} == set()
    assert "var(--small)" in sizes
    drawn = page.source.partition("</style>")[2]
    assert set(re.findall(r"font-size: ([^;]+);", drawn)) == {"9px"}


def test_page_follows_the_colour_scheme_and_no_figure_is_black_on_black(page):
    figures = page.source.partition("</style>")[2]
    assert figures.count("var(--muted)") > 100
    for colour in ("#000000", "#1f2530", "#5d6777"):
        assert colour not in figures


def test_sets_have_the_same_colours_in_key_masks_and_histograms_in_both_schemes(page):
    style = page.source.partition("</style>")[0]
    drawn = page.source.partition("</style>")[2]
    for name, colour in zip(SET_NAMES, SET_COLOURS, strict=True):
        assert colour[3] == 255
        assert re.findall(rf"--{name}: (#\w+);", style) == ["#" + bytes(colour[:3].tolist()).hex()]
        assert f"fill: var(--{name})" in drawn


def test_legends_lie_beside_what_is_drawn_and_histograms_have_none(run):
    pytest.importorskip("matplotlib")
    from lightning_topkast.app.report.figures import curve_figures, histograms

    drawn = {each.name: each.figure for each in curve_figures(read_curves(run), "val/acc")}
    drawn |= {each.name: each.figure for each in histograms(read_masks(RunFolder(run)).weights)}
    assert {name for name, figure in drawn.items() if figure.legends} == {
        "metric-loss", "metric-acc", "sparsity", "mask-change", "learning-rate",
    }  # fmt: skip
    for figure in drawn.values():
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert axes.get_legend() is None
        assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for legend in figure.legends)


def test_curves_and_heatmap_show_what_was_logged(run):
    pytest.importorskip("matplotlib")
    from lightning_topkast.app.report.figures import curve_figures, heatmap

    curves = read_curves(run)
    drawn = {each.name: each.figure.axes[0] for each in curve_figures(curves, "val/acc")}
    lines = {line.get_label(): line for line in drawn["metric-acc"].lines}
    assert lines["val"].get_ydata().tolist() == curves["val/acc"][1].tolist()
    assert lines["train"].get_xdata().tolist() == curves["train/acc"][0].tolist()
    shown = np.asarray(heatmap(curves).figure.axes[0].collections[0].get_array())
    last = [curves[f"topkast/mask_change/net.hidden{n}.weight"][1][-1] for n in (1, 2)]
    assert shown[:, -1].tolist() == last
    assert shown.max() > 0.05


def test_run_is_made_without_a_report_where_sweeps_make_it(trained):
    assert not (trained / "report.html").exists()


def test_report_is_no_part_of_what_a_run_computes(composed):
    assert "report" not in settings_of(composed())
    assert without_places(["report=false", "seed=1"]) == ["seed=1"]


# --- the end of a training --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_ends_with_the_name_of_its_report(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(train_job, "leave_report", leave_report)
    code, out, _ = cli(*SHORT, f"hydra.run.dir={tmp_path}/run")
    assert code == 0
    assert out.splitlines()[-1].split() == ["Report:", f"{tmp_path}/run/report.html"]
    assert Page(tmp_path / "run" / "report.html").figures["parameters in use"] == 11274


def test_report_false_leaves_none(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(train_job, "leave_report", leave_report)
    code, out, _ = cli(*SHORT, f"hydra.run.dir={tmp_path}/run", "report=false")
    assert code == 0
    assert "Report:" not in out
    assert not (tmp_path / "run" / "report.html").exists()


def test_report_that_fails_is_one_line_and_no_failure_of_the_run(run, monkeypatch, capsys):
    def fail(folder):
        raise RuntimeError("no space\nleft")

    monkeypatch.setattr(run_page, "write_run_report", fail)
    leave_report(run)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["Report:      none, since it failed (RuntimeError: no space); report=false skips it"]


def test_only_the_first_process_leaves_a_report(run, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    leave_report(run)
    assert not (run / "report.html").exists()


def test_without_matplotlib_there_is_a_page_without_curves_and_the_way_out(run, monkeypatch, capsys):
    for name in [
        name for name in sys.modules if name.startswith(("lightning_topkast.app.report.figures", "matplotlib"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "lightning_topkast.app.report.drawing", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    leave_report(run)
    assert capsys.readouterr().out.endswith("(without curves: pip install 'lightning-topkast[report]')\n")
    page = Page(run / "report.html")
    check_safe_and_whole(page, SLIDE)
    assert "they need matplotlib" in page.said
    assert page.figures["parameters in use"] == 11274
    assert len(page.all("img")) == 4  # the masks, and those over the run


# --- what is missing, damaged or hostile ------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_figures")
def test_run_that_kept_no_curves_says_so_and_shows_the_rest(run):
    shutil.rmtree(run / "csv")
    page = Page(write_run_report(run))
    assert "the run has no log on disk. Train with logger=csv" in page.said
    assert page.figures["parameters in use"] == 11274
    assert len(page.all("img")) == 4


@pytest.mark.usefixtures("without_figures")
def test_run_without_checkpoints_says_so_and_shows_the_rest(run):
    shutil.rmtree(run / "checkpoints")
    page = Page(write_run_report(run))
    assert "Masks and magnitudes are missing" in page.said
    assert "backward sparsity" not in page.figures
    assert page.figures["test/acc"] > 0.5


@pytest.mark.usefixtures("without_figures")
def test_damaged_checkpoint_is_named_and_the_rest_shown(run):
    (run / "checkpoints" / "best.ckpt").write_bytes(b"PK\3\4 cut off")
    page = Page(write_run_report(run))
    assert "best.ckpt is not complete" in page.said
    assert page.figures["test/acc"] > 0.5


@pytest.mark.usefixtures("without_figures")
def test_run_that_was_killed_shows_how_far_it_has_come(run):
    (run / "result.json").unlink()
    page = Page(write_run_report(run))
    assert "the run has not ended" in page.said
    assert "Masks" in page.said
    check_safe_and_whole(page, SLIDE)


@pytest.mark.usefixtures("without_figures")
def test_result_of_another_form_is_passed_over_and_the_rest_shown(run):
    write_result(run, {**read_result(run), "flops": {"forward_flops": "many", "training_flops": 1}})
    page = Page(write_run_report(run))
    assert "flops.forward_flops: input should be a valid number, got 'many'" in page.said
    assert "Curves" in page.said


@pytest.mark.usefixtures("without_figures")
def test_failed_run_shows_its_error(tmp_path):
    start = {"format": 1, "status": "failed", "choices": {}, "overrides": [], "config": {}, "error": f"no {HOSTILE}"}
    write_result(tmp_path / "run", start)
    page = Page(write_run_report(tmp_path / "run"))
    assert f"no {HOSTILE}" in page.said
    check_safe_and_whole(page)


@pytest.mark.slow
def test_hostile_names_are_shown_and_never_run(run, tmp_path):
    quotes = f"\"'><img src=x onerror=alert(1)>{HOSTILE}$x_{{$"
    result = read_result(run)
    result["choices"]["model"] = HOSTILE
    result["overrides"] = [f"run={quotes}"]
    result["config"] = {HOSTILE: quotes}
    result["metrics"] = {f"test/{quotes}": 0.5}
    result["weights"][0]["name"] = quotes
    result["versions"] = {HOSTILE: quotes}
    write_result(run, result)
    path = run / "csv" / "metrics.csv"
    header, *rows = csv.reader(path.read_text().splitlines())
    names = {"val/loss": f"val/{quotes}", "topkast/mask_change/net.hidden1.weight": f"topkast/mask_change/{HOSTILE}"}
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[names.get(name, name) for name in header], *rows])
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    (state,) = (state for key, state in saved["callbacks"].items() if key.startswith("TopKastCallback"))
    state["weights"][HOSTILE] = state["weights"].pop("net.hidden1.weight")
    saved["state_dict"][HOSTILE] = saved["state_dict"].pop("net.hidden1.weight")
    torch.save(saved, run / "checkpoints" / "best.ckpt")
    history = json.loads((run / "masks.json").read_text())
    history["weights"][0]["name"] = HOSTILE
    (run / "masks.json").write_text(json.dumps(history))
    hostile = run.rename(tmp_path / "<b onclick=x>")
    page = Page(write_run_report(hostile))
    check_safe_and_whole(page, SLIDE)
    titles = re.findall("aria-label=.*?</svg>", page.source, flags=re.DOTALL)
    assert any(part.count(escape(quotes[:20], quote=False)) == 1 for part in titles), "no curve has the metric's name"
    assert page.said.count(HOSTILE) >= 8
    assert len(page.all("img")) == 4  # the masks, and those over the run
    assert not page.all("b")
    assert page.figures[f"test/{quotes}"] == 0.5
    assert len(page.all("svg")) >= 8
    assert all(path.parent == hostile / "report" for path in hostile.rglob("*.png"))


def test_dense_run_has_a_report_without_masks(composed, tmp_path):
    train(composed(*SHORT, "sparsity=dense"))
    page = Page(write_run_report(tmp_path / "run"))
    check_safe_and_whole(page)
    assert page.figures["model sparsity"] == pytest.approx(0, abs=1e-3)
    assert not page.all("img")
    assert not page.all("aside")


# --- sweeps and the command -------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(trained, tmp_path):
    """Three runs of two methods, of which one has a page, and one that failed."""
    folder = tmp_path / "sweep"
    for name, method, seed in (("a b", "topkast", 5), ("c", "topkast", 6), ("d", "set", 5)):
        run = shutil.copytree(trained, folder / name, ignore=shutil.ignore_patterns("checkpoints"))
        result = read_result(run)
        result["choices"]["sparsity"], result["seed"], result["config"]["seed"] = method, seed, seed
        write_result(run, result)
    (folder / "a b" / "report.html").write_text("a page")
    start = {"format": 1, "status": "failed", "choices": {}, "overrides": [], "config": {}, "error": HOSTILE}
    write_result(folder / "e", start)
    return folder


@pytest.mark.slow
def test_sweep_has_the_table_of_the_comparison_and_every_run(sweep):
    pytest.importorskip("matplotlib")
    page = Page(write_reports(sweep)[0])
    check_safe_and_whole(page, SORT)
    assert "#000000" not in page.source.partition("</style>")[2]
    rows = {row[0]: row for row in page.rows}
    accuracy = read_result(sweep / "c")["metrics"]["test/acc"]
    assert rows["topkast"][2] == f"{accuracy:.4f} ± 0.0000"
    assert rows["topkast"][-1] == "2"
    assert rows["a b"][1:5] == ["topkast", "5", "finished", f"{accuracy:.4f}"]
    assert rows["e"][3] == "failed"
    assert rows["run"][4] == "test/acc"
    assert "test/acc and training FLOPs" in page.said
    assert len(set(re.findall(r"font-size: ([^;]+);", page.source.partition("</style>")[2]))) == 1
    assert HOSTILE in page.said
    assert [attributes["href"] for attributes in page.all("a")] == ["a%20b/report.html"]
    assert {path.name for path in (sweep / "report").iterdir()} == {
        "comparison-1.png", "curves-1-val-acc.png", "curves-1-val-loss.png", "curves-1-train-loss.png",
        "curves-1-topkast-forward_sparsity.png", "curves-1-topkast-mask_change.png",
    }  # fmt: skip


def test_sweep_draws_a_line_a_configuration_in_its_methods_colour_with_a_band_over_the_seeds(sweep):
    pytest.importorskip("matplotlib")
    from lightning_topkast.app.report.sweep_figures import overlays

    log = sweep / "a b" / "csv" / "metrics.csv"
    log.write_text("step,val/acc,topkast/mask_change\n0,0.1,0.5\n10,0.5,0.3\n")
    (sweep / "c" / "csv" / "metrics.csv").write_text("step,val/acc,topkast/mask_change\n0,0.3,0.1\n10,0.6,0.3\n")
    runs = [(sweep / name, read_model(sweep / name)) for name in ("a b", "c", "d")]
    drawn = {each.name: each.figure.axes[0] for each in overlays(runs, "x")}
    axes = drawn["x-val-acc"]
    mean, alone = axes.lines
    assert mean.get_color() != alone.get_color()
    assert mean.get_ydata() == pytest.approx([0.2, 0.55])
    assert alone.get_ydata().tolist() == read_curves(sweep / "d")["val/acc"][1].tolist()
    (band,) = axes.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(0, 0.1), (0, 0.3), (10, 0.5), (10, 0.6)}
    assert {line.get_drawstyle() for line in axes.lines} == {"default"}
    axes = drawn["x-topkast-mask_change"]
    assert {line.get_drawstyle() for line in axes.lines} == {"steps-post"}
    assert (10, 0.5) in {tuple(point) for point in axes.collections[0].get_paths()[0].vertices}


def test_settings_other_than_the_seed_have_a_line_of_their_own(sweep):
    pytest.importorskip("matplotlib")
    from lightning_topkast.app.report.sweep_figures import overlays

    result = read_result(sweep / "c")
    result["config"]["optimizer"]["lr"] = 5.0
    write_result(sweep / "c", result)
    runs = [(sweep / name, read_model(sweep / name)) for name in ("a b", "c")]
    assert len(overlays(runs, "x")[0].figure.axes[0].lines) == 2


@pytest.mark.usefixtures("without_figures")
def test_tables_of_a_sweep_are_whole_without_the_script_that_sorts_them(sweep):
    page = Page(write_reports(sweep)[0])
    check_safe_and_whole(page, SORT)
    assert not page.all("button")
    cells = [attributes for attributes in page.all("td") if "data-value" in attributes]
    figures = {f"{float(each['data-value']):.4f}" for each in cells if each["data-value"]}
    result = read_result(sweep / "c")
    for value in (result["metrics"]["test/acc"], result["flops"]["training_flops_ratio"], result["sparsity"]["model"]):
        assert f"{value:.4f}" in figures


@pytest.mark.usefixtures("without_figures")
def test_list_of_runs_names_the_metric_of_each_if_they_differ(sweep):
    result = read_result(sweep / "c")
    result["monitor"], result["metrics"] = {"name": "val/loss", "mode": "min", "value": 0.25}, {}
    write_result(sweep / "c", result)
    rows = {row[0]: row for row in Page(write_reports(sweep)[0]).rows}
    assert rows["run"][4] == "score"
    assert rows["c"][4] == "val/loss 0.2500"
    assert rows["d"][4].startswith("test/acc 0.")


def test_the_more_runs_a_page_shows_the_fewer_points_a_line_has(tmp_path):
    pytest.importorskip("matplotlib")
    from lightning_topkast.app.report.sweep_figures import overlays

    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("step,val/acc\n" + "".join(f"{n},0.5\n" for n in range(1000)))
    for of_all, points in ((1, 150), (300, 50), (5000, 20)):
        assert len(overlays([(tmp_path, None)], "x", of_all)[0].figure.axes[0].lines[0].get_xdata()) == points


@pytest.mark.slow
def test_each_makes_the_page_of_every_run_and_links_to_it(sweep, monkeypatch):
    made = []
    page_of = lambda run: made.append(run.name) or run / "report.html"  # noqa: E731
    monkeypatch.setattr("lightning_topkast.app.report.write.write_run_report", page_of)
    assert len(write_reports(sweep, each=True)) == 5
    assert made == ["a b", "c", "d", "e"]


def call(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["topkast-report", *arguments])
    code = 0
    try:
        command.main()
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


@pytest.mark.usefixtures("without_figures")
def test_command_says_where_the_page_is(run, monkeypatch, capsys):
    assert call([str(run)], monkeypatch, capsys) == (0, f"{run}/report.html\n", "")


def test_command_says_what_it_is_for(monkeypatch, capsys):
    code, out, _ = call(["--help"], monkeypatch, capsys)
    assert code == 0
    assert "topkast-report runs/mlp --each" in out


def test_folder_without_runs_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    code, _, err = call([str(tmp_path)], monkeypatch, capsys)
    assert (code, err.strip().count("\n")) == (2, 0)
    assert f"there is no run in {tmp_path}" in err
    code, _, err = call([str(tmp_path / "nowhere")], monkeypatch, capsys)
    assert code == 2
    assert f"there is no folder {tmp_path}/nowhere" in err


@pytest.mark.usefixtures("without_figures")
def test_report_that_is_made_again_removes_pictures_of_the_last(run):
    write_run_report(run)
    shutil.rmtree(run / "checkpoints")
    write_run_report(run)
    assert not list((run / "report").glob("mask-[0-9].png"))
    assert not list(run.glob(".report*"))
