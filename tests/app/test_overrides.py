"""Overrides in the folder of a run: only values, unless the user trusts it. Any text can be typed as a value."""

import os
import re
import shlex
import sys
from contextlib import suppress
from importlib import resources

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_topkast.app.overrides import as_override, more_than_a_value, quoted, split_options
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.run_folder.resume_arguments import resume_options

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
RUN = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "logger=none")
TARGET = "+callbacks.evil={_target_: os.mkdir, path: executed}"


def last_line(text):
    return text.strip().splitlines()[-1]


@pytest.fixture
def run(cli, tmp_path):
    """The folder of a run of one epoch."""
    assert cli(*RUN, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}/run")[0] == 0
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path):
    """What `--resume` takes for the folder of a run."""
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    return tmp_path / "run"


def plant(folder, *overrides):
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([*RUN, *overrides]))


HOSTILE = (
    TARGET,
    "++callbacks.evil._target_=os.mkdir",
    "optimizer._target_=os.mkdir",
    "callbacks.progress={_target_: os.mkdir}",
    "trainer.plugins=[{_target_: os.mkdir}]",
    "trainer.plugins=[{'_target_': os.mkdir}]",
    "optimizer._args_=[1]",
    "run_name=${oc.env:A_SECRET}",
    "run_name='a-${topkast.times:${oc.env:A_SECRET},2}'",
    "run_name='${${seed}:A_SECRET}'",
    "run_name={a: '${oc.decode:x}'}",
    "data=../../../evil",
    "data=[digits,/tmp/evil]",
    "hydra.searchpath=[file:///tmp/evil]",
    "hydra/launcher=evil",
    "data@model=digits",
    "+experiment@_global_=evil",
    "seed=1,2",
    "--config-dir=evil",
    "--config-dir",
    "--multirun",
    "-m",
    "--experimental-rerun=evil.pickle",
    "a=b=c",
    "paths.output_dir=outputs/mine",
    "paths={output_dir: .}",
    "callbacks.checkpoint.dirpath=.git",
    "callbacks.checkpoint={dirpath: .git}",
    "trainer.default_root_dir=src",
    "data.download_folder=src",
    "data.download=true",
    "logger.csv.save_dir=logs",
    "callbacks.last_checkpoint.dirpath=/home/me",
    "callbacks.last_checkpoint.dirpath=~/models",
    "callbacks.last_checkpoint.dirpath=models/../../me",
    "callbacks.last_checkpoint.dirpath=http://there",
    "callbacks.last_checkpoint.dirpath='C:\\me'",
    "paths.output_dir='simplecache::file://x'",
    "callbacks.last_checkpoint.dirpath='${topkast.times:/tmp/evil,1}'",
    "callbacks.last_checkpoint.dirpath='${oc.select:nokey,/tmp/evil}'",
    "callbacks.last_checkpoint.dirpath='${oc.select:nokey,..}'",
    "callbacks.last_checkpoint.dirpath='${run_name}${run_name}/evil'",
)


@pytest.mark.parametrize("override", HOSTILE)
def test_overrides_of_a_folder_that_do_more_than_set_values_are_refused(cli, folder, tmp_path, monkeypatch, override):
    monkeypatch.setenv("A_SECRET", "xyz")
    plant(folder, override)
    code, out, err = cli("--resume", folder, "trainer.max_epochs=2")
    assert code == 2
    assert last_line(err).startswith("topkast-train: --resume: the override")
    assert "--trust" in last_line(err)
    assert "xyz" not in out + err
    assert not (tmp_path / "executed").exists()


def test_every_place_of_the_configuration_that_a_run_writes_to_is_known():
    """The keys whose values are made from the folder of outputs; that of data sets is only read, but for downloads."""
    files = resources.files("lightning_topkast.conf")
    places = set()
    for folder in files.iterdir():
        for file in folder.iterdir() if folder.is_dir() else [folder]:
            lines = file.read_text(encoding="utf-8").splitlines() if file.name.endswith(".yaml") else []
            places |= {line.split(":")[0].strip() for line in lines if re.search(r":.*\$\{paths\.output_dir\}", line)}
    assert {"dirpath", "save_dir"} <= places
    for place in places:
        assert more_than_a_value(f"a.{place}=b") is not None, place


HARMLESS = (
    "data.download=false",
    "optimizer.lr=0.01",
    "data=digits",
    "logger=[csv,wandb]",
    "experiment=null",
    "model.hidden=[64,'32']",
    "trainer.max_epochs=${recipe.max_epochs}",
    "trainer.max_steps='${topkast.times:${recipe.max_steps},2}'",
    "~callbacks.progress",
    "sparsity.overrides={net.hidden1.weight: [0.5, 0.3]}",
    "run_name='it\\'s ü = 3'",
    "ckpt_path='a=b.ckpt'",
)


@pytest.mark.parametrize("override", HARMLESS)
def test_values_are_accepted(override):
    assert more_than_a_value(override) is None


def test_trust_repeats_all_overrides(cli, folder, tmp_path):
    plant(folder, TARGET)
    with suppress(AttributeError):  # of Lightning, since what the target returns is no callback
        cli("--resume", folder, "--trust", "trainer.max_epochs=2")
    assert (tmp_path / "executed").exists()
    code, _, err = cli("--trust", "trainer.max_epochs=2")
    assert code == 2
    assert "--resume FOLDER --trust" in last_line(err)


def test_options_beside_resume_are_the_users_own(cli, run, tmp_path):
    (tmp_path / "own" / "scheduler").mkdir(parents=True)
    (tmp_path / "own" / "scheduler" / "mine.yaml").write_text("null")
    (tmp_path / "own" / "recipe.yaml").write_text("")
    own = ("--config-dir", tmp_path / "own")
    for epochs, more in enumerate([(*own, "seed=0"), ("seed=0", *own), (f"--config-dir={own[1]}",)], 2):
        code, out, err = cli("--resume", run, *more, f"trainer.max_epochs={epochs}")
        assert code == 0, err
        assert f"epoch {epochs}/{epochs}:" in out


def test_the_line_that_resumes_a_run_has_the_options_that_it_needs(folder, monkeypatch):
    plant(folder)
    monkeypatch.setattr(sys, "argv", ["topkast-train", *RUN])
    assert resume_options(RunFolder(folder)) == ["--resume", str(folder)]
    plant(folder, TARGET)
    monkeypatch.setattr(sys, "argv", ["topkast-train", "--config-dir", "my conf", *RUN])
    assert resume_options(RunFolder(folder)) == ["--resume", str(folder), "--config-dir", "my conf", "--trust"]


@pytest.mark.parametrize("value", ["a=b.ckpt", "ünï.ckpt", "~a.ckpt", "a=b c.ckpt", "it's=a.ckpt", "a=$b`c.ckpt"])
def test_value_that_hydra_cannot_read_is_answered_with_the_line_that_works(cli, value):
    code, _, err = cli(f"ckpt_path={value}")
    assert code == 2
    typed = shlex.split(last_line(err).partition("write it as ")[2])
    code, _, err = cli(*typed)
    assert code == 2
    assert f"there is no checkpoint {os.getcwd()}/{value}" in last_line(err)


VALUES = ["a", "a=b", "a b", "a,b", "x:y", "it's", "\\'", "a\\", "a\\b", "ü", "[a]", "{a}", "null", "1", "", "~", "(a)"]


@pytest.mark.parametrize("value", VALUES)
def test_any_text_can_be_written_as_an_override(value):
    parser = OverridesParser.create()
    for text in (as_override("key", value), f"key={quoted(value)}"):
        read = parser.parse_override(text).value()
        assert read == value
        assert isinstance(read, str)


def test_options_are_told_from_overrides():
    assert split_options(["a=1", "--config-dir", "d=1", "b=2", "-m"]) == (["--config-dir", "d=1", "-m"], ["a=1", "b=2"])
