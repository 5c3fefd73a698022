"""What a run leaves in `result.json`."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_topkast import TopKastError
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run.describe import Outcome, describe_end
from lightning_topkast.app.run.meter import Progress, RunMeter
from lightning_topkast.app.run.train import train
from lightning_topkast.app.run_folder import result as result_module
from tests.app.result_files import read_result

SHORT = ["trainer.limit_train_batches=4", "callbacks.progress=null", "logger=none"]
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def test_finished_run_leaves_what_it_has_reached_and_taken(composed, tmp_path, capsys):
    score = train(composed(*SHORT, "trainer.max_epochs=2", "seed=3"))
    printed = float(capsys.readouterr().out.rsplit("test/acc ", 1)[1].split()[0])
    result = read_result(tmp_path / "run")
    assert (result["status"], result["seed"], result["choices"]["sparsity"]) == ("finished", 3, "topkast")
    assert result["monitor"] == {"name": "val/acc", "mode": "max", "value": score}
    assert result["metrics"]["test/acc"] == pytest.approx(printed, abs=1e-4)
    assert (result["examples"], result["steps"]) == (2 * 4 * 64, 8)
    assert result["sparsity"]["weights"] == pytest.approx(0.9, abs=1e-3)
    assert result["parameters"] == {"total": 85002, "nonzero": 11274}
    reasons = {row["name"]: row["kept_dense"] for row in result["weights"]}
    assert reasons["net.hidden1.weight"] == ""
    assert reasons["net.output.weight"] == "last candidate"
    assert reasons["net.output.bias"] == "bias"
    # per example 2 a weight forward: 8,192 active ones and the output's 2,560, of 84,480
    assert result["flops"]["forward_flops_ratio"] == pytest.approx((8192 + 2560) / 84480)
    assert 0 < result["seconds"] < 60


def test_small_dense_takes_flops_of_the_network_that_was_made_narrow(composed, tmp_path):
    train(composed(*SHORT, "trainer.max_epochs=1", "sparsity=small_dense", "sparsity.width_factor=0.25"))
    flops = read_result(tmp_path / "run")["flops"]
    share = (64 * 64 + 64 * 64 + 64 * 10) / (64 * 256 + 256 * 256 + 256 * 10)
    assert flops["forward_flops_ratio"] == pytest.approx(share)
    assert flops["forward_flops"] / flops["dense_forward_flops"] == pytest.approx(share)
    assert flops["training_flops"] / flops["dense_training_flops"] == pytest.approx(flops["training_flops_ratio"])
    assert flops["training_flops_ratio"] < 0.2


@pytest.mark.parametrize("distribution", ["global", "global_normalized"])
def test_flops_are_unknown_where_training_decides_which_weights_are_denser(composed, tmp_path, distribution):
    train(composed(*SHORT, "trainer.max_epochs=1", f"sparsity.distribution={distribution}"))
    assert read_result(tmp_path / "run")["flops"] is None


def test_examples_are_those_of_training_and_not_of_the_tested_checkpoint(composed, tmp_path):
    # the first epoch stays the best one
    train(composed(*SHORT, "trainer.max_epochs=3", "recipe.monitor=val/loss", "recipe.mode=max"))
    assert read_result(tmp_path / "run")["examples"] == 3 * 4 * 64


@pytest.mark.slow
def test_examples_go_on_where_a_resumed_run_does(composed, tmp_path):
    train(composed(*SHORT, "trainer.max_epochs=1"))
    before = read_result(tmp_path / "run")
    train(composed(*SHORT, "trainer.max_epochs=3", "ckpt_path=auto"))
    after = read_result(tmp_path / "run")
    assert (before["examples"], after["examples"]) == (4 * 64, 3 * 4 * 64)


def test_meter_goes_on_from_what_a_checkpoint_holds():
    meter = RunMeter()
    meter.load_state_dict({"seconds": 100.0, "steps": 7, "examples": 70})
    assert meter.progress() == Progress(seconds=100.0, steps=7, examples=70)
    meter.on_train_start(None, None)
    assert meter.progress().seconds > 100
    meter.on_train_end(None, None)
    assert meter.progress() == meter.progress(), "the clock stands"


def test_meter_counts_the_examples_of_all_processes():
    meter, trainer = RunMeter(), SimpleNamespace(world_size=4, global_step=0)
    for trainer.global_step, size in ((1, 8), (2, 8), (3, 5)):
        meter.on_train_batch_end(trainer, None, None, (torch.zeros(size, 3), torch.zeros(size)), 0)
    assert (meter.progress().examples, meter.progress().steps) == (4 * 21, 3)


def test_run_that_was_good_once_and_is_not_finite_at_its_end_has_diverged(composed, tmp_path):
    train(composed(*SHORT, "trainer.max_epochs=2", "sparsity=dense", "+callbacks.bomb._target_=tests.app.bombs.Poison"))
    result = read_result(tmp_path / "run")
    assert result["metrics"]["test/loss"] is not None, "the best checkpoint is the first epoch's"
    assert result["status"] == "diverged"


@pytest.mark.slow
def test_places_and_loggers_are_no_part_of_what_a_run_computes(composed, tmp_path):
    configs = []
    elsewhere = ["logger=csv", f"paths.data_dir={tmp_path}", "ckpt_path=auto", "run_name=a"]
    for name, more in {"a": ["logger=none"], "b": elsewhere}.items():
        train(composed(*SHORT[:-1], "trainer.max_epochs=1", f"paths.output_dir={tmp_path}/{name}", *more))
        configs.append(read_result(tmp_path / name)["config"])
    assert configs[0] == configs[1]
    assert configs[0]["optimizer"]["lr"] == 3e-3


@pytest.mark.parametrize("sparsity", ["dense", "topkast"])
def test_run_whose_loss_is_not_finite_has_diverged(composed, tmp_path, sparsity):
    config = composed(
        *SHORT, "trainer.max_epochs=2", "optimizer=sgd", "optimizer.lr=1e30", "scheduler=none", f"sparsity={sparsity}",
        "recipe.update_every=2", *(["sparsity.penalty.shrinkage=null"] if sparsity == "topkast" else []),
        *(["sparsity.penalty.strength=0"] if sparsity == "topkast" else []),
    )  # fmt: skip
    if sparsity == "topkast":
        with pytest.raises(TopKastError, match="NaN"):
            train(config)
    else:
        train(config)
    text = (tmp_path / "run" / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["status"] == "diverged", "and NaN is no JSON"


def test_numbers_that_a_result_cannot_hold_do_not_cost_a_run_its_result(composed, tmp_path):
    config = composed("+trainer.callback_limit=inf")
    tested = {"test/loss": float("nan"), "test/big": 1e300, "test/acc": 0.5}
    result = describe_end(config, Outcome(False, Progress(1.0, 1, 64), float("inf"), tested))
    result_module.write_result(tmp_path, result)
    read = read_result(tmp_path)
    assert read["metrics"] == {"test/loss": None, "test/big": None, "test/acc": 0.5}
    assert read["monitor"]["value"] is None
    assert read["config"]["trainer"]["callback_limit"] == "Infinity"


@pytest.mark.parametrize("text", ["", '{"format": 1', "[]", '{"format": 2}', '{"format": 1, "status": "finished"}'])
def test_broken_result_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(AppError, match=r"result\.json .*remove it"):
        read_result(tmp_path)


def test_interrupted_writing_of_a_result_leaves_the_old_one_whole(tmp_path, monkeypatch):
    old = {"format": 1, "status": "running", "choices": {}, "overrides": [], "config": {}}
    result = result_module.Result(**old)
    result_module.write_result(tmp_path, result)

    def half(path, text, **options):
        path.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        result_module.write_result(tmp_path, result.model_copy(update={"seed": 1}))
    assert json.loads((tmp_path / "result.json").read_text()) == old
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_result_that_can_not_be_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "disk gone")

    old = {"format": 1, "status": "running", "choices": {}, "overrides": [], "config": {}}
    result = result_module.Result(**old)
    result_module.write_result(tmp_path, result)
    with pytest.raises(ValueError, match="JSON"):
        result_module.write_result(tmp_path, result.model_copy(update={"seconds": float("nan")}))
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="not written: disk gone"):
        result_module.write_result(tmp_path, result.model_copy(update={"seed": 1}))
    assert json.loads((tmp_path / "result.json").read_text()) == old
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
