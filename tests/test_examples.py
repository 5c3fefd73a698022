"""Every example runs, and does what it says."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_topkast.app.run.mask_dynamics import MaskDynamics
from tests import processes
from tests.helpers import fit, make_callback, make_net, make_trainer, plain_path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch, tmp_path, capsys, name, *arguments):
    monkeypatch.chdir(tmp_path)  # an example writes nothing beside itself
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_run_here():
    names = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")}
    run_here = {"callback.py", "plain_loop.py", "cli/main.py", "transformer.py", "read_checkpoint.py"}
    run_here |= {"dense_layers.py", "plot_curves.py", "plot_masks.py", "packed.py", "fsdp2.py", "fsdp2_packed.py"}
    run_here |= {"duplicate_filters.py"}
    assert names == run_here


@pytest.mark.parametrize("name", ["callback.py", "plain_loop.py"])
def test_digits_are_learnt_by_a_tenth_of_the_weights(name, monkeypatch, tmp_path, capsys):
    output = run(monkeypatch, tmp_path, capsys, name)
    found = re.search(r"accuracy (0\.\d+) with (\d+\.\d)% of", output)
    assert found, output
    assert float(found[1]) > 0.92
    assert found[2] == "10.0"


def test_a_packed_network_is_born_without_memory_and_compressed_at_the_end(monkeypatch, tmp_path, capsys):
    output = run(monkeypatch, tmp_path, capsys, "packed.py")
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", output)]
    assert losses[-1] < 0.7 * losses[0]
    assert "104,858 values stand for 1,048,576 entries" in output
    assert "CsrLinear(in_features=1024, out_features=1024, density=0.0500)" in output


def test_duplicate_filters_are_dropped_without_loss(monkeypatch, tmp_path, capsys):
    output = run(monkeypatch, tmp_path, capsys, "duplicate_filters.py")
    trained, wider, diverse, largest = map(float, re.findall(r"\b\d\.\d{3}\b", output))
    assert trained > 0.95
    assert min(wider, diverse) > trained - 0.01
    assert largest < diverse
    (pairs,) = re.findall(r"as trained: (\d+) of 496 pairs of filters above cosine 0.5", output)
    assert int(pairs) < 25


@pytest.mark.slow
def test_two_processes_shard_weights_and_masks(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / "fsdp2.py"]
    output = processes.run(command, env=environment, cwd=tmp_path, check=True)
    expected = "rank 0 holds 15,000 of 30,000 entries of net.2.weight; 3,000 are in use, 3,000 were asked for"
    assert expected in output.stdout


@pytest.mark.slow
def test_two_processes_hold_slices_of_packed_weights(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"}
    output = processes.run([sys.executable, EXAMPLES / "fsdp2_packed.py"], env=environment, cwd=tmp_path, check=True)
    assert "of the 360,000 entries of net.2.weight rank 0 holds 18,000 values" in output.stdout
    assert "180,000 in host memory" in output.stdout


def test_lightning_cli_builds_the_callback_from_yaml(monkeypatch, tmp_path, capsys, caplog):
    run(monkeypatch, tmp_path, capsys, "cli/main.py", "fit", "--config", EXAMPLES / "cli/config.yaml")


@pytest.mark.slow
def test_a_gpt2_trains_sparse(monkeypatch, tmp_path, capsys):
    output = run(monkeypatch, tmp_path, capsys, "transformer.py")
    found = re.search(r"loss (\d\.\d+), 8 weights at sparsity 0\.800", output)
    assert found, output
    assert float(found[1]) < 2.0  # 5.5 at the start


def test_dart_names_the_layers_that_stay_dense(monkeypatch, tmp_path, capsys):
    output = run(monkeypatch, tmp_path, capsys, "dense_layers.py", "--rounds", 6, "--steps", 30)
    found = re.search(r"dense layers \(\d, \d, \d\) of 8: accuracy (0\.\d+)", output)
    assert found, output
    assert float(found[1]) > 0.5


def test_curves_of_a_csv_log_are_plotted(monkeypatch, tmp_path, capsys):
    logger = CSVLogger(tmp_path / "run")
    fit(make_trainer(tmp_path, make_callback(), logger=logger), make_net())
    run(monkeypatch, tmp_path, capsys, "plot_curves.py", tmp_path / "run", tmp_path / "curves.png")
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000  # an empty figure has less


def test_mask_dynamics_of_a_csv_log_are_plotted(monkeypatch, tmp_path, capsys):
    logger = CSVLogger(tmp_path / "run")
    fit(make_trainer(tmp_path, make_callback(), MaskDynamics(every=2), logger=logger), make_net())
    run(monkeypatch, tmp_path, capsys, "plot_masks.py", tmp_path / "run", tmp_path / "masks.png")
    picture = (tmp_path / "masks.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000  # an empty figure has less


def test_mask_dynamics_of_a_resumed_run_are_plotted_from_all_its_logs(tmp_path):
    read = runpy.run_path(str(EXAMPLES / "plot_masks.py"))["read"]
    columns = [f"masks/{name}_{part}" for name in ("change", "activated") for part in ("min", "mean", "max")]
    for number, steps in enumerate(([10, 20], [20, 30])):
        path = tmp_path / "run" / f"csv-{number}" / "metrics.csv"
        path.parent.mkdir(parents=True)
        lines = [",".join([str(step), *[f"0.{number}"] * 6]) for step in steps]
        path.write_text("\n".join([",".join(["step", *columns]), *lines]) + "\n")
        os.utime(path, (number, number))
    assert read(tmp_path / "run")["step"] == [10, 20, 30]
    assert read(tmp_path)["masks/change_mean"] == [0.0, 0.1, 0.1], "what was trained again counts"
    (tmp_path / "other" / "csv").mkdir(parents=True)
    (tmp_path / "other" / "csv" / "metrics.csv").write_text(path.read_text())
    with pytest.raises(SystemExit, match="there are 2 runs in"):
        read(tmp_path)


def test_a_checkpoint_is_read_without_the_package(monkeypatch, tmp_path, capsys):
    weight = torch.zeros(10, 10)
    weight[0] = 1
    torch.save({"state_dict": {"layer.weight": weight}}, tmp_path / "model.ckpt")
    assert "lightning_topkast" not in (EXAMPLES / "read_checkpoint.py").read_text().replace("lightning-topkast", "")
    output = run(monkeypatch, tmp_path, capsys, "read_checkpoint.py", tmp_path / "model.ckpt")
    assert "90.00% zeros" in output
    assert "10 of 100 numbers are not zero" in output
