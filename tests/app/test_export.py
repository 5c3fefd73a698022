"""`topkast-export` hands on what a run has learned: the same weights with the same accuracy."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from lightning_topkast.app.commands import export as export_module
from lightning_topkast.app.data.cache import user_cache
from lightning_topkast.app.export import export_run
from lightning_topkast.app.export.check import check_weights
from lightning_topkast.app.export.export_run import FORMATS
from lightning_topkast.app.run import instantiate
from lightning_topkast.app.run.train import train
from lightning_topkast.export import load_csr, load_sparse, save_csr
from lightning_topkast.export.state import same_bits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    overrides = ["trainer=cpu", "trainer.max_epochs=2", "logger=none", "callbacks.progress=null", "run_name=short"]
    with initialize_config_module("lightning_topkast.conf", version_base="1.3"):
        cfg = compose("train", [*overrides, f"paths.output_dir={folder}"])
    train(cfg)
    (folder / ".hydra").mkdir()
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")  # as the command does
    GlobalHydra.instance().clear()
    return folder


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def cli(command_line):
    """Run `topkast-export`."""
    return command_line("topkast-export", export_module.main)


def refused(cli, *arguments):
    """Return the one line that a refused command prints."""
    code, out, err = cli(*arguments)
    assert code == 2, out + err
    assert len(err.strip().splitlines()) == 1, err
    return err


def weights_of(file):
    return torch.load(file, weights_only=True)["state_dict"]


def configure(folder, **changes):
    """Rewrite a run's configuration, as whoever hands it on could."""
    path = folder / ".hydra" / "config.yaml"
    cfg = OmegaConf.load(path)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False, force_add=True)
    OmegaConf.save(cfg, path)


def test_folder_of_a_run_stands_for_its_best_checkpoint(cli, run_folder):
    code, out, err = cli(run_folder)
    assert (code, err) == (0, "")
    file = run_folder / "model.safetensors"
    best, last = (weights_of(run_folder / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    read = load_sparse(file)
    assert read.keys() == best.keys()
    assert all(same_bits(read[name], best[name]) for name in best)
    dense = sum(tensor.nbytes for tensor in best.values())
    assert f"{file.stat().st_size:,} bytes, {file.stat().st_size / dense:.3f} of the {dense:,}" in out
    assert file.stat().st_size < 0.2 * dense
    assert re.search(r"net.hidden2.weight │ 256×256 │ 10.00 % │ gaps", out)
    (run_folder / "checkpoints" / "best.ckpt").unlink()
    assert "last.ckpt" in cli(run_folder, "--force")[1]
    assert all(same_bits(tensor, last[name]) for name, tensor in load_sparse(file).items())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "2:4"])
def test_exported_network_has_the_accuracy_of_the_run(cli, run_folder, name, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)  # of handlers whose stream ended with an earlier test
    code, out, err = cli(run_folder, "--format", name, "--check")
    assert (code, err) == (0, "")
    accuracy = json.loads((run_folder / "result.json").read_text())["metrics"]["test/acc"]
    assert accuracy > 0.5
    assert f"Test accuracy: {accuracy:.4f}, the checkpoint's {accuracy:.4f} (359 targets)" in out
    assert float(re.search(r"differ by at most (\S+),", out)[1]) < 1e-4
    assert ("bit for bit" in out) == (not name.startswith("onnx"))
    (made,) = run_folder.glob("model.*")
    assert made.name == f"model{FORMATS[name].suffix}"


def test_check_computes_with_what_is_in_the_file(cli, run_folder, monkeypatch):
    def another(model, example, path, sparse, overwrite, **more):
        other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        nn.init.zeros_(other[1].weight)
        return save_onnx(other, example, path, sparse, overwrite, **more)

    save_onnx = export_run.save_onnx
    monkeypatch.setattr(export_run, "save_onnx", another)
    out = cli(run_folder, "--format", "onnx", "--check")[1]
    assert float(re.search(r"differ by at most (\S+),", out)[1]) > 0.1
    exported, own = re.search(r"accuracy: (\S+), the checkpoint's (\S+) ", out).groups()
    assert float(exported) < 0.2 < float(own)


def test_check_sees_a_single_changed_bit(cli, run_folder, monkeypatch):
    def changed(path):
        state = load_sparse(path)
        state["net.output.bias"].view(torch.int32)[3] ^= 1
        return state

    unstructured = FORMATS["safetensors"]
    monkeypatch.setitem(FORMATS, "safetensors", export_run.Format(unstructured.suffix, unstructured.save, changed))
    assert "'net.output.bias' differs between the exported file and the checkpoint" in refused(
        cli, run_folder, "--check"
    )


def test_check_does_not_pass_over_outputs_that_are_no_numbers(cli, run_folder, monkeypatch):
    def spoilt(model, example, path, sparse, overwrite, **more):
        other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        nn.init.constant_(other[1].bias, float("nan"))
        return save_onnx(other, example, path, sparse, overwrite, **more)

    save_onnx = export_run.save_onnx
    monkeypatch.setattr(export_run, "save_onnx", spoilt)
    assert "Outputs: differ by at most nan" in cli(run_folder, "--format", "onnx", "--check")[1]


def test_csr_weights_of_16_bits_with_nan_are_read_again_as_they_were(tmp_path):
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    weight[0] = -float("nan")
    weight[1] = -0.0
    save_csr({"w": weight}, tmp_path / "a.pt")
    check_weights(Console(quiet=True), {"w": weight}, load_csr(tmp_path / "a.pt"))


def test_paths_and_names_are_printed_as_they_are(cli, run_folder, tmp_path):
    checkpoint = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["odd[/name]"] = torch.zeros(40, 40)
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    target = tmp_path / "a [bold] :smile:.safetensors"
    code, out, err = cli(tmp_path / "odd.ckpt", "--output", target)
    assert code == 0, err
    assert f"Wrote {target}: " in out
    assert "odd[/name]" in out


def test_bare_checkpoint_needs_no_run(cli, run_folder, tmp_path):
    file = Path(shutil.copy(run_folder / "checkpoints" / "last.ckpt", tmp_path / "other.ckpt"))
    code, out, _ = cli(file, "--check")
    assert code == 0
    assert "Outputs not compared" in out
    assert all(
        same_bits(tensor, weights_of(file)[n]) for n, tensor in load_sparse(tmp_path / "other.safetensors").items()
    )
    assert cli(file, "--format", "csr", "--output", tmp_path / "small.pt")[0] == 0
    assert torch.load(tmp_path / "small.pt", weights_only=True)["net.hidden1.weight"].layout is torch.sparse_csr
    assert cli(file, "--format", "dense")[0] == 0
    assert torch.load(tmp_path / "other.dense.pt", weights_only=True).keys() == weights_of(file).keys()
    assert "onnx needs the network" in refused(cli, file, "--format", "onnx")


def test_network_without_sparse_weights_is_exported_and_called_so(cli, run_folder, tmp_path):
    checkpoint = torch.load(run_folder / "checkpoints" / "best.ckpt", weights_only=True)
    for tensor in checkpoint["state_dict"].values():
        tensor.add_(torch.randn_like(tensor))
    torch.save(checkpoint, tmp_path / "dense.ckpt")
    code, out, _ = cli(tmp_path / "dense.ckpt")
    assert code == 0
    assert "No weight is sparse" in out
    assert load_sparse(tmp_path / "dense.safetensors").keys() == checkpoint["state_dict"].keys()


def test_a_mask_that_is_not_two_of_four_is_refused_and_one_that_is_taken(cli, run_folder, tmp_path):
    line = refused(cli, run_folder, "--format", "2:4")
    share, over, groups = re.search(r"([\d.]+)% of its groups of four \((\d+) of ([\d,]+)\)", line).groups()
    groups = int(groups.replace(",", ""))
    assert groups == 64 * 256 // 4
    assert float(share) == pytest.approx(100 * int(over) / groups, abs=0.05)
    checkpoint = torch.load(run_folder / "checkpoints" / "best.ckpt", weights_only=True)
    for name, tensor in checkpoint["state_dict"].items():
        if "hidden" in name and tensor.dim() == 2:
            tensor.view(-1, 4)[:, 2:] = 0
    torch.save(checkpoint, tmp_path / "pairs.ckpt")
    code, out, _ = cli(tmp_path / "pairs.ckpt", "--format", "2:4", "--check")
    assert code == 0
    assert re.search(r"256×256 │ +\d+\.\d+ % │ 2:4 ", out)
    assert "bit for bit" in out


def test_files_are_overwritten_only_by_force(cli, run_folder):
    (run_folder / "model.safetensors").write_text("mine")
    line = refused(cli, run_folder)
    assert "exists already" in line
    assert "--force" in line
    assert (run_folder / "model.safetensors").read_text() == "mine"
    assert cli(run_folder, "--force")[0] == 0
    assert load_sparse(run_folder / "model.safetensors")


def test_what_is_no_checkpoint_is_answered_in_a_line(cli, run_folder, tmp_path):
    assert "there is no" in refused(cli, tmp_path / "nowhere")
    (tmp_path / "notes.ckpt").write_text("text")
    assert "is not complete" in refused(cli, tmp_path / "notes.ckpt")
    whole = (run_folder / "checkpoints" / "best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    assert "is not complete" in refused(cli, tmp_path / "cut.ckpt")
    middle = len(whole) // 2
    (tmp_path / "flipped.ckpt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "damaged" in refused(cli, tmp_path / "flipped.ckpt")
    torch.save({"weight": torch.ones(3)}, tmp_path / "state.pt")
    assert "is not a checkpoint of a run" in refused(cli, tmp_path / "state.pt")
    (tmp_path / "empty").mkdir()
    assert "is not the folder of a run" in refused(cli, tmp_path / "empty")
    (tmp_path / "empty" / ".metadata").touch()
    assert "topkast-consolidate" in refused(cli, tmp_path / "empty")
    assert "there is no folder" in refused(cli, run_folder, "--output", tmp_path / "no" / "folder.safetensors")
    assert [entry.name for entry in tmp_path.rglob("*safetensors*")] == []


def test_configuration_whose_parts_are_text_is_refused(cli, run_folder):
    configure(run_folder, model="os.system")
    assert "is not a configuration of topkast-train" in refused(cli, run_folder, "--format", "onnx")


def test_another_networks_weights_are_refused(cli, run_folder):
    configure(run_folder, model__hidden=[128])
    assert "do not fit the network of the run's configuration" in refused(cli, run_folder, "--format", "onnx")
    (run_folder / ".hydra" / "config.yaml").write_text("model: [unclosed")
    assert "config.yaml cannot be read" in refused(cli, run_folder, "--format", "onnx")
    (run_folder / ".hydra" / "config.yaml").write_text("a: 1")
    assert "is not a configuration of topkast-train" in refused(cli, run_folder, "--format", "onnx")


HOSTILE = (
    "os.system",
    "builtins.eval",
    "subprocess.run",
    "torch.hub.load",
    "torch.load",
    "torch.nn.functional.os.system",
    "torch.nn.modules.module.torch.load",
    "torch.nn.Module.load_state_dict",
    "torch.nn.init.zeros_",
    "lightning_topkast.app.models.image.nn.Linear",
    "lightning_topkast.app.models.image.load_torchvision",
    "torchvision.models.resnet.partial",
    "lightning_topkast.app.models.nothing",
    "lightning_topkast.app.data.Digits",  # is no network
    "",
    ["os.system"],
)


@pytest.mark.parametrize("target", HOSTILE, ids=str)
def test_configuration_that_names_what_is_not_trusted_is_refused(cli, run_folder, target):
    if isinstance(target, str) and target:
        configure(run_folder, model={"_target_": target, "command": "touch hacked", "path": "hacked"})
    else:
        configure(run_folder, model={"_target_": target})
    for arguments in (("--format", "onnx"), ("--check",)):
        line = refused(cli, run_folder, *arguments)
        assert f"model._target_={target}" in line
        assert "--trust" in line
        assert not list(run_folder.glob("model.*"))


def test_a_nested_target_and_those_of_data_and_sparsity_are_looked_at_too(cli, run_folder, monkeypatch):
    called = []
    monkeypatch.setattr(os, "system", called.append)
    configure(run_folder, model__dropout={"_target_": "os.system", "command": "x"})
    assert "model.dropout._target_=os.system" in refused(cli, run_folder, "--format", "onnx")
    configure(run_folder, model__dropout=[{"deeper": {"_target_": "${trick}"}}], trick="os.system")
    assert "model.dropout.0.deeper._target_=os.system" in refused(cli, run_folder, "--format", "onnx")
    configure(run_folder, model__dropout=0.0, sparsity___target_="evil.SmallDense")
    assert "has the untrusted target sparsity._target_=evil.SmallDense" in refused(cli, run_folder, "--format", "onnx")
    small_dense = {"_target_": "lightning_topkast.app.run.small_dense.SmallDense", "forward_sparsity": 0.9}
    configure(run_folder, sparsity=small_dense | {"overrides": {"_target_": "os.system", "command": "x"}})
    assert "sparsity.overrides._target_=os.system" in refused(cli, run_folder, "--format", "onnx")
    configure(run_folder, sparsity=small_dense)
    assert "do not fit the network" in refused(cli, run_folder, "--format", "onnx"), (
        "it should have been built, narrower"
    )
    configure(run_folder, sparsity___target_="lightning_topkast.TopKastCallback", data___target_="os.system")
    assert "data._target_=os.system" in refused(cli, run_folder, "--check")
    assert not called


def test_trust_builds_the_users_own_network(cli, run_folder, tmp_path, monkeypatch):
    (tmp_path / "mynets.py").write_text(
        "from lightning_topkast.app.models import MLP\n\ndef net():\n    return MLP([1, 8, 8], 10, [256, 256])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    configure(run_folder, model={"_target_": "mynets.net"})
    assert "model._target_=mynets.net" in refused(cli, run_folder, "--format", "onnx")
    code, out, _ = cli(run_folder, "--format", "onnx", "--check", "--trust")
    assert code == 0
    assert "Test accuracy" in out


def test_help_names_every_format(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert all(re.search(rf"^  {name} +\S", out, re.MULTILINE) for name in FORMATS)
    assert max(map(len, out.splitlines())) <= 120


SMALL_DENSE = {"_target_": "lightning_topkast.app.run.small_dense.SmallDense", "forward_sparsity": 0.9}


@pytest.mark.parametrize("factor", [0.5, None], ids=["given", "searched for"])
def test_what_is_built_is_what_was_checked(cli, run_folder, tmp_path, monkeypatch, factor):
    """Here the target depends on a value that small-dense changes before it builds the network."""
    called = []
    monkeypatch.setattr(instantiate, "reaches_further", lambda *_: False)  # which refuses the resolver
    monkeypatch.setattr(os, "system", called.append)
    OmegaConf.register_new_resolver("pick", lambda width, a, b: a if width == 1.0 else b, replace=True)
    target = "${pick:${model.width_factor},lightning_topkast.app.models.MLP,os.system}"
    configure(
        run_folder, model___target_=target, model__width_factor=1.0, sparsity=SMALL_DENSE | {"width_factor": factor}
    )
    assert "has the untrusted target model._target_=os.system" in refused(cli, run_folder, "--format", "onnx")
    assert called == []


def test_shipped_small_dense_settings_need_no_trust(cli, run_folder):
    configure(run_folder, sparsity=SMALL_DENSE | {"targets": {"_target_": "lightning_topkast.Targets"}})
    assert "do not fit the network" in refused(cli, run_folder, "--format", "onnx"), "it was built, narrower"


def test_text_that_becomes_an_interpolation_only_when_it_is_built_is_refused(cli, run_folder):
    configure(run_folder, model__dropout="\\${seed}")
    assert "text that is not allowed, model.dropout=${seed}" in refused(cli, run_folder, "--format", "onnx")


def test_environment_is_not_read_for_a_strangers_configuration(cli, run_folder, monkeypatch):
    monkeypatch.setenv("A_SECRET", "xyz")
    configure(run_folder, model__hidden=["${oc.env:A_SECRET}"])
    line = refused(cli, run_folder, "--format", "onnx")
    assert "a variable of the environment: ${oc.env:A_SECRET};" in line
    assert "xyz" not in line
    assert "a variable of the environment" not in refused(cli, run_folder, "--format", "onnx", "--trust")


@pytest.mark.parametrize("how", [{"weights": "DEFAULT"}, {"_args_": [True]}], ids=str)
def test_weights_that_a_strangers_configuration_names_are_not_downloaded(cli, run_folder, how):
    configure(run_folder, model={"_target_": "torchvision.models.resnet18", **how})
    assert "downloads something, model." in refused(cli, run_folder, "--format", "onnx")


def test_data_that_a_strangers_configuration_names_is_not_downloaded(cli, run_folder):
    configure(run_folder, data___target_="lightning_topkast.app.data.FashionMNIST", data__download=True)
    assert "downloads something, data.download" in refused(cli, run_folder, "--check")


def test_functions_that_call_another_one_with_hidden_arguments_are_no_models(cli, run_folder):
    pytest.importorskip("torchvision")
    configure(run_folder, model={"_target_": "torchvision.models.get_model", "name": "fasterrcnn_resnet50_fpn"})
    assert "untrusted target model._target_=torchvision.models.get_model" in refused(
        cli, run_folder, "--format", "onnx"
    )


@pytest.mark.parametrize("name", ["detection.fasterrcnn_resnet50_fpn", "segmentation.fcn_resnet50"])
def test_models_that_download_by_default_do_not(name, monkeypatch):
    pytest.importorskip("torchvision")
    fetched = []
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: fetched.append(name))
    config = OmegaConf.create({"model": {"_target_": f"torchvision.models.{name}"}})
    with torch.device("meta"):
        assert isinstance(instantiate.build(config.model, instantiate.MODEL), nn.Module)
    assert fetched == []


def test_strangers_data_starts_no_processes():
    config = OmegaConf.create({"data": {"_target_": "lightning_topkast.app.data.Digits", "num_workers": 100000}})
    assert instantiate.build(config.data, instantiate.DATA).num_workers == 0


def test_strangers_data_is_cached_in_the_users_own_cache(tmp_path):
    config = OmegaConf.create({"data": {"_target_": "lightning_topkast.app.data.WikiText", "folder": str(tmp_path)}})
    for cache in (None, str(tmp_path / "cache")):
        config.data.cache = cache
        assert instantiate.build(config.data, instantiate.DATA).places == [user_cache()]
        assert instantiate.build(config.data).places != [user_cache()]


def test_network_larger_than_its_checkpoint_is_not_built(cli, run_folder):
    configure(run_folder, model={"_target_": "torch.nn.Linear", "in_features": 1 << 20, "out_features": 1 << 20})
    assert "has 1,099,512,676,352 values, and" in refused(cli, run_folder, "--format", "onnx")


@pytest.mark.parametrize("change", [{"data___partial_": True}, {"data": {"input_shape": [1, 8, 8], "num_classes": 10}}])
def test_configuration_of_something_else_than_data_is_refused(cli, run_folder, change):
    configure(run_folder, **change)
    assert "configuration of data stands for a" in refused(cli, run_folder, "--check")
