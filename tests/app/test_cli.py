"""The console script in processes of its own: a run, a sweep, two ranks, and a user's own Hydra application."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

QUICK = ["trainer.limit_train_batches=3", "trainer.max_epochs=2", "trainer.log_every_n_steps=1"]

OWN_APP = """
import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

@hydra.main(version_base="1.3", config_path="own_conf", config_name="own")
def main(cfg: DictConfig) -> None:
    callback = instantiate(cfg.sparsity)
    print(type(callback).__name__, cfg.sparsity.forward_sparsity, cfg.sparsity.schedule.update_every)

main()
"""
OWN_CONF = """
hydra:
  searchpath: [pkg://lightning_topkast.conf]
defaults:
  - sparsity: topkast
  - _self_
own_setting: 1
"""


def run(*command: str, folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = processes.run([sys.executable, *command], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert not check or result.returncode == 0, result.stderr
    return result


def topkast_train(*overrides: str, folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("-m", "lightning_topkast.app.commands.train", *overrides, folder=folder, check=check)


@pytest.mark.slow
def test_sweep_gives_each_job_its_own_folder_and_wandb_run(tmp_path):
    result = topkast_train("-m", "sparsity.forward_sparsity=0.8,0.95", "seed=0,1", *QUICK, folder=tmp_path)
    (sweep,) = tmp_path.glob("multirun/*/*")
    for job in range(4):
        assert (sweep / str(job) / "csv" / "metrics.csv").is_file()
        assert (sweep / str(job) / "checkpoints" / "best.ckpt").is_file()
        assert len(list((sweep / str(job) / "wandb").glob("offline-run-*"))) == 1
    assert result.stdout.count("wandb sync ") == 4
    assert "80.00 %" in result.stdout
    assert "95.00 %" in result.stdout


@pytest.mark.slow
def test_typo_exits_with_code_2_and_one_line(tmp_path):
    result = topkast_train("sparsity.forwrd_sparsity=0.9", folder=tmp_path, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.endswith("did you mean 'sparsity.forward_sparsity'?")


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_two_processes_share_one_run_folder(tmp_path, storage):
    storage = f"sparsity.storage={storage}"
    result = topkast_train("trainer=ddp_cpu", "callbacks=mask_dynamics", storage, *QUICK, folder=tmp_path)
    assert "MEMBER: 2/2" in result.stderr + result.stdout
    assert result.stdout.count("Realised sparsity") == 1
    (folder,) = tmp_path.glob("outputs/*/*")
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert (folder / "masks.json").is_file()
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
def test_own_hydra_application_takes_the_sparsity_group(tmp_path):
    (tmp_path / "own_conf").mkdir()
    (tmp_path / "own_conf" / "own.yaml").write_text(OWN_CONF)
    (tmp_path / "own_app.py").write_text(OWN_APP)
    preset = ("sparsity=topkast_95_90", "hydra.run.dir=.", "hydra.output_subdir=null")
    assert run("own_app.py", *preset, folder=tmp_path).stdout.split() == ["TopKastCallback", "0.95", "100"]


@pytest.mark.skipif(sys.platform != "linux", reason="the console script lies beside the interpreter")
def test_console_script_is_installed():
    assert (Path(sys.executable).parent / "topkast-train").is_file()


@pytest.mark.slow
def test_jobs_of_joblib_load_data_in_processes_of_their_own(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = ["-m", "hydra/launcher=joblib", "seed=0,1", "data.num_workers=1", "logger=none", "report=false", *QUICK]
    run("-m", "lightning_topkast.app.commands.train", *sweep, f"hydra.sweep.dir={tmp_path}/sweep", folder=tmp_path)
    assert len(list(tmp_path.glob("sweep/*/result.json"))) == 2
