"""What is written of a run: no value of the environment, and files that the user's umask allows others to read."""

import os

import pytest

from lightning_topkast.app.report.write import write_reports
from lightning_topkast.app.run.settings import recorded, settings_of
from lightning_topkast.app.sweep.launch import differences

SHORT = ("trainer.max_epochs=1", *(f"trainer.limit_{part}_batches=1" for part in ("train", "val", "test")))
SECRET = "hunter2-of-the-environment"


@pytest.fixture
def run(cli, tmp_path, monkeypatch):
    """The folder of a run with every logger, that uses a variable of the environment in several places."""
    monkeypatch.setenv("A_SECRET", SECRET)
    monkeypatch.setenv("TOPKAST_DATA", f"/{SECRET}")
    code, _, err = cli(
        *SHORT, "logger=many", f"hydra.run.dir={tmp_path}/run", "+data_key=${oc.env:A_SECRET}",
        "+deeper={text: 'a ${data_key} b', again: '${data_key}', list: ['${oc.env:A_SECRET}']}",
        "+missing=${oc.env:NOT_THERE,some default}", "recipe.max_epochs=${trainer.check_val_every_n_epoch}",
    )  # fmt: skip
    assert code == 0, err
    write_reports(tmp_path / "run")
    return tmp_path / "run"


def test_no_file_of_a_run_holds_a_variable_of_the_environment(run):
    holding = [path for path in run.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    # W&B's own notes of the machine hold the command line and folders, which have none here
    assert [str(path.relative_to(run)) for path in holding] == []


def test_what_is_written_instead_is_the_interpolation(run):
    for name in ("result.json", "csv/hparams.yaml", "report.html"):
        text = (run / name).read_text()
        for expected in ("${oc.env:A_SECRET}", "a ${oc.env:A_SECRET} b", "${oc.env:NOT_THERE,some default}"):
            assert expected in text, name


def test_files_follow_the_umask(run):
    modes = {str(path.relative_to(run)): path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    ours = {name: mode for name, mode in modes.items() if not name.startswith("wandb/")}
    assert set(ours.values()) == {0o666 & ~umask}, ours


def test_runs_are_the_same_whatever_their_environment_says(composed, monkeypatch):
    found = []
    for value in ("a", "b"):
        monkeypatch.setenv("A_SECRET", value)
        found.append(settings_of(composed("+data_key=${oc.env:A_SECRET}")))
    assert differences(*found) == []
    assert found[0]["data_key"] == "${oc.env:A_SECRET}"


def test_messages_show_no_variable_of_the_environment(cli, monkeypatch):
    monkeypatch.setenv("A_SECRET", SECRET)
    code, out, err = cli("optimizer.lr=${oc.env:A_SECRET}", "logger=none")
    assert code == 2
    assert "optimizer.lr=${oc.env:A_SECRET} is not valid: expected a number" in err
    assert SECRET not in out + err


@pytest.mark.parametrize("trainer", ["multinode", "slurm"])
def test_numbers_of_the_environment_are_not_resolved_either(composed, monkeypatch, trainer):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "7")
    config = composed(f"trainer={trainer}")
    assert "7" not in str(recorded(config)["trainer"]["num_nodes"])
    if trainer == "multinode":
        assert config.trainer.num_nodes == 7
