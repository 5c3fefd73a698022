"""The first screen of a run's report: one sentence of what is known, and three figures."""

import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_topkast.app.report.contents import RunContents
from lightning_topkast.app.report.key_figures import headline, key_figures
from lightning_topkast.app.report.run_page import write_run_report
from lightning_topkast.app.report.story import story
from lightning_topkast.app.run_folder.result import Result
from tests.app.result_files import write_result

RESULT = {
    "format": 1, "status": "finished", "choices": {"data": "digits", "model": "mlp", "sparsity": "topkast"},
    "overrides": [], "config": {}, "monitor": {"name": "val/acc", "mode": "max", "value": 0.99},
    "metrics": {"test/acc": 0.9805, "test/loss": 0.1}, "sparsity": {"weights": 0.9, "model": 0.8},
    "parameters": {"total": 1000, "nonzero": 200},
    "flops": {"forward_flops": 2.0, "training_flops": 6.0, "training_flops_ratio": 0.1637},
}  # fmt: skip
DENSE_YET = {"weights": 0.0, "model": 0.0}
LEVEL, RAMP = [0.9, 0.9, 0.9], [0.0, 0.5, 0.9]


@pytest.fixture
def without_figures(monkeypatch):
    """matplotlib takes most of a report's time."""
    monkeypatch.setitem(sys.modules, "lightning_topkast.app.report.drawing", None)


def told(forward=(), **parts):
    """The sentence, and the names of the large figures."""
    result = Result.model_validate({key: value for key, value in (RESULT | parts).items() if value is not None})
    curves = {"topkast/forward_sparsity": (np.arange(len(forward)), np.array(forward))} if len(forward) else {}
    run = RunContents(Path("run"), result, {}, curves, None, None, ())
    figures = key_figures(result, None)
    return story(run, figures), [figure.name for figure in headline(figures)]


def test_sentence_says_what_was_trained_how_sparse_how_good_and_what_it_saves():
    said, large = told(LEVEL)
    assert said == (
        "The network mlp was trained on digits with 90 % of its sparse weights at zero in every forward pass, and "
        "reached test/acc 0.9805 for 16.4 % of a dense network's training FLOPs, as far as zeros are skipped; what it "
        "reaches without sparsity is not known."
    )
    assert large == ["test/acc", "forward sparsity", "training FLOPs"]


def test_every_forward_pass_is_said_only_of_a_level_curve():
    assert "90 % of its sparse weights at zero when it was tested, and" in told(RAMP)[0]
    assert "with 0 % of its sparse weights at zero when it was tested" in told(RAMP, sparsity=DENSE_YET)[0]
    assert "90 % of its sparse weights at zero in the end, and" in told(RAMP, metrics=None)[0]
    assert "90 % of its sparse weights at zero, and" in told()[0]
    said = told([0.9, 0.93, 0.906], sparsity={"weights": 0.906, "model": 0.8})[0]
    assert "with at least 90 % of its sparse weights at zero in every forward pass, and" in said


def test_sentence_and_figures_are_of_what_is_known():
    said, large = told(flops=None)
    assert "reached test/acc 0.9805 with 200 of 1,000 parameters in use; what" in said
    assert large == ["test/acc", "forward sparsity", "parameters in use"]
    said, large = told(metrics=None, flops=None, parameters=None, choices={})
    assert said == (
        "This network ran with 90 % of its sparse weights at zero, and reached val/acc 0.9900; what it reaches without "
        "sparsity is not known."
    )
    assert large == ["val/acc", "forward sparsity"]
    assert told(metrics=None, monitor=None, flops=None, parameters=None, sparsity=None) == (None, [])


def test_monitored_metric_is_the_large_one_even_if_only_others_were_tested():
    assert told(metrics={"test/loss": 0.1})[1][0] == "val/acc"


def test_dense_network_saves_nothing():
    said, large = told(sparsity={"weights": None, "model": 0.0})
    assert said == "The network mlp was trained on digits without sparsity, and reached test/acc 0.9805."
    assert large == ["test/acc", "training FLOPs"]


@pytest.mark.parametrize(
    ("status", "end"), [("running", "has not ended"), ("diverged", "has diverged"), ("failed", "has failed")]
)
def test_run_without_an_end_is_not_told_as_a_success(status, end):
    assert told(LEVEL, status=status)[0] == f"The training of mlp on digits {end}."


@pytest.mark.usefixtures("without_figures")
def test_first_screen_has_three_figures_and_the_others_are_folded_and_escaped(tmp_path):
    hostile = "<script>alert(1)</script>"
    changes = {"choices": {"model": hostile}, "metrics": {f"test/{hostile}": 0.5}, "status": "finished"}
    complete = {"seed": 0, "versions": {}, "seconds": 1.0, "examples": 1}
    monitor = {"name": f"val/{hostile}", "mode": "max", "value": 0.5}
    write_result(tmp_path, RESULT | complete | changes | {"monitor": monitor})
    source = write_run_report(tmp_path).read_text()
    first, folded, rest = source.partition("<details>")
    assert folded
    sentence = first.partition('<p class="story">')[2].partition("</p>")[0]
    assert sentence.startswith("The network &lt;script&gt;alert(1)&lt;/script&gt; was trained with 90\u00a0% of")
    assert "reached test/&lt;script&gt;alert(1)&lt;/script&gt; 0.5000" in sentence
    assert first.count("<data ") == 3
    assert rest.partition("</details>")[0].count("<data ") >= 3
    assert hostile not in source


def log_of_lightning(folder, text, below="."):
    """The folder of a Trainer with a CSVLogger."""
    (folder / below).mkdir(parents=True)
    (folder / below / "metrics.csv").write_text(text)
    return folder


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("below", [".", "csv"])
def test_run_of_a_trainer_has_a_title_its_metric_and_no_warning(below, tmp_path):
    log = "step,train_loss,val_acc,val_loss\n1,5,,\n2,,0.25,3\n4,,0.75,2\n"
    folder = log_of_lightning(tmp_path / "version_0", log, below)
    source = write_run_report(folder).read_text()
    assert "<h1>version_0</h1>" in source
    assert "This network reached val_acc 0.7500." in source
    assert 'data-name="val_acc">0.7500' in source.partition("<details>")[0]
    assert 'data-name="val_loss">2.0000' in source.partition("<details>")[2]
    assert source.count("<li>") == 1  # of matplotlib, which the test hides
    assert "How it was made" not in source


@pytest.mark.usefixtures("without_figures")
def test_sparse_run_of_a_trainer_says_how_sparse_and_that_its_masks_are_missing(tmp_path):
    folder = log_of_lightning(tmp_path / "run", "step,test_f1,topkast/forward_sparsity\n1,,0.9\n2,0.5,0.9\n")
    source = write_run_report(folder).read_text()
    assert (
        "This network ran with 90\u00a0% of its sparse weights at zero in every forward pass, and reached test_f1"
        in source
    )
    assert "Masks and magnitudes are missing" in source
    assert "no result.json" not in source


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("left", [".hydra/config.yaml", "checkpoints/last.ckpt"])
def test_run_of_topkast_train_without_a_result_says_so(left, tmp_path):
    (tmp_path / left).parent.mkdir(parents=True)
    (tmp_path / left).write_text("not read")
    assert "There is no result.json" in write_run_report(tmp_path).read_text()
